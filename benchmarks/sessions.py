"""What a worker process does: a session's methods are the commands (worker.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from common import Workload, peak_memory_mb

if TYPE_CHECKING:
    from minillm.train.job import Job


class Session:
    """What every side can be asked."""

    def gemm(self) -> dict[str, Any]:
        """FLOP/s of a matrix product in float32, now."""
        import torch

        from minillm.train.precision import gemm_flops

        return {"flops": gemm_flops(torch.device("cpu"), torch.float32)}

    def memory(self) -> dict[str, Any]:
        return {"peak_mb": peak_memory_mb()}

    def close(self) -> None:
        """The input has ended."""


class Training(Session):
    """One workload under way."""

    trainer: Any

    def start(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Build the model; what is known about it before it is trained."""
        import torch

        from minillm.models.transformer import flops_per_token

        if workload["side"] != "ours":
            from transformers import Qwen3ForCausalLM  # noqa: F401  (its share of the memory is known apart)
        libraries = peak_memory_mb()
        # Imported late: what follows is the configuration's own memory.
        from trainers import trainer_of

        from minillm.models.config import ModelConfig
        from minillm.models.lora import adapter_size
        from minillm.models.transformer import LanguageModel, count_parameters

        self.trainer = trainer_of(Workload(**workload))
        with torch.device("meta"):
            ours = LanguageModel(ModelConfig.from_dict(workload["config"]))
        adapter = adapter_size(self.trainer.model)
        parameters = count_parameters(self.trainer.model) - adapter
        same = parameters == count_parameters(ours)
        assert same or workload["side"] == "nanogpt", "the sides must be of one size"  # nanoGPT has other layers
        return {
            "parameters": parameters,
            "adapter": adapter,
            "flops_per_token": flops_per_token(ours) if same else 6.0 * parameters,
            "threads": torch.get_num_threads(),
            "libraries_mb": libraries,
        }

    def steps(self, count: int) -> dict[str, Any]:
        """Train so many steps: the seconds of each, and the last one's loss in nats a token."""
        seconds, loss = [], 0.0
        for _ in range(count):
            started = time.perf_counter()
            loss = self.trainer.step()
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds, "loss": loss}

    def evaluate(self) -> dict[str, Any]:
        return {"bits_per_byte": self.trainer.bits_per_byte()}


def job_of(command: str, flags: Sequence[str]) -> Job:
    """The job that `minillm COMMAND FLAGS` would train."""
    from minillm.cli import COMMANDS
    from minillm.config import parse
    from minillm.stages import canonical_stage
    from minillm.train.job import build_job
    from minillm.train.settings import Settings

    groups = [reference.split(":") for reference in COMMANDS[command].settings]
    parsed = parse(f"minillm {command}", "", [getattr(import_module(module), name) for module, name in groups], flags)
    common = len(fields(Settings)) - 1
    return build_job(canonical_stage(command), Settings(*parsed[:common], method=tuple(parsed[common:])))  # type: ignore[misc]


def job_with(**parts: Any) -> Job:
    """A job that has only what the steps of a benchmark touch."""
    from minillm.train.job import Job

    job = Job.__new__(Job)
    vars(job).update(parts)
    return job
