"""Furniture of web pages in answers: menus, cookie banners, copyright lines, buttons for sharing, links to more.

One phrase alone may be what a conversation is about. Several of different kinds at the ends of an answer are what was
around the text on a page.
"""

from __future__ import annotations

import re

EDGE = 200  # characters at either end of an answer, where the furniture of a page ends up
ENOUGH, MANY = 2, 4  # kinds of furniture; the latter where the question is about such things
ROW_OF_LINKS = 3  # names of pages side by side
LONGEST_ROW = 120  # characters

# Kinds of furniture: phrases in small letters and, where these say too little, a pattern that must be found as well.
_PHRASES = {
    "cookies": "cookie|クッキー|çerez",
    "consent": "accept all|reject all|manage preferences|by continuing to|got it!|接受所有|接受全部|全部接受|继续浏览",
    "rights": (
        "rights reserved|版权所有|版權所有|保留一切权利|保留所有权利|保留所有權利|版权声明|未经授权|未经许可|转载请|"
        "禁止转载|请注明出处|droits réservés|rechte vorbehalten|derechos reservados|direitos reservados|"
        "права защищены|prawa zastrzeżone|hakları saklı|bản quyền ©|無断転載|무단전재|الحقوق محفوظة"
    ),
    "copyright": "copyright|©|(c) 20",
    "navigation": (
        "skip to content|skip to main content|toggle navigation|you are here:|back to top|search for:|previous post|"
        "next post|« previous|next »|<< previous|next >>|当前位置|现在的位置|所在位置|上一篇|下一篇|上一页|下一页|"
        "返回顶部|回到顶部|打印本页|关闭窗口|收藏本站|加入收藏|设为首页|欢迎光临本站"
    ),
    "newsletter": "newsletter|subscribe|unsubscribe|your inbox|订阅|рассылку|abonnez",
    "sharing": "share|tweet this|follow us|pin it|like this:|分享|转发|扫码|扫一扫|二维码|公众号|シェア",
    "more": (
        "click here to|read more »|read more:|also read:|continue reading|log in to view|点击这里|点击查看|查看更多|"
        "阅读更多|阅读全文|阅读原文|更多精彩"
    ),
    "related": (
        "related articles|related posts|you may also like|recommended for you|相关阅读|相关推荐|相关文章|猜你喜欢|"
        "热门推荐|推荐阅读|関連記事"
    ),
    "posting": (
        "posted by|posted on|posted in|filed under|tagged with:|leave a comment|leave a reply|bookmark the permalink|"
        "powered by wordpress|comments (|责任编辑|发布时间|浏览次数|浏览：|点击数|阅读量：|字号：|字体：|最新评论|"
        "我要评论|本文来源|本文来自|本文转自|文章来源：|来源：互联网"
    ),
    "licence": "icp备|icp证|公网安备|经营许可证",
    "notice": (
        "友情链接|技术支持：|不良信息|举报电话|如有侵权|免责声明：|仅代表作者|report abuse|dmca|"
        "was this article helpful|found this helpful"
    ),
    "app": "download our app|app store|google play|下载app|客户端下载",
    "advertisement": "advertisement|sponsored|广告",
    "browser": "enable javascript|javascript is disabled|does not support|您的浏览器|启用javascript",
}
_PATTERNS = {
    "cookies": (
        r"cookies? (?:policy|settings|preferences|notice|consent)"
        r"|(?:uses?|using|use of|accept|accept all|reject all|our|utilis\w+|utiliz\w+|verwende\w*|używa\w*)"
        r"\s(?:\w+\s){0,3}(?:plików )?cookies?\b|использу\w+ (?:\w+ ){0,2}cookies?"
        r"|(?:使用|接受)[^。\n]{0,6}cookie|cookie[^。\n]{0,8}(?:提升|改善|确保|政策|设置)|クッキー|çerez"
    ),
    "copyright": (
        r"(?:copyright|©|\(c\))[\s:]*(?:copyright|©|\(c\))?\s*(?:19|20)\d\d|(?:19|20)\d\d\s*©|content copyright"
        r"|©[^\n]{0,40}(?:\b(?:inc|ltd|llc|corp|gmbh)\b|公司|(?:19|20)\d\d)"
    ),
    "newsletter": (
        r"(?:subscribe|sign up)[^.\n]{0,30}newsletter|subscribe (?:now|today|to (?:our|get|receive))|unsubscribe \|"
        r"|to your inbox|订阅(?:我们|本站)|на (?:нашу )?рассылку|abonnez-vous|(?:assine|inscr)[^.\n]{0,20}newsletter"
    ),
    "sharing": (
        r"share (?:this|on|via)\b|tweet this|follow us on|pin it|like this:|分享(?:到|至)"
        r"|点赞[^。\n]{0,6}(?:在看|转发|收藏)|扫码(?:关注|下载|添加|加)|扫一扫|(?:长按|识别|扫描)[^。\n]{0,6}二维码"
        r"|二维码[^。\n]{0,6}(?:关注|添加)|关注[^。\n]{0,10}公众号|微信公众号|シェアする"
    ),
    "advertisement": r"(?m)^\s*(?:advertisement|sponsored|广告)\s*$",
    "browser": r"enable javascript|javascript is disabled|browser does not support|您的浏览器|启用javascript",
}
_KINDS = [
    (kind, phrases.split("|"), re.compile(_PATTERNS[kind]) if kind in _PATTERNS else None)
    for kind, phrases in _PHRASES.items()
]
# Advertisements and letters have these for good reasons.
_INVITATIONS = {"newsletter", "sharing", "more", "app"}

# Names of links, which stand side by side in a menu.
_LINK_NAMES = {
    "menu": (
        "home|homepage|about|about us|contact|contact us|blog|news|products|services|support|help|faq|forum|search|"
        "menu|shop|store|pricing|docs|gallery|events|careers|archives|categories|articles|首页|主页|网站首页|"
        "返回首页|新闻|新闻中心|产品|产品中心|产品展示|关于|关于我们|联系我们|联系方式|帮助|帮助中心|论坛|搜索|文章|"
        "正文|手机版|accueil|à propos|startseite|kontakt|über uns|inicio|quiénes somos|contacto|início|sobre nós|"
        "главная|о нас|контакты|strona główna|o nas|trang chủ|giới thiệu|liên hệ|ana sayfa|hakkımızda|iletişim|"
        "ホーム|トップページ|会社概要|お問い合わせ|ニュース|홈|회사소개|الرئيسية|من نحن|اتصل بنا"
    ),
    "account": (
        "log in|login|sign in|sign up|register|create account|my account|cart|checkout|登录|注册|免费注册|请登录|"
        "登录/注册|忘记密码|我的订单|购物车|退出|connexion|anmelden|entrar|войти|ログイン|로그인|회원가입"
    ),
    "policies": (
        "privacy|privacy policy|cookie policy|terms|terms of use|terms of service|terms and conditions|"
        "terms & conditions|cookies|legal|legal notice|sitemap|site map|unsubscribe|manage preferences|"
        "view in browser|隐私|隐私政策|隐私声明|用户协议|法律声明|网站地图|mentions légales|impressum|datenschutz|"
        "политика конфиденциальности"
    ),
}
_LINKS = {name: kind for kind, names in _LINK_NAMES.items() for name in names.split("|")}
_BETWEEN_LINKS = re.compile(r"\s*[|｜»›>·•/]+\s*|\s{2,}|\t")

# One of these is found wherever there is much furniture. Without them nothing else is looked for: that takes time.
_SIGNS = {
    "latin": (
        "cookie;reserved;copyright;continuing;accept all;skip to ;toggle nav;you are here;back to top;previous;"
        "related ;posted ;leave a ;powered by;comments (;advertisement;javascript; | ;home;log in;login;sign in"
    ),
    "accented": "©;»;réservés;vorbehalten;derechos;direitos;права;prawa;hakları",
    "chinese": (
        "cookie;copyright;©;reserved;版权;版權;保留所有;转载;当前位置;在的位置;上一;返回顶部;关闭窗口;收藏本站;首页;"
        "相关阅读;相关推荐;猜你喜欢;责任编辑;发布时间;点击数;最新评论;本文来;icp;公网安备;友情链接;侵权;免责声明;广告\n;"
        "登录;联系我们"
    ),
    "eastern": "©;copyright;cookie;クッキー;無断;関連記事;ホーム;トップページ;홈;무단;로그인",
}
_LATIN, _ACCENTED, _CHINESE, _EASTERN = (signs.split(";") for signs in _SIGNS.values())
_ABOUT = re.compile(
    r"copyright|footer|cookie|newsletter|privacy|disclaimer|\bmenu|navigation|web ?(?:page|site)|home ?page|advert"
    r"|marketing|slogan|call to action|campaign|promot"
    r"|版权|页脚|导航|公众号|订阅|隐私|声明|网页|网站|广告|营销|宣传|推广|文案",
    re.IGNORECASE,
)


def furniture_problem(question: str, answer: str) -> str:
    """The furniture of a page at the ends of `answer`, in words; "" when there is too little to tell."""
    edges = (answer if len(answer) <= 2 * EDGE else f"{answer[:EDGE]}\n{answer[-EDGE:]}").lower()
    if not _worth_a_look(edges):
        return ""
    found = _rows_of_links(edges)
    for kind, phrases, pattern in _KINDS:
        phrase = next((phrase for phrase in phrases if phrase in edges), "")
        seen = pattern.search(edges) if phrase and pattern else None
        if seen or phrase and not pattern:
            found[kind] = seen[0] if seen else phrase
    if len(found) < ENOUGH or not found.keys() - _INVITATIONS:
        return ""
    if len(found) < MANY and _ABOUT.search(question):
        return ""
    return f"furniture of a page: {', '.join(map(repr, list(found.values())[:3]))}"


def _worth_a_look(edges: str) -> bool:
    """A quick look, which says True of one answer in twenty."""
    if edges.isascii():
        signs = _LATIN
    elif len(edges.encode()) < 2.2 * len(edges):
        signs = _LATIN + _ACCENTED
    else:
        signs = _EASTERN if "の" in edges or "다" in edges else _CHINESE
    return any(map(edges.__contains__, signs))


def _rows_of_links(edges: str) -> dict[str, str]:
    """Kinds of links in lines that consist of links and little else."""
    lines = edges.strip().split("\n")
    found = {}
    for number, line in enumerate(lines):
        at_an_end = number == 0 or number == len(lines) - 1
        if len(line) > LONGEST_ROW or not at_an_end and 3 <= number < len(lines) - 3:
            continue
        parts = _BETWEEN_LINKS.split(line.strip(" |>"))
        if len(parts) == 1:
            parts = line.split()
        known = [part for part in parts if part in _LINKS]
        row = len(parts) >= ROW_OF_LINKS and at_an_end and ("|" in line or "｜" in line)
        if known and row or len(known) >= ENOUGH and 2 * len(known) >= len(parts):
            found.update({_LINKS[part]: part for part in known})
            if row or len(known) >= ROW_OF_LINKS:
                found["links"] = line.strip()[:40]
    return found
