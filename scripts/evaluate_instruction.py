"""python scripts/evaluate_instruction.py --flags: the same as `minillm evaluate-instructions --flags`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.cli import main  # noqa: E402

sys.exit(main(["evaluate-instructions", *sys.argv[1:]]))
