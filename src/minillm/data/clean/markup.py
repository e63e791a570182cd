"""Remains of web pages in answers: tags, entities, scripts and style sheets; furniture.py looks for the words of pages.

Code is not a remain. What stands between backticks is left out of the search, and where the conversation is about
markup or scripts, only what no answer would write is a remain.
"""

from __future__ import annotations

import re
from html.entities import name2codepoint

from minillm.data.clean.furniture import furniture_problem

_CODE = re.compile(r"```.*?```|~~~.*?~~~|``[^`\n]+``|`[^`\n]+`", re.DOTALL)
_NAMES = (
    "abbr|article|aside|blockquote|body|br|button|caption|center|dd|del|div|dl|dt|em|embed|fieldset|figcaption|figure|"
    "font|footer|form|h[1-6]|head|header|hr|html|iframe|img|input|ins|label|li|link|main|meta|nav|noscript|ol|option|"
    "pre|script|section|select|small|span|strike|strong|style|sub|sup|svg|table|tbody|td|textarea|tfoot|th|thead|title|"
    "tr|ul|video"
)
_NAMES = f"(?:(?i:{_NAMES})|[abipu])"  # a capital letter in angle brackets is a type of a program
_TAG = re.compile(rf"<(?:/{_NAMES}\s*|{_NAMES}(?:\s[^<>]*)?/?)>|<!--|<!(?i:doctype)|<!\[CDATA\[")
_NO_PLACEHOLDER = re.compile(r"</|<!|<(?:br|hr|p|li|img)\b")  # <title> alone may stand for a title to fill in
_ATTRIBUTES = re.compile(rf"<{_NAMES}\s+[\w:-]+\s*=\s*[\"'][^<>]*>")
_LOUD = re.compile(r"<(?:script|style|iframe|noscript)\b[^<>]*>|<!--.{0,2000}?-->|<!\[CDATA", re.IGNORECASE | re.DOTALL)
# Names of letters and signs of print. Those of mathematics (&sum;) are what programs call their variables.
_ENTITIES = "|".join(name for name, code in name2codepoint.items() if code < 0x100 or 0x2000 <= code < 0x2100)
_ENTITY = re.compile(rf"&(?:amp;)?(?:(?:{_ENTITIES}|apos|trade|#\d{{2,6}}|#[xX][0-9a-fA-F]{{2,5}});|nbsp\b)")
# Double escaping, and entities in the place of spaces between words, are no part of a text about entities either.
_MANGLED = re.compile(r"&amp;(?:nbsp|lt|gt|quot|amp|#\d+);|[\w,.;:，。；：、]&nbsp;\w[^&]*&nbsp;\w")
_ABOUT_MARKUP = re.compile(
    r"html|css|\bxml|\bsvg\b|javascript|\bjs\b|jquery|\bjsx|typescript|markup|markdown|\btags?\b|selenium|soup|scrap(?:e|ing)"
    r"|标签|爬虫|脚本|转义",
    re.IGNORECASE,
)
_ABOUT_PAGES = re.compile(
    r"web ?pages?|web ?sites?|front-?end|\bphp|react\.?js|angular|\bvue\b|网页|网站|前端|页面", re.IGNORECASE
)
# Programs that count visitors: part of no answer whatever it is about.
_TRACKER = re.compile(
    r"_gaq\b|_trackPageview|GoogleAnalyticsObject|googletagmanager|google-analytics|googletag\.|adsbygoogle|gtag\(['\"]"
    r"|ga\(['\"](?:create|send)|fbq\(['\"]|_hmt\b|hm\.baidu\.com|cnzz|_paq\b"
    r"|window\.dataLayer",
    re.IGNORECASE,
)
_LINK_ON = re.compile(
    r"<a\s[^<>]*>\s*(?:next|prev|previous|home|back|more|read more|next page|[上下]一[页篇]|首页|返回|更多)"
    r"\s*(?:&raquo;|»|→)?\s*</a>",
    re.IGNORECASE,
)
# Scripts and style sheets that lost their tags.
_BARE = re.compile(
    r"\$\(document\)|document\.(?:write|createElement|getElementById)\("
    r"|(?:^|[\s}])(?:[.#][A-Za-z][\w-]*|body|html|div|p|a|ul|li|h[1-6])\s*\{\s*[a-z-]+\s*:[^{}]*\}"
)
_BLOCKS = "p|br|hr|div|span|li|ul|ol|dl|dd|tr|td|table|center|font|section|article|h[1-6]"
_AT_AN_END = re.compile(rf"\A<(?:{_BLOCKS})\b[^<>]*>|</?(?:{_BLOCKS})\b[^<>]*>\Z", re.IGNORECASE)


def markup_problem(question: str, answer: str) -> str:
    """What remains of a web page in `answer`, in words; "" when there is nothing."""
    furniture = furniture_problem(question, answer)
    if furniture:
        return furniture
    if "<" not in answer and "&" not in answer and "{" not in answer and "('" not in answer:
        return ""
    prose = _CODE.sub(" ", answer) if "`" in answer or "~~~" in answer else answer
    tracker = _TRACKER.search(prose)
    if tracker:
        return f"a part of a page: {_shown(tracker[0])}"
    about_markup = _ABOUT_MARKUP.search(question)
    tags = _TAG.findall(prose)
    entities = _ENTITY.findall(prose)
    if not tags and not entities:
        bare = None if about_markup else _BARE.search(prose)
        return f"a script or style sheet: {_shown(bare[0].strip())}" if bare else ""
    mangled = _MANGLED.search(prose)
    if mangled:
        return f"entities: {_shown(mangled[0])}"
    link = _LINK_ON.search(prose)
    if link and _mostly_prose(tags, answer):
        return f"a link of a page: {_shown(link[0])}"
    lowered = prose.lower()
    if about_markup or "<html" in lowered or "<!doctype" in lowered:
        return _wrapping(prose, tags, answer) if len(prose) < len(answer) else ""
    if _ABOUT_PAGES.search(question):
        return _wrapping(prose, tags, answer)
    if entities:
        return f"entities: {_shown(entities[0])}"
    if len(tags) >= 2 and any(map(_NO_PLACEHOLDER.match, tags)):
        return f"tags: {_shown(tags[0])}"
    if _AT_AN_END.search(prose.strip()) or _ATTRIBUTES.search(prose) or _LOUD.search(prose):
        return f"tags: {_shown(tags[0])}"
    return ""


def _wrapping(prose: str, tags: list[str], answer: str) -> str:
    """Tags with attributes around what is mostly prose: part of the page that the text came from."""
    stripped = prose.strip()
    around = stripped.startswith("<") and stripped.endswith(">") and _ATTRIBUTES.search(stripped)
    return f"tags around the text: {_shown(tags[0])}" if around and _mostly_prose(tags, answer) else ""


def _mostly_prose(tags: list[str], answer: str) -> bool:
    return sum(map(len, tags)) < 0.5 * len(answer)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
