"""python trainer/train_lora.py --flags: the same as `minillm lora --flags`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.cli import main  # noqa: E402

sys.exit(main(["lora", *sys.argv[1:]]))
