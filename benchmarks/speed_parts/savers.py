"""Who trains and saves in speed_parts/checkpoints.py."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from sessions import Session, job_of


class Saver(Session):
    """A job of ours under way, whose state is saved in several ways."""

    def start(self, folder: str, preset: str, seq: int, rows: int) -> dict[str, Any]:
        import torch

        out = Path(folder) / f"out{os.getpid()}"
        flags = ["--data_path", str(Path(folder) / "pretrain.jsonl"), "--out_dir", str(out), "--model_config", preset,
                 "--max_seq_len", str(seq), "--batch_size", str(rows), "--optimizer", "adamw", "--dtype", "float32",
                 "--compile", "off", "--device", "cpu", "--no_wandb", "--max_steps", "1000000"]  # fmt: skip
        self.job, self.target = job_of("pretrain", flags), out / "peer"
        self._steps(2)
        tensors = [*self.job.model.state_dict().values(), *self._optimizer_tensors()]
        return {"bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                "threads": torch.get_num_threads()}  # fmt: skip

    def _optimizer_tensors(self) -> list[Any]:
        return [
            value
            for optimizer in self.job.optimizers.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if hasattr(value, "numel")
        ]

    def _steps(self, count: int) -> float:
        from minillm.train.loop import take_step

        started = time.perf_counter()
        for _ in range(count):
            take_step(self.job)
            self.job.state.step += 1
        return time.perf_counter() - started

    def save(self, way: str) -> dict[str, Any]:
        """Seconds: one step, the call of a save alone, until it is complete, and the stall of a save among steps."""
        step = self._steps(1)
        started = time.perf_counter()
        finish = self._begin(way)
        call = time.perf_counter() - started
        finish()
        complete = time.perf_counter() - started
        count = max(2, math.ceil(1.5 * (complete - call) / step))
        before = self._steps(count)
        started = time.perf_counter()
        finish = self._begin(way)
        self._steps(count)
        with_save = time.perf_counter() - started
        finish()
        without = (before + self._steps(count)) / 2
        return {"step": without / count, "call": call, "complete": complete, "stall": with_save - without}

    def _begin(self, way: str) -> Any:
        """Start a save; what it returns waits until the save is complete."""
        import torch

        if way == "ours":
            from minillm.train import saving

            saving.save(self.job, numbered=False, best=False)
            return self.job.writer.wait
        state = {"model": self.job.model.state_dict(), "optimizer": self.job.optimizers.state_dict()}
        if way == "torch.save":
            self.target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, self.target)
            return self.target.unlink
        import torch.distributed as dist
        from torch.distributed import checkpoint as dcp

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if way == "DCP save":
            dcp.save(state, checkpoint_id=self.target)
            return lambda: shutil.rmtree(self.target)
        future: Any = dcp.async_save(state, checkpoint_id=self.target)

        def finish() -> None:
            future.result()
            shutil.rmtree(self.target)

        return finish
