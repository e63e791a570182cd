"""Which tokens of a vocabulary play the parts that structure the stream. Our tokenizers have a token of its own name
for each part; an imported one plays them with what it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from minillm.log import UserError

ROLES_KEY = "minillm_roles"  # in tokenizer_config.json


@dataclass(frozen=True)
class Roles:
    """A token for each part, and what else an imported vocabulary has."""

    pad: str = "<|pad|>"
    end_of_text: str = "<|endoftext|>"
    start_of_turn: str = "<|im_start|>"
    end_of_turn: str = "<|im_end|>"
    mask: str = "<|mask|>"
    ignore: str = "<|ignore|>"
    begin: str = ""  # bos_token, where there is one
    end: str = ""  # what the chat template knows as eos_token; "": end_of_turn
    unknown: str = ""  # unk_token, where there is one
    rows: int = 0  # ids the model has, where they are more than the vocabulary's: padded, without text

    @property
    def control(self) -> tuple[str, ...]:
        """The six parts that every tokenizer needs, in the order of CONTROL_TOKENS."""
        return (self.pad, self.end_of_text, self.start_of_turn, self.end_of_turn, self.mask, self.ignore)

    @property
    def template_variables(self) -> dict[str, str]:
        """What a chat template may ask for, as transformers gives it."""
        named = {
            "bos_token": self.begin, "eos_token": self.end or self.end_of_turn, "unk_token": self.unknown,
            "pad_token": self.pad,
        }  # fmt: skip
        return {name: token for name, token in named.items() if token}

    def to_dict(self) -> dict[str, Any]:
        """Without what is as in our own tokenizers."""
        return {name: value for name, value in asdict(self).items() if value != getattr(OURS, name)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roles:
        """Raises UserError for a part this version does not know, or a value that is no token."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        for name, value in values.items():
            if name not in kinds or not isinstance(value, kinds[name]):
                raise UserError(f"the tokenizer's roles: {name} is {value!r}, which this version does not know")
        return cls(**values)


OURS = Roles()
