"""Who prepares a corpus in speed_parts/growth.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from common import peak_memory_mb
from sessions import Session


class Preparing(Session):
    """A jsonl file of texts that differ, and `minillm data prepare-text` on it."""

    def start(self, folder: str, megabytes: int) -> dict[str, Any]:
        from minillm.data.prepare_text import run  # noqa: F401  (its share of the memory is known apart)
        from minillm.text.tokenizer import Tokenizer

        Tokenizer.load()
        demo = (Path(folder) / "demo" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
        self.input, self.output = Path(folder) / f"{megabytes}.jsonl", Path(folder) / f"{megabytes}"
        size = number = 0
        with self.input.open("w", encoding="utf-8") as stream:
            while size < megabytes * 1_000_000:
                text = f"{number}. {json.loads(demo[number % len(demo)])['text']}"
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size, number = size + len(text.encode()), number + 1
        return {"libraries_mb": peak_memory_mb()}

    def prepare(self) -> dict[str, Any]:
        from minillm.data.prepare_text import PrepareTextSettings, run

        started = time.perf_counter()
        run(PrepareTextSettings(input=(str(self.input),), output_dir=str(self.output), val_fraction=0.0))
        return {"seconds": time.perf_counter() - started}
