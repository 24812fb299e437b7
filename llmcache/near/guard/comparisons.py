"""Read comparisons with a number: more than 5, at most 5, 5 or more, > 5, 5+, 5以上, 5 이하, कम से कम 5.

Covers English, German, Spanish, French, Italian, Portuguese, Dutch, Chinese, Japanese, Korean and Hindi. All
expressions
of one comparison become the same sign. They are removed from the text, so that the "no" of "no less than 5" is no
negation. The functions expect text from `llmcache.near.guard.plain_text`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from llmcache.near.guard.lexicon import UNITS, word_set
from llmcache.near.guard.number_lexicon import number_words

_NOT = r"(?:no|not|nicht|non|pas|niet|não) "
_NEGATED = {">": "<=", "<": ">=", ">=": "<", "<=": ">"}
# by language: words of which a text must have one, then the phrases for more, less, at least, at most
_PHRASES = (
    (
        "more greater larger bigger higher longer older later heavier excess upwards upward exceed exceeds "
        "exceeding above over "
        "beyond less fewer smaller lower shorter younger earlier lighter below under beneath least minimum most "
        "maximum max",
        r"(?:more|greater|larger|bigger|higher|longer|older|later|heavier) than|in excess of|upwards? of"
        r"|exceed(?:s|ing)?"
        r"|above|over|beyond",
        r"(?:less|fewer|smaller|lower|shorter|younger|earlier|lighter) than|below|under|beneath",
        r"at least|a minimum of|minimum(?: of)?",
        r"at (?:the )?most|a maximum of|maximum(?: of)?|max\.?|up to",
    ),
    (
        "mehr größer höher länger älter später schwerer über weniger kleiner niedriger kürzer jünger früher "
        "leichter unter "
        "mindestens wenigstens minimal höchstens maximal bis",
        r"(?:mehr|größer|höher|länger|älter|später|schwerer) als|über",
        r"(?:weniger|kleiner|niedriger|kürzer|jünger|früher|leichter) als|unter",
        r"mindestens|wenigstens|minimal",
        r"höchstens|maximal|bis zu",
    ),
    (
        "más menos mayor mayores menor menores superior superiores inferior inferiores mínimo máximo mucho sumo hasta "
        "plus moins supérieur supérieure supérieurs inférieur inférieure dessus dessous minimum maximum jusqu'à",
        r"más (?:del?|que)|(?:mayor|superior)(?:es)? (?:a|de|que)|plus (?:de|que|d')|supérieure?s? à|au-dessus de",
        r"menos (?:del?|que)|(?:menor|inferior)(?:es)? (?:a|de|que)|moins (?:de|que|d')|inférieure?s? à|au-dessous de",
        r"al menos|por lo menos|como mínimo|un mínimo de|au moins|au minimum|un minimum de",
        r"como mucho|a lo sumo|como máximo|un máximo de|hasta|au plus|au maximum|un maximum de|jusqu'à",
    ),
    (
        "più maggiore superiore oltre meno minore inferiore almeno minimo massimo fino mais acima abaixo menos "
        "pelo mínimo máximo "
        "até meer groter langer ouder minder kleiner korter jonger minstens minste minst hoogstens hoogste tot",
        r"più di|oltre|(?:maggiore|superiore) (?:a|di)|mais (?:de|que|do que)|acima de|(?:meer|groter|langer"
        r"|ouder) dan",
        r"meno di|(?:minore|inferiore) (?:a|di)|abaixo de|(?:minder|kleiner|korter|jonger) dan",
        r"almeno|come minimo|pelo menos|no mínimo|minstens|ten minste|op zijn minst",
        r"al massimo|non oltre|fino a|no máximo|até|hoogstens|ten hoogste|tot",
    ),
)
_SIGN_OF_GROUP = (">", "<", ">=", "<=")
_BEFORE = tuple(
    (
        word_set(words),
        re.compile(rf"\b({_NOT})?(?:{'|'.join(f'({phrase})' for phrase in phrases)})(?=[ $€£¥₹])"),
    )
    for words, *phrases in _PHRASES
)
_NUMBER = re.compile(
    r" ?(?:(an? |one |half an? |eine[mnr]? |un[ae]? |uma? )|the |about )?(?:us|usd|eur|gbp|rs\.?|ca|€|£|¥|₹|\$)? ?[-+]?"
    r"(?:([0-9])|([^\W\d_]+))"
)
_AFTER = re.compile(
    r" (?:(?<!more )(?:or|and|oder|und|o|ou|of) (?:(more|above|over|up|older|longer|later|mehr|más|plus|più|mais|meer)"
    r"|(less|fewer|below|under|younger|shorter|earlier|weniger|menos|moins|meno|minder))"
    r"|(as a minimum|at least|at the least|au moins|au minimum|como mínimo|por lo menos|minimum)"
    r"|(at most|at the most|at maximum|au plus|au maximum|como máximo|maximum|tops))(?![\w'])"
)
_NUMBER_BEFORE = re.compile(r"(?:([0-9])|([^\W\d_]+))(?:[$€£%]| ?(?:percent|[^\W\d_]+))?$")
_SIGNS = re.compile(
    r"(?<![-=<>!])(=?[<>]=?|[≤≥≠]|!=|<>|±|\+/?-)(?![<>=]) ?(?=[-+]?[$€£¥₹]?[0-9])(?!3[^\w%]*$)"
    r"|(?<=[0-9])(\+)(?![\w+/-])(?! ?[0-9])"
)
_SAME = {"≤": "<=", "≥": ">=", "=<": "<=", "=>": ">=", "≠": "!=", "<>": "!=", "+/-": "±", "+-": "±", "+": ">="}
_MAY_SIGN = re.compile(r"[<>≤≥≠±+!][=<>/-]?-? ?[-+$€£¥₹]?[0-9]|[0-9]\+")
_EXTRA = re.compile(
    r"\b([0-9]+(?:[.,][0-9]+)*)(%| ?[^\W\d_]+)? (more|less|fewer|higher|lower|mehr|weniger)\b(?! than| als)"
)

TRIGGERS = word_set("than als exceed exceeds exceeding")
"""Words of a comparison with "a" and a unit: more than a week. All others need a number, and are read only "
"beside one."""
_WORDS = TRIGGERS.union(*(words for words, _ in _BEFORE), ("tops",))


def comparisons(text: str, words: Collection[str], into: list[str]) -> str:
    """Move the comparisons of a text to `into`, in order. words: the words of the text. Returns the rest."""
    signs: list[tuple[int, str]] = []
    if not _WORDS.isdisjoint(words) or "up to" in text:
        for its_words, pattern in _BEFORE:
            if not its_words.isdisjoint(words) or "up to" in text:
                text = pattern.sub(lambda match: _before(match, signs), text)
        text = _AFTER.sub(lambda match: _after(match, signs), text)
        signs += [(match.start(), "+" if match[3] in _RISING else "-") for match in _EXTRA.finditer(text)]
    if _MAY_SIGN.search(text):
        text = _SIGNS.sub(lambda match: _sign(match, signs), text)
    if not text.isascii() and _ASIAN.search(text):
        text = _HINDI.sub(lambda match: _grouped(match, signs, _HINDI_SIGNS), text)
        text = _HAN.sub(lambda match: _grouped(match, signs, _HAN_SIGNS), text)
        text = _SUFFIX.sub(lambda match: _grouped(match, signs, _SUFFIX_SIGNS), text)
    if signs:
        into += [sign for _, sign in sorted(signs, key=lambda placed: placed[0])]
    return text


_RISING = word_set("more higher mehr")
_POSITION = word_set("above below over under über unter")


def _before(match: re.Match[str], signs: list[tuple[int, str]]) -> str:
    """Note "more than" before a number, or before "a" and a unit of time. Returns the replacement in the text."""
    following = _NUMBER.match(match.string, match.end())
    if following is None:
        return match[0]
    article, digit, word = following.groups()
    if word in ("zero", "null") and match[0] in _POSITION:
        return match[0]  # 5 degrees below zero
    if word == "once" and " de" not in match[0]:  # more than once; Spanish has "más de once"
        return match[0]
    if not (digit or word in number_words() or (article and word in UNITS)):
        return match[0]
    sign = next(sign for sign, phrase in zip(_SIGN_OF_GROUP, match.groups()[1:], strict=True) if phrase)
    signs.append((match.start(), _NEGATED[sign] if match[1] else sign))
    return " " * len(match[0])


def _after(match: re.Match[str], signs: list[tuple[int, str]]) -> str:
    """Note "or more" after a number and its unit. Returns the replacement in the text."""
    number = _NUMBER_BEFORE.search(match.string, max(0, match.start() - 30), match.start())
    if number is None or not (number[1] or number[2] in number_words()):
        return match[0]
    signs.append((match.start(), ">=" if match[1] or match[3] else "<="))
    return " " * len(match[0])


def _sign(match: re.Match[str], signs: list[tuple[int, str]]) -> str:
    sign = match[1] or match[2]
    signs.append((match.start(), _SAME.get(sign, sign)))
    return " " * len(match[0])


# -- Chinese, Japanese, Korean and Hindi ---------------------------------------------------------------------------

_ASIAN = re.compile(r"[\u0900-\u097f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_HAN_NUMBER = r"(?=[ 了于於约]?[$¥€£]? ?[0-9零一二两兩三四五六七八九十百千万])"
_HAN_SIGNS = (">=", "<=", ">", "<")
_HAN = re.compile(
    rf"(?:(至少|最少|起码|不少于|不少於|不低于|不低於|不小于|少なくとも|最低でも|적어도|최소(?:한)? ?)"
    rf"|(至多|最多|不超过|不超過|不多于|不高于|不大于|最大で?|최대 ?|많아야 ?)|(超过|超過|大于|大於|多于|多於"
    rf"|高于|高於|不止)"
    rf"|(小于|小於|少于|少於|低于|低於|不到|不足|不满|未满)){_HAN_NUMBER}|(?:(적어도|최소한?)|(최대|많아야)) "
    rf"(?=[가-힣])"
)
_SUFFIX_SIGNS = (">=", "<=", "<", ">")
_SUFFIX = re.compile(
    r"(?<=[0-9个個人名岁歲年天月日元円块%件分秒克斤米ルン歳回本枚つ度개명원일달시간초살번세권대장]) ?"
    r"(?:(以上|이상(?=[이의을인은 .,?!]|$))|(以下|以内|이하|이내)|(未満|より小さい|より少ない|より低い|미만"
    r"|보다 (?:작|적|낮|짧)[가-힣]{1,2})|(を超える|超(?!市)|より大きい|より多い|より高い|초과|보다 (?:많|크|높"
    r"|길|큰|긴)[가-힣]{0,2}))"
)
_HINDI_SIGNS = (">=", "<=", ">", "<")
_HINDI = re.compile(
    r"(?:(कम से कम|न्यूनतम)|(अधिक से अधिक|ज्यादा से ज्यादा|अधिकतम))(?= )|(?<= )(?:(से (?:अधिक|ज्यादा|ऊपर|बड[ाे]))"
    r"|(से (?:कम|नीचे|छोट[ाे])))(?= |$|[.,?!।])"
)


def _grouped(match: re.Match[str], signs: list[tuple[int, str]], meanings: tuple[str, ...]) -> str:
    place = (match.lastindex or 1) - 1
    signs.append((match.start(), meanings[place % len(meanings)]))
    return " " * len(match[0])
