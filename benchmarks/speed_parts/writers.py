"""Those who write in speed_parts/generation.py, each in a worker of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sessions import Session

if TYPE_CHECKING:
    from torch import Tensor

    from minillm.models.candidates import Candidates
    from minillm.models.transformer import LanguageModel


def prompts(batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random tokens, none of them special: the same for every side."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(16, vocabulary, (batch, length), generator=generator).tolist()


def spread_weights(model: LanguageModel) -> None:
    """Fresh weights leave the most probable tokens almost equal, so that rounding would decide between them."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)


class Ours(Session):
    """Our model, and what transformers loads."""

    def start(self, config: dict[str, Any], folder: str, prompt: int) -> dict[str, Any]:
        import torch

        from minillm.cli import main as minillm
        from minillm.families.autoregressive import Autoregressive
        from minillm.models.allocator import keep_freed_memory
        from minillm.models.config import ModelConfig
        from minillm.models.transformer import LanguageModel

        keep_freed_memory()  # as `minillm generate` does
        self.model = LanguageModel(ModelConfig.from_dict(config))
        self.model.init_weights(0)
        spread_weights(self.model)
        self.model.eval().requires_grad_(False)
        self.family, self.prompt = Autoregressive(), prompt
        weights = Path(folder).with_name("pretrain.pth")
        torch.save(self.model.state_dict(), weights)
        if minillm(["export", "--checkpoint", str(weights), "--output", folder, "--no_check"]):
            raise RuntimeError("the export failed")
        size = sum(parameter.numel() * 4 for parameter in self.model.parameters())
        return {"threads": torch.get_num_threads(), "bytes": size}

    def write(self, batch: int, new: int) -> dict[str, Any]:
        """`new` tokens for each of `batch` prompts."""
        from minillm.families.base import Sampling

        asked = prompts(batch, self.prompt, self.model.config.vocab_size)
        started = time.perf_counter()
        written = self.family.generate(self.model, asked, Sampling(max_new_tokens=new, temperature=0.0))
        return {"seconds": time.perf_counter() - started, "tokens": written}

    def bandwidth(self) -> dict[str, Any]:
        """Bytes read a second while a large array is summed, the best of five."""
        import torch

        large = torch.ones(2**26)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            large.sum()
            best = min(best, time.perf_counter() - started)
        return {"bytes_per_second": 4 * large.numel() / best}


class Transformers(Session):
    """transformers' generate with one of its caches: the static one compiled, as its documentation has it."""

    def start(self, folder: str, cache: str, prompt: int) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompt, self.options = prompt, {}
        if cache == "static":
            self.options = {"cache_implementation": "static"}
            self.model.forward = torch.compile(self.model.forward)
        return {"threads": torch.get_num_threads()}

    def write(self, batch: int, new: int) -> dict[str, Any]:
        import torch

        asked = torch.tensor(prompts(batch, self.prompt, self.model.config.vocab_size))
        self.model.generation_config.eos_token_id = None  # nothing stops a text
        started = time.perf_counter()
        with torch.inference_mode():
            written = self.model.generate(
                asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=new, pad_token_id=0,
                **self.options,
            )  # fmt: skip
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": written[:, self.prompt :].tolist()}


class Diffusers(Session):
    """One model that looks at everything and one that never looks ahead of a block, each with a cache and without."""

    def start(self, config: dict[str, Any], block: int, prompt: int) -> dict[str, Any]:
        import torch

        from minillm.families.base import SpecialIds
        from minillm.models.allocator import keep_freed_memory
        from minillm.models.config import ModelConfig
        from minillm.models.transformer import LanguageModel
        from minillm.text.tokenizer import Tokenizer

        keep_freed_memory()
        self.model = LanguageModel(ModelConfig.from_dict(config))
        self.model.init_weights(0)
        spread_weights(self.model)
        self.model.eval().requires_grad_(False)
        self.ids = SpecialIds.of(Tokenizer.load())
        self.block, self.prompt = block, prompt
        return {"threads": torch.get_num_threads()}

    def write(self, way: str, new: int) -> dict[str, Any]:
        """One text. `way`: cached, reread or whole; with `causal` before it blocks do not look ahead."""
        import torch

        from minillm.families.base import Sampling
        from minillm.families.unmasking import write

        causal = way.startswith("causal")
        block = 0 if way == "whole" else self.block
        sampling = Sampling(max_new_tokens=new, temperature=0.0, block_length=block)
        asked = prompts(1, self.prompt, self.model.config.vocab_size)
        started = time.perf_counter()
        with torch.inference_mode():
            if way.endswith("reread"):
                written = self._reread(asked, sampling, causal)
            else:
                written = write(self.model, asked, sampling, self.ids, self._show, block_causal=causal)
        return {"seconds": time.perf_counter() - started, "tokens": written}

    def _show(self, tokens: Tensor, hidden: Tensor, _: Candidates | None) -> Tensor:
        return tokens.masked_fill(hidden, self.ids.mask)

    def _reread(self, asked: list[list[int]], sampling: Any, causal: bool) -> list[list[int]]:
        """The writer of `minillm.families.unmasking`, whose cache remembers tokens and no keys and values."""
        import torch

        from minillm.families.unmasking import Writer

        class Memory:
            def __init__(self, rows: int) -> None:
                self.shown = torch.empty(rows, 0, dtype=torch.int64)

            @property
            def length(self) -> int:
                return self.shown.shape[1]

            def truncate(self, length: int) -> None:
                self.shown = self.shown[:, :length]

            def keep(self, rows: Tensor) -> None:
                self.shown = self.shown[rows]

        class Rereading(Writer):
            def _new_cache(self, capacity: int) -> Any:
                return Memory(len(self.alive))

            def _look(self, tokens: Tensor, hidden: Tensor | None, beliefs: Any, cache: Any) -> Tensor:
                hidden = torch.zeros_like(tokens, dtype=torch.bool) if hidden is None else hidden
                cache.shown = torch.cat((cache.shown, cast("Tensor", self.show(tokens, hidden, beliefs))), dim=1)
                mask = None
                if self.block_causal:
                    blocks = torch.arange(cache.length) // self.sampling.block_length
                    mask = (blocks[:, None] >= blocks[None, :])[None, None]
                return self.model(cache.shown, mask=mask).hidden[:, -tokens.shape[1] :]

        writer = Rereading(
            self.model, asked, sampling, self.ids, self._show, candidates=0, block_causal=causal, watch=None
        )
        writer.run(list(range(len(asked))))
        return writer.written
