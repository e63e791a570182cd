"""python scripts/evaluate_models.py --flags: the same as `minillm evaluate --flags`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.cli import main  # noqa: E402

sys.exit(main(["evaluate", *sys.argv[1:]]))
