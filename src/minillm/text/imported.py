"""Another model's tokenizer, made ready for our stages: its own tokens take the parts that ours have tokens for, and
only what is missing is added. Its ids stay what they are."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.log import UserError
from minillm.text.chat import CHAT_TEMPLATE, render_template
from minillm.text.roles import OURS, ROLES_KEY, Roles
from minillm.text.tokenizer import CONFIG_FILE, SENTENCEPIECE_FILE, TEMPLATE_FILE, TOKENIZER_FILE, Tokenizer

SPECIAL_FILE = "special_tokens_map.json"
_PROBE = "minillm-probe"
SENTENCEPIECE_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # its defaults, where they exist


@dataclass(frozen=True)
class ImportedTokenizer:
    """A tokenizer, and what was done for it."""

    tokenizer: Tokenizer
    said: tuple[str, ...]  # sentences for people
    rows: int  # ids that the model needs


def import_tokenizer(folder: Path, rows: int, model: Mapping[str, Any]) -> ImportedTokenizer | None:
    """The tokenizer of a Hugging Face folder; None where it has none.

    Args:
        rows: of the model's embedding. Those behind the vocabulary are used first for tokens that are added.
        model: config.json and generation_config.json in one, where eos_token_id and its kin stand.

    Raises:
        UserError: a file cannot be used, or the tokenizer has neither an end of text nor a template that ends turns.
    """
    config = read_json(folder / CONFIG_FILE)
    found = _tokenizer_json(folder)
    if found is None:
        return None
    json_text, config = found[0], {**found[1], **config}
    if ROLES_KEY in config or all(f'"{token}"' in json_text for token in OURS.control):
        own = Tokenizer.load(folder)  # ours, or imported before
        return ImportedTokenizer(own, (), max(rows, own.vocab_size))
    import tokenizers

    try:
        engine = tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise UserError(f"{folder / TOKENIZER_FILE} cannot be used: {error}") from error
    named = _named_tokens(folder, config, model, engine)
    template = _chat_template(folder, config)
    roles, said = _find_roles(engine, named, template, model)
    before = set(engine.get_vocab(with_added_tokens=True).values())
    missing = {part: token for part, token in roles.items() if not _is_special(engine, token)}
    names = list(dict.fromkeys(missing.values()))
    if names:
        engine.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
        json_text = engine.to_str()
    ids = {name: int(engine.token_to_id(name) or 0) for name in names}
    for name in names:
        if ids[name] in before:
            said.append(f"{name} was in the vocabulary and is a control token now")
        else:
            where = "an unused row of the embedding" if ids[name] < rows else "a new row, the mean of the others"
            parts = ", ".join(part.replace("_", " ") for part, token in missing.items() if token == name)
            said.append(f"{name} ({parts}) is added: id {ids[name]}, {where}")
    if template is None:
        said.append("it has no chat template and gets ours (ChatML)")
    needed = max(rows, 1 + max(engine.get_vocab(with_added_tokens=True).values()))
    if min(set(range(rows, needed)) - set(ids.values()), default=-1) >= 0:
        said.append(f"its tokenizer has more ids than the model's {rows} rows: the rest is the mean of the others")
    padded = needed if needed != engine.get_vocab_size(with_added_tokens=True) else 0
    every = Roles(
        **roles, begin=named.get("bos_token", ""), end=named.get("eos_token", ""), unknown=named.get("unk_token", ""),
        rows=padded,
    )  # fmt: skip
    return ImportedTokenizer(Tokenizer(json_text, template or CHAT_TEMPLATE, every), tuple(said), needed)


def _find_roles(
    engine: Any, named: Mapping[str, str], template: str | None, model: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """A token for each part: the model's own where it has one, else the name of ours; and what to say of it."""
    eos = named.get("eos_token", "")
    ours = (OURS.start_of_turn, OURS.end_of_turn)
    turns = ours if template is None else _turn_tokens(engine, template, named)
    end_of_turn = turns[1] or eos
    # What ends an answer and what ends a document may be two tokens; generation_config.json names both.
    ends = _tokens_of_ids(engine, model.get("eos_token_id"))
    others = {"", end_of_turn, named.get("bos_token"), named.get("unk_token")} - {eos if eos != end_of_turn else None}
    end_of_text = next((token for token in (eos, *ends) if token not in others), eos or end_of_turn)
    if not end_of_text:
        raise UserError("the tokenizer names no eos_token and its chat template ends no turn: what ends a text?")
    taken = {end_of_text, end_of_turn, named.get("bos_token")}
    pad = named.get("pad_token", "")
    roles = {
        "pad": pad if pad and pad not in taken else OURS.pad,
        "end_of_text": end_of_text,
        "start_of_turn": turns[0] or named.get("bos_token") or OURS.start_of_turn,
        "end_of_turn": end_of_turn,
        "mask": named.get("mask_token") or OURS.mask,
        "ignore": OURS.ignore,
    }
    said = [f"{roles['end_of_text']} ends a text, {roles['end_of_turn']} a turn"]
    if pad in taken and pad:
        said.append(f"{pad} is its padding and ends texts, too: padding gets a token of its own")
    return roles, said


def _turn_tokens(engine: Any, template: str, variables: Mapping[str, str]) -> tuple[str, str]:
    """The special tokens with which the template begins and ends an answer; "" where it has none."""
    special = [token.content for token in engine.get_added_tokens_decoder().values() if token.special]
    user = {"role": "user", "content": f"{_PROBE} user"}
    asked = render_template(template, [user], variables, add_generation_prompt=True)
    answered = render_template(template, [user, {"role": "assistant", "content": _PROBE}], variables)
    after = _special_tokens_in(answered.rpartition(_PROBE)[2], special)
    end = after[0] if after else ""
    before = _special_tokens_in(asked.rpartition(f"{_PROBE} user")[2], special)
    start = next((token for token in before if token not in (end, variables.get("eos_token"))), "")
    return start, end


def _special_tokens_in(text: str, tokens: Sequence[str]) -> list[str]:
    """Those that occur, in the order in which they do first."""
    found = [(text.find(token), -len(token), token) for token in tokens if token in text]
    return [token for _, _, token in sorted(found)]


def _is_special(engine: Any, token: str) -> bool:
    return any(added.special and added.content == token for added in engine.get_added_tokens_decoder().values())


def _named_tokens(folder: Path, config: Mapping[str, Any], model: Mapping[str, Any], engine: Any) -> dict[str, str]:
    """bos_token, eos_token and their kin, as far as they are in the vocabulary; the files in the order in which
    transformers asks them."""
    found = {}
    special = read_json(folder / SPECIAL_FILE)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token"):
        said = [config.get(name), special.get(name)]
        values = [value.get("content") if isinstance(value, Mapping) else value for value in said]
        values += _tokens_of_ids(engine, model.get(f"{name}_id"))[:1]
        token = next((value for value in values if isinstance(value, str) and value), "")
        if token and engine.token_to_id(token) is not None:
            found[name] = token
    return found


def _tokens_of_ids(engine: Any, ids: Any) -> list[str]:
    """The special tokens of one id or several: a default of a configuration may name what means something else."""
    listed = ids if isinstance(ids, list) else [ids]
    tokens = [engine.id_to_token(each) for each in listed if isinstance(each, int) and 0 <= each < 2**32]
    return [token for token in tokens if token is not None and _is_special(engine, token)]


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The model's own; of several with names the one called default."""
    separate = folder / TEMPLATE_FILE
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _tokenizer_json(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The text of tokenizer.json, or what transformers makes of the files that older models have instead, with the
    special tokens it knows of them."""
    file = folder / TOKENIZER_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), {}
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not text: {error}") from error
    older = [name for name in (SENTENCEPIECE_FILE, "vocab.json") if (folder / name).is_file()]
    if not older:
        return None
    if older[0] == SENTENCEPIECE_FILE and not _known_to_transformers(folder):
        from minillm.text.sentencepiece_bpe import foreign_tokenizer_json

        try:
            return foreign_tokenizer_json((folder / SENTENCEPIECE_FILE).read_bytes()), SENTENCEPIECE_NAMES
        except Exception as error:  # the library's own for a damaged file
            raise UserError(f"{folder / SENTENCEPIECE_FILE} cannot be used: {error}") from error
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            f"{folder} has {older[0]} and no {TOKENIZER_FILE}: reading it needs transformers (pip install transformers)"
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return str(loaded.backend_tokenizer.to_str()), dict(loaded.special_tokens_map)
    except Exception as error:  # whatever it trips over
        raise UserError(f"{folder / older[0]} cannot be made a {TOKENIZER_FILE}: {error}") from error


def _known_to_transformers(folder: Path) -> bool:
    """Whether the folder names a class that says what else is done with a text, such as putting <s> before it."""
    name = read_json(folder / CONFIG_FILE).get("tokenizer_class")
    if not isinstance(name, str) or importlib.util.find_spec("transformers") is None:
        return False
    import transformers

    return hasattr(transformers, name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file.

    Raises:
        UserError: it is not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not an object")
    return values
