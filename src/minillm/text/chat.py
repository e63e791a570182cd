"""Conversations -> tokens. One Jinja template serves training, generation, and other programs.

A turn is `<|im_start|>role`, a newline, the content, `<|im_end|>`, a newline. Nothing is added that the
conversation does not contain. The template itself defuses control tokens written inside a content
(`<|im_end|>` becomes `<|im_end |>`), so nobody can forge a turn, whichever program renders it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from minillm.log import UserError
from minillm.text.roles import OURS
from minillm.text.tokenizer import CONTROL_TOKENS, Tokenizer

if TYPE_CHECKING:
    import jinja2
    from jinja2.ext import Extension

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")

_DEFUSE = "".join(f" | replace('{token}', '{token[:-2]} {token[-2:]}')" for token in CONTROL_TOKENS)

_CONTENT = (
    """    {%- set content = message['content'] if message['content'] is string else '' -%}
    {%- set content = content"""
    + _DEFUSE
    + " -%}\n"
)

# An answer is trimmed so that its first token never merges with the newline after the role: the border
# between what is given and what is learned lies between two tokens.
CHAT_TEMPLATE = (
    """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('unknown role: ' + message['role'] | string) -}}
    {%- endif -%}
"""
    + _CONTENT
    + """\
    {%- if message['role'] == 'assistant' -%}
        {%- set content = content | trim -%}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)


# The form in which Alpaca's rows were first trained on. An input stands in the user's turn, after "### Input:".
CLASSIC_TEMPLATE = (
    """\
{%- for message in messages -%}
"""
    + _CONTENT
    + """\
    {%- if message['role'] == 'assistant' -%}
        {{- '### Response:\\n' + content | trim + '<|endoftext|>' -}}
    {%- elif message['role'] == 'system' -%}
        {{- content + '\\n\\n' -}}
    {%- else -%}
        {{- '### Instruction:\\n' + content + '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""
)
TEMPLATES = {"chatml": CHAT_TEMPLATE, "classic": CLASSIC_TEMPLATE}


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """The conversation as one text, through the tokenizer's chat template in a sandbox.

    Raises UserError for a message without role or content, an unknown role, or a broken template.
    """
    check_messages(messages)
    if tokenizer.roles != OURS:  # our own templates do it themselves
        messages = [{**message, "content": _defused(tokenizer, message["content"])} for message in messages]
    variables = tokenizer.roles.template_variables
    return render_template(tokenizer.chat_template, messages, variables, add_generation_prompt=add_generation_prompt)


def render_template(
    template: str,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation through any chat template, with the variables transformers gives it (eos_token and its kin).

    Raises UserError for a template that is broken or refuses the conversation.
    """
    import jinja2

    try:
        return _compile(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"The chat template cannot render this conversation: {error}") from error


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids [L] and loss mask [L] of a conversation.

    The mask is True exactly on what an assistant says, its `<|im_end|>` included. The ids are those of the
    rendered template. Raises UserError as `render_chat` does.
    """
    ids, masks = encode_chats(tokenizer, [messages], add_generation_prompt=add_generation_prompt)
    return ids[0], masks[0]


def encode_chats(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, str]]], *, add_generation_prompt: bool = False
) -> tuple[list[list[int]], list[list[bool]]]:
    """As `encode_chat` for several conversations, with one call of the tokenizer for all, which uses its threads."""
    if tokenizer.adds_space:
        return _encoded_whole(tokenizer, conversations, add_generation_prompt=add_generation_prompt)
    if tokenizer.roles.control[2:4] == OURS.control[2:4] and _has_turn_tokens(tokenizer.chat_template):
        texts = [render_chat(tokenizer, each, add_generation_prompt=add_generation_prompt) for each in conversations]
        ids = tokenizer.encode_batch(texts, parse_special=True)
        return ids, [answer_mask(tokenizer, tokens) for tokens in ids]
    parts = [chat_parts(tokenizer, each, add_generation_prompt=add_generation_prompt) for each in conversations]
    encoded = iter(tokenizer.encode_batch([text for row in parts for text, _ in row], parse_special=True))
    ids, masks = [], []
    for row in parts:
        pieces = [(next(encoded), answer) for _, answer in row]
        ids.append([token for piece, _ in pieces for token in piece])
        masks.append([answer for piece, answer in pieces for _ in piece])
    return ids, masks


def _encoded_whole(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, str]]], *, add_generation_prompt: bool
) -> tuple[list[list[int]], list[list[bool]]]:
    """For tokenizers that put a space before a text: parts of a conversation would get one each. A token belongs to
    the part in which it begins."""
    ids, masks = [], []
    for messages in conversations:
        parts = chat_parts(tokenizer, messages, add_generation_prompt=add_generation_prompt)
        tokens, starts = tokenizer.encode_with_starts("".join(text for text, _ in parts))
        ends = list(accumulate(len(text) for text, _ in parts))
        ids.append(tokens)
        masks.append([parts[min(bisect_right(ends, start), len(parts) - 1)][1] for start in starts])
    return ids, masks


def _defused(tokenizer: Tokenizer, content: str) -> str:
    """A text in which control tokens of an imported tokenizer are no longer such: nobody can forge a turn."""
    for token in tokenizer.special_tokens.values():
        if token in content:
            content = content.replace(token, f"{token[:-2]} {token[-2:]}")
    return content


def chat_parts(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> list[tuple[str, bool]]:
    """The rendered conversation as (text, is it an answer with its end), for templates of any kind: an answer is what a
    turn adds to the generation prompt before it. Parts are encoded one by one, as generation will see them.

    Raises UserError as `render_chat` does, and for a template that writes an earlier turn differently later.
    """
    parts: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        given = render_chat(tokenizer, messages[:index], add_generation_prompt=True)
        answered = render_chat(tokenizer, messages[: index + 1])
        if not (given.startswith(done) and answered.startswith(given)):
            raise UserError(
                "The chat template writes turns differently once others follow: what is an answer in it cannot be told"
            )
        parts += [(given[len(done) :], False), (answered[len(given) :], True)]
        done = answered
    rest = render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)[len(done) :]
    return parts + [(rest, False)] * bool(rest)


def answer_mask(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
    """Loss mask [L] of encoded turns [L]: True from after an assistant's header through its `<|im_end|>`.

    An answer that has no end yet (a generation prompt, a cut conversation) is masked to the end.
    """
    header = [tokenizer.start_of_turn_id, *_role_ids(tokenizer, "assistant")]
    mask = [False] * len(ids)
    position = 0
    while position < len(ids):
        if ids[position] != header[0] or list(ids[position : position + len(header)]) != header:
            position += 1
            continue
        position += len(header)
        while position < len(ids):
            mask[position] = True
            position += 1
            if ids[position - 1] == tokenizer.end_of_turn_id:
                break
    return mask


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """UserError unless every message has a known role and a text (which may be empty)."""
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise UserError(f"message {number}: the role is {role!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {number} ({role}): the content must be text")


def _role_ids(tokenizer: Tokenizer, role: str) -> list[int]:
    return tokenizer.encode(role + "\n")


@lru_cache(maxsize=16)
def _has_turn_tokens(template: str) -> bool:
    """Do answers begin with ChatML's header, so that tokens tell where they are?"""
    import jinja2

    try:
        probe = _compile(template).render(messages=[{"role": "user", "content": "?"}], add_generation_prompt=True)
    except jinja2.TemplateError:
        return False  # rendering the conversation itself will tell why
    return probe.endswith("<|im_start|>assistant\n")


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # as transformers sets them: the same template renders the same text
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_blocks()]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _generation_blocks() -> type[Extension]:
    """{% generation %} ... {% endgeneration %}, by which a template may mark answers: read, and otherwise nothing."""
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock, Node
    from jinja2.parser import Parser

    class Blocks(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> Node | list[Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Callable[[], str]) -> str:
            return caller()

    return Blocks
