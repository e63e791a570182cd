"""python trainer/train_full_sft.py --flags: the same as `minillm sft --flags`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.cli import main  # noqa: E402

sys.exit(main(["sft", *sys.argv[1:]]))
