# ruff: noqa: RUF001, SIM905, E501, T201 - texts in several scripts, word lists, a table to read
"""Pairs of texts for the field guard: those of `guard_pairs.jsonl`, written by hand, and drawn ones.

A drawn pair is a template with a value in it, and the same template with another value (the guard has to refuse) or
with another spelling of the value (it has to accept). Numbers are written in words by the short grammars below, which
share nothing with the rules that read them. `python -m tests.near.guard_cases` prints the table of what went wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from llmcache.near.guard.rules import differs


class Pair(NamedTuple):
    """Two texts that differ by one edit. kind: kind of the edit. refuse: True if the edit changed the meaning."""

    kind: str
    language: str
    refuse: bool
    one: str
    other: str


def written_pairs() -> list[Pair]:
    """Read the hand-written pairs."""
    lines = (Path(__file__).parent / "guard_pairs.jsonl").read_text(encoding="utf-8").split("\n")
    rows = (json.loads(line) for line in lines if line)
    return [Pair(kind, language, expected == "refuse", one, other) for kind, language, expected, one, other in rows]


def mistakes(pairs: Iterable[Pair]) -> tuple[dict[str, list[int]], list[Pair]]:
    """Count, per kind, changed pairs, accepted ones, mere spellings, refused ones; and list the errors of the guard."""
    counts: dict[str, list[int]] = {}
    wrong = []
    for pair in pairs:
        row = counts.setdefault(pair.kind, [0, 0, 0, 0])
        refused = differs(pair.one, pair.other) is not None
        row[0 if pair.refuse else 2] += 1
        if refused != pair.refuse:
            row[1 if pair.refuse else 3] += 1
            wrong.append(pair)
    return counts, wrong


def table(counts: dict[str, list[int]]) -> str:
    """Format the counts of `mistakes` as lines of text."""
    total = [sum(row[place] for row in counts.values()) for place in range(4)]
    rows = [*sorted(counts.items()), ("all", total)]
    return "\n".join(
        f"{kind:12} changed {row[0]:5}, accepted {row[1]:3}   mere spelling {row[2]:5}, refused {row[3]:3}"
        for kind, row in rows
    )


# -- numbers in words ------------------------------------------------------------------------------------------

_EN = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
_DE = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn".split()
_DE_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_ES = "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve".split()
_ES_TENS = "- - veinte treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
_ES_HUNDREDS = (
    "- ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos".split()
)
_FR = "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit dix-neuf".split()
_FR_TENS = "- - vingt trente quarante cinquante soixante".split()
_ZH = "零一二三四五六七八九"
_KO = "영일이삼사오육칠팔구"
_KO_NATIVE = "- 한 두 세 네 다섯 여섯 일곱 여덟 아홉".split()
_KO_TENS = "- 열 스물 서른 마흔 쉰 예순 일흔 여든 아흔".split()
_HI = {2: "दो", 3: "तीन", 4: "चार", 5: "पाँच", 6: "छह", 7: "सात", 8: "आठ", 9: "नौ", 10: "दस", 11: "ग्यारह", 12: "बारह", 15: "पंद्रह",
       18: "अठारह", 20: "बीस", 21: "इक्कीस", 24: "चौबीस", 25: "पच्चीस", 30: "तीस", 36: "छत्तीस", 40: "चालीस", 45: "पैंतालीस",
       50: "पचास", 60: "साठ", 64: "चौंसठ", 75: "पचहत्तर", 80: "अस्सी", 90: "नब्बे", 99: "निन्यानवे"}  # fmt: skip


def english(n: int) -> str:
    if n >= 1000:
        return f"{english(n // 1000)} thousand" + (f" {english(n % 1000)}" if n % 1000 else "")
    if n >= 100:
        return f"{_EN[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")
    return _EN[n] if n < 20 else _EN_TENS[n // 10] + (f"-{_EN[n % 10]}" if n % 10 else "")


def german(n: int) -> str:
    if n >= 1000:
        return ("ein" if n // 1000 == 1 else german(n // 1000)) + "tausend" + (german(n % 1000) if n % 1000 else "")
    if n >= 100:
        return ("ein" if n // 100 == 1 else _DE[n // 100]) + "hundert" + (german(n % 100) if n % 100 else "")
    if n < 20:
        return _DE[n]
    return (f"{'ein' if n % 10 == 1 else _DE[n % 10]}und" if n % 10 else "") + _DE_TENS[n // 10]


def spanish(n: int) -> str:
    if n >= 1000:
        return (
            ("" if n // 1000 == 1 else spanish(n // 1000) + " ") + "mil" + (f" {spanish(n % 1000)}" if n % 1000 else "")
        )
    if n >= 100:
        return "cien" if n == 100 else _ES_HUNDREDS[n // 100] + (f" {spanish(n % 100)}" if n % 100 else "")
    return _ES[n] if n < 30 else _ES_TENS[n // 10] + (f" y {_ES[n % 10]}" if n % 10 else "")


def french(n: int) -> str:
    if n >= 1000:
        return (
            ("" if n // 1000 == 1 else french(n // 1000) + " ") + "mille" + (f" {french(n % 1000)}" if n % 1000 else "")
        )
    if n >= 100:
        plural = "s" if n % 100 == 0 and n > 100 else ""
        return (
            ("" if n // 100 == 1 else _FR[n // 100] + " ")
            + f"cent{plural}"
            + (f" {french(n % 100)}" if n % 100 else "")
        )
    if n < 20:
        return _FR[n]
    if n >= 80:
        return "quatre-vingts" if n == 80 else f"quatre-vingt-{_FR[n - 80]}"
    ten = min(n // 10, 6)
    rest = n - ten * 10
    return _FR_TENS[ten] + (f" et {_FR[rest]}" if rest in (1, 11) else f"-{_FR[rest]}" if rest else "")


def chinese(n: int) -> str:
    out = ""
    for unit, sign in ((1000, "千"), (100, "百"), (10, "十")):
        digit = n // unit
        if digit:
            out += ("" if sign == "十" and digit == 1 and not out else _ZH[digit]) + sign
        elif out and n % unit and not out.endswith("零"):
            out += "零"
        n %= unit
    return (out + (_ZH[n] if n else "")).removesuffix("零") or "零"


def korean(n: int) -> str:
    out = ""
    for unit, sign in ((1000, "천"), (100, "백"), (10, "십")):
        if n // unit:
            out += ("" if n // unit == 1 else _KO[n // unit]) + sign
        n %= unit
    return out + (_KO[n] if n else "")


_WORDS: dict[str, Callable[[int], str]] = {
    "en": english,
    "de": german,
    "es": spanish,
    "fr": french,
    "zh": chinese,
    "ko": korean,
}
_COUNTED = {
    "en": ["We ordered {} chairs for the office", "There are {} people in the queue", "It took {} days to arrive"],
    "de": ["Wir haben {} Stühle bestellt", "In der Schlange stehen {} Leute", "Es hat {} Tage gedauert"],
    "es": ["Pedimos {} sillas para la oficina", "Hay {} personas en la cola", "Tardó {} días en llegar"],
    "fr": ["Nous avons commandé {} chaises", "Il y a {} personnes dans la file", "Il a fallu {} jours"],
    "zh": ["我们订了{}张椅子", "一共有{}个人排队", "等了{}天才到"],
    "ko": ["의자를 {} 개 주문했어요", "{} 명이 줄을 서 있어요", "도착까지 {} 일 걸렸어요"],
    "hi": ["हमने {} कुर्सियाँ मँगवाईं", "कतार में {} लोग हैं", "पहुँचने में {} दिन लगे"],
}


def _numbers(random: Random, count: int) -> Iterator[Pair]:
    for _ in range(count):
        for language, templates in _COUNTED.items():
            template = random.choice(templates)
            if language == "hi":
                n, m = random.sample(sorted(_HI), 2)
                words, others = _HI[n], _HI[m]
            else:
                n, m = random.sample(range(2, random.choice((30, 100, 1000, 9000))), 2)
                words, others = _WORDS[language](n), _WORDS[language](m)
            yield Pair("number", language, False, template.format(n), template.format(words))
            yield Pair("number", language, True, template.format(words), template.format(others))
            yield Pair("number", language, True, template.format(n), template.format(others))
    for _ in range(count):
        n = random.randrange(1000, 10**7)
        yield Pair("number", "en", False, f"We sold {n:,} tickets", f"We sold {n} tickets")
        yield Pair("number", "de", False, f"Wir haben {n:,}".replace(",", ".") + ",50 Liter", f"Wir haben {n}.5 Liter")
        yield Pair("number", "en", True, f"We sold {n:,} tickets", f"We sold {n + 10 ** random.randrange(4):,} tickets")


_LARGE = {
    "en": [
        ("a budget of {} thousand euros", 10**3),
        ("a budget of {} million euros", 10**6),
        ("a budget of {} billion euros", 10**9),
    ],
    "de": [
        ("ein Budget von {} Tausend Euro", 10**3),
        ("ein Budget von {} Millionen Euro", 10**6),
        ("ein Budget von {} Milliarden Euro", 10**9),
    ],
    "es": [("un presupuesto de {} mil euros", 10**3), ("un presupuesto de {} millones de euros", 10**6)],
    "fr": [
        ("un budget de {} mille euros", 10**3),
        ("un budget de {} millions d'euros", 10**6),
        ("un budget de {} milliards d'euros", 10**9),
    ],
    "zh": [("预算是{}万元", 10**4), ("预算是{}亿元", 10**8)],
    "ko": [("예산은 {}만 원입니다", 10**4), ("예산은 {}억 원입니다", 10**8)],
    "hi": [("बजट {} हज़ार रुपये है", 10**3), ("बजट {} लाख रुपये है", 10**5), ("बजट {} करोड़ रुपये है", 10**7)],
}
_MONEY = {"en": "a budget of {} euros", "de": "ein Budget von {} Euro", "es": "un presupuesto de {} euros", "fr": "un budget de {} euros",
          "zh": "预算是{}元", "ko": "예산은 {} 원입니다", "hi": "बजट {} रुपये है"}  # fmt: skip


def _amounts(random: Random, count: int) -> Iterator[Pair]:
    for _ in range(count):
        for language, forms in _LARGE.items():
            n = random.randrange(2, 90)
            (template, factor), (other, _) = random.sample(forms, 2)
            yield Pair("amount", language, True, template.format(n), other.format(n))
            yield Pair("amount", language, False, template.format(n), _MONEY[language].format(n * factor))


# -- dates and times -------------------------------------------------------------------------------------------

_MONTHS = {
    "en": "January February March April May June July August September October November December".split(),
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split(),
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre".split(),
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre".split(),
    "hi": "जनवरी फरवरी मार्च अप्रैल मई जून जुलाई अगस्त सितंबर अक्टूबर नवंबर दिसंबर".split(),
}
_DATES = {
    "en": ["due {d} {name} {y}", "due {name} {d}, {y}", "due {y}-{m:02}-{d:02}"],
    "de": ["fällig am {d}. {name} {y}", "fällig am {d:02}.{m:02}.{y}"],
    "es": ["vence el {d} de {name} de {y}", "vence el {d} {name} {y}"],
    "fr": ["à payer le {d} {name} {y}", "à payer le {d:02}.{m:02}.{y}"],
    "zh": ["{y}年{m}月{d}日到期", "{y}-{m:02}-{d:02}到期"],
    "ko": ["{y}년 {m}월 {d}일까지", "{y}-{m:02}-{d:02}까지"],
    "hi": ["{d} {name} {y} तक", "{y}-{m:02}-{d:02} तक"],
}
_DAYS = {
    "en": ("closed on {}", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(), "Mon Tue Wed Thu Fri Sat Sun".split()),
    "de": ("geschlossen: {}", "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split(),
           "montags dienstags mittwochs donnerstags freitags samstags sonntags".split()),
    "es": ("cerrado el {}", "lunes martes miércoles jueves viernes sábado domingo".split(), "LUNES MARTES MIÉRCOLES JUEVES VIERNES SÁBADO DOMINGO".split()),
    "fr": ("fermé le {}", "lundi mardi mercredi jeudi vendredi samedi dimanche".split(), "lundis mardis mercredis jeudis vendredis samedis dimanches".split()),
    "zh": ("{}不营业", "星期一 星期二 星期三 星期四 星期五 星期六 星期日".split(), "周一 周二 周三 周四 周五 周六 周日".split()),
    "ko": ("{}에 만나요", "월요일 화요일 수요일 목요일 금요일 토요일 일요일".split(), "월요일 화요일 수요일 목요일 금요일 토요일 일요일".split()),
    "hi": ("{} को बैठक", "सोमवार मंगलवार बुधवार गुरुवार शुक्रवार शनिवार रविवार".split(), "सोमवार मंगलवार बुधवार बृहस्पतिवार शुक्रवार शनिवार इतवार".split()),
}  # fmt: skip


def _dates(random: Random, count: int) -> Iterator[Pair]:
    def text(template: str, language: str, y: int, m: int, d: int) -> str:
        return template.format(y=y, m=m, d=d, name=_MONTHS.get(language, [""] * 12)[m - 1])

    for _ in range(count):
        for language, templates in _DATES.items():
            y, m, d = random.randrange(1990, 2030), random.randrange(1, 13), random.randrange(1, 29)
            one, other = random.choice(templates), random.choice(templates)
            yield Pair("date", language, False, text(one, language, y, m, d), text(other, language, y, m, d))
            changed = random.choice(((y + 1, m, d), (y, m % 12 + 1, d), (y, m, d % 28 + 1)))
            yield Pair("date", language, True, text(one, language, y, m, d), text(one, language, *changed))
        for language, (template, full, short) in _DAYS.items():
            i, j = random.sample(range(7), 2)
            yield Pair("date", language, False, template.format(full[i]), template.format(short[i]))
            yield Pair("date", language, True, template.format(full[i]), template.format(full[j]))
            yield Pair("date", language, True, template.format(short[i]), template.format(short[j]))


def _times(random: Random, count: int) -> Iterator[Pair]:
    for _ in range(count):
        hour, minute = random.randrange(1, 12), random.choice((5, 10, 15, 20, 30, 45, 59))
        late, clock = hour + 12, f"{hour + 12}:{minute:02}"
        yield Pair("time", "en", False, f"wake me at {hour}:{minute:02} pm", f"wake me at {clock}")
        yield Pair("time", "en", False, f"wake me at {hour}:{minute:02}PM", f"wake me at {hour}:{minute:02} p.m.")
        yield Pair("time", "en", True, f"wake me at {hour}:{minute:02}pm", f"wake me at {hour}:{minute:02}am")
        yield Pair("time", "en", True, f"wake me at {hour} pm", f"wake me at {hour} am")
        yield Pair("time", "en", True, f"wake me at {clock}", f"wake me at {late}:{(minute + 7) % 60:02}")
        yield Pair("time", "de", False, f"um {clock} Uhr", f"um {late}.{minute:02} Uhr")
        yield Pair("time", "de", True, f"um {late} Uhr", f"um {late - 1} Uhr")
        yield Pair("time", "fr", False, f"à {late}h{minute:02}", f"à {clock}")
        yield Pair("time", "fr", True, f"à {hour} heures du matin", f"à {hour} heures du soir")
        if hour >= 5:
            yield Pair("time", "es", False, f"a las {hour}:{minute:02} de la noche", f"a las {clock}")
        yield Pair("time", "es", True, f"a las {hour} de la mañana", f"a las {hour} de la tarde")
        yield Pair("time", "zh", False, f"下午{chinese(hour)}点半", f"{late}:30")
        yield Pair("time", "zh", True, f"上午{hour}点开会", f"下午{hour}点开会")
        yield Pair("time", "ko", False, f"오후 {hour}시 {minute}분", clock)
        yield Pair("time", "ko", True, f"오전 {hour}시에", f"오후 {hour}시에")
        if hour in _HI and 2 <= hour <= 8:
            yield Pair("time", "hi", False, f"शाम {hour} बजे", f"शाम {_HI[hour]} बजे")
            yield Pair("time", "hi", True, f"सुबह {hour} बजे", f"शाम {hour} बजे")


# -- signs, currencies, identifiers, quotations ----------------------------------------------------------------

_DEGREES = {"en": ("It is {} degrees outside", "minus"), "de": ("Draußen sind es {} Grad", "minus"), "es": ("Hace {} grados", "menos"),
            "fr": ("Il fait {} degrés", "moins")}  # fmt: skip


def _signs(random: Random, count: int) -> Iterator[Pair]:
    for _ in range(count):
        n = random.randrange(2, 60)
        for language, (template, minus) in _DEGREES.items():
            yield Pair("sign", language, True, template.format(f"-{n}"), template.format(n))
            yield Pair("sign", language, False, template.format(f"\u2212{n}"), template.format(f"-{n}"))
            yield Pair("sign", language, False, template.format(f"{minus} {n}"), template.format(f"-{n}"))
        yield Pair("sign", "zh", True, f"今天零下{n}度", f"今天{n}度")
        yield Pair("sign", "zh", False, f"今天零下{n}度", f"今天-{n}度")
        yield Pair("sign", "ko", True, f"오늘은 영하 {n}도", f"오늘은 {n}도")
        yield Pair("sign", "hi", True, f"तापमान -{n} डिग्री", f"तापमान {n} डिग्री")
        yield Pair("sign", "en", False, f"pages {n}-{n + 9}", f"pages {n}\u2013{n + 9}")
        yield Pair("sign", "en", False, f"the model-{n} car", f"the model {n} car")


_CURRENCIES = {
    "en": [
        ["${}", "{} dollars", "USD {}", "{} USD"],
        ["€{}", "{} euros", "EUR {}"],
        ["£{}", "{} pounds", "GBP {}"],
        ["{} yen", "JPY {}"],
    ],
    "de": [["{} Dollar", "{} $"], ["{} Euro", "{} €", "EUR {}"], ["{} Franken", "CHF {}"]],
    "es": [["{} dólares", "${}"], ["{} euros", "{} €"], ["{} pesos", "MXN {}"]],
    "fr": [["{} dollars", "{} $"], ["{} euros", "{} €"], ["{} francs", "CHF {}"]],
    "zh": [["{}美元", "${}"], ["{}元", "¥{}"], ["{}欧元", "€{}"]],
    "ko": [["{}원", "₩{}"], ["{}달러", "${}"], ["{}유로", "€{}"]],
    "hi": [["{} रुपये", "₹{}"], ["{} डॉलर", "${}"], ["{} यूरो", "€{}"]],
}
_PAID = {"en": "I paid {} for it", "de": "Ich habe {} bezahlt", "es": "Pagué {} por eso", "fr": "J'ai payé {} pour ça", "zh": "我付了 {} 给他",
         "ko": "저는 {} 냈어요", "hi": "मैंने {} दिए"}  # fmt: skip


def _currencies(random: Random, count: int) -> Iterator[Pair]:
    for _ in range(count):
        for language, groups in _CURRENCIES.items():
            n = random.randrange(2, 999)
            group, another = random.sample(groups, 2)
            template = _PAID[language]
            first, second = random.sample(group, 2)
            yield Pair("currency", language, False, template.format(first.format(n)), template.format(second.format(n)))
            yield Pair(
                "currency", language, True, template.format(first.format(n)), template.format(another[0].format(n))
            )


def _identifiers(random: Random, count: int) -> Iterator[Pair]:
    letters = "ABCDEFGHJKLMNPQRTUVWXYZ"

    def digits(length: int) -> str:
        return "".join(random.choice("0123456789") for _ in range(length))

    def changed(text: str) -> str:
        places = [place for place, sign in enumerate(text) if sign.isdecimal()]
        place = random.choice(places)
        return f"{text[:place]}{(int(text[place]) + random.randrange(1, 10)) % 10}{text[place + 1 :]}"

    for _ in range(count):
        code = (
            "".join(random.choice(letters) for _ in range(2)) + digits(random.randrange(3, 7)) + random.choice(letters)
        )
        language, template = random.choice((("en", "my order {} is late"), ("de", "meine Bestellung {} fehlt"), ("es", "mi pedido {} falta"),
                                            ("fr", "ma commande {} manque"), ("zh", "订单 {} 在哪里"), ("ko", "주문 {} 어디"),
                                            ("hi", "ऑर्डर {} कहाँ है")))  # fmt: skip
        yield Pair("identifier", language, True, template.format(code), template.format(changed(code)))
        yield Pair("identifier", language, False, template.format(code), template.format(code.lower()))
        iban = f"DE{digits(20)}"
        spaced = " ".join(iban[place : place + 4] for place in range(0, 22, 4))
        yield Pair("identifier", language, False, template.format(iban), template.format(spaced))
        yield Pair("identifier", language, True, template.format(spaced), template.format(changed(spaced)))
        phone = f"+{random.randrange(20, 60)} {random.randrange(20, 99)} {digits(4)} {digits(4)}"
        yield Pair("identifier", language, False, template.format(phone), template.format(phone.replace(" ", "-")))
        yield Pair("identifier", language, True, template.format(phone), template.format(changed(phone)))
        version = f"{random.randrange(1, 9)}.{random.randrange(20)}.{random.randrange(20)}"
        yield Pair("address", language, False, template.format(f"v{version}"), template.format(f"version {version}"))
        yield Pair("address", language, True, template.format(f"v{version}"), template.format(f"v{version}1"))
        name = random.choice("ann bob kim lee".split()) + digits(2)
        host = random.choice(("example.com", "mail.example.org", "beispiel.de"))
        yield Pair("address", language, True, template.format(f"{name}@{host}"), template.format(f"x{name}@{host}"))
        yield Pair(
            "address",
            language,
            True,
            template.format(f"https://{host}/{name}"),
            template.format(f"https://{host}/{name}x"),
        )
        yield Pair(
            "address",
            language,
            False,
            template.format(f"https://{host}/{name}"),
            template.format(f"http://www.{host}/{name}/"),
        )


_QUOTED = {
    "en": ("search for {} please", "shoes coat yesterday help war peace".split()),
    "de": ("das Wort {} bitte", "Haus Baum Krieg Frieden Wasser".split()),
    "es": ("la palabra {} por favor", "casa perro guerra paz agua".split()),
    "fr": ("le mot {} ici", "chien chat guerre paix eau".split()),
    "zh": ("请输入{}这个词", "战争 和平 水 山".split()),
    "ko": ("단어 {} 찾기", "사랑 전쟁 평화 물".split()),
    "hi": ("{} शब्द", "प्रेम युद्ध शांति जल".split()),
}
_STYLES = {
    "en": ['"{}"', "“{}”", "‘{}’", "'{}'"], "de": ["„{}“", "»{}«", '"{}"', "‚{}‘"], "es": ["«{}»", '"{}"', "“{}”"], "fr": ["« {} »", "“{}”", "‹ {} ›"],
    "zh": ["“{}”", "「{}」", "《{}》"], "ko": ["'{}'", "‘{}’", "“{}”", "「{}」"], "hi": ['"{}"', "“{}”", "‘{}’"],
}  # fmt: skip


def _quotations(random: Random, count: int) -> Iterator[Pair]:
    for _ in range(count):
        for language, (template, words) in _QUOTED.items():
            word, another = random.sample(words, 2)
            style, second = random.sample(_STYLES[language], 2)
            yield Pair(
                "quotation", language, False, template.format(style.format(word)), template.format(second.format(word))
            )
            yield Pair(
                "quotation", language, True, template.format(style.format(word)), template.format(style.format(another))
            )


# -- negations -------------------------------------------------------------------------------------------------

_AUXILIARIES = {"can": "can't", "could": "couldn't", "will": "won't", "would": "wouldn't", "should": "shouldn't", "must": "mustn't", "do": "don't",
                "did": "didn't", "have": "haven't", "had": "hadn't"}  # fmt: skip
_FRAMES = {  # positive, negative, another spelling of the negative
    "de": [
        ("Ich kann {} sehen", "Ich kann {} nicht sehen", "Nicht sehen kann ich {}"),
        ("Wir haben {}", "Wir haben ohne Zweifel kein {}", "Wir haben kein {}"),
    ],
    "es": [
        ("Quiero {}", "No quiero {}", "NO quiero {}"),
        ("Siempre compro {}", "Nunca compro {}", "No compro nunca {}"),
        ("con {}", "sin {}", "Sin {}"),
    ],
    "fr": [
        ("Je veux {}", "Je ne veux pas {}", "Je veux pas {}"),
        ("J'aime {}", "Je n'aime pas {}", "Je n’aime pas {}"),
        ("avec {}", "sans {}", "Sans {}"),
    ],
    "zh": [
        ("我喜欢{}", "我不喜欢{}", "我 不喜欢 {}"),
        ("我买了{}", "我没买{}", "我沒买{}"),
        ("请带{}", "请别带{}", "请勿带{}"),
    ],
    "ko": [
        ("{} 좋아합니다", "{} 좋아하지 않습니다", "{} 안 좋아합니다"),
        ("{} 있어요", "{} 없어요", "{} 없습니다"),
        ("{} 사세요", "{} 사지 마세요", "{} 사지 마십시오"),
    ],
    "hi": [
        ("मुझे {} चाहिए", "मुझे {} नहीं चाहिए", "मुझे {} नही चाहिए"),
        ("{} लाओ", "{} मत लाओ", "{} न लाओ"),
        ("{} के साथ", "{} के बिना", "बिना {} के"),
    ],
}
_THINGS = {"de": "Wasser Geld Brot Salz".split(), "es": "agua pan café leche".split(), "fr": "ce livre|ce café|ce pain".split("|"), "zh": "咖啡 米饭 苹果 茶".split(),
           "ko": "커피 사과 빵 물".split(), "hi": "चाय चीनी पानी किताब".split()}  # fmt: skip


def _negations(random: Random, count: int) -> Iterator[Pair]:
    for _ in range(count):
        auxiliary = random.choice(sorted(_AUXILIARIES))
        short = _AUXILIARIES[auxiliary]
        subject, action = (
            random.choice(("I", "we", "you", "they")),
            random.choice(("see the card", "open the door", "pay the bill", "help him")),
        )
        negative = f"{subject} {short} {action}"
        yield Pair("negation", "en", True, f"{subject} {auxiliary} {action}", negative)
        yield Pair("negation", "en", True, f"{subject} {auxiliary} {action}", f"{subject} {auxiliary} not {action}")
        yield Pair("negation", "en", False, negative, f"{subject} {auxiliary} not {action}")
        yield Pair("negation", "en", False, negative, negative.replace("'", "\u2019"))
        yield Pair("negation", "en", False, negative, negative.upper())
        for language, frames in _FRAMES.items():
            positive, negated, respelled = random.choice(frames)
            thing = random.choice(_THINGS[language])
            yield Pair("negation", language, True, positive.format(thing), negated.format(thing))
            yield Pair("negation", language, False, negated.format(thing), respelled.format(thing))


def drawn_pairs(seed: int, count: int) -> list[Pair]:
    """Draw pairs of all kinds and languages. count: rounds per kind."""
    random = Random(seed)
    kinds = (_numbers, _amounts, _dates, _times, _signs, _currencies, _identifiers, _quotations, _negations)
    return [pair for kind in kinds for pair in kind(random, count)]


if __name__ == "__main__":
    for name, pairs in (("written by hand", written_pairs()), ("drawn", drawn_pairs(0, 60))):
        counts, wrong = mistakes(pairs)
        print(f"{name}: {len(pairs)} pairs in {len({pair.language for pair in pairs})} languages\n{table(counts)}\n")
        print("\n".join(map(str, wrong[:12])))
        print(Counter((pair.kind, pair.language) for pair in wrong))
