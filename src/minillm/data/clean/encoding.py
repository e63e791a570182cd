"""Text that was decoded wrongly on its way: replacement characters, control characters, mojibake."""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"
# Tab, the line ends and form feed are white space; U+0085 is an old line end that real texts hold.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_CONTROL_BYTES = bytes(code for code in range(128) if _CONTROL.match(chr(code)))

# Bytes 0x80-0xbf of UTF-8 as they look when they are read as Latin-1 or Windows-1252.
_TRAILING = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
# Two of these in a row are one character in UTF-8; no language writes them so.
_CERTAIN = re.compile(f"Ã[\x80-\xbf€‚ƒ„†‡ˆ‰Š‹ŒŽ˜™š›œžŸ]|Â[\xa0-\xbf]|â€[{_TRAILING}]|ï»¿|ï¿½|ðŸ[{_TRAILING}]")
_MULTIBYTE = re.compile(f"[Â-ÓÖ-Û][{_TRAILING}]|[à-ï][{_TRAILING}]{{2}}|[ð-ô][{_TRAILING}]{{3}}")
MANY = 3  # multi-byte look-alikes that are too many for chance ("Spaß“" is one in a sound text)
_WIDE = re.compile("[^\x00-\u02ff\u2000-\u206f\u3000-\u303f\uff00-\uffef]{8,}")
_HAN = re.compile(f"[\u4e00-\u9fff{REPLACEMENT}]")
SAMPLE = 60


def encoding_problem(text: str) -> tuple[str, str] | None:
    """(reason, what was seen) when `text` shows traces of a wrong decoding, else None."""
    raw = text.encode()  # bytes are searched ten times as fast; what they say is where a closer look is due
    if len(raw) != len(text):
        if REPLACEMENT in text:
            return "replacement_character", "U+FFFD stands where bytes could not be decoded"
        found = mojibake(text, has_letters_of_latin_1=b"\xc3" in raw)
        if found:
            return "mojibake", f"{found!r} looks like text decoded as the wrong character set"
    if b"\xc2" in raw or len(raw.translate(None, _CONTROL_BYTES)) != len(raw):
        control = _CONTROL.search(text)
        if control:
            return "control_character", f"U+{ord(control[0]):04X}"
    return None


def mojibake(text: str, has_letters_of_latin_1: bool = True) -> str:
    """The first piece that looks like UTF-8 read as Latin-1, Windows-1252 or GBK; "" when there is none."""
    if has_letters_of_latin_1:
        certain = _CERTAIN.search(text)
        if certain:
            return certain[0]
        pieces = _MULTIBYTE.findall(text)
        if len(pieces) >= MANY:
            return str(pieces[0])
    for start in (0, len(text) // 2):
        run = _WIDE.search(text, start)
        if run and _was_utf8(run[0][:SAMPLE]):
            return run[0][:8]
    return ""


def _was_utf8(run: str) -> bool:
    """True when most GBK bytes of `run` are Chinese characters in UTF-8: not all, since some get lost on the way."""
    raw = run.encode("gb18030", "replace")
    found = _HAN.findall(raw.decode("utf-8", "ignore"))
    return 3 * len(found) >= 0.6 * len(raw)
