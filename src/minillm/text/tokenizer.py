"""Text <-> token ids: a byte-level BPE (or one of SentencePiece's) in the file format of the `tokenizers` library.

Ten entries come first, in a fixed order. The first six are control tokens: they structure the stream
(padding, end of a document, turns, hidden and ignored positions) and ordinary text can never produce them.
The other four, `<think>` ... `</answer>`, are plain text to a reader but one token each to the model.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.atomic import write_texts
from minillm.log import UserError, info
from minillm.text.roles import OURS, ROLES_KEY, Roles

if TYPE_CHECKING:
    import numpy as np

    from minillm.text.engine import FastEngine

CONTROL_TOKENS = OURS.control
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
SPECIAL_TOKENS = CONTROL_TOKENS + TAG_TOKENS

ASSETS = Path(__file__).parent / "assets"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SENTENCEPIECE_FILE = "tokenizer.model"
SMALL_BATCH = 50_000  # characters: so little is encoded before the fast engine is built


class Tokenizer:
    """A trained tokenizer and its chat template. Cheap to pickle, so worker processes can have one."""

    def __init__(self, json_text: str, chat_template: str, roles: Roles = OURS) -> None:
        """Build from the text of a tokenizer.json; UserError if control tokens are missing from it."""
        import tokenizers

        self.json_text, self.chat_template, self.roles = json_text, chat_template, roles
        self._parsing = tokenizers.Tokenizer.from_str(json_text)
        self._literal = tokenizers.Tokenizer.from_str(json_text)
        self._literal.encode_special_tokens = True
        missing = [token for token in roles.control if self._parsing.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"This tokenizer has no {', '.join(missing)}. MiniLLM needs these control tokens; "
                "train one with `minillm data train-tokenizer`, use the one that is shipped, or let `minillm import` "
                "find what plays their parts in another model's."
            )
        control_ids: list[int] = [int(self._parsing.token_to_id(token) or 0) for token in roles.control]
        self.pad_id, self.end_of_text_id, self.start_of_turn_id = control_ids[:3]
        self.end_of_turn_id, self.mask_id, self.ignore_id = control_ids[3:]
        added = self._parsing.get_added_tokens_decoder()
        self.special_tokens = {index: token.content for index, token in added.items() if token.special}
        self.special_ids = frozenset(control_ids) | frozenset(self.special_tokens)
        self.vocab_size: int = max(self._parsing.get_vocab_size(), roles.rows)
        also = "" if roles == OURS else json.dumps(roles.to_dict(), sort_keys=True)
        self.fingerprint = hashlib.sha256((json_text + chat_template + also).encode()).hexdigest()
        # what it puts before every text (Llama's <s>); ours puts nothing
        self.begin_ids: list[int] = [i for i in self._parsing.encode("").ids[:1] if i == self.token_to_id(roles.begin)]
        first = self._parsing.encode("a", add_special_tokens=False).tokens
        self.adds_space = bool(first) and first[0][:1] in ("\u2581", "\u0120")  # it reads a text as if after a space
        self.byte_lengths = self._measure_tokens()
        self._fast: FastEngine | None = None
        self._slow_because: str | None = None  # None: not tried yet

    @classmethod
    def load(cls, path: str | Path | None = None) -> Tokenizer:
        """The shipped tokenizer (path None), or the one in a folder or in a tokenizer.json or tokenizer.model file.

        A folder without a chat template gets ours. Raises UserError when nothing usable is there.
        """
        place = ASSETS if path is None else Path(path)
        file = place / TOKENIZER_FILE if place.is_dir() else place
        if place.is_dir() and not file.exists() and (place / SENTENCEPIECE_FILE).exists():
            file = place / SENTENCEPIECE_FILE
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"No tokenizer at {place}: {file} cannot be read ({error.strerror}). "
                f"--tokenizer takes a folder with {TOKENIZER_FILE}, or that file itself."
            ) from error
        try:
            if file.suffix == ".model":
                from minillm.text.sentencepiece_bpe import to_tokenizer_json

                return cls(to_tokenizer_json(content), read_chat_template(file.parent))
            return cls(content.decode("utf-8"), read_chat_template(file.parent), _read_roles(file.parent))
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception for a malformed file
            form = SENTENCEPIECE_FILE if file.suffix == ".model" else TOKENIZER_FILE
            raise UserError(f"{file} is not a {form} that can be used: {error}") from error

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether both have the same ids for the same entries, whatever their chat templates are."""
        return self.json_text == other.json_text or self._parsing.get_vocab() == other._parsing.get_vocab()

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Tokenizer:
        """The one that a checkpoint holds (`to_dict`)."""
        return cls(saved["json"], saved["chat_template"], Roles.from_dict(saved.get("roles", {})))

    def to_dict(self) -> dict[str, Any]:
        """All there is to it, for a checkpoint."""
        roles = {"roles": self.roles.to_dict()} if self.roles != OURS else {}
        return {"json": self.json_text, "chat_template": self.chat_template, "fingerprint": self.fingerprint, **roles}

    def with_template(self, chat_template: str) -> Tokenizer:
        """The same with another chat template."""
        return Tokenizer(self.json_text, chat_template, self.roles)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of `text`. Control tokens written in the text stay plain text unless `parse_special`."""
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """Ids of each text, as `encode`; several texts at once use all cores."""
        if self._fast is None and sum(map(len, texts)) < SMALL_BATCH:
            return self._encode_slowly(texts, parse_special)
        return [ids if isinstance(ids, list) else ids.tolist() for ids in self.encode_arrays(texts, parse_special)]

    def encode_arrays(self, texts: Sequence[str], parse_special: bool = False) -> list[np.ndarray | list[int]]:
        """Ids of each text, as `encode_batch`, by the fast engine where it can be used: uint32 arrays [L] (lists
        from the other engine)."""
        engine = self.fast_engine()
        if engine is None:
            return list(self._encode_slowly(texts, parse_special))
        try:
            found = engine.encode_batch(texts, parse_special)
        except UnicodeEncodeError:
            texts = _without_surrogates(texts)
            found = engine.encode_batch(texts, parse_special)
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        slow = iter(self._encode_slowly(left, parse_special))
        return [next(slow) if ids is None else ids for ids in found]

    def _encode_slowly(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        engine = self._parsing if parse_special else self._literal
        try:
            encoded = engine.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            encoded = engine.encode_batch_fast(_without_surrogates(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text`, control tokens parsed, and the character at which each begins: both [L]."""
        encoded = self._parsing.encode(_without_surrogates([text])[0], add_special_tokens=False)
        return encoded.ids, [start for start, _ in encoded.offsets]

    def fast_engine(self) -> FastEngine | None:
        """The fast engine; None, which is said once, where this tokenizer cannot use it."""
        if self._fast is None and self._slow_because is None:
            from minillm.text.engine import FastEngine, NotExpressible

            try:
                self._fast = FastEngine(self.json_text)
            except NotExpressible as reason:
                self._slow_because = str(reason)
                if multiprocessing.parent_process() is None:  # not by every worker
                    info(f"[tokenizer] text is encoded by the library tokenizers, not the faster tiktoken: {reason}")
        return self._fast

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; control tokens are left out unless `skip_special` is False."""
        return self._parsing.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_bytes(self, ids: Sequence[int]) -> int:
        """How many UTF-8 bytes of text the ids stand for; control tokens stand for none."""
        lengths = self.byte_lengths
        return sum(lengths[i] for i in ids)

    def token_to_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None if there is no such entry."""
        return self._parsing.token_to_id(token)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (with the chat template) into `folder`: both or neither."""
        folder = Path(folder)
        config = json.dumps(self._transformers_config(), indent=2, ensure_ascii=False) + "\n"
        write_texts({folder / TOKENIZER_FILE: self.json_text, folder / CONFIG_FILE: config})

    def _measure_tokens(self) -> list[int]:
        lengths = [0] * self.vocab_size
        byte_level = "ByteLevel" in self.json_text  # else as SentencePiece, with bytes or without
        for token, index in self._parsing.get_vocab(with_added_tokens=False).items():
            if byte_level:
                lengths[index] = len(token)  # it writes each byte as one character
            else:
                text = token.replace("\u2581", " ")  # as SentencePiece writes a space
                lengths[index] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(text.encode())
        for index, added in self._parsing.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    def _transformers_config(self) -> dict[str, Any]:
        roles = self.roles
        end = roles.end or roles.end_of_turn
        others = [token for token in dict.fromkeys(roles.control) if token not in (roles.pad, end, roles.mask)]
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": roles.pad,
            "eos_token": end,
            "bos_token": roles.begin or None,
            "unk_token": roles.unknown or None,
            "mask_token": roles.mask,
            "additional_special_tokens": others,
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
            "chat_template": self.chat_template,
        }
        if roles != OURS:  # tokenizer.json says what is put before a text
            del config["add_bos_token"], config["add_prefix_space"]
            config[ROLES_KEY] = roles.to_dict()
        return config

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, str, Roles]]:
        return Tokenizer, (self.json_text, self.chat_template, self.roles)


def _read_roles(folder: Path) -> Roles:
    """The roles kept beside an imported tokenizer; those of ours when there are none."""
    config = folder / CONFIG_FILE
    if not config.is_file():
        return OURS
    try:
        return Roles.from_dict(json.loads(config.read_text(encoding="utf-8")).get(ROLES_KEY, {}))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} is not valid JSON: {error}") from error


def read_chat_template(folder: Path) -> str:
    """The chat template kept beside a tokenizer; ours when there is none."""
    from minillm.text.chat import CHAT_TEMPLATE

    separate, config = folder / TEMPLATE_FILE, folder / CONFIG_FILE
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    if config.is_file():
        try:
            template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config} is not valid JSON: {error}") from error
        if isinstance(template, str):
            return template
    return CHAT_TEMPLATE


def _without_surrogates(texts: Sequence[str]) -> list[str]:
    """A lone surrogate has no UTF-8 form: it becomes a question mark."""
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
