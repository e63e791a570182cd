"""Those who train in the benchmarks: our step, exactly as the training loop takes it, and the peers'."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import RANDOM_TOKENS, Workload
from peers import LitGPT, MiniMind, Model, NanoGPT, Transformers
from sessions import job_with
from torch import Tensor

from minillm.data.batches import Batch, Dataset, open_dataset, sample_indices
from minillm.data.mixture import Mixture, Part
from minillm.families import get_family
from minillm.families.settings import FamilyConfig
from minillm.methods.likelihood import Likelihood
from minillm.models.allocator import keep_freed_memory
from minillm.models.config import ModelConfig
from minillm.models.lora import LoraConfig, add_adapter
from minillm.models.transformer import LanguageModel
from minillm.stages import STAGES
from minillm.text.tokenizer import Tokenizer
from minillm.train.job import micro_rows
from minillm.train.loop import evaluate, take_step
from minillm.train.optim import build_optimizers, learning_rate
from minillm.train.precision import choose_dtype, compile_layers
from minillm.train.settings import OptimSettings, RunSettings
from minillm.train.state import TrainState

RANDOM_ROWS = 512
EVALUATION_ROWS = 8  # of the peer at once
GRAD_CLIP = 1.0


class RandomRows:
    """Rows of random tokens: what the speed does not depend on."""

    bytes_per_token = row_size = 1.0

    def __init__(self, vocabulary: int, seq: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocabulary, (RANDOM_ROWS, seq), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> Batch:
        tokens = self.tokens[indices]
        return Batch(tokens, np.ones(tokens.shape, dtype=bool), None, None, indices)

    def describe(self) -> str:
        return f"{len(self)} random rows"


def open_rows(path: str, workload: Workload) -> Dataset:
    """The rows of a file, tokenized with the shipped tokenizer, or random ones."""
    if path == RANDOM_TOKENS:
        return RandomRows(workload.config["vocab_size"], workload.seq)
    cache = workload.cache_dir or None
    return open_dataset("pretrain", path, Tokenizer.load(), max_seq_len=workload.seq, cache_dir=cache)


def in_order(path: str, workload: Workload) -> Mixture:
    """The same rows as the training loop takes them."""
    return Mixture([Part(path, open_rows(path, workload))], seed=workload.seed, pad_id=0)


class Ours:
    """Our model, our optimizers, and `minillm.train.loop.take_step` on the parts of a job that it reads."""

    def __init__(self, workload: Workload) -> None:
        keep_freed_memory()
        torch.manual_seed(workload.seed)
        device = torch.device("cpu")
        self.model = LanguageModel(ModelConfig.from_dict(workload.config))
        self.model.init_weights(workload.seed)
        if workload.lora_rank:
            add_adapter(self.model, LoraConfig(workload.lora_rank, 2.0 * workload.lora_rank), workload.seed)
        if workload.compiled:
            compile_layers(self.model)
        optim = replace(OptimSettings(), optimizer=workload.optimizer, learning_rate=workload.lr)
        dtype = choose_dtype(workload.dtype, device)
        run = RunSettings(batch_size=workload.rows, seed=workload.seed)
        family = get_family(FamilyConfig(architecture=workload.family), Tokenizer.load())
        self.job = job_with(
            state=TrainState(),
            model=self.model,
            family=family,
            method=Likelihood(family, workload.seed),
            optimizers=build_optimizers(self.model, optim, dtype=dtype),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            train_data=in_order(workload.data, workload),
            validation_data=in_order(workload.validation, workload) if workload.validation else None,
            eval_samples=workload.eval_rows,
            rows_per_step=workload.rows,
            own_rows=workload.rows,
            micro_rows=micro_rows(run, workload.seq, workload.rows, device, STAGES["pretrain"]),
            total_steps=workload.total_steps,
            warmup_steps=workload.warmup_steps,
            peak_lr=workload.lr,
            final_lr_ratio=optim.final_lr_ratio,
            grad_clip=optim.grad_clip,
            seed=workload.seed,
            device=device,
            dtype=dtype,
            average=None,
        )

    def step(self) -> float:
        """One optimizer step; the loss in nats a token."""
        sums, _, _ = take_step(self.job)
        self.job.state.step += 1
        return sums.means().get("loss", math.nan)

    def bits_per_byte(self) -> float:
        return evaluate(self.job)["val/bits_per_byte"]


class Peer:
    """A model of others, AdamW (fused, as transformers' Trainer has it), clip_grad_norm_, and the loss that its own
    training takes; the same rows in the same order."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(workload.seed)
        self.peer = PEERS[workload.side](ModelConfig.from_dict(workload.config))
        self.model = self.peer.model.train()
        self.run: Any = torch.compile(self.model) if workload.compiled else self.model
        betas = workload.peer_options["betas"]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=workload.lr,
            betas=(betas[0], betas[1]),
            weight_decay=workload.peer_options["weight_decay"],
            fused=True,
        )
        self.workload, self.done = workload, 0
        self.data = open_rows(workload.data, workload)
        self.validation = open_rows(workload.validation, workload) if workload.validation else None

    def step(self) -> float:
        """One optimizer step; the loss in nats a token."""
        work = self.workload
        lr = learning_rate(self.done, total=work.total_steps, warmup=work.warmup_steps, peak=work.lr, final_ratio=0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens = _tokens(self.data, sample_indices(work.seed, self.done * work.rows, work.rows, len(self.data)))
        loss = self.peer.loss(self.run, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.item()

    @torch.no_grad()
    def bits_per_byte(self) -> float:
        """Over the same validation rows as ours; every row predicts as many tokens, so means may be averaged."""
        assert self.validation is not None
        size = min(len(self.validation), self.workload.eval_rows)
        indices = sample_indices(self.workload.seed, 0, size, len(self.validation))
        self.model.eval()
        total = 0.0
        for start in range(0, size, EVALUATION_ROWS):
            tokens = _tokens(self.validation, indices[start : start + EVALUATION_ROWS])
            total += self.peer.loss(self.model, tokens).item() * len(tokens)
        self.model.train()
        return total / size / math.log(2) / self.validation.bytes_per_token


def _tokens(data: Dataset, indices: np.ndarray) -> Tensor:
    return torch.from_numpy(data.rows(indices).tokens)


PEERS: dict[str, type[Model]] = {
    "transformers": Transformers,
    "nanogpt": NanoGPT,
    "litgpt": LitGPT,
    "minimind": MiniMind,
}


def trainer_of(workload: Workload) -> Ours | Peer:
    """The side of a workload, ready to train."""
    return Ours(workload) if workload.side == "ours" else Peer(workload)
