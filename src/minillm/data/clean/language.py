"""Which language a conversation is in: English and Chinese by their looks, others by py3langid where that is wanted."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from minillm.log import UserError

SAMPLE = 1_000  # characters that are looked at
FEWEST_LETTERS = 20  # fewer tell nothing
CHINESE = {"wuu": "zh", "yue": "zh", "lzh": "zh"}  # written like it
LIKELY, UNLIKELY = 0.5, 0.05  # probabilities of another language, and of the wanted ones together
UNDECIDED = "undecided"
# The words that hold English sentences together. Other languages share a few of them ("in", "was"), none shares many.
_ENGLISH = frozenset(
    """the of and to is that it for you with as are this be or by from have not can your an will has was were what which
    how they their there would when these about if we more its also but she he his her""".split()  # noqa: SIM905
)
ENGLISH_SHARE = 0.12
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_KANA = re.compile("[\u3041-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7af\u1100-\u11ff]")
_WORD = re.compile(r"[^\W\d_]+")
HAN_WEIGHT = 4  # a character says as much as so many letters


def quick_language(text: str) -> str:
    """ "en", "zh", "ja" or "ko" where letters and little words tell, else "undecided"."""
    if not text.isascii():
        han, kana, hangul = (len(script.findall(text)) for script in (_HAN, _KANA, _HANGUL))
        wide = han + kana + hangul
        if wide * HAN_WEIGHT >= len(text) - wide:
            if hangul * 2 > wide:
                return "ko"
            return "ja" if kana * 5 > wide else ("zh" if han * 2 > wide else UNDECIDED)
    words = text.lower().split()
    if len(words) >= 4 and sum(map(_ENGLISH.__contains__, words)) >= ENGLISH_SHARE * len(words):
        return "en"
    return UNDECIDED


@lru_cache(maxsize=1)
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(
            "--languages needs py3langid to tell languages apart. Install it with: pip install 'minillm-trainer[data]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_model() -> None:
    """Raises UserError when the package that tells languages apart is not installed."""
    _model()


def language_of(text: str, wanted: tuple[str, ...]) -> str:
    """The ISO 639-1 code of the language of `text`; "undecided" where there is too little of it, or where it
    may as well be one of the wanted ones."""
    text = text[:SAMPLE]
    quick = quick_language(text)
    if quick != UNDECIDED:
        return quick
    letters = " ".join(_WORD.findall(text))
    if len(letters) < FEWEST_LETTERS:
        return UNDECIDED
    ranking = _model().rank(letters)
    language, probability = CHINESE.get(ranking[0][0], ranking[0][0]), ranking[0][1]
    if language in wanted:
        return str(language)
    is_other = probability >= LIKELY and sum(share for name, share in ranking if name in wanted) <= UNLIKELY
    return str(language) if is_other else UNDECIDED
