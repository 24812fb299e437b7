"""Number words: cardinals, ordinals, multipliers and fractions, with the compounds of German, Dutch and Italian.

The word lists follow the usual grammars of these languages and CLDR's spell-out rules.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from functools import cache

_TENS = (20, 30, 40, 50, 60, 70, 80, 90)
_ENGLISH = (
    "zero - two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_GERMAN = (
    "- eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
)
_SPANISH = (
    "cero - dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete "
    "dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete "
    "veintiocho veintinueve"
)
_FRENCH = (
    "zéro - deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit "
    "dix-neuf"
)
_ITALIAN = (
    "- - due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici "
    "diciassette diciotto diciannove"
)
_PORTUGUESE = (
    "- - dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis dezessete dezoito "
    "dezenove"
)
_DUTCH = (
    "- - twee drie vier vijf zes zeven acht negen tien elf twaalf dertien veertien vijftien zestien zeventien "
    "achttien negentien"
)
_HINDI = (
    "शून्य - दो तीन चार पांच छह सात आठ नौ दस ग्यारह बारह तेरह चौदह पंद्रह सोलह सत्रह अठारह उन्नीस बीस इक्कीस बाईस तेईस "
    "चौबीस पच्चीस छब्बीस सत्ताईस अट्ठाईस उनतीस तीस इकतीस बत्तीस तैंतीस चौंतीस पैंतीस छत्तीस सैंतीस अड़तीस उनतालीस चालीस "
    "इकतालीस बयालीस तैंतालीस चौवालीस पैंतालीस छियालीस सैंतालीस अड़तालीस उनचास पचास इक्यावन बावन तिरपन चौवन पचपन छप्पन "
    "सत्तावन अट्ठावन उनसठ साठ इकसठ बासठ तिरसठ चौंसठ पैंसठ छियासठ सड़सठ अड़सठ उनहत्तर सत्तर इकहत्तर बहत्तर तिहत्तर चौहत्तर "
    "पचहत्तर छिहत्तर सतहत्तर अठहत्तर उनासी अस्सी इक्यासी बयासी तिरासी चौरासी पचासी छियासी सत्तासी अट्ठासी नवासी नब्बे "
    "इक्यानवे बानवे तिरानवे चौरानवे पचानवे छियानवे सत्तानवे अट्ठानवे निन्यानवे"
)
_MORE = {
    2: "zwo duas два две",
    3: "три",
    4: "четыре",
    5: "fuenf пять",
    6: "छः छे шесть",
    7: "семь",
    8: "восемь",
    9: "девять",
    10: "десять",
    11: "одиннадцать",
    12: "zwoelf двенадцать",
    14: "quatorze",
    15: "पन्द्रह",
    16: "dieciseis dezasseis",
    17: "dezassete dixsept",
    18: "dixhuit",
    19: "dezanove dixneuf",
    20: "двадцать vingts",
    80: "quatrevingt",
    21: "veintiún veintiun veintiuna",
    22: "veintidos",
    23: "veintitres",
    26: "veintiseis",
    44: "चवालीस",
}
_TEN_WORDS = {
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
    "de": "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    "es": "veinte treinta cuarenta cincuenta sesenta setenta ochenta noventa",
    "fr": "vingt trente quarante cinquante soixante septante huitante nonante",
    "it": "venti trenta quaranta cinquanta sessanta settanta ottanta novanta",
    "pt": "vinte trinta quarenta cinquenta sessenta setenta oitenta noventa",
    "nl": "twintig dertig veertig vijftig zestig zeventig tachtig negentig",
}
_HUNDREDS = {
    200: "двести doscientos doscientas duzentos duzentas",
    300: "триста trescientos trescientas trezentos trezentas",
    400: "четыреста cuatrocientos cuatrocientas quatrocentos quatrocentas",
    500: "пятьсот quinientos quinientas quinhentos quinhentas",
    600: "шестьсот seiscientos seiscientas seiscentos seiscentas",
    700: "семьсот setecientos setecientas setecentos setecentas",
    800: "восемьсот ochocientos ochocientas oitocentos oitocentas",
    900: "девятьсот novecientos novecientas novecentos novecentas",
}
_MULTIPLIERS = {
    12: "dozen dozens dutzend docena docenas douzaine douzaines dozzina dozzine dúzia dúzias dozijn",
    100: "hundred hundert cent cents cien ciento cento cem honderd सौ сто",
    10**3: "thousand tausend mille mil mila duizend हजार тысяча тысячи тысяч",
    10**5: "lakh lakhs lac lacs लाख",
    10**6: (
        "million millions million millionen millón millones milhão milhões milione milioni miljoen mio mln "
        "миллион миллиона миллионов"
    ),
    10**7: "crore crores करोड़ करोड",
    10**9: "billion billions bn milliarde milliarden milliard milliards miliardo miliardi miljard mrd mld md अरब",
    10**12: "trillion trillions billionen billones",
}
_ORDINALS = {
    1: "first erste ersten erster erstes erstem premier première primera primero primer primeira primeiro "
    "premiers premières eerste पहला पहली",
    2: "second zweite zweiten zweiter zweites zweitem deuxième segunda segundo tweede दूसरा दूसरी दूसरे",
    3: "third dritte dritten dritter drittes drittem troisième tercera tercero tercer terceira terceiro terza terzo "
    "derde तीसरा तीसरी तीसरे",
    4: "fourth quatrième cuarta vierde चौथा चौथी चौथे",
    5: "fifth cinquième quinta quinto vijfde पांचवां पांचवीं",
    6: "sixth sixième sexta sexto zesde छठा छठी",
    7: "seventh siebte siebten siebter siebtes septième séptima séptimo zevende सातवां सातवीं",
    8: "eighth achter huitième octava octavo achtste आठवां आठवीं",
    9: "ninth neuvième novena noveno negende नौवां",
    10: "tenth dixième décima décimo tiende दसवां दसवीं",
    11: "eleventh onzième",
    12: "twelfth douzième",
    13: "thirteenth",
    14: "fourteenth",
    15: "fifteenth quinzième",
    16: "sixteenth",
    17: "seventeenth",
    18: "eighteenth",
    19: "nineteenth",
    20: "twentieth vingtième",
    30: "thirtieth trentième",
    40: "fortieth",
    50: "fiftieth",
    60: "sixtieth",
    70: "seventieth",
    80: "eightieth",
    90: "ninetieth",
    100: "hundredth centième",
    1000: "thousandth millième",
}
_PARTS = {
    "0.5": "half halb halbe halben halber halbes mitad moitié demi demie metà metade meio meia आधा आधी आधे",
    "0.25": "quarter viertel",
    "0.75": "dreiviertel",
    "1.5": "anderthalb डेढ़ डेढ",
    "2.5": "ढाई",
    "2": "twice double doubled doubles doubling twofold zweimal doppelt doppelte doppelten doppelter doppeltes "
    "zweifach doble doppio doppia dobro dubbel दोगुना दुगना दुगुना",
    "3": "thrice triple tripled triples tripling threefold dreimal dreifach dreifache triplo tripla triplar "
    "driedubbel तिगुना",
}
_PARTS |= {
    "4": "quadruple quadrupled fourfold vierfach vierfache cuádruple quadruplo चौगुना",
    "5": "quintuple fivefold fünffach",
    "10": "tenfold zehnfach",
    "100": "hundredfold hundertfach",
}
_ROMAN = {2: "ii", 3: "iii", 4: "iv", 7: "vii", 8: "viii", 12: "xii", 13: "xiii", 14: "xiv", 16: "xvi", 17: "xvii",
          18: "xviii"}  # fmt: skip
# number words that are ordinary words in another language: read as numbers only in texts of these languages
ONLY_IN = {
    "once": "es", "dos": "es", "mil": "es pt", "due": "it", "tre": "it", "sei": "it", "sette": "it", "otto": "it",
    "acht": "de nl", "elf": "de nl", "sept": "fr", "dix": "fr", "cent": "fr", "cents": "fr", "mille": "fr it",
    "dez": "pt", "nove": "it pt", "sete": "pt", "eins": "de", "md": "fr", "cem": "pt", "mila": "it", "achter": "de",
    "segundo": "es pt", "segunda": "es pt", "neuf": "fr", "cuarta": "es", "quinta": "es", "quinto": "es",
    "sexta": "es", "sexto": "es", "premier": "fr", "onze": "fr pt", "meio": "pt", "meia": "pt", "metro": "es",
    "seis": "es pt", "tres": "es", "mln": "de it nl", "primer": "es", "viertel": "de", "quatro": "pt",
}  # fmt: skip
LANGUAGE_WORDS = {
    "de": "ich du er sie es wir ihr der die das den dem ein eine einen ist sind war und nicht kein keine mit für auf "
    "im am um zu von mein haben habe brauche bitte uhr tage stunden jahre prozent leute kosten kostet nach vor "
    "seit wir karten",
    "es": "el la los las un una de que es son y no por para con mi tengo necesito quiero en del al se años personas "
    "euros veces libros días horas a ciudad millones cuesta hay",
    "fr": "le la les un une des de du est sont et je tu il elle nous vous pour avec mon ma mes dans sur ai a au aux "
    "ans jours heures pages mètres euros que qui en y milliards millions élèves personnes",
    "it": "il lo la gli le un una di che è sono e non per con mio ho vorrei in del al ore giorni anni persone euro "
    "alle carte",
    "pt": "o a os as um uma de que é são e não por para com meu minha tenho preciso em do da dias horas anos pessoas "
    "reais às",
    "nl": "ik je hij zij wij de het een van is zijn niet geen met voor op mijn heb uur dagen jaar mensen en nog om",
    "en": "the a an of to and is are was i you he she it we they my your for with on in at by this that not do have "
    "please what how when can be",
}


def _spelling(word: str) -> str:
    """Return a word as `plain_text` spells it: lower case, without the optional dots and moons of Hindi."""
    plain = unicodedata.normalize("NFKC", word.casefold())
    return plain.replace("\u093c", "").replace("\u0901", "\u0902")


@cache
def cardinals() -> dict[str, Decimal]:
    """Return the values of number words: whole numbers below 1000, and fractions. See `multipliers` for larger ones."""
    words: dict[str, Decimal] = {}

    def put(word: str, value: int | str) -> None:
        if word != "-":
            words.setdefault(_spelling(word), Decimal(value))

    for line in (_ENGLISH, _GERMAN, _SPANISH, _FRENCH, _ITALIAN, _PORTUGUESE, _DUTCH, _HINDI):
        for value, word in enumerate(line.split()):
            put(word, value)
    for value, line in (*_MORE.items(), *_HUNDREDS.items(), *_ROMAN.items()):
        for word in line.split():
            put(word, value)
    for line in _TEN_WORDS.values():
        for value, word in zip(_TENS, line.split(), strict=True):
            put(word, value)
    for amount, word in _compounds():
        put(word, amount)
    for number, line in _PARTS.items():
        for word in line.split():
            put(word, number)
    return words


def _compounds() -> Iterator[tuple[int | str, str]]:
    """Yield value and word of German, Dutch and Italian compounds: einundzwanzig, driehonderdvijf, ventuno."""
    german = ["ein" if word == "eins" else word for word in _GERMAN.split()]
    dutch = ["een" if place == 1 else word for place, word in enumerate(_DUTCH.split())]
    italian = ["un" if place == 1 else word for place, word in enumerate(_ITALIAN.split())]
    below: dict[str, dict[int, str]] = {
        "de": dict(enumerate(_GERMAN.split())),
        "nl": dict(enumerate(dutch)),
        "it": {**dict(enumerate(_ITALIAN.split())), 1: "uno"},
    }
    for place, ten in enumerate(_TENS):
        words = {language: line.split()[place] for language, line in _TEN_WORDS.items()}
        for language in below:
            below[language][ten] = words[language]
        for unit in range(1, 10):
            below["de"][ten + unit] = f"{german[unit]}und{words['de']}"
            linking = "ën" if dutch[unit].endswith("e") else "en"
            below["nl"][ten + unit] = f"{dutch[unit]}{linking}{words['nl']}"
            stem = words["it"][:-1] if unit in (1, 8) else words["it"]
            below["it"][ten + unit] = stem + {1: "uno", 3: "tré"}.get(unit, italian[unit])
    for language, hundred, units in (("de", "hundert", german), ("nl", "honderd", dutch), ("it", "cento", italian)):
        for value, word in below[language].items():
            if value > 20:
                yield value, word
        for count in range(1, 10):
            prefix = units[count] if count > 1 else ""
            yield count * 100, f"{prefix}{hundred}"
            if language == "de":
                yield count * 100, f"{units[count]}{hundred}"
            for value, word in below[language].items():
                if value and word != "-":
                    yield count * 100 + value, f"{prefix}{hundred}{word}"
                    if language == "de":
                        yield count * 100 + value, f"{units[count]}{hundred}{word}"
                        yield count * 100 + value, f"{units[count]}{hundred}und{word}"
    for unit in range(1, 10):
        yield f"{unit}.5", f"{german[unit]}einhalb"
    for value in (21, 31, 41, 51, 61, 71, 81, 91):
        yield value, "trentuno" if value == 31 else below["it"][value]


@cache
def ordinals() -> dict[str, Decimal]:
    """Return the values of ordinal words."""
    words = {_spelling(word): Decimal(value) for value, line in _ORDINALS.items() for word in line.split()}
    german = dict(enumerate(_GERMAN.split()))
    german |= dict(zip(_TENS, _TEN_WORDS["de"].split(), strict=True))
    for ten in _TENS:
        for unit in range(1, 10):
            german[ten + unit] = f"{'ein' if unit == 1 else german[unit]}und{german[ten]}"
    for value, word in german.items():
        if value > 3 and word != "-" and value != 7:
            stem = word.rstrip("t") if value == 8 else word
            for ending in ("e", "en", "er", "es", "em"):
                words.setdefault(f"{stem}{'st' if value >= 20 else 't'}{ending}".casefold(), Decimal(value))
    for word in ("achten", "achtes"):
        words.pop(word, None)
    return words


@cache
def multipliers() -> dict[str, int]:
    """Return the factors of words such as thousand, million, dozen."""
    return {_spelling(word): value for value, line in _MULTIPLIERS.items() for word in line.split()}


@cache
def number_words() -> frozenset[str]:
    """Return all words that may be a number, or the first word of one."""
    signs = ("minus", "negative", "moins", "menos", "meno", "माइनस")
    return frozenset((*cardinals(), *ordinals(), *multipliers(), "one", _spelling("साढ़े"), *signs))


def joined_number(word: str) -> Decimal | None:
    """Return the value of a one-word number with a thousand in it, or None for any other word."""
    for thousand in ("tausend", "duizend", "mila", "mille"):
        head, separator, tail = word.partition(thousand)
        if separator and (head or tail):
            below = cardinals()
            is_one = head in ("", "ein", "een")
            tail = tail.removeprefix("und")
            if (is_one or head in below) and (not tail or tail in below or tail == "eins"):
                return (1 if is_one else below[head]) * Decimal(1000) + (below.get(tail, Decimal(1)) if tail else 0)
    return None
