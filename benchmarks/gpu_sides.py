"""What runs in the worker processes of gpu.py: the agreement of CPU and GPU, and one side that trains."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sessions import Session, job_of

from minillm.data.batches import Batch
from minillm.families import get_family
from minillm.families.settings import FamilyConfig
from minillm.methods.likelihood import Likelihood
from minillm.models import attention
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel, flops_per_token
from minillm.text.tokenizer import Tokenizer
from minillm.train.loop import take_step
from minillm.train.precision import autocast, choose_dtype, compile_layers, gemm_flops

WIDTH, LENGTH, ROWS = 64, 160, 4
CPU = torch.device("cpu")


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


class Agreement(Session):
    """The same losses and gradients on both devices, and the same attention from both kernels."""

    def start(self, device: str) -> dict[str, Any]:
        self.device = torch.device(device)
        self.tokenizer = Tokenizer.load()
        on_gpu = self.device.type == "cuda"
        return {
            "name": torch.cuda.get_device_name(self.device) if on_gpu else "CPU",
            "cuda": torch.version.cuda,
            "gemm_flops": gemm_flops(self.device, choose_dtype("auto", self.device)),
        }

    def family(self, name: str) -> dict[str, Any]:
        """Relative differences of a float32 step on packed rows between CPU and device, eager and compiled, and of
        bfloat16 from float32."""
        config = FamilyConfig(architecture=name)
        family = get_family(config, self.tokenizer)
        sizes = ModelConfig(
            vocab_size=self.tokenizer.vocab_size, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=WIDTH // 4, intermediate_size=2 * WIDTH, max_position_embeddings=LENGTH,
            causal=family.causal, denoiser=family.denoiser,
        )  # fmt: skip
        method = Likelihood(family, 0)
        exact = self._step(method, sizes, CPU, torch.float32)
        here = self._step(method, sizes, self.device, torch.float32)
        found = {"loss": abs(here[0] / exact[0] - 1), "gradient": _apart(here[1], exact[1])}
        if self.device.type == "cuda":
            compiled = self._step(method, sizes, self.device, torch.float32, compiled=True)
            found["compiled gradient"] = _apart(compiled[1], exact[1])
            found["bfloat16 loss"] = abs(self._step(method, sizes, self.device, torch.bfloat16)[0] / exact[0] - 1)
        return found

    def _step(
        self,
        method: Likelihood,
        sizes: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compiled: bool = False,
    ) -> tuple[float, torch.Tensor]:
        model = LanguageModel(sizes).train()
        model.init_weights(0)
        model.to(device)
        if compiled:
            compile_layers(model)
        generator = np.random.default_rng(0)
        segments = np.sort(generator.integers(0, 4, (ROWS, LENGTH)), axis=1).astype(np.int32)
        segments[:, -10:] = -1
        positions = np.zeros((ROWS, LENGTH), np.int64)
        for row, parts in enumerate(segments):
            starts = np.flatnonzero(np.diff(parts, prepend=parts[0] - 1))
            positions[row] = np.arange(LENGTH) - starts[np.searchsorted(starts, np.arange(LENGTH), side="right") - 1]
        tokens = generator.integers(300, sizes.vocab_size, (ROWS, LENGTH))
        part = method.prepare(model, Batch(tokens, segments >= 0, positions, segments, np.arange(ROWS)), device, 0, 0)
        with autocast(device, dtype):
            loss = method.loss(model, part.data).loss / part.count
        loss.backward()
        gradient = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.cat(gradient)

    def attention(self) -> dict[str, Any]:
        """FlexAttention through block masks against the dense mask: the output, and on a GPU the gradients."""
        generator = torch.Generator().manual_seed(0)
        found = {}
        for causal in (True, False):
            segments = torch.randint(0, 5, (2, 700), generator=generator).sort(dim=1).values.to(self.device)
            sides = []
            for mask in (attention.segment_blocks(segments, causal), attention.segment_mask(segments, causal)):
                generator.manual_seed(1)
                q, k, v = (
                    torch.randn(2, heads, 700, 64, generator=generator).to(self.device).requires_grad_(
                        self.device.type == "cuda"  # on a CPU FlexAttention has no backward pass
                    )
                    for heads in (4, 2, 2)
                )  # fmt: skip
                out = attention.attend(q, k, v, mask, causal)
                if out.requires_grad:
                    out.square().sum().backward()
                parts = (out, q.grad, k.grad, v.grad)
                sides.append(torch.cat([each.detach().flatten() for each in parts if each is not None]).cpu())
            found["causal" if causal else "both ways"] = _apart(*sides)
        return found


def _apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """The distance of two vectors relative to the second's length."""
    return float((one - two).norm() / two.norm())


class Side(Session):
    """One side that trains: ours as `minillm pretrain` does, or a peer's model in the same arithmetic."""

    def start(
        self, side: str, flags: list[str], rows: int, seq: int, device: str, compiled: bool, folder: str
    ) -> dict[str, Any]:
        self.device = torch.device(device)
        text = Path(folder) / "text.jsonl"
        if not text.exists():
            words = random.Random(0)
            lines = (" ".join(words.choices(("tree", "river", "of", "the", "stone", "and", "light", "under"), k=500))
                     for _ in range(max(100, rows * seq * 4 // 500)))  # fmt: skip
            text.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines), encoding="utf-8")
        common = [
            "--data_path", str(text), "--validation_data", str(text), "--max_seq_len", str(seq),
            "--batch_size", str(rows),
            "--micro_batch_size", str(rows), "--max_steps", "1000000", "--device", device, "--optimizer", "adamw",
            "--out_dir", str(Path(folder) / side), "--no_wandb", "--compile", "on" if compiled else "off",
        ]  # fmt: skip
        self.job = job_of("pretrain", [*common, *flags])
        self.tokens = rows * seq
        config = self.job.model.config
        parameters = sum(parameter.numel() for parameter in self.job.model.parameters())
        flops = flops_per_token(self.job.model)
        self.peer: Any = None
        if side != "ours":
            from peers import NanoGPT, Transformers

            self.job.model.to("meta")  # its memory is not the peer's
            self.job.optimizers.by_name.clear()
            self.peer = (NanoGPT if side == "nanogpt" else Transformers)(config)
            model = self.peer.model.to(self.device).train()
            self.call: Any = torch.compile(model) if compiled else model
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
            own = sum(parameter.numel() for parameter in model.parameters())
            parameters, flops = own, flops if own == parameters else 6.0 * own
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Attention's own products: PaLM (arXiv 2204.02311), appendix B.
        inner = config.num_attention_heads * config.head_dim
        with_attention = flops + 12.0 * config.num_hidden_layers * inner * seq
        return {"parameters": parameters, "flops_per_token": flops, "flops_with_attention": with_attention}

    def steps(self, seconds: float, least: int) -> dict[str, Any]:
        """Train at least so many steps and for so long, three blocks of the same length: tokens/s of each."""
        rates, loss = [], float("nan")
        for _ in range(3):
            done, started = 0, time.perf_counter()
            while done < least or time.perf_counter() - started < seconds / 3:
                loss = self._step()
                done += 1
            wait_for(self.device)
            rates.append(done * self.tokens / (time.perf_counter() - started))
        return {"tokens_per_second": rates, "loss": loss, "peak_bytes": peak_bytes(self.device)}

    def _step(self) -> float:
        if self.peer is None:
            sums = cast(Any, take_step(self.job))[0]
            self.job.state.step += 1
            return sums.means().get("loss", float("nan"))
        seq = self.job.config["max_seq_len"]
        tokens = torch.randint(self.job.model.config.vocab_size, (self.tokens // seq, seq), device=self.device)
        with autocast(self.device, self.job.dtype):
            loss = self.peer.loss(self.call, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.peer.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
