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
# Letters of another alphabet, a byte each: no language has so many letters with accents in a row.
_HIGH = re.compile("[\xa1-\xff]{6,}")
DIFFERENT_LETTERS = 4
# What lost characters and the quotation marks of UTF-8 look like in GBK.
_SIGNATURES = tuple(text.encode() for text in ("锟斤拷", "鈥"))
_WIDE = re.compile("[^\x00-\u02ff\u2000-\u206f\u3000-\u303f\uff00-\uff60\uffe0-\uffef]{6,}")
# What must be there (of the text in UTF-8), and the character set it may have been read as.
_READ_AS = ((b"", "gb18030"), (b"\xd0", "cp1251"), (b"\xef\xbd", "cp932"))
_OF_THREE_BYTES = re.compile(f"[\u0e00-\u0fff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af{REPLACEMENT}]")
_OF_TWO_BYTES = re.compile("[\u0391-\u03ce\u0400-\u045f\u05d0-\u05ea\u0620-\u064a]")
# of the bytes; two bytes look like a letter by chance in one Chinese character of ten
SHARE_OF_THREE, SHARE_OF_TWO = 0.6, 0.8
SAMPLE = 60
_ABOUT_ENCODING = re.compile(r"mojibake|character (?:set|encoding)|乱码|编码|文字化け|utf-?8", re.IGNORECASE)


def encoding_problem(text: str) -> tuple[str, str] | None:
    """(reason, what was seen) when `text` shows traces of a wrong decoding, else None."""
    raw = text.encode()  # bytes are searched ten times as fast; what they say is where a closer look is due
    if len(raw) != len(text):
        if REPLACEMENT in text:
            return "replacement_character", "U+FFFD stands where bytes could not be decoded"
        found = mojibake(text, raw)
        if found and not _ABOUT_ENCODING.search(text):
            return "mojibake", f"{found!r} looks like text decoded as the wrong character set"
    if b"\xc2" in raw or len(raw.translate(None, _CONTROL_BYTES)) != len(raw):
        control = _CONTROL.search(text)
        if control:
            return "control_character", f"U+{ord(control[0]):04X}"
    return None


def mojibake(text: str, raw: bytes) -> str:
    """The first piece that looks like text of another character set: UTF-8 read as one of Western Europe, Russia, China
    or Japan, or one of those read as Latin-1. "" when there is none. raw: the text in UTF-8."""
    if b"\xc3" in raw:
        certain = _CERTAIN.search(text)
        if certain:
            return certain[0]
        high = _HIGH.search(text)
        if high and len(set(filter(str.isalpha, high[0]))) >= DIFFERENT_LETTERS:
            return high[0][:8]
        pieces = _MULTIBYTE.findall(text)
        if len(pieces) >= MANY:
            return str(pieces[0])
    for signature in _SIGNATURES:
        if signature in raw:
            return signature.decode()
    for start in (0, len(text) // 2):
        run = _WIDE.search(text, start)
        if run:
            for trace, read_as in _READ_AS:
                if trace in raw and _was_utf8(run[0][:SAMPLE], read_as):
                    return run[0][:8]
    return ""


def _was_utf8(run: str, read_as: str) -> bool:
    """True when most bytes of `run` in this character set are letters in UTF-8: not all, since some get lost."""
    raw = run.encode(read_as, "replace")
    text = raw.decode("utf-8", "ignore")
    if len(text.encode()) < SHARE_OF_THREE * len(raw):
        return False
    if 3 * len(_OF_THREE_BYTES.findall(text)) >= SHARE_OF_THREE * len(raw):
        return True
    return 2 * len(_OF_TWO_BYTES.findall(text)) >= SHARE_OF_TWO * len(raw)
