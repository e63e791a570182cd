"""The words of the demo world, English beside Chinese, and the little grammar they need."""

# ruff: noqa: E501 (tables)

from __future__ import annotations


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    """Entries divided by `;` or a new line, their columns by commas."""
    entries = text.replace("\n", ";").split(";")
    return tuple(tuple(entry.strip().split(",")) for entry in entries if entry.strip())


GIRLS = {
    "en": "Anna Lily Mia Emma Nora Clara Rose Ella Ivy Ruth Alice Lucy Grace Sara Helen Kate Jane Molly Daisy Hazel",
    "zh": "小红 小丽 小芳 小雨 小梅 小兰 小玲 小雪 小燕 小静 婷婷 佳佳 王芳 李娜 陈静 张敏 周婷 赵雪 吴霞 孙悦",
}
BOYS = {
    "en": "Tom Ben Leo Max Sam Jack Oscar Hugo Peter Henry Finn Theo Noah Adam Eric Felix Luke Paul Simon Victor",
    "zh": "小明 小刚 小强 小军 小华 小亮 小宇 小杰 小龙 小虎 乐乐 豆豆 王强 李雷 陈浩 张伟 周涛 赵磊 吴凡 孙亮",
}
CHILDREN_PER_LIST = 12  # the first twelve of each list are children, the others grown up

# English, Chinese
COLOURS = _table("""\
red,红色; blue,蓝色; green,绿色; yellow,黄色; white,白色; black,黑色; brown,棕色; pink,粉色; purple,紫色;
orange,橙色; grey,灰色; golden,金色""")
MATERIALS = {
    "wood": "木头", "paper": "纸", "glass": "玻璃", "iron": "铁", "silver": "银", "wool": "羊毛", "leather": "皮革",
    "cotton": "棉布", "plastic": "塑料", "clay": "陶土", "silk": "丝绸", "straw": "稻草", "stone": "石头", "brass": "黄铜",
}  # fmt: skip
# English, plural if irregular, Chinese, measure word, what it can be made of
OBJECTS = _table("""\
ball,,皮球,个,leather plastic; kite,,风筝,只,paper silk; book,,书,本,paper; lantern,,灯笼,盏,paper silk;
basket,,篮子,个,straw wood; umbrella,,雨伞,把,silk cotton; key,,钥匙,把,iron brass silver;
cup,,杯子,个,clay glass; hat,,帽子,顶,straw wool; scarf,scarves,围巾,条,wool silk;
watch,watches,手表,块,silver brass; bell,,铃铛,个,brass silver; toy boat,,玩具船,艘,wood plastic;
drum,,小鼓,面,wood leather; map,,地图,张,paper silk; mirror,,镜子,面,glass silver;
lamp,,台灯,盏,glass brass; spoon,,勺子,把,wood silver; box,boxes,盒子,个,wood paper;
doll,,布娃娃,个,cotton wool; ring,,戒指,枚,silver brass; button,,纽扣,颗,wood plastic;
whistle,,哨子,个,wood plastic; candlestick,,烛台,个,brass clay; pencil,,铅笔,支,wood;
bottle,,瓶子,个,glass plastic; plate,,盘子,个,clay wood; blanket,,毯子,条,wool cotton;
flute,,笛子,支,wood silver; rope,,绳子,根,cotton straw; backpack,,背包,个,leather cotton;
coin,,硬币,枚,silver brass; letter,,信,封,paper; clock,,闹钟,个,brass plastic; kettle,,水壶,个,iron brass;
vase,,花瓶,个,clay glass; glove,,手套,只,wool leather; toy train,,玩具火车,列,wood iron;
notebook,,笔记本,本,paper; brush,brushes,刷子,把,wood plastic; comb,,梳子,把,wood plastic;
purse,,钱包,个,leather silk; fan,,扇子,把,paper silk; flowerpot,,花盆,个,clay stone;
toy horse,,玩具马,匹,wood cotton; mask,,面具,个,paper wood""")
# things one counts: English singular, plural, Chinese, measure word
COUNTABLES = _table("""\
apple,apples,苹果,个; pear,pears,梨,个; egg,eggs,鸡蛋,个; cookie,cookies,饼干,块; orange,oranges,橘子,个;
bun,buns,包子,个; candy,candies,糖果,颗; strawberry,strawberries,草莓,颗; peach,peaches,桃子,个;
marble,marbles,弹珠,颗; shell,shells,贝壳,个; sticker,stickers,贴纸,张; flower,flowers,花,朵;
stamp,stamps,邮票,张; walnut,walnuts,核桃,个; tomato,tomatoes,西红柿,个; carrot,carrots,胡萝卜,根;
star card,star cards,星星卡片,张; pebble,pebbles,小石子,颗; feather,feathers,羽毛,根""")
# English, Chinese, measure word
ANIMALS = _table("""\
cat,猫,只; dog,狗,只; rabbit,兔子,只; parrot,鹦鹉,只; turtle,乌龟,只; goat,山羊,只; duck,鸭子,只; pony,小马,匹;
hamster,仓鼠,只; goldfish,金鱼,条; hen,母鸡,只; lamb,小羊,只""")
WILD_ANIMALS = _table("""\
fox,狐狸,只; bear,熊,头; wolf,狼,只; squirrel,松鼠,只; crow,乌鸦,只; frog,青蛙,只; mouse,老鼠,只; deer,小鹿,只;
hedgehog,刺猬,只; owl,猫头鹰,只; monkey,猴子,只; elephant,大象,头; lion,狮子,头; hare,野兔,只""")
PET_NAMES = {
    "en": "Biscuit Pepper Snowy Button Rusty Coco Mango Pebble Sunny Ginger Misty Toffee Bean Maple Pippin Cloud Patches"
    " Clover Nutmeg Waffles",
    "zh": "豆包 雪球 花花 糖糖 毛毛 黑豆 年糕 汤圆 阿福 咪咪 球球 栗子 芝麻 点点 布丁 米粒 可可 团团 小白 多多",
}
# English, Chinese
JOBS = _table("""\
baker,面包师; teacher,老师; doctor,医生; farmer,农民; fisherman,渔夫; painter,画家; tailor,裁缝; gardener,园丁;
postman,邮递员; driver,司机; cook,厨师; librarian,图书管理员; carpenter,木匠; nurse,护士; singer,歌手;
engineer,工程师; clockmaker,钟表匠; potter,陶艺师""")
FOODS = _table("""\
noodles,面条; rice,米饭; bread,面包; dumplings,饺子; sandwiches,三明治; pancakes,煎饼; cheese,奶酪; fish,鱼;
cake,蛋糕; pumpkin pie,南瓜饼; tofu,豆腐; corn,玉米; potatoes,土豆; mushrooms,蘑菇; honey,蜂蜜; yogurt,酸奶""")
FRUITS = _table("""\
apple,苹果; pear,梨; peach,桃子; orange,橘子; banana,香蕉; grape,葡萄; lemon,柠檬; cherry,樱桃; mango,芒果""")
PLACES = _table("""\
library,图书馆; market,市场; school,学校; park,公园; bakery,面包店; harbour,码头; station,火车站; hospital,医院;
museum,博物馆; farm,农场; forest,树林; lake,湖边; theatre,剧院; post office,邮局; garden,花园; bridge,石桥""")
HIDING_PLACES = (
    ("under the bench", "长椅下面"), ("behind the door", "门后面"), ("beside the fence", "篱笆旁边"),
    ("under a big tree", "大树底下"), ("on the windowsill", "窗台上"), ("behind the counter", "柜台后面"),
    ("in the long grass", "草丛里"), ("next to the steps", "台阶旁边"), ("between two stones", "两块石头中间"),
    ("on top of the wall", "墙头上"), ("near the gate", "大门附近"), ("under a pile of leaves", "一堆树叶下面"),
)  # fmt: skip
WEATHER = (
    ("sunny", "晴天"), ("rainy", "雨天"), ("windy", "大风天"), ("cloudy", "阴天"), ("snowy", "雪天"), ("foggy", "雾天"),
)  # fmt: skip
SKILLS = (
    ("swim", "游泳"), ("ride a bicycle", "骑自行车"), ("bake bread", "烤面包"), ("play the flute", "吹笛子"),
    ("fly a kite", "放风筝"), ("draw horses", "画马"), ("tie a strong knot", "打结实的绳结"), ("knit", "织毛衣"),
    ("play chess", "下棋"), ("skate", "滑冰"), ("whistle", "吹口哨"), ("fold paper cranes", "折纸鹤"),
    ("make dumplings", "包饺子"), ("tell the time", "看钟表"), ("row a boat", "划船"), ("plant flowers", "种花"),
)  # fmt: skip
DIRECTIONS = {
    (0, 1): ("north", "北"),
    (0, -1): ("south", "南"),
    (1, 0): ("east", "东"),
    (-1, 0): ("west", "西"),
}
CHINESE_DIGITS = "零一二三四五六七八九十"
ENGLISH_NUMBERS = str.split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)


def article(phrase: str) -> str:
    """`a kite`, `an orange kite`."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(noun: str) -> str:
    """The plural of a noun of this world."""
    for english, irregular, *_ in OBJECTS:
        if noun == english and irregular:
            return irregular
    irregulars = {"goldfish": "goldfish", "pony": "ponies", "deer": "deer", "wolf": "wolves", "mouse": "mice"}
    return irregulars.get(noun, noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s"))


def number_word(number: int, language: str) -> str:
    """Small numbers in words as each language writes them before a noun: `two`, 两."""
    if language == "zh":
        if number == 2:
            return "两"
        return CHINESE_DIGITS[number] if number <= 10 else str(number)
    return ENGLISH_NUMBERS[number] if number <= 20 else str(number)
