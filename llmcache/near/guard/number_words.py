"""Rewrite number words in digits: "twenty-one cards" becomes "21 cards", "3 thousand" becomes "3000".

Covers English, German, Spanish, French, Italian, Portuguese, Dutch and Hindi, with ordinals, fractions and multipliers,
and the common words of Russian (`llmcache.near.guard.number_lexicon`). The functions expect text from
`llmcache.near.guard.plain_text`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from functools import cache

from llmcache.near.guard.digits import plain_number, written
from llmcache.near.guard.lexicon import word_set
from llmcache.near.guard.number_lexicon import (
    LANGUAGE_WORDS,
    ONLY_IN,
    cardinals,
    joined_number,
    multipliers,
    ordinals,
)

_AND = word_set("and und y et e en и")
_LINKED_ONE = word_set("one un uno una une um uma ein eine een एक один")  # numbers only inside a longer number
_PLURAL = word_set("dozens millions billions trillions lakhs crores docenas douzaines millones milliards cents")
# words after a "one" that is no number: "one of them", "the one with a chip"
_NOT_AFTER_ONE = word_set("""
    of another that which who whom whose is was are were for to in on at with and or but can could should would must
    may might has had have does did do will from as by so than then if i you he she we they it not ever the a an this
    more thing way please too else when where because before after about like just really only be been here there now
    up out off over s sided self only who's that's
    """)
_NOT_BEFORE_ONE = word_set("""
    the this that which another no every each any some same other right wrong only new old good bad big small first
    last next my your his her our their next-to such what loved a an it's he's she's better best
    """)
_NOT_BEFORE_FIRST = word_set("at")
_NOT_AFTER_FIRST = word_set("of name names and place hand off class")
_AFTER_A_SECOND = word_set("to of for and but i it that this please later ago if or in")
_ABBREVIATED = word_set("mio mln mrd mld bn md")
_PARTIAL = word_set("half quarter halb viertel दो demie demi media meia mezza")
_DECIMAL_POINTS = word_set("point komma virgule coma vírgula virgola दशमलव")
_CLOCK_WORDS = word_set("past to after till before nach vor")


# -- composing -------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"(?:[^\W\d_]|[\u0900-\u0963\u0971-\u097f])+|[0-9]+(?:[.,][0-9]+)*")


_QUATRE_VINGT = re.compile(r"\bquatre[- ]vingts?\b")
_AND_A_HALF = re.compile(r"\b([0-9]{1,9}|one)(?: and a half| et demie?)\b")
_DIX = re.compile(r"\bdix-(sept|huit|neuf)\b")
_DOUBLE_CHECK = re.compile(r"\bdouble[- ](?=check)")
_HALF_A = re.compile(r"\b(half|quarter) (?:of )?an? ")  # half a million, half an hour: drop the article


def in_digits(text: str, known: Collection[str]) -> str:
    """Rewrite the number words of a text in digits.

    text: plain. known: words of the text that are in `number_words` or have a `joined_number`.
    """
    language = _language(text) if not ONLY_IN.keys().isdisjoint(known) else ""
    if "double" in known:
        text = _DOUBLE_CHECK.sub("", text)
    text = _QUATRE_VINGT.sub("quatrevingt", text) if "quatre" in text else text
    text = _AND_A_HALF.sub(lambda match: f"{match[1] if match[1] != 'one' else 1}.5", text)
    text = _DIX.sub(r"dix\1", _HALF_A.sub(r"\1 ", text))
    tokens = list(_TOKEN.finditer(text))
    parts: list[str] = []
    done = place = 0
    while place < len(tokens):
        word = tokens[place][0]
        if (
            word not in known
            and word not in ("quatrevingt", "dixsept", "dixhuit", "dixneuf")
            and not word[0].isdecimal()
        ):
            place += 1
            continue
        read = _number(text, tokens, place, language)
        if read is None:
            place += 1
            continue
        value, end = read
        start = tokens[place].start()
        parts += (text[done:start], value)
        done, place = tokens[end - 1].end(), end
        if tokens[end - 1][0] in _ABBREVIATED and text[done : done + 1] == "." and text[done + 1 : done + 2] == " ":
            done += 1
    return "".join((*parts, text[done:]))


def _language(text: str) -> str:
    """Return the codes of the most likely languages of a text, separated by spaces; "" if unknown."""
    words = set(re.findall(r"[^\W\d_]+", text))
    counts = {name: len(words & listed) for name, listed in _vocabulary().items()}
    for name in counts:
        numbers = sum(name in ONLY_IN[word].split() for word in words & ONLY_IN.keys())
        counts[name] += numbers if numbers > 1 else 0  # "mille neuf cents" has no other French word
    best = max(counts.values())
    return " ".join(name for name, count in counts.items() if count == best) if best else ""


@cache
def _vocabulary() -> dict[str, frozenset[str]]:
    return {name: frozenset(line.split()) for name, line in LANGUAGE_WORDS.items()}


def _is_number_word(word: str, language: str) -> bool:
    """Return True if a word is a number in these languages."""
    languages = ONLY_IN.get(word)
    return languages is None or any(name in language for name in languages.split())


def _number(text: str, tokens: Sequence[re.Match[str]], place: int, language: str) -> tuple[str, int] | None:
    """Read the number that starts at a token.

    Returns its digits and the index after its last token, or None if no number starts there.
    """
    values, ranks, factors = cardinals(), ordinals(), multipliers()
    first = tokens[place][0]
    if place and not first[0].isdecimal() and text[tokens[place].start() - 1].isalnum():
        return None  # a suffix: 3bn, 5k
    total = Decimal(0)
    current: Decimal | None = None
    half = False
    end = place
    if first == "साढे" and place + 1 < len(tokens):
        half, end = True, place + 1
    biggest = 0
    while end < len(tokens):
        word = tokens[end][0]
        started = current is not None or biggest > 0
        gap = text[tokens[end - 1].end() : tokens[end].start()] if end > place else " "
        if not half and gap not in (" ", "-") and not (gap == "" and tokens[end - 1][0][0].isdecimal()):
            break
        ahead = end
        if started and word in _AND and end + 1 < len(tokens):
            after = tokens[end + 1][0]
            if after in ("a", "demi", "demie", "media", "meia", "mezza", "mezzo") and (
                after != "a" or (end + 2 < len(tokens) and tokens[end + 2][0] == "half")
            ):
                last = end + 3 if after == "a" else end + 2
                return written(total + (current or 0) + Decimal("0.5")), last
            ahead, word = end + 1, after
        if word[0].isdecimal():
            if started or ahead != end or end + 1 >= len(tokens) or len(word) > 15:
                break
            after = tokens[end + 1][0]
            if after not in factors or (after in ("cent", "cents") and not _is_number_word(after, language)):
                break
            if text[tokens[end].end() : tokens[end + 1].start()] not in (" ", "-", ""):
                break
            current, end = Decimal(plain_number(word)), end + 1
            continue
        if word in _DECIMAL_POINTS and current is not None and end + 1 < len(tokens):
            decimals, last = _decimals(text, tokens, end + 1)
            if not decimals:
                break
            current, end = Decimal(f"{int(total + current)}.{decimals}"), last
            total = Decimal(0)
            if end >= len(tokens) or tokens[end][0] not in factors:
                break
            continue
        if word in ("cent", "cents") and "fr" not in language:
            break
        if word in factors and (started or ahead == end) and (started or _is_number_word(word, language)):
            multiplier = factors[word]
            if not started and (
                word in _PLURAL or (word in ("mil", "mille", "md") and not _is_number_word(word, language))
            ):
                break
            if multiplier == 100 and current is not None and current < 100 and current % 1 == 0:
                current = current * 100
            elif multiplier == 100:
                if current is not None and current % 1 == 0:
                    break
                current = (Decimal(1) if current is None else current) * 100
            elif multiplier == 12:
                return written((total + (Decimal(1) if current is None else current)) * 12), ahead + 1
            elif multiplier > biggest > 0 and current is None:
                total *= multiplier
            else:
                total += (Decimal(1) if current is None else current) * multiplier
                current = None
            biggest = max(biggest, multiplier)
            end = ahead + 1
            continue
        value = values.get(word)
        if value is None and word in _LINKED_ONE and started:
            value = Decimal(1)
        if value is None:
            value = joined_number(word) if len(word) > 7 else None
        if value is not None and not started and not _is_number_word(word, language):
            value = None
        if value is None and word == "one" and not started and _one_is_number(tokens, end, text):
            value = Decimal(1)
        if value is not None and not started and word in _PARTIAL:
            value = _fraction(text, tokens, end, value)
        if value is not None and (not started or _continues(total, current, value, word)):
            if current in (18, 19, 20) and value >= 10:
                current = current * 100  # nineteen ninety-five
            current = (current or Decimal(0)) + value
            end = ahead + 1
            if half:
                return _plus_half(text, tokens, end, current)
            continue
        ordinal = ranks.get(word)
        if ordinal is not None and (started or (_is_number_word(word, language) and _is_ordinal(tokens, end, text))):
            if not started or _continues(total, current, ordinal, word):
                return written(total + (current or Decimal(0)) + ordinal), ahead + 1
            if current is not None and ordinal == 3 and word == "third":
                return written((total + current) / 3), ahead + 1
        if current is not None and word in ("thirds", "quarters", "halves", "drittel") and current < 10:
            return written(current / {"quarters": 4, "halves": 2}.get(word, 3)), ahead + 1
        break
    if current is None and not biggest:
        return None
    return written(total + (current or Decimal(0))), end


def _decimals(text: str, tokens: Sequence[re.Match[str]], place: int) -> tuple[str, int]:
    """Read number words after a decimal point ("three point one four"). Returns digits and the index after the last."""
    digits = ""
    while place < len(tokens) and len(digits) < 9:
        value = cardinals().get(tokens[place][0], Decimal(1) if tokens[place][0] in _LINKED_ONE else None)
        if value is None or value % 1 or value > 99 or text[tokens[place - 1].end() : tokens[place].start()] != " ":
            break
        digits += str(int(value))
        place += 1
    return digits, place


def _plus_half(text: str, tokens: Sequence[re.Match[str]], end: int, value: Decimal) -> tuple[str, int]:
    """Add a half for Hindi साढ़े, before the multiplier: साढ़े तीन लाख is 350,000. Returns digits and the index after."""
    value += Decimal("0.5")
    if end < len(tokens) and (multiplier := multipliers().get(tokens[end][0])):
        return written(value * multiplier), end + 1
    return written(value), end


def _continues(total: Decimal, current: Decimal | None, value: Decimal, word: str) -> bool:
    """Return True if a value continues a number: twenty + one, hundred + five, thousand + 200; not one + two."""
    if value % 1:
        return False
    if current is None:
        return value < 1000
    if current % 1:
        return False
    if current in (18, 19, 20) and 10 <= value < 100:
        return True
    if current % 100 == 0 and current > 0:
        return value < 100
    tens = current % 100
    if tens in (60, 80) and 10 <= value < 20:
        return True
    return tens >= 20 and tens % 10 == 0 and 0 < value < 10


def _one_is_number(tokens: Sequence[re.Match[str]], place: int, text: str) -> bool:
    """Return True if "one" is a number: "one card"; not "the one", "one of them" or "another one"."""
    before = tokens[place - 1][0] if place else ""
    if before in _NOT_BEFORE_ONE or text[tokens[place].end() : tokens[place].end() + 1] not in (" ", "-"):
        return False
    after = tokens[place + 1][0] if place + 1 < len(tokens) else ""
    return bool(after) and after not in _NOT_AFTER_ONE


def _is_ordinal(tokens: Sequence[re.Match[str]], place: int, text: str) -> bool:
    """Return True if an ordinal word is a rank: not "first of all", "at first", "a second please" or "10 seconds"."""
    word = tokens[place][0]
    before = tokens[place - 1][0] if place else ""
    after = tokens[place + 1][0] if place + 1 < len(tokens) else ""
    if word == "first":
        mark = text[tokens[place].end() : tokens[place].end() + 1]
        return before not in _NOT_BEFORE_FIRST and after not in _NOT_AFTER_FIRST and mark != ","
    if word in ("second", "segundo"):
        if before[:1].isdecimal() or before in ("per", "each", "one", "split", "un", "wait"):
            return False
        if after in ("that", "this", "it"):
            return False
        return not (before in ("a", "every", "this") and (not after or after in _AFTER_A_SECOND))
    return True


def _fraction(text: str, tokens: Sequence[re.Match[str]], place: int, value: Decimal) -> Decimal | None:
    """Return the value of half, quarter or दो if it is a number; None in half past three, halb vier, मुझे दो."""
    after = tokens[place + 1][0] if place + 1 < len(tokens) else ""
    word = tokens[place][0]
    if word == "दो":
        return value if after and text[tokens[place].end() : tokens[place].end() + 1] == " " else None
    if after in _CLOCK_WORDS:
        return None
    if word in ("demie", "demi", "media", "meia", "mezza") and place and tokens[place - 1][0] in ("et", "y", "e"):
        return None
    if word == "halb" and (after in cardinals() or after == "eins" or after.isdecimal()):
        return None
    return value
