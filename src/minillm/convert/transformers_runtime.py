"""An exported folder in transformers, as `parity.compare` asks it. Nothing of ours computes here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.convert.parity import BLOCK_LENGTH, Prompt, refused

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers and torchao; errors are raised all the same."""
    import logging
    import warnings

    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        enable_progress_bar()


class TransformersRuntime:
    """The model and the tokenizer of a folder.

    Raises:
        UserError: transformers cannot load it.
    """

    def __init__(self, folder: Path, auto_class: str, *, base: Path | None = None) -> None:
        """`base`: the folder is an adapter of peft's, which lies on the model in this one."""
        import transformers

        self.name = f"transformers {transformers.__version__}"
        remote = auto_class == "AutoModelForMaskedLM"
        with quiet():
            try:
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=remote)
                loader = getattr(transformers, auto_class)
                model, told = loader.from_pretrained(
                    str(base or folder), trust_remote_code=remote, output_loading_info=True
                )
                if base is not None:
                    import peft

                    self.name = f"peft {peft.__version__}"
                    model = peft.PeftModel.from_pretrained(model, str(folder))
            except Exception as error:  # each of the libraries has its own
                raise refused(self.name, f"cannot load it: {_first_line(error)}") from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if told.get(what):
                names = ", ".join(map(str, sorted(told[what])[:3]))
                raise refused(self.name, f"reports {what.replace('_', ' ')}: {names}")
        self.model: Any = model.eval()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids, by the folder's tokenizer and chat template."""
        if not prompt.messages:
            return list(self.tokenizer(prompt.text)["input_ids"])
        text = self.tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [L, V] of every position; of a model that judges [1, 1]."""
        import torch

        with torch.no_grad(), self._running():
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits.float().clone()
        return logits if logits.ndim == 2 else logits[0]

    def write(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """What follows greedily, without the token that ends it."""
        import torch

        prompt = torch.tensor([list(ids)])
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "attention_mask": torch.ones_like(prompt)}
        if hasattr(self.model.config, "stop_token_ids"):  # our own class
            settings["block_length"] = BLOCK_LENGTH
        else:
            settings["do_sample"] = False
        with torch.no_grad(), self._running():
            written = self.model.generate(input_ids=prompt, **settings)[0, len(ids) :].tolist()
        ends = self._ends()
        end = next((place for place, token in enumerate(written) if token in ends), None)
        return [token for token in written[:end]]

    @contextmanager
    def _running(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except Exception as error:  # torchao, for one, lacks an operation here and there
            raise refused(self.name, f"cannot run it: {_first_line(error)}") from error

    def _ends(self) -> set[int]:
        found = getattr(self.model.config, "stop_token_ids", None) or self.model.generation_config.eos_token_id
        return {found} if isinstance(found, int) else set(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
