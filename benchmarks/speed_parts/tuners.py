"""Those who fine-tune in speed_parts/sft.py, each in a worker of its own."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from sessions import Session, job_of

RATE = 2e-5


class Ours(Session):
    """What `minillm sft` does, a step at a time."""

    def start(self, folder: str, data: str, seq: int, batch: int, config: dict[str, Any]) -> dict[str, Any]:
        import torch

        from minillm.cli import main as minillm
        from minillm.models.config import ModelConfig
        from minillm.models.transformer import LanguageModel

        weights = Path(folder) / "pretrain.pth"
        model = LanguageModel(ModelConfig.from_dict(config))
        model.init_weights(0)
        torch.save(model.state_dict(), weights)
        if minillm(["export", "--checkpoint", str(weights), "--output", str(Path(folder) / "exported"), "--no_check"]):
            raise RuntimeError("the export failed")
        del model
        started = time.perf_counter()
        flags = ["--data_path", data, "--pretrained_path", str(weights), "--out_dir", str(Path(folder) / "ours"),
                 "--max_seq_len", str(seq), "--batch_size", str(batch), "--optimizer", "adamw", "--learning_rate",
                 str(RATE), "--dtype", "float32", "--compile", "off", "--device", "cpu", "--no_wandb",
                 "--max_steps", "1000000"]  # fmt: skip
        self.job = job_of("sft", flags)
        self.tokens = batch * seq
        return {"threads": torch.get_num_threads(), "seconds": time.perf_counter() - started}

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds, tokens trained, and tokens that were computed, padding included."""
        from minillm.train.loop import take_step

        trained = 0.0
        started = time.perf_counter()
        for _ in range(count):
            sums, *_ = take_step(self.job)
            self.job.state.step += 1
            trained += sums.counts["loss"]
        return {"seconds": time.perf_counter() - started, "trained": trained, "read": count * self.tokens}


class Trl(Session):
    """TRL's SFTTrainer, whose train() waits in a thread for its turns."""

    def start(self, folder: str, data: str, seq: int, batch: int, packing: bool) -> dict[str, Any]:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        exported = Path(folder) / "exported"
        started = time.perf_counter()
        rows = []
        for line in Path(data).read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["conversations"]
            rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
        session = self
        self.trained = self.read = 0
        self.allowed, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False

        class Turns(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                session.allowed.acquire()
                control.should_training_stop = session.ended

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                session.done.release()
                control.should_training_stop = session.ended

        class Counted(SFTTrainer):  # type: ignore[misc]
            def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
                session.trained += int((inputs["labels"][:, 1:] != -100).sum())
                session.read += inputs["input_ids"].numel()
                return super().training_step(model, inputs, *rest, **more)

        arguments = SFTConfig(
            output_dir=str(Path(folder) / f"trl{int(packing)}"), per_device_train_batch_size=batch, max_length=seq,
            packing=packing, max_steps=10**6, learning_rate=RATE, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True,
            seed=0, max_grad_norm=1.0,
        )  # fmt: skip
        self.trainer = Counted(
            model=AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32), args=arguments,
            train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(exported),
            callbacks=[Turns()],
        )  # fmt: skip
        self.problem: Exception | None = None
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        return {"threads": torch.get_num_threads(), "seconds": time.perf_counter() - started}

    def _train(self) -> None:
        try:
            self.trainer.train()
        except Exception as error:  # told by the next turn
            self.problem = error
            self.done.release()

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds, tokens trained, and tokens that were computed, padding included."""
        self.trained = self.read = 0
        started = time.perf_counter()
        for _ in range(count):
            self.allowed.release()
            self.done.acquire()
            if self.problem is not None:
                raise self.problem
        return {"seconds": time.perf_counter() - started, "trained": self.trained, "read": self.read}

    def close(self) -> None:
        """Let the training end: the step under way is its last."""
        self.ended = True
        self.allowed.release()
        self.thread.join(timeout=20)
