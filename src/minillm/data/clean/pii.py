"""Masking of personal data: e-mail addresses, telephone and identity card numbers, credit cards, IP addresses."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from datetime import date

_WORTH_A_LOOK = re.compile(r"@|\d{3}|\d\.\d|::|\+\d\d", re.ASCII)

# ASCII only: a Chinese character may stand right before and behind what is masked.
_EMAIL = re.compile(r"(?<![\w.%+-])\w[\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])", re.ASCII)
_ID_CARD = re.compile(r"(?<!\w)[1-9]\d{16}[\dXx](?!\w)", re.ASCII)
_CARD = re.compile(
    r"(?<![\w.-])(?:[2-6]\d{12,18}|[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{1,7}|3[47]\d{2}([ -])\d{6}\2\d{5})(?![\w-]|[.,]\d)",
    re.ASCII,
)
_PHONE = re.compile(
    r"""(?<![\w.,/+-])(?:
        (?:\+?86[ -]?|\(\+?86\)[ ]?)?1[3-9]\d(?:[ -]?\d{4}){2}           # Chinese mobile
      | (?:\+86[ -]?)?\(?0(?:10|2\d|[3-9]\d{2})[) -]{1,2}\d{7,8}            # Chinese landline, with its area
      | [48]00-(?:\d{3}-\d{4}|\d{4}-\d{3})                                 # Chinese service numbers
      | \+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,5}                         # international
      | (?:1[ .-])?(?:\([2-9]\d{2}\)[ ]?|[2-9]\d{2}[.-])[2-9]\d{2}[.-]\d{4}    # North American
    )(?![\w-]|[.,]\d)""",
    re.VERBOSE | re.ASCII,
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])", re.ASCII)


def _is_id_card(number: str) -> bool:
    """A Chinese identity card number: a birthday and the check digit of ISO 7064 (mod 11-2)."""
    try:
        date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    weighted = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[weighted % 11] == number[17].upper()


def _is_card(number: str) -> bool:
    """13 to 19 digits with the check digit of Luhn."""
    digits = [int(character) for character in number if character.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 2:
        return False
    doubled = (digit if place % 2 == 0 else (digit * 2 - 9 if digit > 4 else digit * 2)
               for place, digit in enumerate(reversed(digits)))  # fmt: skip
    return sum(doubled) % 10 == 0


def _is_phone(number: str) -> bool:
    digits = sum(map(str.isdigit, number))
    return (10 if number.startswith("+") else 7) <= digits <= 15


def _is_public_address(text: str) -> bool:
    """Addresses of one's own machine or network name nobody."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _always(text: str) -> bool:
    return True


# In this order: an identity card number would else be taken for a credit card's, and that for a telephone's.
KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", _EMAIL, _always),
    ("id_card", _ID_CARD, _is_id_card),
    ("credit_card", _CARD, _is_card),
    ("ip_address", _IPV4, _is_public_address),
    ("ip_address", _IPV6, _is_public_address),
    ("phone", _PHONE, _is_phone),
)


def mask(text: str, counts: Counter[str]) -> str:
    """`text` with personal data replaced by [EMAIL], [ID_CARD], [CREDIT_CARD], [IP_ADDRESS] or [PHONE]; adds to
    `counts` how many of each kind there were."""
    if not _WORTH_A_LOOK.search(text):
        return text
    for kind, pattern, holds in KINDS:

        def replaced(match: re.Match[str], kind: str = kind, holds: Callable[[str], bool] = holds) -> str:
            if not holds(match[0]):
                return match[0]
            counts[kind] += 1
            return f"[{kind.upper()}]"

        text = pattern.sub(replaced, text)
    return text
