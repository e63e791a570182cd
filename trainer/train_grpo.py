"""python trainer/train_grpo.py --flags: the same as `minillm grpo --flags`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.cli import main  # noqa: E402

sys.exit(main(["grpo", *sys.argv[1:]]))
