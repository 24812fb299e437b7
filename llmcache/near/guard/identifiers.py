# ruff: noqa: RUF001 - the quotation marks of several scripts
"""Read identifiers (addresses, paths, versions, telephone and account numbers, codes) and quotations of a text.

The functions expect text from `llmcache.near.guard.plain_text`. Repetitions inside the patterns are bounded or
anchored, so run time grows with the length of a text only, not with its content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmcache.near.guard.lexicon import (
    CURRENCIES,
    NO_CODES,
    SHORT_WORDS,
    UNITS,
    word_set,
)

_FILES = "py|js|ts|java|cpp|txt|pdf|csv|jsonl?|xml|ya?ml|html?|docx?|xlsx?|pptx?|png|jpe?g|zip|exe"
_HOSTS = "com|org|net|edu|gov|io|info|dev|app|de|fr|es|it|uk|nl|eu|ch|at|jp|kr|cn|br|ru|pl|in|ca|au"
# lengths are bounded where a search could otherwise scan a long run of letters repeatedly
_END = r"\s<>\"'”»)\]\u3000-\u303f\u3400-\u9fff\uac00-\ud7a3"
_LINK = re.compile(
    rf"""(?:https?|ftp|s3|file)://[^{_END}]+|www\.[^{_END}]+"""
    r"""|(?<![a-z0-9.+_-])[a-z0-9.+_-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+|(?<![\w@])@\w{2,}|(?<![\w#])#[a-z]\w+"""
    r"""|(?<![\w/.])(?:~|\.{1,2})?(?:/[\w.+-]+){2,}/?|\b[a-z]:\\[^\s"']+"""
    rf"""|(?<![\w.-])(?:[\w-]{{1,63}}\.){{1,5}}(?:com|org|net|edu|gov|io|info|dev|app)\b(?:/[^{_END}]*)?"""
    rf"""|(?<![\w.-])(?:[a-z0-9-]{{2,63}}\.){{1,5}}(?:{_HOSTS})(?:/[^{_END}]+)"""
    rf"""|(?<![\w.-])[\w-]{{1,99}}\.(?:{_FILES})\b"""
    r"""|(?<!\w)--[a-z][\w-]+|(?<!\w)_*[^\W_]+(?:_+[^\W_]+)+"""
)
_MAY_LINK = re.compile(rf"[@\\_]|#[a-z]|://|--[a-z]|\.(?:{_HOSTS}|{_FILES})\b|/[\w.+-]+/|www\.")
_MARK_OF_LINK = re.compile(r"[@\\_#:/.-]")
_SCHEME = re.compile(r"^(?:https?://)?(?:www\.)?")
# letters only, with no vowel in one of the parts: lcs-csj, php
_NO_VOWEL = "[b-df-hj-np-tv-xz]"
_SPELLED = re.compile(rf"(?<![\w./@'-])(?:[^\W\d_]+-)*{_NO_VOWEL}{{3,}}(?:-[^\W\d_]+)*(?![\w@']|[-./]\w)")
_MAY_SPELL = re.compile(rf"\b{_NO_VOWEL}{{3,}}\b")
# a single consonant: vitamin C, C++. Pairs of consonants (TV, CV) refused as many right pairs as wrong ones
_LONE_LETTERS = frozenset("bcfghjkpqrvwxz")
_LONE = re.compile(r"(?<![\w'./&°-])[bcfghjkpqrvwxz](?:\+\+|#)?(?![\w'./&-])")
# any single letter is a code after these words: size M, plan B, class D
_LETTER_NAMES = word_set("""
    size plan class type group grade team option section terminal gate level appendix block wing zone drive platform row
    größe gruppe typ klasse talla taille grupo groupe tipo
    """)
_NAMED_LETTER = re.compile(
    rf"\b(?:{'|'.join(sorted(_LETTER_NAMES))}) ([adeilmnostuy])\b(?![' ]\w|'|-)|\bsize ([sml])\b(?=[ ]\w)"
)
SIZES = word_set("xs xxs xl xxl xxxl")
_SIZE = re.compile(rf"\b(?:{'|'.join(sorted(SIZES))})\b")
# grades and blood types: A+, B-, AB+, blood type A positive
_GRADE = re.compile(
    r"(?<![\w'./+-])(ab|[abcdfo])([+-])(?![\w'/+-])"
    r"|\b(?:type|group|grade|gruppe|blutgruppe|grupo|groupe) (ab|[abcdfo]) (plus|minus|positive|negative)\b"
)
_CHAT_LETTER = re.compile(  # "how r u", "c u", "b there", "k": letters that stand for words
    r"\br (?=u\b|you\b|ya\b|we\b|they\b|the\b|not\b|there\b)|(?:\b(?:how|what|where|why|who|when|u|you|we"
    r"|they|there) )r\b"
    r"|\bc (?=u\b|ya\b|you\b)|\b(?:to|will|ll|ill|b|can|2|must|should|wanna|gonna|might) b\b|\bb (?=there"
    r"|back|here|ok|good|able|home|in\b)"
    r"|(?<=[0-9] )[bghklmvwx]\b|^k\b|\b(?:o|ok|it) k\b|\bx(?: x)*$|\bw (?=me\b|you\b|u\b)"
)
_TELEPHONE = re.compile(
    r"(?<![\w+.])\+[0-9]{1,3}(?:[ .()/-]{0,2}[0-9]{1,5}){2,7}(?![0-9])"
    r"|(?<![\w.,/-])(?:0[0-9]{1,4}[ -]{1,3}[0-9]{5,9}|0[0-9]{2,4}/ ?[0-9]{4,9})(?![0-9])"
    r"|(?<![\w.])(?:\+?1[ .-])?(?:\([0-9]{3}\) ?|[0-9]{3}[-. ])[0-9]{3}[-. ][0-9]{4}(?![0-9])"
)
_ACCOUNT = re.compile(
    r"(?<![a-z0-9])[a-z]{2}[0-9]{2}(?: ?[a-z0-9]{4}){3,7}(?: ?[a-z0-9]{1,3})?(?![a-z0-9])"
    r"|(?<![\w-])[0-9]{4}(?:[ -][0-9]{4}){3}(?![\w-])"
)
_MANY_DIGITS = re.compile(r"(?:[0-9][a-z ()./-]{0,4}){8}")
_VERSION = re.compile(
    r"\b(?:v|ver|version|versión|versione|release|rev|revision|build|python|java|node|android|ios|windows|macos|ubuntu"
    r"|php|perl|ruby|django|postgres|mysql|kernel|firmware)\.? ?([0-9]+(?:\.[0-9]+)*)(?![0-9%,]|\.[0-9]|-?[a-z])"
)
_MAY_VERSION = re.compile(r"[a-z] ?\.?[0-9]")
_SPLIT_CODE = re.compile(r"(?<![\w./&'$-])([a-z]{2}|[b-df-hj-np-tv-xz]{3}) ([0-9]{2,5})(?![\w:%]|[.,/-][0-9])")
_SPACES = re.compile(r"[^a-z0-9]+")


def linkless(text: str, identifiers: list[str]) -> str:
    """Move addresses, paths and names with underscores from a text to `identifiers`. Returns the rest."""
    if not _MARK_OF_LINK.search(text) or not _MAY_LINK.search(text):
        return text

    def take(match: re.Match[str]) -> str:
        address = match[0].rstrip(".,;:!?/")
        identifiers.append(_SCHEME.sub("", address) or address)
        return " "

    # word by word: the long pattern is only tried where the short one matches
    return " ".join(_LINK.sub(take, word) if _MAY_LINK.search(word) else word for word in text.split(" "))


def numbered(text: str, identifiers: list[str]) -> str:
    """Move telephone numbers, account numbers and versions from a text to `identifiers`. Returns the rest.

    Codes in two parts are joined: "lh 454" becomes "lh454".
    """

    def take(match: re.Match[str]) -> str:
        identifiers.append(_SPACES.sub("", match[0]))
        return " "

    def version(match: re.Match[str]) -> str:
        identifiers.append(match[1])
        return " "

    def join(match: re.Match[str]) -> str:
        letters, digits = match.groups()
        if letters in SHORT_WORDS or letters in UNITS or letters in CURRENCIES or letters in NO_CODES:
            return match[0]
        return letters + digits

    if _MANY_DIGITS.search(text):
        text = _TELEPHONE.sub(take, _ACCOUNT.sub(take, text))
    if _MAY_VERSION.search(text):
        text = _SPLIT_CODE.sub(join, _VERSION.sub(version, text))
    return text


def may_spell(text: str) -> bool:
    """Return True if a text has a word without a vowel."""
    return _MAY_SPELL.search(text) is not None


_GRADE_SIGNS = {"+": "+", "-": "-", "plus": "+", "minus": "-", "positive": "+", "negative": "-"}


def spelled_codes(text: str, words: Sequence[str]) -> list[str]:
    """Return codes without a digit: php, lcs-csj, vitamin C, C++, size XL, grade A+, blood type A positive.

    words: the words of the text.
    """
    codes = []
    if _MAY_SPELL.search(text):
        codes = [code.replace("-", "") for code in _SPELLED.findall(text) if code not in NO_CODES]
    if not _LONE_LETTERS.isdisjoint(words) and _LONE.search(text):
        codes += _LONE.findall(_CHAT_LETTER.sub(" ", text))
    if not SIZES.isdisjoint(words):
        codes += _SIZE.findall(text)
    if (
        "+" in text
        or any(end in f"{text} " for end in ("- ", "-.", "-,", "-?", "-)"))
        or not _GRADE_SIGNS.keys().isdisjoint(words)
    ):
        grades = (match.groups("") for match in _GRADE.finditer(text))
        codes += [letter + named + _GRADE_SIGNS[sign + word] for letter, sign, named, word in grades]
    return (
        codes
        if _LETTER_NAMES.isdisjoint(words)
        else codes + [one or other for one, other in _NAMED_LETTER.findall(text)]
    )


# -- quotations ------------------------------------------------------------------------------------------------

_QUOTED = re.compile(
    r"""(?<![\w"])"(?=\S)([^"\n]{1,80}?)(?<=\S)"(?![a-z0-9])|[“„”]([^“”„"]{1,80})[”“"]|«([^«»]{1,80})»|»([^«»]{1,80})«"""
    r"""|「([^「」]{1,80})」|『([^『』]{1,80})』|《([^《》]{1,80})》|〈([^〈〉]{1,80})〉|‹([^‹›]{1,80})›|›([^‹›]{1,80})‹"""
    r"""|(?<![\w`])`([^`\n]{1,80})`(?![\w`])|[‘‚]([^‘’‚]{1,80})[’‘](?![a-z0-9])"""
    r"""|(?<![\w'])'(?=[^\s'])((?:[^'\n]|(?<=\w)'(?=\w)){2,80}?|[^\x00-\x7f])(?<=\S)'(?![a-z0-9'])"""
)
_PUNCTUATION = re.compile(r"[,;:!?。、，]|\.(?=\s|$)")
_MAY_QUOTE = re.compile(r"""["“„”«»「『`《〈‹›‘‚]|(?<![\w'])'\w""")


def quotations(text: str) -> list[str]:
    """Return quoted passages of at most 80 characters, in any quotation style, without punctuation.

    Longer quotations are sentences, which a paraphrase rarely repeats verbatim; only their numbers and negations are
    compared.
    """
    if text.isascii() and not ('"' in text or "'" in text or "`" in text):
        return []
    if not _MAY_QUOTE.search(text):
        return []
    groups = (next(group for group in match.groups() if group is not None) for match in _QUOTED.finditer(text))
    return [name for name in (" ".join(_PUNCTUATION.sub(" ", group).split()) for group in groups) if name]
