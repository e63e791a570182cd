"""The process in which one workload is trained: commands as JSON lines on stdin, an answer to each on stdout.

start (the workload), steps (count), evaluate, gemm, memory. It ends when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

from common import Workload, peak_memory_mb


class Session:
    """One workload under way."""

    trainer: Any

    def start(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Build the model; what is known about it before it is trained."""
        import torch

        from minillm.models.transformer import flops_per_token

        if workload["side"] == "peer":
            from transformers import Qwen3ForCausalLM  # noqa: F401  (its share of the memory is known apart)
        libraries = peak_memory_mb()
        # Imported late: what follows is the configuration's own memory.
        from trainers import Ours, Peer

        from minillm.models.config import ModelConfig
        from minillm.models.lora import adapter_size
        from minillm.models.transformer import LanguageModel, count_parameters

        self.trainer = (Peer if workload["side"] == "peer" else Ours)(Workload(**workload))
        with torch.device("meta"):
            ours = LanguageModel(ModelConfig.from_dict(workload["config"]))
        adapter = adapter_size(self.trainer.model)
        parameters = count_parameters(self.trainer.model) - adapter
        assert parameters == count_parameters(ours), "the two sides must be of one size"
        return {
            "parameters": parameters,
            "adapter": adapter,
            "flops_per_token": flops_per_token(ours),
            "threads": torch.get_num_threads(),
            "libraries_mb": libraries,
        }

    def steps(self, count: int) -> dict[str, Any]:
        seconds, loss = [], 0.0
        for _ in range(count):
            started = time.perf_counter()
            loss = self.trainer.step()
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds, "loss": loss}

    def evaluate(self) -> dict[str, Any]:
        return {"bits_per_byte": self.trainer.bits_per_byte()}

    def gemm(self) -> dict[str, Any]:
        import torch

        from minillm.train.precision import gemm_flops

        return {"flops": gemm_flops(torch.device("cpu"), torch.float32)}

    def memory(self) -> dict[str, Any]:
        return {"peak_mb": peak_memory_mb()}


def main() -> None:
    # Libraries print to stdout; the answers keep it to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(session, command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
