"""python trainer/train_distillation.py --flags: the same as `minillm distill --flags`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.cli import main  # noqa: E402

sys.exit(main(["distill", *sys.argv[1:]]))
