"""python trainer/train_distill_reason.py --flags: the same as `minillm reason --flags`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.cli import main  # noqa: E402

sys.exit(main(["reason", *sys.argv[1:]]))
