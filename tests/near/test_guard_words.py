# ruff: noqa: RUF001, SIM905, E501 - word lists of several languages
"""The field guard over word lists: relative dates, times of day, zones, units, comparisons, near-negations, codes."""

from __future__ import annotations

from itertools import combinations

import pytest

from llmcache.near.guard.rules import differs, fields

# -- words that mean different things in one place of a sentence -----------------------------------------------

DAYS = {  # two days before yesterday ... the day after tomorrow; the words of one place mean the same
    "en": ("the bill is due {}", "the day before yesterday|yesterday|today|tomorrow|the day after tomorrow"),
    "de": ("die Rechnung ist {} fällig", "vorgestern|gestern|heute|morgen|übermorgen"),
    "es": ("la factura vence {}", "anteayer|ayer|hoy|mañana|pasado mañana"),
    "fr": ("la facture est due {}", "avant-hier|hier|aujourd'hui|demain|après-demain"),
    "it": ("la fattura scade {}", "ieri|oggi|domani|dopodomani"),
    "pt": ("a fatura vence {}", "anteontem|ontem|hoje|amanhã"),
    "nl": ("de rekening vervalt {}", "eergisteren|gisteren|vandaag|overmorgen"),
    "ru": ("счёт нужно оплатить {}", "позавчера|вчера|сегодня|завтра|послезавтра"),
    "zh": ("账单{}到期", "前天|昨天|今天|明天|后天"),
    "ja": ("請求書は{}です", "一昨日|昨日|今日|明日|明後日"),
    "ko": ("청구서는 {} 나옵니다", "그저께|어제|오늘|내일|모레"),
    "hi": ("बिल {} आएगा", "आज|कल|परसों"),
}
PERIODS = {
    "en": ("pay the bill {}", "last week|this week|next week|last month|this month|next month|last year|this year|next year|next Monday|last Monday|next weekend|last quarter"),
    "de": ("ich zahle {}", "letzte Woche|diese Woche|nächste Woche|letzten Monat|nächsten Monat|letztes Jahr|nächstes Jahr|nächsten Montag|letzten Montag"),
    "es": ("pago {}", "la semana pasada|esta semana|la próxima semana|el mes pasado|el mes que viene|el año pasado|el próximo año|el próximo lunes|el lunes pasado"),
    "fr": ("je paie {}", "la semaine dernière|cette semaine|la semaine prochaine|le mois dernier|le mois prochain|l'année dernière|l'année prochaine|lundi dernier|lundi prochain"),
    "zh": ("{}付款", "上周|本周|下周|上个月|这个月|下个月|去年|今年|明年|下周一|上周一"),
    "ja": ("{}払います", "先週|今週|来週|先月|今月|来月|去年|今年|来年"),
    "ko": ("{} 지불합니다", "지난주|이번 주|다음 주|지난달|이번 달|다음 달|작년|올해|내년"),
    "hi": ("{} भुगतान", "पिछले हफ्ते|इस हफ्ते|अगले हफ्ते|पिछले महीने|अगले महीने|पिछले साल|अगले साल"),
}  # fmt: skip
AGO = {
    "en": ("it came {}", "{n} days ago|in {n} days|{n} weeks ago|in {n} weeks"),
    "de": ("es kam {}", "vor {n} Tagen|in {n} Tagen|vor {n} Wochen|in {n} Wochen"),
    "es": ("llegó {}", "hace {n} días|dentro de {n} días|hace {n} semanas|dentro de {n} semanas"),
    "fr": ("c'est arrivé {}", "il y a {n} jours|dans {n} jours|il y a {n} mois|dans {n} mois"),
    "zh": ("{}到", "{n}天前|{n}天后|{n}小时前|{n}小时后"),
    "ko": ("{} 왔다", "{n}일 전에|{n}일 후에|{n}개월 전에|{n}개월 후에"),
    "hi": ("{} आया", "{n} दिन पहले|{n} दिन बाद|{n} हफ्ते पहले|{n} हफ्ते बाद"),
}
PARTS_OF_DAY = {
    "en": ("call me in the {}", "morning|afternoon|evening|night"),
    "de": ("ich rufe am {} an", "Vormittag|Nachmittag|Abend"),
    "es": ("llamo por la {}", "mañana|tarde|noche"),
    "fr": ("j'appelle le {}", "matin|soir"),
    "zh": ("请{}打电话", "早上|下午|晚上|半夜"),
    "ja": ("{}電話します", "午前中に|午後に|夕方に"),
    "ko": ("{}에 전화하세요", "아침|오후|저녁"),
    "hi": ("{} को फोन करें", "सुबह|दोपहर|शाम|रात"),
}
BOUNDS = {
    "en": ("closed {} Monday", "before|after|until|since"),
    "de": ("geschlossen {} Montag", "vor|nach|bis|seit"),
    "es": ("cerrado {} lunes", "antes del|después del|hasta el|desde el"),
    "fr": ("fermé {} lundi", "avant|après|depuis"),
    "es, a date": ("cerrado {} 5 de mayo", "antes del|después del|hasta el|desde el"),
    "en, a time": ("closed {} 5 pm", "before|after|until"),
}
ZONES = "UTC EST EDT CST CDT MST MDT PST PDT CET CEST BST IST JST KST HKT SGT EET MSK AEST AEDT NZST".split()
UNITS = (
    "ml|cl|dl|l|hl|gallons|pints|cups|teaspoons|tablespoons", "µg|mg|g|kg|tonnes|stone|ounces|lbs", "nm|mm|cm|m|km|inches|feet|yards|miles",
    "bit|byte|kbit|kB|KiB|Mb|MB|MiB|Gb|GB|GiB|TB|TiB|PB", "Mbps|MBps|kbps|Gbps", "bar|mbar|psi|pascal|hPa|kPa", "V|A|W|mV|kV|mA|mAh|kW|MW|mW|kWh|ohm", "Hz|kHz|MHz|GHz",
    "ns|ms|seconds|minutes|hours|days|weeks|months|years|decades", "km/h|mph|m/s|knots", "hectares|acres", "cal|kcal|kJ|joules",
    "percent|percentage points|permille|basis points|ppm", "°C|°F|kelvin",
    "US$|CA$|A$|NZ$|HK$|S$|R$|NT$", "USD|EUR|GBP|CAD|AUD|CHF|JPY|CNY|INR|KRW|THB|ZAR|AED|TWD|VND|IDR|MYR|ILS|HUF|CZK|NGN|UAH",
)  # fmt: skip
COMPARISONS = {
    "en": ("{} cards are in the box", "more than 5|less than 5|at least 5|at most 5|5"),
    "de": ("{} Karten sind da", "mehr als 5|weniger als 5|mindestens 5|höchstens 5|5"),
    "es": ("hay {} tarjetas", "más de 5|menos de 5|al menos 5|como máximo 5|5"),
    "fr": ("il y a {} cartes", "plus de 5|moins de 5|au moins 5|au plus 5|5"),
    "it": ("ci sono {} carte", "più di 5|meno di 5|almeno 5|al massimo 5|5"),
    "pt": ("há {} cartões", "mais de 5|menos de 5|pelo menos 5|no máximo 5|5"),
    "nl": ("er zijn {} kaarten", "meer dan 5|minder dan 5|minstens 5|hoogstens 5|5"),
    "zh": ("有{}张卡", "超过5|少于5|至少5|最多5|5"),
    "ja": ("カードは{}です", "5枚以上|5枚以下|5枚未満|5枚"),
    "ko": ("카드는 {} 있다", "5개 이상|5개 이하|5개 미만|5개 초과|5개"),
    "hi": ("{} कार्ड हैं", "5 से अधिक|5 से कम|कम से कम 5|अधिक से अधिक 5|5"),
    "signs": ("x {}", "> 5|< 5|>= 5|<= 5|!= 5|= 5"),
}
MULTIPLES = {
    "en": ("{} the limit", "double|triple|quadruple"),
    "es": ("el {} del límite", "doble|triple"),
    "de": ("{} so viel", "doppelt|dreifach|vierfach"),
    "fr": ("le {} du prix", "double|triple|quadruple"),
    "hi": ("{} दाम", "दोगुना|तिगुना|चौगुना"),
}
ERAS = {
    "en": ("a coin of 50 {}", "BC|AD"),
    "de": ("eine Münze von 50 {}", "v. Chr.|n. Chr."),
    "zh": ("{}50年的硬币", "公元前|公元"),
    "ko": ("{} 50년의 동전", "기원전|기원후"),
}
DECADES = {
    "en": ("songs of the {}", "twenties|thirties|forties|fifties|sixties|seventies|eighties|nineties"),
    "de": ("Lieder der {}", "zwanziger|dreißiger|vierziger|fünfziger|sechziger|siebziger|achtziger|neunziger"),
    "digits": ("songs of the {}", "1950s|1960s|1970s|1980s|1990s"),
}
CODES = {
    "hyphened": ("the order {} is late", "ABC-DEF|ABC-DEG|ABD-DEF|AB-CD|ABC-DEF-GHI"),
    "alone": ("{}", "ABC-DEF|ABC-DEG|ABD-DEF"),
    "size": ("a shirt of size {}", "XS|S|M|L|XL|XXL|XXXL"),
    "grade": ("the grade is {} this time", "A+|A-|B+|B-|C+|C-|D+|D-"),
    "a size and a noun": ("a size {} shirt", "S|M|L|XL"),
    "blood": ("the blood type is {} here", "A+|A-|B+|B-|AB+|AB-|O+|O-"),
    "blood in words": ("blood type {} here", "A positive|A negative|B positive|B negative"),
    "lone numeral": ("room {} is free", "一|二|三|四|五|六|七|八|九|十"),
}
FAMILIES = {
    f"{name} {language}": (frame, words.replace("{n}", "3").split("|"))
    for name, table in {
        "days": DAYS, "periods": PERIODS, "ago": AGO, "parts of the day": PARTS_OF_DAY, "bounds": BOUNDS, "comparisons": COMPARISONS,
        "multiples": MULTIPLES, "eras": ERAS, "decades": DECADES, "codes": CODES,
    }.items()
    for language, (frame, words) in table.items()
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_two_of_a_family_of_words_are_told_apart(family: str) -> None:
    frame, words = FAMILIES[family]
    pairs = [(frame.format(one), frame.format(other)) for one, other in combinations(words, 2)]
    assert [pair for pair in pairs if differs(*pair) is None] == []


@pytest.mark.parametrize("units", UNITS)
def test_every_two_units_of_a_quantity_are_told_apart(units: str) -> None:
    before = "$" in units
    texts = [f"it takes {f'{unit}5' if before else f'5 {unit}'} of it" for unit in units.split("|")]
    glued = [text.replace("5 ", "5", 1) for text in texts if "$" not in text]
    assert [pair for pair in combinations(texts, 2) if differs(*pair) is None] == []
    assert [pair for pair in combinations(glued, 2) if differs(*pair) is None] == []


@pytest.mark.parametrize("frame", ["at 7:00 {}", "at 7 o'clock in {} time", "at 7 pm {}", "at 19:00 ({}) please"])
def test_time_zones_are_told_apart(frame: str) -> None:
    texts = [frame.format(zone) for zone in ZONES]
    assert [pair for pair in combinations(texts, 2) if differs(*pair) is None] == []


NEAR_NEGATIONS = """
en|My card was hardly ever accepted|My card was accepted
en|My card was barely accepted|My card was accepted
en|My card is rarely accepted|My card is accepted
en|My card is seldom accepted|My card is accepted
en|I could scarcely pay|I could pay
en|I doubt that it was sent|It was sent
en|We failed to receive it|We managed to receive it
en|We neglected to send it|We remembered to send it
en|I refuse to pay the fee|I agree to pay the fee
en|They refused to pay|They agreed to pay
en|They declined to answer|They agreed to answer
en|lacking a receipt|having a receipt
en|Do it, unless I call|Do it, if I call
en|Smoking is forbidden here|Smoking is allowed here
en|Is it false that the fee is due?|Is it true that the fee is due?
de|Ich kann kaum zahlen|Ich kann zahlen
de|Ich bezweifle, dass es kam|Ich glaube, dass es kam
de|Ich weigere mich zu zahlen|Ich bin bereit zu zahlen
de|Rauchen ist hier verboten|Rauchen ist hier erlaubt
de|Ich zahle, es sei denn, ich rufe an|Ich zahle, wenn ich anrufe
es|Apenas puedo pagar|Puedo pagar
es|Dudo que llegue|Creo que llegará
es|Está prohibido fumar|Está permitido fumar
es|Pago, a menos que llame|Pago, si llamo
fr|Il paie rarement|Il paie souvent
fr|C'est interdit ici|C'est permis ici
fr|Je paie, à moins que tu appelles|Je paie, si tu appelles
zh|我拒绝付款|我同意付款
zh|这里禁止吸烟|这里允许吸烟
zh|我很少付款|我经常付款
zh|我怀疑他付款了|我相信他付款了
ko|결제를 거부합니다|결제를 합니다
ko|흡연 금지|흡연 허용
ko|의심합니다|믿습니다
hi|मैंने भुगतान से इनकार किया|मैंने भुगतान किया
""".strip().splitlines()


@pytest.mark.parametrize("line", NEAR_NEGATIONS)
def test_words_that_negate_without_a_not_are_negations(line: str) -> None:
    _, one, other = line.split("|")
    assert differs(one, other) == "negation"


# -- mere spellings --------------------------------------------------------------------------------------------

ALIKE = """
I don't pay|I do not pay
I won’t pay|I will not pay
meet me at 15:30|meet me at 3:30 pm
a fee of 5 %|a fee of 5 percent
at least 5 cards|no less than 5 cards
at least 5 cards|5 or more cards
at least 5 cards|not less than 5 cards
at least five cards|minimum 5 cards
at least 5 cards|>= 5 cards
at least 5 cards|5+ cards
at most 5 cards|no more than 5 cards
at most 5 cards|up to 5 cards
at most 5 cards|5 cards or fewer
at most 5 cards|max. 5 cards
at most 5 cards|≤ 5 cards
more than 5 cards|over 5 cards
more than five cards|> 5 cards
less than 5 cards|under 5 cards
less than 5 cards|fewer than five cards
mehr als 5 Karten|über 5 Karten
mindestens 5 Karten|wenigstens fünf Karten
höchstens 5 Karten|nicht mehr als 5 Karten
al menos 5 tarjetas|por lo menos cinco tarjetas
como máximo 5 tarjetas|no más de 5 tarjetas
au moins 5 cartes|pas moins de 5 cartes
至少5张|不少于五张
最多5张|不超过5张
적어도 5개|최소 5개
due tomorrow|due tmrw
pay it today|pay it now
pay it today|pay it
next week|the following week
last week|the previous week
3 days ago|three days ago
3 days ago|3 days earlier
tonight at 8|this evening at 8
at 8 in the evening|at 8 pm
7:00 UTC|7 o'clock in UTC time
7:00 EST|7:00 Eastern Standard Time
the nineties|the 90s
the nineteen nineties|the 1990s
die neunziger Jahre|die 90er Jahre
50 BC|50 B.C.
50 AD|50
Good morning, my card is lost|Good evening, my card is lost
Monday till Friday|Monday to Friday
5 l of water|5 litres of water
5 l of water|5l of water
5 m long|5 metres long
5 kg|5 KG
5 V.|5 volts.
5 MB|5 megabytes
5 MB|5 mb
5 Mb|5 megabits
5 KiB|5 kibibytes
5 km/h|5 kilometres per hour
5 km/h|5km/h
$5 CAD|CA$5
US$5|$5
US$5|5 US dollars
5 percentage points|5 percent points
5 euros per month|5 euros a month
5 euros per month|5 euros/month
double the limit|twice the limit
triple the limit|three times the limit
double-check my card|check my card
size xl|size XL
grade A+ today|grade a+ today
unless I pay|if I don't pay
I hardly ever pay|I almost never pay
Smoking is forbidden|Smoking is not allowed
it is false|it is not true
more or less the same|about the same
I was charged more than once|I was charged several times
a few days ago it came|it came
明日払います|あした払います
今天付款|请付款
下周付款|下星期付款
다음 주에 지불|다음주에 지불
heute zahlen|zahlen
übermorgen zahlen|uebermorgen zahlen
""".strip().splitlines()


@pytest.mark.parametrize("line", ALIKE)
def test_another_wording_of_the_same_field_is_no_difference(line: str) -> None:
    one, other = line.split("|")
    assert differs(one, other) is None, (fields(one), fields(other))


PLAIN = """
I know more about it|the file is up to date|it is over|above all, thank you|the most popular card
is the last card mine|what is next|how do I pass this on|at most banks|a well-known bank|the e-mail came
it is a positive thing|the metro is here|a bar of soap|he is down to earth|plus tax|it may be later|my hier is here|this is the minimum
""".replace("\n", "|").strip("|").split("|")  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_words_of_comparisons_and_dates_in_other_senses_are_no_fields(text: str) -> None:
    assert fields(text) == fields("thank you")
