"""CheckpointLoader under its documented name; it lives in minillm.checkpoint."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from minillm.checkpoint.loader import CheckpointLoader  # noqa: E402

__all__ = ["CheckpointLoader"]
