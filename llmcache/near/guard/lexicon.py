# ruff: noqa: RUF001 - the words of many scripts
"""Word lists of the field guard: units, currencies, months and weekdays of the larger languages, in lower case.

Sources: CLDR's names of units, currencies, months and weekdays, and the abbreviations in common use.
"""

from __future__ import annotations


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text separated by white space, in lower case."""
    return frozenset(text.casefold().split())


def _table(rows: dict[str, str]) -> dict[str, str]:
    """Map each word to its key."""
    return {word: meaning for meaning, words in rows.items() for word in sorted(word_set(words))}


# -- units ----------------------------------------------------------------------------------------------------

# allowed before a number; the value is the canonical form that is compared
CURRENCIES = _table(
    {
        "$": "$ us$ u.s.$ usd dollar dollars dólares dólar bucks buck dollari",
        "€": "€ eur euro euros",
        "£": "£ gbp pound pounds pfund quid libras livres sterling",
        "¥": "¥ yuan cny rmb 円 元",
        "yen": "jpy yen",
        "₹": "₹ inr rs rupee rupees rupien",
        "₽": "₽ rub rubel roubles рублей рубля рубль руб",
        "₩": "₩ krw won 원",
        "₺": "₺ tl lira",
        "¢": "¢ cents centavos",
        "chf": "chf franken francs franc",
        "pln": "pln zł",
        "cad": "cad ca$ c$ can$",
        "aud": "aud au$ a$",
        "hkd": "hkd hk$",
        "sgd": "sgd s$ sg$",
        "nzd": "nzd nz$",
        "mxn": "mxn mx$ pesos peso",
        "brl": "brl r$ reais real",
        "sek": "sek kronor",
        "nok": "nok",
        "dkk": "dkk kroner",
        "twd": "twd nt$",
        "thb": "thb baht",
        "zar": "zar",
        "aed": "aed dirham dirhams",
        "sar": "sar riyal riyals",
        "ils": "ils shekel shekels ₪",
        "vnd": "vnd ₫",
        "idr": "idr rupiah",
        "myr": "myr ringgit",
        "php": "₱",
        "ngn": "ngn naira ₦",
        "uah": "uah hryvnia ₴",
        "huf": "huf forint forints",
        "czk": "czk koruna",
        "btc": "btc bitcoin bitcoins",
        "eth": "ether ethereum",
        "pence": "pence p",
    }
)
# allowed after a number, with or without a space
UNITS = CURRENCIES | _table(
    {
        "%": "% percent percentage pct prozent procent percento porcento 퍼센트 процентов процента процент",
        "‰": "‰ permille promille permil",
        "°": "° degree degrees grad",
        "°c": "°c celsius centigrade",
        "°f": "°f fahrenheit",
        "second": "sec secs second seconds sekunde sekunden seconde secondes segundo segundos secondi секунд",
        "minute": "min mins minute minutes minuten minuto minutos minuti минут минуты",
        "hour": "hr hrs hour hours stunde stunden heure heures hora horas ora ore uur час часа часов 小时 時間 시간",
        "day": "day days tag tage tagen jour jours día días dia dias giorno giorni dag dagen день дня дней 天 日間",
        "week": "week weeks woche wochen semaine semaines semana semanas settimana weken неделя недель",
        "month": "month months monat monate monaten mois mes meses mês mese mesi maand maanden месяц месяца месяцев",
        "year": "yr yrs year years jahr jahre jahren ans année années año años ano anos anno anni jaar год года лет",
        "kg": "kg kgs kilo kilos kilogram kilograms kilogramm кг",
        "km": "km kms kilometer kilometers kilometre kilometres км",
        "mg": "mg milligram milligrams milligramm мг",
        "cm": "cm centimeter centimeters centimetre centimetres zentimeter centímetros centimètres см",
        "mm": "mm millimeter millimeters millimetre millimetres мм",
        "ml": "ml milliliter milliliters millilitre millilitres milliliters мл",
        "µm": "µm micron microns micrometer micrometers",
        "nm": "nm nanometer nanometers nanometre nanometres",
        "dm": "dm",
        "m": "meter meters metre metres metros metro mètre mètres metri метров",
        "yard": "yd yds yard yards",
        "nmi": "nmi",
        "cl": "cl centiliter centiliters centilitre centilitres zentiliter",
        "dl": "dl deciliter deciliters decilitre decilitres deziliter",
        "hl": "hl hectoliter hectoliters hectolitre hectolitres",
        "µl": "µl microliter microliters",
        "l": "liter liters litre litres litro litros litri ltr ltrs литров",
        "gallon": "gal gallon gallons galones",
        "pint": "pt pint pints",
        "quart": "qt quart quarts",
        "cup": "cup cups tasse tassen taza tazas tasses",
        "tablespoon": "tbsp tablespoon tablespoons esslöffel cucharada cucharadas",
        "teaspoon": "tsp teaspoon teaspoons teelöffel cucharadita cucharaditas",
        "fl oz": "floz",
        "g": "gram grams gramm gramme grammes gramo gramos grammi gr",
        "µg": "µg mcg ug microgram micrograms",
        "ng": "ng",
        "stone": "stone",
        "tonne": "tonne tonnes tonnen toneladas tonnellate",
        "ton": "ton tons",
        "carat": "carat carats karat",
        "acre": "acre acres",
        "hectare": "hectare hectares hektar hectáreas",
        "knot": "knot knots kt kts",
        "bit": "bit bits",
        "byte": "byte bytes",
        "kb": "kb kilobyte kilobytes",
        "mb": "mb megabyte megabytes",
        "gb": "gb gigabyte gigabytes гб",
        "tb": "tb terabyte terabytes",
        "pb": "pb petabyte petabytes",
        "kib": "kib kibibyte kibibytes",
        "mib": "mib mebibyte mebibytes",
        "gib": "gib gibibyte gibibytes",
        "tib": "tib tebibyte tebibytes",
        "kbit": "kbit kbits kilobit kilobits",
        "mbit": "mbit mbits megabit megabits",
        "gbit": "gbit gbits gigabit gigabits",
        "tbit": "tbit tbits terabit terabits",
        "kbps": "kbps kilobps",
        "mbps": "mbps megabps",
        "gbps": "gbps gigabps",
        "pixel": "px pixel pixels",
        "mp": "mp megapixel megapixels",
        "hz": "hz hertz",
        "khz": "khz kilohertz",
        "mhz": "mhz megahertz",
        "ghz": "ghz gigahertz",
        "mw": "mw milliwatt milliwatts",
        "kw": "kw kilowatt kilowatts",
        "megawatt": "megawatt megawatts",
        "gigawatt": "gw gigawatt gigawatts",
        "wh": "wh",
        "kwh": "kwh",
        "mwh": "mwh",
        "watt": "watt watts",
        "volt": "volt volts voltios",
        "mv": "mv millivolt millivolts",
        "kv": "kv kilovolt kilovolts",
        "megavolt": "megavolt",
        "ampere": "amp amps ampere amperes amperios ampères",
        "ma": "milliamp milliamps milliampere",
        "ohm": "ohm ohms ω",
        "mah": "mah",
        "joule": "joule joules",
        "kj": "kj",
        "cal": "cal cals calorie calories kalorien calorías",
        "kcal": "kcal",
        "n": "newton newtons",
        "hp": "hp horsepower",
        "ps": "ps",
        "bar": "bar",
        "mbar": "mbar millibar millibars",
        "psi": "psi",
        "pa": "pascal pascals",
        "hpa": "hpa",
        "kpa": "kpa",
        "mpa": "megapascal mpa",
        "mmhg": "mmhg",
        "torr": "torr",
        "db": "db decibel decibels",
        "lumen": "lumen lumens",
        "k": "kelvin",
        "ppm": "ppm",
        "ppb": "ppb",
        "pp": "pp",
        "bp": "bps",
        "decade": "decade decades jahrzehnt jahrzehnte décadas décennies",
        "century": "century centuries jahrhundert jahrhunderte siglos siècles",
        "night": "night nights noches nuits nächte",
        "fortnight": "fortnight fortnights",
        "inch": "inch inches zoll pouces pulgadas pollici",
        "foot": "ft feet foot",
        "lb": "lb lbs",
        "oz": "oz ounce ounces",
        "mile": "mile miles mi meilen millas milles",
        "mph": "mph",
        "kmh": "kmh",
        "mps": "mps",
        "dpi": "dpi",
        "rpm": "rpm",
        "ms": "ms millisecond milliseconds millisekunden",
        "µs": "µs microsecond microseconds",
        "ns": "ns nanosecond nanoseconds",
    }
)
PERIODS = frozenset({"second", "minute", "hour", "day", "week", "month", "year"})
# allowed only directly after a number: after a space they are other words or ambiguous
GLUED = UNITS | _table(
    {
        "g": "g",
        "m": "m",
        "l": "l",
        "watt": "w",
        "volt": "v",
        "ampere": "a",
        "b": "b",
        "n": "n",
        "k": "k",
        "ma": "ma",
        "pa": "pa",
        "hectare": "ha",
        "ah": "ah",
        "inch": "in",
        "second": "s",
        "hour": "h",
        "day": "d",
        "x": "x",
    }
)
# letters that are a unit after a space only if a number's phrase ends there: 5 V, 5 g of sugar
LETTER_UNITS = GLUED.keys() & set("gmlwvsh") | {"a", "n", "in", "k", "pa", "ma", "ha", "ah", "d"}
ORDINALS = word_set("st nd rd th er ère ere re e eme ème de o a º ª ste ого й я")

# words without a vowel that are not codes
NO_CODES = frozenset(GLUED) | word_set("pls plz thx tnx tks btw hmm msg ppl tmrw tmr mrs shh psst nth ltd str vgl bzw")

# -- dates ----------------------------------------------------------------------------------------------------

MONTHS = _table(
    {
        "1": "january jan januar janvier janv enero ene janeiro gennaio januari jänner stycznia января ocak",
        "2": "february feb februar février févr fevrier febrero fevereiro febbraio februari lutego февраля şubat",
        "3": "march mar märz maerz mrz mars marzo março marco maart marca марта mart mmarch",
        "4": "april apr avril avr abril abr aprile kwietnia апреля nisan",
        "5": "may mai mayo maio maggio mei maja мая mayıs mmay",
        "6": "june jun juni juin junio junho giugno czerwca июня haziran mjune",
        "7": "july jul juli juillet juil julio julho luglio lipca июля temmuz mjuly",
        "8": "august aug août aout agosto augustus sierpnia августа ağustos",
        "9": "september sep sept septembre septiembre setembro settembre września сентября eylül",
        "10": "october oct oktober okt octobre octubre outubro ottobre października октября ekim",
        "11": "november nov novembre noviembre novembro listopada ноября kasım",
        "12": "december dec dezember dez décembre diciembre dic dezembro dicembre grudnia декабря aralık",
    }
)
# words that mean a month even without a day or a year
SURE_MONTHS = frozenset(
    word
    for word in MONTHS
    if len(word) > 4 and word not in {"march", "marzo", "marco", "maart", "augustus", "maggio", "marca", "nisan"}
)
WEEKDAYS = _table(
    {
        "mon": "monday mondays montag montags montage lundi lundis lunes lunedì maandag понедельник 月曜日",
        "tue": "tuesday tuesdays tues dienstag dienstags mardi mardis martes martedì dinsdag вторник 火曜日",
        "wed": "wednesday wednesdays mittwoch mittwochs mercredi mercredis miércoles miercoles mercoledì woensdag "
        "среда среду 水曜日",
        "thu": "thursday thursdays thurs donnerstag donnerstags jeudi jeudis jueves giovedì donderdag четверг 木曜日",
        "fri": "friday fridays freitag freitags vendredi vendredis viernes venerdì vrijdag пятница пятницу 金曜日",
        "sat": "saturday saturdays samstag samstags sonnabend samedi samedis sábado sábados sabado sabato zaterdag "
        "суббота субботу 土曜日",
        "sun": "sunday sundays sonntag sonntags dimanche dimanches domingo domingos domenica zondag воскресенье 日曜日",
    }
)
# ambiguous abbreviations: weekdays only next to a preposition or another weekday
DOUBTFUL_WEEKDAYS = _table(
    {
        "mon": "mon",
        "tue": "tue",
        "wed": "wed",
        "thu": "thu thur",
        "fri": "fri",
        "sat": "sat",
        "sun": "sun",
    }
)
GERMAN_WEEKDAYS = {"mo": "mon", "di": "tue", "mi": "wed", "do": "thu", "fr": "fri", "sa": "sat", "so": "sun"}
# short words that are not part of a code when they precede a number
SHORT_WORDS = word_set(
    """
    am an as at be by do go he hi if in is it me my no of oh ok on or so to up us vs we ab da du er es im ja um zu
    ad al el en ha la le lo mi ni se si su te tu un ya au ce de et il je ma ne ou qu sa ta va vu di ed io tra ao
    eu na os em ik op wo hr pm tv pc ca re st nd rd th cv id dr mr ms mrs rs kg km cm mm ml lb oz ft gb mb tb kb
    hz kw ep pg pp ch nr art bis von aus mit für the and for per via than then der die das les des los las
    """
)
