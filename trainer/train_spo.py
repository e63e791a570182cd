"""python trainer/train_spo.py --flags: the same as `minillm spo --flags`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.cli import main  # noqa: E402

sys.exit(main(["spo", *sys.argv[1:]]))
