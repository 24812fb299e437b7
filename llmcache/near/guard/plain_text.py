"""Normalise text: lower case, single spaces, ASCII digits, one kind of apostrophe, dash and minus sign."""

from __future__ import annotations

import re
import unicodedata

# applied before NFKC, which would turn 10² into 102 and 5½ into 51/2
_RAISED = re.compile(r"[⁰¹²³⁴-⁹]|(?=[¼-¾⅐-⅞↉])")
_RANK = re.compile(r"(?<=[0-9])[ªº](?! ?[CF]\b)")  # 2ª, 1º
_INCH = re.compile(r'(?<=[0-9])"')
_FOREIGN_DIGIT = re.compile(r"[^\D0-9]")
_MARKS = {
    0x2212: "-", 0x2010: "-", 0x2011: "-", 0x2044: "/", 0x066B: ".", 0x066C: ",", 0x066A: "%", 0xFE63: "-", 0x093C: "",
}  # fmt: skip
_MARK = re.compile("[" + "".join(map(chr, _MARKS)) + "]")
_GROUP = re.compile(r"(?<=\d)[\u00a0\u202f\u2009\u2019'](?=\d{3}(?!\d))")  # 1 234, 1'234
_APOSTROPHE = re.compile(r"(?<=[^\W\d_])[\u2019\u2018\u02bc\u00b4`\u2032](?=[^\W\d_])|(?<= n)\u2019(?=t\b)")
_DASH = re.compile(r"(?<=\d)[\u2012-\u2014](?=\d)|(?<=\w)[\u2012\u2013](?=\w)|(?:(?<=[\s(])|^)[\u2012\u2013](?=\d)")
_MONEY_SIGN = re.compile("[\uffe0-\uffe6]")
_BULLET = re.compile(r"(?:^|(?<=\s))[-*•] (?=\S)")


def plain_text(text: str) -> str:
    """Return a text in lower case, with single spaces, ASCII digits and marks, and without compatibility forms."""
    if not text.isascii():
        text = _RAISED.sub(
            lambda mark: f"^{unicodedata.digit(mark[0])}" if mark[0] else " ", _GROUP.sub("", _RANK.sub("", text))
        )
        text = _DASH.sub("-", _APOSTROPHE.sub("'", text))
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = _FOREIGN_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
        text = _MARK.sub(lambda mark: _MARKS[ord(mark[0])], text)
        text = text.replace("\u0901", "\u0902")  # पाँच becomes पांच
    elif "'" in text or "`" in text:
        text = _APOSTROPHE.sub("'", _GROUP.sub("", text))
    if '"' in text and text.count('"') % 2:  # an unpaired mark: 15"
        text = _INCH.sub(" inch ", text)
    return " ".join(text.lower().split())
