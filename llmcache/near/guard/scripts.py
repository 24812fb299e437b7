# ruff: noqa: RUF001 - the words of several scripts
"""Rewrite numbers, dates and times of Chinese, Japanese, Korean and Hindi texts in the form that the other rules read.

三张卡 becomes 3张卡, 下午三点半 becomes 15:30, 星期一 becomes monday, 零下5度 becomes -5 °,
오후 세 시 becomes 15:00, 5만 원 becomes 50000 krw, शाम 8 बजे becomes 20:00.
These scripts have no spaces around numbers, so a numeral is only read next to a counter, a unit or another numeral:
一起 (together) and 十分 (very) are no numbers. The functions expect text from `llmcache.near.guard.plain_text`.
Sources: the counters of common grammars and CLDR's date fields.
"""

from __future__ import annotations

import re
from decimal import Decimal

from llmcache.near.guard.digits import plain_number, written
from llmcache.near.guard.lexicon import word_set

_HAN = re.compile(r"[\u3400-\u9fff]")
_HANGUL = re.compile(r"[\uac00-\ud7a3]")
_DEVANAGARI = re.compile(r"[\u0900-\u097f]")


def rewritten(text: str) -> str:
    """Rewrite numbers, dates and times of these scripts in the digits and words that the other rules read."""
    if _HAN.search(text):
        text = _han(text)
    if _HANGUL.search(text):
        text = _korean(text)
    if _DEVANAGARI.search(text):
        text = _hindi(text)
    return text


# -- Chinese and Japanese --------------------------------------------------------------------------------------

_HAN_DIGITS = {digit: place for place, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_HAN_TENS = {"十": 10, "百": 100, "千": 1000}
_HAN_GROUPS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_COUNTERS = (
    "个個张張只隻条條位名次天年月日号號元块塊角秒岁歲周週人杯瓶斤公米层層楼樓章节節页頁课課题題间"
    "間台辆輛份套雙双把支枝倍度寸克吨升小钟鐘季集场場件封首句字字章級级階阶代区區折円ヶか"
)
_LONE_COUNTERS = (  # after a single 一
    "张張只隻条條次天年月日元块塊岁歲周週杯瓶斤公米层層楼樓章节節页頁课課题題间間台辆輛份套双秒小個个位件封首折円"
)
_HAN_NUMERAL = re.compile(
    r"(?P<digits>[0-9]{1,15}(?:[.,][0-9]{1,9}){0,4})? ?(?P<han>[零〇一二两兩三四五六七八九十百千万萬亿億]{1,24})"
    r"(?:点(?P<part>[零〇一二三四五六七八九]{1,9})(?![分刻十]))?"
)
_LETTER = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_NO_NUMERAL = word_set("千万 万一 一一 万千 千百 一二 三三")
_HAN_WEEKDAY = re.compile(
    r"(?:星期|礼拜|禮拜|(?<![一二两三四五六七八九十0-9])(?:周|週))([一二三四五六日天])(?![次个個篇回])"
    r"|([月火水木金土日])曜日?"
)
_WEEKDAY_NAMES = {"一": "monday", "二": "tuesday", "三": "wednesday", "四": "thursday", "五": "friday",
                  "六": "saturday", "日": "sunday", "天": "sunday"}  # fmt: skip
_YOUBI = dict(
    zip("月火水木金土日", ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"), strict=True)
)
_HAN_DOUBLE = re.compile(r"(?:双倍|雙倍|翻倍|加倍|翻番|ダブル)|(トリプル)")
_HAN_PERCENT = re.compile(
    r"百分之([零〇一二两三四五六七八九十百千]{1,12}|[0-9.]{1,12})(?:点([零〇一二三四五六七八九]{1,9}))?"
)
_HAN_CLOCK = re.compile(
    r"(?:(凌晨|清晨|早上|早晨|上午|午前|中午|下午|午後|午后|傍晚|晚上|夜里|夜晚"
    r"|深夜)的?)? ?(?<![0-9.])([0-9]{1,2})(?:点钟?|點鐘?|时(?!间)|時(?!間))"
    r"(?:(半)|(一刻|三刻)|([0-9]{1,2})分?)?(?:整|钟)?"
)
_DAY_HALF = re.compile(
    r"(凌晨|清晨|早上|早晨|上午|午前|中午|下午|午後|午后|傍晚|晚上|夜里|夜晚|深夜) ?([0-9]{1,2}):([0-9]{2})"
)
_HAN_SIGN = re.compile(r"(?:负|負|零下|マイナス|(?<=[\u3400-\u9fff])-) ?(?=[0-9])")
_HAN_HALF = re.compile(r"(?<![0-9])([0-9]{1,9})(个|個|年|天|小时|月)半")
_HAN_ALONE_HALF = re.compile(r"半(?=个?小时|个|個|天|年|价|月|杯|斤|時間)")
_HAN_UNITS = (
    (re.compile(r"(?<=[0-9]) ?(?:个|個)?(?:小时|小時|鐘頭|钟头|時間)"), " hours "),
    (re.compile(r"(?<=[0-9]) ?(?:分钟|分鐘|分間)"), " minutes "),
    (re.compile(r"(?<=[0-9]) ?秒钟?"), " seconds "),
    (re.compile(r"(?<=[0-9]) ?(?:天|日間)"), " days "),
    (re.compile(r"(?<=[0-9]) ?(?:个|個|ヶ|か)(?:月|星期|礼拜)"), " months "),
    (re.compile(r"(?<=[0-9]) ?(?:公里|千米)"), " km "),
    (re.compile(r"(?<=[0-9]) ?(?:公斤|千克)"), " kg "),
    (re.compile(r"(?<=[0-9]) ?(?:摄氏)?(?:度|℃)"), " ° "),
    (re.compile(r"(?:美元|美金|米ドル|ドル)"), " usd "),
    (re.compile(r"(?:欧元|歐元|ユーロ)"), " eur "),
    (re.compile(r"(?:英镑|英鎊|ポンド)"), " gbp "),
    (re.compile(r"(?:日元|日圓)"), " jpy "),
    (re.compile(r"(?:港元|港币|港幣)"), " hkd "),
    (re.compile(r"(?:韩元|韓元)"), " krw "),
    (re.compile(r"(?<=[0-9]) ?(?:元|块钱?|塊錢?|圆|人民币|円)"), " yuan "),
)


_HAN_FRACTION = re.compile(r"([二三四五六七八九十])分之([一二两三四五六七八九])")


def _han(text: str) -> str:
    text = _HAN_WEEKDAY.sub(lambda day: f" {_WEEKDAY_NAMES[day[1]] if day[1] else _YOUBI[day[2]]} ", text)
    text = _HAN_PERCENT.sub(lambda share: f" {_share(share)}% ", text)
    text = _HAN_FRACTION.sub(lambda part: f" {written(_han_value(part[2]))}/{written(_han_value(part[1]))} ", text)
    text = text.replace("一半", "0.5")
    text = _HAN_DOUBLE.sub(lambda match: f"{'三' if match[1] else '二'}倍", text)
    text = _HAN_ALONE_HALF.sub("0.5", text)
    text = _HAN_NUMERAL.sub(_han_number, text)
    text = _HAN_CLOCK.sub(_han_time, text)
    text = _DAY_HALF.sub(lambda time: f" {_in_24_hours(time[1], int(time[2]))}:{time[3]} ", text)
    text = _HAN_HALF.sub(lambda half: f"{half[1]}.5{half[2]}", text)
    text = _HAN_SIGN.sub(" -", text).replace("零上", " ")
    for pattern, name in _HAN_UNITS:
        text = pattern.sub(name, text)
    return text


def _share(share: re.Match[str]) -> str:
    whole = share[1] if share[1][0].isascii() else written(_han_value(share[1]))
    return f"{whole}.{_digits(share[2])}" if share[2] else whole


def _digits(numerals: str) -> str:
    return "".join(str(_HAN_DIGITS[numeral]) for numeral in numerals)


def _han_number(match: re.Match[str]) -> str:
    digits, han, part = match["digits"], match["han"], match["part"]
    text = match.string
    before = text[match.start() - 1] if match.start() else ""
    after = text[match.end() : match.end() + 1]
    if part and not digits and after not in _COUNTERS + "%倍":  # 三点五: half past or a decimal, by what follows
        return f"{written(_han_value(han))}点{written(_han_value(part))}" if len(han) < 3 else match[0]
    if digits:
        if han[0] not in _HAN_TENS and han[0] not in _HAN_GROUPS:
            return match[0]
        return written(_han_value(han, Decimal(plain_number(digits)))) if after not in ("克", "米") else match[0]
    if han in _NO_NUMERAL:
        return match[0]
    if len(han) == 1 and not part:
        beside = _LONE_COUNTERS if han == "一" else _COUNTERS
        clock = after in ("点", "點", "时", "時") and han != "一"
        if han == "一" and after in ("点", "點"):
            clock = before in tuple("午上晚晨") or text[match.end() : match.end() + 2] in ("点半", "点钟", "点整")
        numbered = bool(before) and before in "第初负負"
        if han in "百千" and after in "克米分度":
            return match[0]
        minutes = after == "分" and text[match.end() : match.end() + 2] in ("分钟", "分鐘")
        minutes = minutes or (after == "分" and before in ("点", "時", "时"))
        alone = not _LETTER.match(before) and not _LETTER.match(after)  # room 三
        if not (alone or numbered or clock or minutes or (after and after in beside)):
            return match[0]
    placed = any(sign in _HAN_TENS or sign in _HAN_GROUPS for sign in han)
    value = written(_han_value(han)) if placed else _digits(han)
    return f"{value}.{_digits(part)}" if part else value


def _han_value(han: str, number: Decimal | None = None) -> Decimal:
    """Return the value of a numeral. number: digits before the numeral, as in 3千5百."""
    total, section = Decimal(0), Decimal(0)
    for sign in han:
        if sign in _HAN_DIGITS:
            number = (number or 0) * 10 + Decimal(_HAN_DIGITS[sign])
        elif sign in _HAN_TENS:
            section += (Decimal(1) if number is None else number) * _HAN_TENS[sign]
            number = None
        else:
            section += number or 0
            total = (total + (section or Decimal(1))) * _HAN_GROUPS[sign]
            section, number = Decimal(0), None
    return total + section + (number or 0)


def _in_24_hours(half: str | None, hour: int) -> int:
    if half in ("下午", "午後", "午后", "傍晚", "晚上", "夜晚", "夜里", "深夜", "中午") and hour < 12:
        late = half in ("夜里", "深夜", "晚上", "夜晚") and hour < 5
        return hour if late or (half == "中午" and hour > 9) else hour + 12
    return 0 if half in ("凌晨", "午前", "上午") and hour == 12 else hour


def _han_time(match: re.Match[str]) -> str:
    half, hour, thirty, quarter, minute = match.groups()
    minutes = 30 if thirty else {"一刻": 15, "三刻": 45}.get(quarter or "", int(minute or 0))
    return f" {_in_24_hours(half, int(hour))}:{minutes:02} "


# -- Korean ----------------------------------------------------------------------------------------------------

_NATIVE_TENS = {"열": 10, "스물": 20, "스무": 20, "서른": 30, "마흔": 40, "쉰": 50, "예순": 60, "일흔": 70, "여든": 80,
                "아흔": 90}  # fmt: skip
_NATIVE = {
    "하나": 1, "한": 1, "둘": 2, "두": 2, "셋": 3, "세": 3, "석": 3, "넷": 4, "네": 4, "넉": 4, "다섯": 5, "여섯": 6,
    "일곱": 7, "여덟": 8, "아홉": 9,
}  # fmt: skip
_SINO = {"영": 0, "공": 0, "일": 1, "이": 2, "삼": 3, "사": 4, "오": 5, "육": 6, "칠": 7, "팔": 8, "구": 9}
_SINO_TENS = {"십": 10, "백": 100, "천": 1000}
_SINO_GROUPS = {"만": 10**4, "억": 10**8}
_KOREAN_COUNTERS = (
    "개월|개|장|명|번째|번|시간|시|살|마리|권|잔|병|대|년|월|일|분|초|원|층|주|"
    "퍼센트|프로|인분|호|달러|유로|엔|도|킬로|미터|배|가지|사람|달|박|점|쪽|페이지|세|회|차|등|"
    "위|편|곡|줄|칸|벌|송이|그루|채|통|봉지|상자|박스|과|급|차례|파운드"
)
_KOREAN_NATIVE = re.compile(
    rf"(?<![가-힣])(?!한 ?번(?!째))({'|'.join(_NATIVE_TENS)})?({'|'.join(_NATIVE)})?"
    rf"(?<=[가-힣])(?= ?(?:{_KOREAN_COUNTERS}))"
)
_KOREAN_SINO = re.compile(
    rf"(?<![가-힣])(?!이번 ?(?:주|달|해|분기))(?:([0-9]{{1,15}}(?:[.,][0-9]{{1,9}}){{0,4}}) ?)?"
    rf"([영공일이삼사오육칠팔구십백천만억]{{1,24}})(?= ?(?:{_KOREAN_COUNTERS}))"
)
_KOREAN_MIXED = re.compile(r"([0-9]{1,15}(?:[.,][0-9]{1,9}){0,4}) ?([백천만억]{1,9})(?![가-힣])")
_SINO_ONE = re.compile(r"[일이](?= (?!년|개월|층|주|퍼센트|킬로))")
_KOREAN_CLOCK = re.compile(
    r"(?:(오전|오후|새벽|아침|낮|저녁|밤) ?)?(?<![0-9.:])([0-9]{1,2}) ?시(?!간|스|작|험"
    r"|민)(?: ?(?:([0-9]{1,2}) ?분|(반)))?"
)
_KOREAN_HALF = re.compile(r"(오전|오후|새벽|저녁|밤) ?([0-9]{1,2}):([0-9]{2})")
_KOREAN_WEEKDAY = re.compile(r"([월화수목금토일])요일")
_KOREAN_DAYS = dict(
    zip("월화수목금토일", ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"), strict=True)
)
_KOREAN_UNITS = (
    (re.compile(r"(?:영하|마이너스) ?(?=[0-9])"), " -"),
    (re.compile(r"영상 ?(?=[0-9])"), " "),
    (re.compile(r"(?<=[0-9]) ?시간"), " hours "),
    (re.compile(r"(?<=[0-9]) ?분(?!의|들)"), " minutes "),
    (re.compile(r"(?<=[0-9]) ?초"), " seconds "),
    (re.compile(r"(?<=[0-9]) ?개월"), " months "),
    (re.compile(r"(?<=[0-9]) ?(?:주일|주)(?!년)"), " weeks "),
    (re.compile(r"(?<=[0-9]) ?(?:퍼센트|프로)"), "% "),
    (re.compile(r"(?<=[0-9]) ?도"), " ° "),
    (re.compile(r"(?<=[0-9]) ?킬로미터"), " km "),
    (re.compile(r"(?<=[0-9]) ?킬로그램"), " kg "),
    (re.compile(r"(?<=[0-9]) ?원"), " krw "),
    (re.compile(r"달러"), " usd "),
    (re.compile(r"유로(?!운)"), " eur "),
    (re.compile(r"(?<=[0-9]) ?엔"), " jpy "),
    (re.compile(r"파운드"), " gbp "),
)


def _korean(text: str) -> str:
    text = _KOREAN_WEEKDAY.sub(lambda day: f" {_KOREAN_DAYS[day[1]]} ", text)
    text = _KOREAN_NATIVE.sub(
        lambda match: str(_NATIVE_TENS.get(match[1], 0) + _NATIVE.get(match[2], 0)) if match[0] else "", text
    )
    text = _KOREAN_SINO.sub(_sino_number, text)
    text = _KOREAN_MIXED.sub(lambda match: written(_sino_value(match[2], Decimal(plain_number(match[1])))), text)
    text = _KOREAN_CLOCK.sub(_korean_time, text)
    text = _KOREAN_HALF.sub(lambda time: f" {_korean_hour(time[1], int(time[2]))}:{time[3]} ", text)
    for pattern, name in _KOREAN_UNITS:
        text = pattern.sub(name, text)
    return text


def _sino_number(match: re.Match[str]) -> str:
    digits, sino = match[1], match[2]
    if digits:
        if sino[0] in _SINO:
            return match[0]
        return written(_sino_value(sino, Decimal(plain_number(digits))))
    if len(sino) == 1 and _SINO_ONE.match(match.string, match.start()):
        return match[0]
    if all(sign in _SINO for sign in sino) and len(sino) > 1:
        return "".join(str(_SINO[sign]) for sign in sino)
    return written(_sino_value(sino))


def _sino_value(sino: str, number: Decimal | None = None) -> Decimal:
    total, section = Decimal(0), Decimal(0)
    for sign in sino:
        if sign in _SINO:
            number = Decimal(_SINO[sign])
        elif sign in _SINO_TENS:
            section += (Decimal(1) if number is None else number) * _SINO_TENS[sign]
            number = None
        else:
            total += (section + (number or 0) or Decimal(1)) * _SINO_GROUPS[sign]
            section, number = Decimal(0), None
    return total + section + (number or 0)


def _korean_hour(half: str | None, hour: int) -> int:
    if half in ("오후", "저녁", "낮") and hour < 12:
        return hour if half == "낮" and hour > 9 else hour + 12
    if half == "밤" and 6 <= hour < 12:
        return hour + 12
    return 0 if half in ("오전", "새벽", "밤") and hour == 12 else hour


def _korean_time(match: re.Match[str]) -> str:
    return f" {_korean_hour(match[1], int(match[2]))}:{30 if match[4] else int(match[3] or 0):02} "


# -- Hindi -----------------------------------------------------------------------------------------------------

_HINDI_WORD = re.compile(r"[\u0900-\u0963\u0971-\u097f]+")
_HINDI_NAMES = {
    word: name
    for name, words in {
        "monday": "सोमवार", "tuesday": "मंगलवार", "wednesday": "बुधवार", "thursday": "गुरुवार गुरूवार बृहस्पतिवार वीरवार",
        "friday": "शुक्रवार", "saturday": "शनिवार", "sunday": "रविवार इतवार", "january": "जनवरी", "february": "फरवरी",
        "mmarch": "मार्च", "april": "अप्रैल", "mmay": "मई", "mjune": "जून", "mjuly": "जुलाई", "august": "अगस्त",
        "september": "सितंबर सितम्बर", "october": "अक्टूबर अक्तूबर", "november": "नवंबर नवम्बर",
        "december": "दिसंबर दिसम्बर", "usd": "डॉलर", "eur": "यूरो", "gbp": "पाउंड", "inr": "रुपये रुपए रुपया रुपयों रूपये रु",
        "percent": "प्रतिशत फीसदी", "days": "दिन दिनों", "hours": "घंटे घंटा घंटों", "minutes": "मिनट", "weeks": "हफ्ते सप्ताह",
        "months": "महीने महीना", "years": "साल वर्ष", "km": "किलोमीटर किमी", "kg": "किलो किलोग्राम", "degrees": "डिग्री",
    }.items()
    for word in words.split()
}  # fmt: skip
_HINDI_CLOCK = re.compile(
    r"(?:(सुबह|सवेरे|दोपहर|शाम|रात)(?: (?:के|को|में))? )?(?<![0-9:.])([0-9]{1,2})(?::([0-9]{2})|(\.5))? बजे"
    r"(?: (सुबह|दोपहर|शाम|रात))?"
)


def _hindi(text: str) -> str:
    text = text.replace("रु.", "रु ")
    return _HINDI_WORD.sub(lambda word: _HINDI_NAMES.get(word[0], word[0]), text)


def hindi_times(text: str) -> str:
    """Rewrite Hindi times in 24 hours. The numbers of the text are already in digits."""
    return _HINDI_CLOCK.sub(_hindi_time, text) if "बजे" in text else text


def _hindi_time(match: re.Match[str]) -> str:
    hour, half = int(match[2]), match[1] or match[5]
    if (half in ("दोपहर", "शाम") and hour < 12 and not (half == "दोपहर" and hour > 10)) or (
        half == "रात" and 6 <= hour < 12
    ):
        hour += 12
    elif half == "रात" and hour == 12:
        hour = 0
    return f" {hour}:{30 if match[4] else int(match[3] or 0):02} "
