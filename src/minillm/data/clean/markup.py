"""Remains of web pages in answers: tags, entities, trackers, menus, cookie banners, copyright lines.

Code is not a remain. What stands between backticks is left out of the search, and where the conversation is about
markup or scripts, only what no answer would write is a remain.
"""

from __future__ import annotations

import re

_CODE = re.compile(r"```.*?```|~~~.*?~~~|``[^`\n]+``|`[^`\n]+`", re.DOTALL)
_NAMES = (
    "abbr|article|aside|blockquote|body|br|button|center|div|em|font|footer|form|h[1-6]|head|header|hr|html|iframe|"
    "img|input|ins|label|li|link|main|meta|nav|noscript|ol|option|pre|script|section|select|small|span|strong|style|"
    "sub|sup|svg|table|tbody|td|tfoot|th|thead|title|tr|ul|video"
)
_NAMES = f"(?:(?i:{_NAMES})|[abipu])"  # a capital letter in angle brackets is a type of a program
_TAG = re.compile(rf"<(?:/{_NAMES}\s*|{_NAMES}(?:\s+[^<>]*)?/?)>|<!--|<!(?i:doctype)")
_NO_PLACEHOLDER = re.compile(r"</|<!|<(?:br|hr|p|li|img)\b")  # <title> alone may stand for a title to fill in
_ATTRIBUTES = re.compile(rf"<{_NAMES}\s+[\w:-]+\s*=\s*[\"'][^<>]*>")
_LOUD = re.compile(r"<(?:script|style|iframe|noscript)\b[^<>]*>|<!--.{0,2000}?-->", re.IGNORECASE | re.DOTALL)
_ENTITY = re.compile(
    r"&(?:amp;)?(?:nbsp|amp|lt|gt|quot|apos|ldquo|rdquo|lsquo|rsquo|hellip|mdash|ndash|middot|bull|copy|reg|trade|"
    r"laquo|raquo|ensp|emsp|times|#\d{2,6}|#[xX][0-9a-fA-F]{2,5});"
)
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
# Programs that count visitors, and links from page to page: part of no answer whatever it is about.
_TRACKER = re.compile(
    r"_gaq\b|_trackPageview|GoogleAnalyticsObject|googletagmanager|google-analytics|googletag\.|adsbygoogle|gtag\(['\"]"
    r"|ga\(['\"](?:create|send)|fbq\(['\"]|_hmt\b|hm\.baidu\.com|cnzz|_paq\b"
    r"|<a\s[^<>]*>\s*(?:next|prev|previous|home|back|more|read more|next page|[上下]一[页篇]|首页|返回|更多)"
    r"\s*(?:&raquo;|»|→)?\s*</a>",
    re.IGNORECASE,
)

# Phrases of page furniture. Two different ones are needed: each alone may be what a conversation is about.
_CHROME: dict[str, tuple[str, ...]] = {
    "cookies": ("we use cookies", "uses cookies to", "cookie policy", "accept all cookies", "accept cookies",
                "本网站使用cookie", "我们使用cookie", "使用 cookie"),
    "accept": ("accept all", "manage preferences", "接受所有", "接受全部", "全部接受"),
    "rights": ("all rights reserved", "版权所有", "保留一切权利", "保留所有权利", "保留所有權利", "未经授权不得转载",
               "未经许可不得转载", "转载请注明"),
    "copyright": ("copyright ©", "copyright (c)", "© 20", "© 19", "©20", "©19", "copyright 20"),
    "menu": ("home | ", "| about", "| contact", "home > ", "home » ", "首页 |", "首页|", "| 首页", "首页 >", "首页>",
             "当前位置", "skip to content", "skip to main content", "toggle navigation", "网站地图", "site map |"),
    "account": ("log in | ", "login | ", "sign in | ", "| sign up", "| register", "| log in", "| login", "登录 |",
                "| 登录", "登录|", "注册 |", "| 注册", "登录/注册", "登录 / 注册"),
    "newsletter": ("subscribe to our newsletter", "sign up for our newsletter", "subscribe now", "订阅我们的"),
    "share": ("share on facebook", "share on twitter", "share this:", "tweet this", "follow us on", "pin it",
              "分享到", "关注我们的公众号", "扫码关注", "扫一扫", "关注公众号", "微信公众号"),
    "more": ("click here to", "read more »", "continue reading", "点击这里查看", "点击查看更多", "查看更多", "阅读更多",
             "点击阅读全文", "阅读全文", "展开全文"),
    "policy": ("privacy policy |", "terms of service |", "terms of use |", "| privacy", "| terms", "隐私政策 |",
               "| 隐私政策", "用户协议 |", "联系我们 |", "| 联系我们", "关于我们 |", "| 关于我们", "icp备"),
    "reading": ("related articles", "related posts", "leave a comment", "leave a reply", "posted by", "上一篇",
                "下一篇", "相关阅读", "责任编辑", "本文来源"),
    "browser": ("enable javascript", "javascript is disabled", "your browser does not support", "您的浏览器",
                "启用javascript"),
}  # fmt: skip
_PHRASES = {
    ascii_only: [[phrase for phrase in group if phrase.isascii() or not ascii_only] for group in _CHROME.values()]
    for ascii_only in (True, False)
}
_ABOUT_FURNITURE = re.compile(
    r"copyright|footer|cookie|newsletter|privacy|disclaimer|\bmenu|navigation|版权|页脚|导航|公众号|订阅|隐私|声明",
    re.IGNORECASE,
)
MANY_KINDS = 4  # that are no part of an answer even where the question is about such things
_EDGE = 300  # characters at either end of an answer, where the furniture of a page ends up


def markup_problem(question: str, answer: str) -> str:
    """What remains of a web page in `answer`, in words; "" when there is nothing."""
    furniture = _furniture(answer)
    if len(furniture) >= MANY_KINDS or (len(furniture) >= 2 and not _ABOUT_FURNITURE.search(question)):
        return f"furniture of a page: {', '.join(map(repr, furniture[:3]))}"
    if "<" not in answer and "&" not in answer:
        return ""
    prose = _CODE.sub(" ", answer) if "`" in answer or "~~~" in answer else answer
    tracker = _TRACKER.search(prose)
    if tracker:
        return f"a part of a page: {_shown(tracker[0])}"
    tags = _TAG.findall(prose)
    entities = _ENTITY.findall(prose)
    if not tags and not entities:
        return ""
    mangled = _MANGLED.search(prose)
    if mangled:
        return f"entities: {_shown(mangled[0])}"
    lowered = prose.lower()
    if _ABOUT_MARKUP.search(question) or "<html" in lowered or "<!doctype" in lowered:
        return _wrapping(prose, tags, answer) if len(prose) < len(answer) else ""
    if _ABOUT_PAGES.search(question):
        return _wrapping(prose, tags, answer)
    if entities:
        return f"entities: {_shown(entities[0])}"
    if (len(tags) >= 2 and any(map(_NO_PLACEHOLDER.match, tags))) or _ATTRIBUTES.search(prose) or _LOUD.search(prose):
        return f"tags: {_shown(tags[0])}"
    return ""


def _wrapping(prose: str, tags: list[str], answer: str) -> str:
    """Tags with attributes around what is mostly prose: part of the page that the text came from."""
    stripped = prose.strip()
    around = stripped.startswith("<") and stripped.endswith(">") and _ATTRIBUTES.search(stripped)
    mostly_prose = sum(map(len, tags)) < 0.5 * len(answer)
    return f"tags around the text: {_shown(tags[0])}" if around and mostly_prose else ""


def _furniture(answer: str) -> list[str]:
    """One phrase of each kind of furniture at the ends of `answer`."""
    edges = answer if len(answer) <= 2 * _EDGE else f"{answer[:_EDGE]}\n{answer[-_EDGE:]}"
    edges = edges.lower()
    found = []
    for phrases in _PHRASES[edges.isascii()]:
        for phrase in phrases:
            if phrase in edges:
                found.append(phrase)
                break
    return found


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
