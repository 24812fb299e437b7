# ruff: noqa: RUF001 - the words of many scripts
"""How many negations a text has: words (not, kein, sans), contractions (can't), prefixes and endings (unable, 않다, 不).

Fixed words that hold a negation and negate nothing (不过, 안녕, no doubt, not only) do not count, nor do tag questions
("isn't it?") or the Chinese question 是不是. A negation that a language says twice ("ne ... pas", "no ... nada") counts
once. Text is expected in the plain form of `llmcache.plain_text`. Word lists follow common grammars.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def _words(text: str) -> frozenset[str]:
    return frozenset(text.casefold().split())


NEGATIONS = _words(
    """not cannot cant never without none nobody nothing nowhere neither unable
    dont doesnt didnt isnt arent wasnt werent wont wouldnt shouldnt couldnt hasnt havent hadnt aint
    impossible unavailable incorrect invalid inactive unlikely illegal unsuccessful incomplete unauthorized unauthorised
    unpaid unused unsafe unknown unhappy unfair unsure uncertain unclear unwilling unlimited unusual incapable insecure
    inaccurate ineligible irregular irrelevant inappropriate unnecessary unacceptable unavoidable unhelpful untrue
    nonrefundable nontoxic dishonest disagree dislike
    nicht nichts nie niemals niemand niemandem niemanden nirgends nirgendwo kein keine keinen keinem keiner keines keins
    weder ohne unmöglich ungültig unfähig unsicher unbekannt ungenau unvollständig unwahrscheinlich unbezahlt unklar
    ungern unnötig unzufrieden
    niet geen nooit niets niemand zonder nergens
    inte inget ingen inga aldrig utan ej ikke ikkje ingen intet aldri uten uden
    sans impossible sin imposible senza impossibile sem impossível
    без bez nem nincs nélkül ei eivät ilman değil yok
    δεν δε μη μην όχι χωρίς ποτέ
    لا ليس ليست لم لن بدون غير ما لست
    לא אין בלי אל אינו אינה
    không chẳng chưa đừng tidak bukan jangan tanpa belum"""
)
# languages where one negation is said twice: "ne ... pas", "no ... nada", "не ... никогда" count once
PARTICLES = _words("no non não nao ne не нет nie нельзя ні не nu nein")
ECHOES = _words(
    """pas jamais rien aucun aucune guère
    nada nadie nunca jamás ningún ninguno ninguna ninguém nenhum nenhuma tampoco jamais nem ni
    niente nulla nessuno nessuna nemmeno neanche né
    никогда ничего никто никого нигде ни никакой
    nigdy nic nikt żaden żadna nikdy nikdo"""
)
_HINDI = _words("नहीं नही मत न ना बिना बगैर")
_ALL = NEGATIONS | PARTICLES | ECHOES
# parts of words, in scripts without spaces or with endings
_HAN_PARTS = re.compile(
    r"不|没|沒|未|勿|莫|并非|並非|绝非|無|无|(?<=[请請你您们們就先都也可千万])别|(?:^|(?<=[，。！？,.!? ]))别|否"
    r"|ません|なかった|ない|ずに|ぬ(?=。|$)"
)
_HAN_HARMLESS = re.compile(
    r"对不起|对不住|對不起|不过|不過|差不多|不仅|不僅|不但|不光|不只|不止|不错|不錯|不断|不斷|不久|不同|不管|不论|不論|不好意思|不客气|不客氣|不妨|不禁|不得不|不料|"
    r"不惜|不愧|不然|不由|不时|不時|不如|未来|未來|未必|少ない|莫斯科|莫大|莫非|とんでもない|かもしれません|かもしれない|没关系|沒關係|没问题|沒問題|没事|"
    r"无论|無論|无线|無線|无聊|無聊|无奈|無奈|无数|無數|无限|無限|无人机|无锡|無料|是否|能否|可否|否则|否則|会否|与否|别人|别的|别墅|别名|别处|别针|别扭|"
    r"淹没|埋没|沉没|没收|出没|没完|ないといけない|なければなりません|なければならない|しかない|ではないか|ませんか|"
    r"(?P<verb>[\u3400-\u9fff]{1,2})[不没沒](?P=verb)|可不可以|有没有|有沒有"
)
_KOREAN_PARTS = re.compile(
    r"않|없|아니|아닙|아닌|못|지 ?(?:마세요|마라|말아|말고|마십시오|마요|말자|말라|마)"
    r"|(?<![가-힣])안(?= [가-힣])|(?<![가-힣])안(?=되|돼|된|됩|될|됐|해|합|함|했|열|먹|가요|와요|나와|보여|보이|좋|사|써|쓰)"
    r"|(?<![가-힣])[불비미](?=가능|완전|포함|확실|필요|성년)"
)
_KOREAN_HARMLESS = re.compile(
    r"아니면|뿐(?:만)? ?아니라|틀림없|끊임없|못지않|지 ?않나요|지 ?않을까|지 ?않아요\?|아닌가요|어이없|상관없|문제없|잘못|머지않|만만치 않"
    r"|못(?=박|자국)|(?<![가-힣])안 (?=에서|에는|에|으로|쪽)|없이는 안"
)
_NUMERO = re.compile(r"\bno\.? ?(?=[0-9#])")  # "no. 5" counts, it does not negate
_LATIN_HARMLESS = re.compile(
    r"\bno (?:problem|worries|doubt|matter|wonder|obstante|sólo|solo|biggie|prob|probs)\b|\bwithout (?:a )?doubt\b"
    r"|\bsans doute\b|\bsin (?:duda|embargo)\b|\bohne zweifel\b|\bpas (?:mal|de problème|de souci)\b|\bwhy not\b|\bpourquoi pas\b|\bwarum nicht\b"
    r"|\bwhy (?:don't|dont) (?:you|we)\b|\bpor qué no\b"
    r"|\b(?:whether )?or not\b|\bnot (?:only|just|merely)\b|\bnicht (?:nur|wahr)\b|\bnon (?:seulement|solo)\b|\bniet alleen\b|\bnão (?:só|apenas)\b"
    r"|\bn'est-ce pas\b|\bcan't wait\b|\bcannot wait\b|\bdo not hesitate\b|\bdon't hesitate\b|\blast but not least\b|\bnothing but\b"
    r"|\bdon't forget\b|\bdo not forget\b|\bdon't worry\b|\bif not\b"
    r"|, (?:is|are|do|does|did|was|were|have|has|had|can|could|would|will|wo|should|ai)n't (?:i|you|he|she|it|we|they|there)\b ?(?=\?)"
    r"|(?:^|, ?)(?:¿no|no|nicht|nein|non|oder nicht|não) ?\?"
)
_LATIN_MAY_BE_HARMLESS = re.compile(
    r"doubt|\bn(?:o|ot|on|icht|iet|ão)\b|\bsans\b|\bsin\b|\bohne\b|\bpas\b|n't|nothing but|pourquoi"
)
_HINDI_HARMLESS = re.compile(r"न (?:केवल|सिर्फ)|(?:है|हैं|हो) ना?(?= ?[?।.!]|$)|नहीं तो")
_HAN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_HANGUL = re.compile(r"[\uac00-\ud7a3]")
_DEVANAGARI = re.compile(r"[\u0900-\u0963\u0971-\u097f]+")


def negations(text: str, words: Sequence[str]) -> int:
    """The number of negations in a plain text. words: its words in order, with their apostrophes."""
    count = 0 if _ALL.isdisjoint(words) and "n'" not in text and "nicht" not in text else _alphabetic(text)
    if not text.isascii():
        if _HAN.search(text):
            count += len(_HAN_PARTS.findall(_HAN_HARMLESS.sub(" ", text)))
        if _HANGUL.search(text):
            count += len(_KOREAN_PARTS.findall(_KOREAN_HARMLESS.sub(" ", text)))
        if _DEVANAGARI.search(text):
            plain = _HINDI_HARMLESS.sub(" ", text)
            count += sum(word in _HINDI for word in _DEVANAGARI.findall(plain))
    return count


_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def _alphabetic(text: str) -> int:
    if _LATIN_MAY_BE_HARMLESS.search(text):
        text = _LATIN_HARMLESS.sub(" ", text)
    count = particles = echoes = 0
    words = _WORD.findall(text)
    for word in words:
        if word in NEGATIONS or word.endswith("n't") or (word.startswith("nicht") and len(word) > 9):
            count += 1
        elif word in PARTICLES or word.startswith("n'"):
            particles += 1
        elif word in ECHOES:
            echoes += 1
    if echoes > 1 and ("ni" in words or "nem" in words or "né" in words):
        echoes = 1  # "ni él ni ella" is one negation
    if particles and "no" in words:
        particles -= len(_NUMERO.findall(text))
    return count + max(particles, echoes)
