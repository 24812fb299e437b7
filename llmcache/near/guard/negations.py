# ruff: noqa: RUF001 - the words of many scripts
"""Count the negations in a text: words (not, kein), contractions (can't), prefixes and endings (unable, 않다).

Fixed expressions that contain a negation but negate nothing (不过, 안녕, no doubt, not only) do not count, nor do tag
questions ("isn't it?") and the Chinese question 是不是. A negation that a language expresses with two words
("ne ... pas", "no ... nada") counts once. The functions expect text from `llmcache.near.guard.plain_text`. The word
lists follow common grammars.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmcache.near.guard.lexicon import word_set

NEGATIONS = word_set(
    """not cannot cant never without none nobody nothing nowhere neither unable
    dont doesnt didnt isnt arent wasnt werent wont wouldnt shouldnt couldnt hasnt havent hadnt aint
    impossible unavailable incorrect invalid inactive unlikely illegal unsuccessful incomplete unauthorized unauthorised
    unpaid unsafe unclear unsure uncertain unwilling ineligible unacceptable incapable nonrefundable
    disagree disagrees disabled disable disallowed false forbidden prohibited
    hardly barely scarcely seldom rarely unless doubt doubts doubted doubting doubtful
    lack lacks lacking lacked refuse refuses refusing
    kaum selten bezweifle bezweifeln bezweifelt zweifle zweifeln zweifelt verweigere verweigern verweigert
    weigere weigern
    weigert verboten apenas raramente dudo duda dudamos dudan prohibido prohibida raro niego rarement interdit interdite
    refuso rifiuto dubito duvido vietato proibido
    nauwelijks zelden verboden weiger betwijfel едва редко
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
# two words for one negation: "ne ... pas", "no ... nada", "не ... никогда" count once
PARTICLES = word_set("no non não nao ne не нет nie нельзя ні не nu nein")
ECHOES = word_set(
    """pas jamais rien aucun aucune guère
    nada nadie nunca jamás ningún ninguno ninguna ninguém nenhum nenhuma tampoco jamais nem ni
    niente nulla nessuno nessuna nemmeno neanche né
    никогда ничего никто никого нигде ни никакой
    nigdy nic nikt żaden żadna nikdy nikdo"""
)
_HINDI = word_set("नहीं नही मत न ना बिना बगैर इनकार शक संदेह मना")
_ALL = NEGATIONS | PARTICLES | ECHOES
# parts of words, for scripts without spaces or with endings
_HAN_PARTS = re.compile(
    r"不|没|沒|未|勿|莫|并非|並非|绝非|無|无|(?<=[请請你您们們就先都也可千万])别|(?:^|(?<=[，。！？,.!? ]))别|否"
    r"|(?<![除是莫并並绝])非(?![常洲得凡])"
    r"|拒绝|拒絕|怀疑|懷疑|禁止|很少|難以|难以|除非|缺少|缺乏|めったに(?!.{1,20}ない)|疑う|断る"
    r"|ません|なかった|ない|ずに|ぬ(?=。|$)"
)
_HAN_HARMLESS = re.compile(
    r"对不起|对不住|對不起|不过|不過|差不多|不仅|不僅|不但|不光|不只|不止|不错|不錯|不断|不斷|不久"
    r"|不同(?!意)|不管|不论|不論|不好意思|不客气|不客氣|不妨|不禁|不得不|不料|"
    r"不惜|不愧|不然|不由|不时|不時|不如|未来|未來|少ない|莫斯科|莫大|莫非|とんでもない|かもしれません"
    r"|かもしれない|没关系|沒關係|"
    r"无论|無論|无线|無線|无聊|無聊|无奈|無奈|无数|無數|无限|無限|无人机|无锡|無料|是否|能否|可否|否则"
    r"|否則|会否|与否|别人|别的|别墅|别名|别处|别针|别扭|"
    r"淹没|埋没|沉没|没收|出没|没完|ないといけない|なければなりません|なければならない|しかない|ではないか|ませんか|"
    r"(?P<verb>[\u3400-\u9fff]{1,2})[不没沒](?P=verb)|可不可以|有没有|有沒有"
)
_KOREAN_PARTS = re.compile(
    r"않|없|거부|거절|금지|의심|드물|아니|아닙|아닌|못|지 ?(?:마세요|마라|말아|말고|마십시오|마요|말자|말라|마)"
    r"|(?<![가-힣])안(?= [가-힣])|(?<![가-힣])안(?=되|돼|된|됩|될|됐|해|합|함|했|열|먹|가요|와요|나와|보여"
    r"|보이|좋|사|써|쓰)"
    r"|(?<![가-힣])[불비미](?=가능|완전|포함|확실|필요|성년|회원|정상|공개|활성|납)"
)
_KOREAN_HARMLESS = re.compile(
    r"아니면|뿐(?:만)? ?아니라|틀림없|끊임없|못지않|어이없|상관없|잘못|머지않|만만치 않"
    r"|못(?=박|자국)|(?<![가-힣])안 (?=에서|에는|에|으로|쪽)|없이는 안"
)
_NUMERO = re.compile(r"\bno\.? ?(?=[0-9#])")  # "no. 5" is a number
_LATIN_HARMLESS = re.compile(
    r"(?:^|, ?|[.!;] )no (?:problem|worries|doubt|wonder|biggie|prob|probs)\b(?=[,.!;]|$)|no (?:matter|obstante)\b"
    r"|without (?:a )?doubt\b|sans doute\b|sin (?:duda|embargo)\b|ohne zweifel\b|or not\b|if not,"
    r"|not (?:only|just|merely)\b(?=.{1,80}\bbut\b)|nicht nur\b(?=.{1,80}\bsondern\b)|nicht wahr\b"
    r"|do(?: not|n't) hesitate\b"
    r"|non seulement\b(?=.{1,80}\bmais\b)|no solo\b(?=.{1,80}\bsino\b)|no sólo\b(?=.{1,80}\bsino\b)"
    r"|n'est-ce pas\b|last but not least\b|nothing but\b"
    r"|, ?(?:is|are|do|does|did|was|were|have|has|had|can|could|would|will|wo|should|ai)n't (?:i|you|he"
    r"|she|it|we|they|there) ?(?=\?)"
    r"|, ?(?:¿no|no|nicht|nein|non|oder nicht|não) ?\?|^non ?\?$"
)
# each phrase of _LATIN_HARMLESS has one of these words
_OF_HARMLESS = word_set("no not sans sin ohne pas warum nicht non não nothing last nein without")
# "I don't know how to pay" means the same as "how do I pay"; "I know how to pay" differs from both
_KNOWING = re.compile(
    r"\b(?:i|we)(?:'m| am|'re| are)? (?:really |honestly |also |still |just )?"
    r"(?P<doubt>(?:don't|dont|do not|didn't|did not) (?:really |quite )?(?:know|understand|remember)"
    r"|not (?:quite |really )?sure|unsure"
    r"|(?:can't|cant|cannot|can not|couldn't) (?:seem to )?(?:figure out|tell|understand)|have no (?:idea|clue)"
    r"|(?:don't|dont|do not) have (?:any|a) (?:idea|clue))?"
    r"(?P<certain>(?:do |already |now |can )*(?:know|understand|remember|figure out|tell)|sure|have an idea)?"
    r"(?: as to| of)? (?=(?:how|why|what|where|when|who|which|whether|if)\b)"
)
# phrases of several words that negate: failed to pay, a menos que
_NEGATING = re.compile(
    r"\b(?:fail(?:s|ed|ing|ure)?|neglect(?:s|ed)?|decline[sd]?|refused|refusal) to\b"
    r"|\bes sei denn\b|\ba menos que\b|\bà moins que?\b|\bà peine\b|\ba meno che\b|\ba não ser que\b|\btenzij\b"
)
_MAY_KNOW = re.compile(r"know|sure|understand|remember|figure|idea|clue|tell")
_HINDI_HARMLESS = re.compile(r"न (?:केवल|सिर्फ)|(?:है|हैं|हो) ना?(?= ?[?।.!]|$)|नहीं तो")
_HAN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_HANGUL = re.compile(r"[\uac00-\ud7a3]")
_DEVANAGARI = re.compile(r"[\u0900-\u0963\u0971-\u097f]+")


_OF_NEGATING = word_set(
    "fail fails failed failing failure neglect neglects neglected decline declines declined refused refusal "
    "denn menos moins "
    "peine meno não tenzij"
)
_ALL_OR_PHRASES = _ALL | _OF_NEGATING
TRIGGERS = _ALL_OR_PHRASES | word_set(
    "know sure understand remember figure idea clue tell"
)  # no negation is counted without one of these words


def negations(text: str, words: Sequence[str]) -> int:
    """Count the negations in a plain text. words: its words in order, with their apostrophes."""
    negated = not _ALL_OR_PHRASES.isdisjoint(words) or "n'" in text or "nicht" in text
    count = _alphabetic(text, words) if negated or (_MAY_KNOW.search(text) and _KNOWING.search(text)) else 0
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


def _polarity(phrase: re.Match[str]) -> str:
    """Return the replacement of a `_KNOWING` phrase: doubt is neutral, certainty counts as a negation."""
    return " " if phrase["doubt"] else " not " if phrase["certain"] else phrase[0]


def _alphabetic(text: str, words: Sequence[str]) -> int:
    """Count the negations in languages with an alphabet and spaces."""
    changed = 0
    if "n't" in text or "n'" in text or not _OF_HARMLESS.isdisjoint(words):
        text, changed = _LATIN_HARMLESS.subn(" ", text)
    if _MAY_KNOW.search(text):
        text, replaced = _KNOWING.subn(_polarity, text)
        changed += replaced
    count = particles = echoes = 0
    if changed:
        words = _WORD.findall(text)
    joined = "n'" in text or "nicht" in text
    for word in words:
        if word in NEGATIONS or (
            joined and (word.endswith(("n't", "n't've")) or (word.startswith("nicht") and len(word) > 9))
        ):
            count += 1
        elif word in PARTICLES or (joined and word.startswith("n'")):
            particles += 1
        elif word in ECHOES:
            echoes += 1
    if echoes > 1 and ("ni" in words or "nem" in words or "né" in words):
        echoes = 1  # "ni él ni ella" is one negation
    if particles and "no" in words:
        particles -= len(_NUMERO.findall(text))
    if not _OF_NEGATING.isdisjoint(words):
        count += len(_NEGATING.findall(text))
    return count + max(particles, echoes)
