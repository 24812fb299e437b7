"""Read dates without digits: tomorrow, last week, 3 days ago, in the evening, before Monday, winter, 50 BC, UTC.

Covers English, German, Spanish, French, Italian, Portuguese, Dutch, Chinese, Japanese, Korean and Hindi, with
some words
of Russian. Every expression becomes a short code: "tomorrow" and "demain" are both day+1, "next week" is +week. The
functions expect text from `llmcache.near.guard.plain_text`, with numbers in digits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from llmcache.near.guard.lexicon import MONTHS, PERIODS, SURE_MONTHS, UNITS, WEEKDAYS, word_set


def _codes(rows: dict[str, str]) -> dict[str, str]:
    return {word: code for code, words in rows.items() for word in words.split()}


_DAYS = _codes(
    {
        "day+0": "today heute hoy oggi hoje vandaag сегодня आज aujourd'hui",
        "day+1": "tomorrow tmrw tmr tomorow tommorow amanhã demain domani завтра",
        "day-1": "yesterday gestern ayer ieri ontem gisteren hier вчера",
        "day+2": "übermorgen uebermorgen overmorgen dopodomani overmorrow послезавтра",
        "day-2": "vorgestern anteayer eergisteren anteontem avantieri позавчера",
        "day±1": "कल",
        "day±2": "परसों",
    }
)
_PARTS = _codes(
    {
        "morning": "morning mornings vormittag vormittags morgens matin matinée mattina manhã ochtend सुबह утром",
        "afternoon": "afternoon afternoons nachmittag nachmittags pomeriggio middag दोपहर днём",
        "evening": "evening evenings tonight tonite abend abends soir soirée sera avond शाम вечером",
        "night": "night nights nacht nachts nuit notte madrugada रात ночью",
    }
)
_SEASONS = _codes(
    {
        "summer": "summer sommer verano été estate verão zomer गर्मी",
        "winter": "winter invierno hiver inverno सर्दी",
        "autumn": "autumn herbst otoño automne autunno outono herfst",
        "spring": "springtime frühling frühjahr primavera printemps lente",
        "christmas": "christmas xmas weihnachten navidad noël natale natal kerst",
        "easter": "easter ostern pascua pâques pasqua páscoa pasen",
        "halloween": "halloween",
        "thanksgiving": "thanksgiving",
    }
)
_EVES = frozenset({"christmas", "easter"})
_PERIODS = (
    {word: unit for word, unit in UNITS.items() if unit in PERIODS and len(word) > 2}
    | _codes(
        {
            "weekend": "weekend weekends wochenende fin",
            "quarter": "quarter quarters quartal trimestre trimester",
            "decade": "decade decades jahrzehnt década décennie",
            "century": "century centuries jahrhundert siglo siècle secolo século",
            "semester": "semester semesters semestre",
            "spring": "spring",
            "autumn": "fall",
            "season": "season seasons",
        }
    )
    | {word: f"m{MONTHS[word]}" for word in (*SURE_MONTHS, "june", "july", "juni", "juli")}
    | WEEKDAYS
    | _SEASONS
    | _PARTS
    | _codes({"afternoon": "tarde tardes", "evening": "noche noches noite", "morning": "mañana"})
)
_DIRECTIONS = _codes(
    {
        "+": "next following coming upcoming nächste nächsten nächster nächstes nächstem kommende kommenden "
        "kommender kommendes "
        "próxima próximo próximas próximos proxima proximo prochain prochaine prochains prochaines prossimo prossima "
        "prossimi volgende अगले अगला अगली следующий следующая следующую следующей следующем",
        "-": "last previous past letzte letzten letzter letztes letztem vorige vorigen voriger voriges "
        "vergangene vergangenen "
        "vergangenes vergangener pasada pasado pasadas pasados última último últimas últimos dernier dernière derniers "
        "dernières passé passée scorso scorsa scorsi passada passado vorig afgelopen पिछले पिछला पिछली прошлый прошлая "
        "прошлую прошлой прошлом",
        "=": "this current diese diesen dieser dieses diesem esta este questa questo cette deze इस",
    }
)
_AFTER_PERIOD = word_set("""
    próxima próximo próximas próximos proxima proximo prochain prochaine prochains prochaines prossimo prossima
    pasada pasado pasadas pasados dernier dernière derniers dernières passé passée scorso scorsa passada passado
    """)
_PLAIN_WITH_THIS = frozenset(("week", "month", "year", "quarter", "weekend", "decade", "century", "semester"))
_SINCE = _codes(
    {
        "-": "ago back geleden назад atrás fa earlier before prior पहले",
        "+": "later after afterwards बाद später danach después más",
    }
)
_UNTIL_NOW = word_set("vor hace há y")
_ARTICLES = word_set("a an one half einer einem einen ein eine un una une um uma एक")
_DOUBTFUL = word_set("morgen mañana tarde noche noite midi viene vem")
_MORNING_AFTER = word_set("am heute gestern jeden diesen dieser nächsten la esta cada una por") | WEEKDAYS.keys()
_THIS = word_set("this since ce questa esta")  # "this morning" is today
_GREETING = word_set("good guten gute schönen gut buenas buenos bonne goede buona happy feliz joyeux frohe merry")
_ZONES = word_set("utc cet cest eet eest aest aedt acst edt pdt cdt mdt kst jst msk")
_ZONES_BEFORE_TIME = word_set("est ist bst pst cst mst wet brt")
_DECADE_WORDS = _codes(
    {
        "20": "twenties zwanziger zwanzigern",
        "30": "thirties dreißiger dreissiger dreißigern",
        "40": "forties fourties vierziger vierzigern",
        "50": "fifties fünfziger fünfzigern",
        "60": "sixties sechziger sechzigern",
        "70": "seventies siebziger siebzigern",
        "80": "eighties achtziger achtzigern",
        "90": "nineties neunziger neunzigern",
    }
)
_OTHERS = word_set("bc bce before until till since")

_NOT_ALONE = frozenset({"this", "after", "y", "más", "fa", "hier", "fin"})  # common words that may be part of a date
_BESIDE = frozenset(
    (*_DAYS, *_PARTS, *_SEASONS, *_DIRECTIONS, *_SINCE, *_DOUBTFUL, *_ZONES, *_ZONES_BEFORE_TIME, *_OTHERS, *_UNTIL_NOW)
)
TRIGGERS = _BESIDE.union(_DECADE_WORDS, _PLAIN_WITH_THIS) - _NOT_ALONE
"""Words of which an ASCII text without digits must have one to have a relative date."""

_WORD = re.compile(r"(?:[^\W\d_]|[\u0900-\u0963\u0971-\u097f])+(?:'[^\W\d_]+)*|[0-9][0-9.,]*")


def relative_dates(text: str, words: Collection[str], into: list[str]) -> None:
    """Append the relative dates of a text to `into`, in order. words: the words of the original text."""
    if not _BESIDE.isdisjoint(words):
        found = _WORD.findall(text)
        for place, word in enumerate(found):
            if word in _BESIDE:
                into += _read(found, place, word)
    if not text.isascii() and _HAN_OR_HANGUL.search(text):
        into += _asian(text)


def _read(words: Sequence[str], place: int, word: str) -> Sequence[str]:
    """Return the codes of the relative date whose last or main word is words[place]."""
    before = words[place - 1] if place else ""
    after = words[place + 1] if place + 1 < len(words) else ""
    if after[:1].isdecimal() and place + 2 < len(words):
        after = words[place + 2]  # last 3 weeks
    if word in _DOUBTFUL:
        return _doubtful(words, place, word, before)
    if day := _DAYS.get(word):
        if word == "hier" and _FRENCH.isdisjoint(words):
            return ()  # German for "here"
        if before in ("after", "après", "before", "avant") and day in ("day+1", "day-1"):
            return (day.replace("1", "2"),)
        return () if day == "day+0" else (day,)
    if direction := _DIRECTIONS.get(word):
        if after == "mañana":
            return ()  # "pasado mañana" is read at its second word
        period = _PERIODS.get(after.removeprefix("l'"))
        if period and (direction != "=" or period in _PLAIN_WITH_THIS):
            return (direction + period,)
        if word in _AFTER_PERIOD and (period := _PERIODS.get(before.removeprefix("l'"))):
            return (direction + period,)
        return ()
    if part := _PARTS.get(word):
        return () if before in _GREETING or (part == "morning" and before in _THIS) else (part,)
    if season := _SEASONS.get(word):
        return () if before in _GREETING else (season,)
    if sign := _SINCE.get(word):
        return (sign,) if _PERIODS.get(before) in PERIODS and _exact(words, place - 2) else ()
    if word in _UNTIL_NOW:
        return _until_now(words, place, word, before)
    if word in _ZONES or (word in _ZONES_BEFORE_TIME and after in ("time", "timezone", "zone")):
        return (word,)
    return ()


_FRENCH = word_set("avant je j'ai le la les mon ma mes depuis reçu est pas été c'est a")


def _doubtful(words: Sequence[str], place: int, word: str, before: str) -> Sequence[str]:
    """Read the words of German and Spanish that mean a day or a part of the day, or neither."""
    if before in _GREETING:
        return ()
    if word in ("morgen", "mañana"):
        if before == "pasado":
            return ("day+2",)
        return ("morning",) if before in _MORNING_AFTER else ("day+1",)
    if word == "midi":
        return ("afternoon",) if before in ("après", "l'après") else ()
    if word in ("viene", "vem"):
        period = _PERIODS.get(words[place - 2]) if place > 1 and before == "que" else None
        return (f"+{period}",) if period else ()
    if before not in ("la", "esta", "de", "por", "à", "da", "ayer", "cada", "una", "mañana", "hoy"):
        return ()
    return ("afternoon",) if word == "tarde" else ("evening",)


def _until_now(words: Sequence[str], place: int, word: str, before: str) -> Sequence[str]:
    """Read "vor 3 Tagen", "hace 3 días" and "il y a 3 jours", which mean 3 days ago."""
    if before == "desde" or (word == "y" and (before != "il" or words[place + 1 : place + 2] != ["a"])):
        return ()
    start = place + 1 + (word == "y")
    exact = _exact(words, start) and _PERIODS.get(words[start + 1] if start + 1 < len(words) else "") in PERIODS
    return ("-",) if exact else ()


def _exact(words: Sequence[str], place: int) -> bool:
    """Return True if words[place] is a number or an article: "3 days ago", "a week ago"; not "a few days ago"."""
    return 0 <= place < len(words) and (words[place][0].isdecimal() or words[place] in _ARTICLES)


# -- before and after a date, eras, decades, zones -----------------------------------------------------------------

_BOUND_WORDS = _codes(
    {
        "before": "before antes avant prima vor voor",
        "after": "after nach después dopo après",
        "until": "until till til bis hasta jusqu'au jusqu'à fino tot",
        "since": "since seit desde depuis dal sinds",
    }
)
_CALENDAR = WEEKDAYS.keys() | MONTHS.keys()
_BOUND = re.compile(
    rf"\b({'|'.join(sorted(_BOUND_WORDS, key=len, reverse=True))}) "
    r"(?:the |de |del |de las |las |el |le |la |dem |den |am |zum |alle |al )?(?:([0-9]+(?:\.5)?)([^ ]*(?: "
    r"(?:of |de |di )?[^\W\d_]+)?)"
    r"|([^\W\d_]+))"
)
_RANGE = re.compile(r"(?:[0-9]|\b(?:uhr|am|pm)|([^\W\d_]+)) $")


def bounds(text: str, words: Collection[str], into: list[str]) -> None:
    """Append before, after, until and since next to a date or a number to `into`: before Monday, after 5 pm.

    A range ("Monday till Friday", "10 bis 12 Uhr") has no bound, since a dash would mean the same.
    """
    if _BOUND_WORDS.keys().isdisjoint(words):
        return
    for match in _BOUND.finditer(text):
        word, number, rest, name = match.groups("")
        bound = _BOUND_WORDS[word]
        if name and name not in _CALENDAR:
            continue
        start = _RANGE.search(text, max(0, match.start() - 16), match.start()) if bound == "until" else None
        if start and (start[1] is None or start[1] in _CALENDAR):
            continue
        period = UNITS.get(rest.strip(" .,;!?")) in PERIODS
        if number and ((period and (bound == "since" or word == "vor")) or not (period or _dated(number, rest, bound))):
            continue  # "vor 3 Tagen" is read by `relative_dates`
        into.append(bound)


_DATED = re.compile(
    r"[:/.-][0-9]| ?(?:am|pm|a\.m|p\.m|uhr|h|heures|horas|o'clock)\b|(?:st|nd|rd|th|\.)? ?(?:of |de |di )?([^\W\d_]+)"
)


def _dated(number: str, rest: str, bound: str) -> bool:
    """Return True if a number is a time, a year or a day of a month, or may be an hour after "before"."""
    if len(number) == 4 or (bound == "before" and not rest.strip(".,;!? ")):
        return True
    date = _DATED.match(rest)
    return date is not None and (date[1] is None or date[1] in MONTHS)


_DECADE = re.compile(rf"\b(?:nineteen[- ])?({'|'.join(_DECADE_WORDS)})\b(?: jahren?)?")
_YEARS_OF_DECADE = re.compile(r"(?<![\w.,])(?:19|')?([2-9]0)'?(?:s|er|ern)\b(?: jahren?)?(?! ?[0-9])")
_ERA = re.compile(
    r"(?<=[0-9]) ?(?:bce?|b\. ?c\.(?: ?e\.)?|v\. ?chr\.?|a\. ?c\.|av\. ?j\.?-? ?c\.?|avant jésus-christ|avant j\.?-c\.?"
    r"|vor christus|antes de cristo)(?!\w)(?! (?:i|we|you|it|they|my|the|he|she|of)\b)"
    r"|(?:公元前|紀元前|西元前|기원전|ईसा पूर्व) ?(?=[0-9])"
)
_MAY_ERA = re.compile(r"bc|b\. ?c|chr|a\. ?c|j\.?-? ?c|前|기원|ईसा|crist")
_REGIONS = frozenset({"eastern", "central", "mountain", "pacific"})
_REGION = re.compile(r"\b(e|c|m|p)(?:astern|entral|ountain|acific) (?:(s)tandard |(d)aylight )?time\b")


def decades(text: str, words: Collection[str]) -> str:
    """Write decades and the time zones of North America in one form: the nineties, the 1990s and 90er are the 90s."""
    if not _DECADE_WORDS.keys().isdisjoint(words):
        text = _DECADE.sub(lambda match: f"{_DECADE_WORDS[match[1]]}s", text)
    if "0s" in text or "0er" in text or "0's" in text:
        text = _YEARS_OF_DECADE.sub(r"\1s", text)
    if not _REGIONS.isdisjoint(words):
        text = _REGION.sub(lambda match: f"{match[1]}{'d' if match[3] else 's'}t", text)
    return text


def eras(text: str, into: list[str]) -> str:
    """Move "BC" after a number from a text to `into`. Returns the rest. AD is what a year without an era means."""
    if not _MAY_ERA.search(text):
        return text

    def take(_: re.Match[str]) -> str:
        into.append("bc")
        return " "

    return _ERA.sub(take, text)


# -- Chinese, Japanese and Korean ----------------------------------------------------------------------------------

_HAN_OR_HANGUL = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_ASIAN_CODES = _codes(
    {
        "day+1": "明天 明日 あした 내일",
        "day-1": "昨天 昨日 きのう 어제 어저께",
        "day+2": "后天 後天 明後日 あさって 모레 내일모레",
        "day-2": "前天 一昨日 おととい 그저께 그제",
        "day+1 evening": "明晚 明晩 내일밤",
        "day-1 evening": "昨晚 昨晩 昨夜 어젯밤 간밤",
        "day+1 morning": "明早 明朝",
        "evening": "晚上 傍晚 夕方 今晚 今晩 今夜 저녁",
        "morning": "早上 早晨 清晨 上午 午前 今早 今朝 毎朝 朝に 朝の 朝は 아침 오전",
        "afternoon": "下午 午後 午后 오후",
        "night": "夜里 夜裡 夜晚 深夜 半夜 凌晨 夜に 夜の 夜は 밤에 한밤 새벽",
        "+week": "下周 下週 下星期 下礼拜 下个星期 下個星期 下一周 来週 다음주",
        "-week": "上周 上週 上星期 上礼拜 上个星期 上個星期 上一周 先週 지난주 저번주",
        "=week": "这周 這週 本周 本週 这星期 这个星期 今週 이번주",
        "+month": "下月 下个月 下個月 来月 다음달",
        "-month": "上月 上个月 上個月 先月 지난달 저번달",
        "=month": "这个月 這個月 本月 今月 이번달",
        "+year": "明年 来年 내년 다음해",
        "-year": "去年 昨年 작년 지난해",
        "=year": "今年 올해",
        "-2year": "前年 一昨年 재작년",
        "+2year": "后年 後年 再来年",
        "+quarter": "下季度 下个季度 다음분기",
        "-quarter": "上季度 上个季度 지난분기",
        "summer": "夏天 夏季 여름",
        "winter": "冬天 冬季 겨울",
        "spring": "春天 春季",
        "autumn": "秋天 秋季 가을",
    }
)
_AGO = r"(?:seconds|minutes|hours|days|weeks|months|years|日|周|週間?|星期|年|달|일|년|주) *"
_ASIAN = re.compile(
    rf"({'|'.join(sorted(_ASIAN_CODES, key=len, reverse=True))})(?!好)"
    r"|(다음|지난|저번|이번) (주말|주|달|해|분기|봄|여름|가을|겨울)(?![가-힣]{3})"
    r"|(下|上|这|這|本)(?:个|個|一)?(?= ?(?:mon|tues|wednes|thurs|fri|satur|sun)day)"
    rf"|[0-9] *{_AGO}(?:(?:之|以)?(前)|(전)(?=[에까부의은 .,?!]|$)|(?:之|以)?(后|後)|(후|뒤)(?=[에까부의은 .,?!]|$))"
)
_KOREAN_DIRECTION = {"다음": "+", "지난": "-", "저번": "-", "이번": "="}
_KOREAN_PERIOD = {"주": "week", "달": "month", "해": "year", "분기": "quarter",
                  "주말": "weekend", "봄": "spring", "여름": "summer", "가을": "autumn", "겨울": "winter"}  # fmt: skip


def _asian(text: str) -> list[str]:
    """Return the relative dates of a Chinese, Japanese or Korean text."""
    codes: list[str] = []
    for word, direction, period, weekday, *ago in (match.groups() for match in _ASIAN.finditer(text)):
        if word:
            codes += _ASIAN_CODES[word].split()
        elif direction:
            codes.append(_KOREAN_DIRECTION[direction] + _KOREAN_PERIOD[period])
        elif weekday:
            if weekday in "下上":
                codes.append("+week" if weekday == "下" else "-week")
        else:
            codes.append("-" if ago[0] or ago[1] else "+")
    return codes
