# ruff: noqa: RUF001 - the words of many scripts
"""Words the field guard knows: units, months, weekdays, numbers and negations of the larger languages, lower case."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.casefold().split())


def _table(rows: dict[str, str]) -> dict[str, str]:
    return {word: meaning for meaning, words in rows.items() for word in sorted(_words(words))}


# -- units ----------------------------------------------------------------------------------------------------

# what may stand in front of a number; the value is what the unit is compared by
CURRENCIES = _table(
    {
        "$": "$ us$ usd dollar dollars dólares dólar",
        "€": "€ eur euro euros",
        "£": "£ gbp pound pounds pfund quid",
        "¥": "¥ jpy cny rmb yen yuan 円 元",
        "₹": "₹ inr rs rupee rupees",
        "₽": "₽ rub rubel roubles рублей рубля рубль руб",
        "₩": "₩ krw 원",
        "₺": "₺ tl lira",
        "¢": "¢ cents centavos",
        "chf": "chf franken",
        "pln": "pln zł",
        "cad": "cad",
        "aud": "aud",
    }
)
# after a number, also with a space between
UNITS = CURRENCIES | _table(
    {
        "%": "% percent percentage prozent procent percento porcento 퍼센트 процентов процента процент",
        "‰": "‰",
        "°": "° degree degrees grad",
        "°c": "°c celsius",
        "°f": "°f fahrenheit",
        "second": "sec secs second seconds sekunde sekunden seconde secondes segundo segundos secondi секунд",
        "minute": "min mins minute minutes minuten minuto minutos minuti минут минуты",
        "hour": "hr hrs hour hours stunde stunden heure heures hora horas ora ore uur час часа часов 小时 時間 시간",
        "day": "day days tag tage tagen jour jours día días dia dias giorno giorni dag dagen день дня дней 天 日間",
        "week": "week weeks woche wochen semaine semaines semana semanas settimana weken неделя недель",
        "month": "month months monat monate monaten mois mes meses mês mese mesi maand maanden месяц месяца месяцев",
        "year": "yr yrs year years jahr jahre jahren ans année années año años ano anos anno anni jaar год года лет",
        "thousand": "thousand tausend mille mil duizend тысяч",
        "million": "mio million millions millionen millones milhões milioni miljoen миллионов 万",
        "billion": "bn mrd billion billions milliarde milliarden milliards 亿",
        "kg": "kg kgs kilo kilos kilogram kilograms kilogramm кг",
        "km": "km kms kilometer kilometers kilometre kilometres км",
        "mg": "mg мг",
        "cm": "cm см",
        "mm": "mm мм",
        "ml": "ml мл",
        "kb": "kb kib kilobyte kilobytes",
        "mb": "mb mib megabyte megabytes",
        "gb": "gb gib gigabyte gigabytes гб",
        "tb": "tb tib terabyte terabytes",
        "mbps": "mbps",
        "gbps": "gbps",
        "hz": "hz hertz",
        "khz": "khz",
        "mhz": "mhz",
        "ghz": "ghz",
        "kw": "kw",
        "kwh": "kwh",
        "watt": "watt watts",
        "volt": "volt volts",
        "mah": "mah",
        "inch": "inch inches zoll pouces pulgadas pollici",
        "foot": "ft feet foot",
        "lb": "lb lbs",
        "oz": "oz ounce ounces",
        "mile": "mile miles mi meilen millas",
        "mph": "mph",
        "dpi": "dpi",
        "rpm": "rpm",
        "ms": "ms",
    }
)
# only when written onto the number: with a space between they are other words, or too short to be sure
GLUED = UNITS | _table(
    {
        "g": "g",
        "m": "m",
        "l": "l",
        "w": "w",
        "v": "v",
        "a": "a",
        "b": "b",
        "k": "k",
        "inch": "in",
        "second": "s",
        "hour": "h",
        "day": "d",
        "x": "x",
    }
)
ORDINALS = _words("st nd rd th er ère ere re e eme ème de o a º ª ste ого й я")

# words without a vowel that are no codes
NO_CODES = frozenset(GLUED) | _words("pls plz thx tnx tks btw hmm msg ppl mrs shh psst nth ltd str vgl bzw")

# -- dates ----------------------------------------------------------------------------------------------------

MONTHS = _table(
    {
        "1": "january jan januar janvier janv enero ene janeiro gennaio januari stycznia января ocak",
        "2": "february feb februar février févr fevrier febrero fevereiro febbraio februari lutego февраля şubat",
        "3": "march mar märz maerz mrz mars marzo março marco maart marca марта mart",
        "4": "april apr avril avr abril abr aprile kwietnia апреля nisan",
        "5": "may mai mayo maio maggio mei maja мая mayıs",
        "6": "june jun juni juin junio junho giugno czerwca июня haziran",
        "7": "july jul juli juillet juil julio julho luglio lipca июля temmuz",
        "8": "august aug août aout agosto augustus sierpnia августа ağustos",
        "9": "september sep sept septembre septiembre setembro settembre września сентября eylül",
        "10": "october oct oktober okt octobre octubre outubro ottobre października октября ekim",
        "11": "november nov novembre noviembre novembro listopada ноября kasım",
        "12": "december dec dezember dez décembre diciembre dic dezembro dicembre grudnia декабря aralık",
    }
)
# these mean a month also without a day or a year beside them
SURE_MONTHS = frozenset(
    word
    for word in MONTHS
    if len(word) > 4 and word not in {"march", "marzo", "marco", "maart", "augustus", "maggio", "marca", "nisan"}
)
WEEKDAYS = _table(
    {
        "mon": "monday montag lundi lunes lunedì maandag понедельник 月曜日 星期一 월요일",
        "tue": "tuesday dienstag mardi martes martedì dinsdag вторник 火曜日 星期二 화요일",
        "wed": "wednesday mittwoch mercredi miércoles mercoledì woensdag среда среду 水曜日 星期三 수요일",
        "thu": "thursday donnerstag jeudi jueves giovedì donderdag четверг 木曜日 星期四 목요일",
        "fri": "friday freitag vendredi viernes venerdì vrijdag пятница пятницу 金曜日 星期五 금요일",
        "sat": "saturday samstag sonnabend samedi sábado sabato zaterdag суббота субботу 土曜日 星期六 토요일",
        "sun": "sunday sonntag dimanche domingo domenica zondag воскресенье 日曜日 星期日 星期天 일요일",
    }
)

# -- numbers in words -----------------------------------------------------------------------------------------

# without "one": it is an article or a pronoun in most of these languages
NUMBERS = _table(
    {
        "0": "zero null zéro cero",
        "2": "two zwei deux dos due twee dois duas два две ii",
        "3": "three drei trois tres tre drie três три iii",
        "4": "four vier quatre cuatro quattro quatro четыре iv",
        "5": "five fünf cinq cinco cinque vijf пять",
        "6": "six sechs seis sei zes шесть",
        "7": "seven sieben sept siete sette sete zeven семь vii",
        "8": "eight acht huit ocho otto oito восемь viii",
        "9": "nine neun neuf nueve nove negen девять",
        "10": "ten zehn dix diez dieci dez tien десять",
        "11": "eleven elf onze once undici одиннадцать",
        "12": "twelve zwölf douze doce dodici doze twaalf двенадцать xii",
        "13": "thirteen xiii",
        "14": "fourteen xiv",
        "15": "fifteen",
        "16": "sixteen xvi",
        "17": "seventeen xvii",
        "18": "eighteen xviii",
        "19": "nineteen",
        "20": "twenty zwanzig vingt veinte venti vinte twintig двадцать",
        "30": "thirty dreißig dreissig trente treinta trenta trinta dertig",
        "40": "forty vierzig quarante cuarenta quaranta quarenta veertig",
        "50": "fifty fünfzig cinquante cincuenta cinquanta vijftig",
        "60": "sixty sechzig soixante sesenta sessanta zestig",
        "70": "seventy siebzig setenta settanta zeventig",
        "80": "eighty achtzig ochenta ottanta oitenta tachtig",
        "90": "ninety neunzig noventa novanta negentig",
        "100": "hundred hundert cent cien cento honderd сто",
    }
)
# words of the table that are ordinary words of another language in it: not read as numbers
for _word in ("once", "due", "null", "dos", "sei", "tre", "sept", "dez", "cent", "elf", "acht", "dix", "sette"):
    NUMBERS.pop(_word, None)

# -- negations ------------------------------------------------------------------------------------------------

NEGATIONS = _words(
    """not cannot cant never without none nobody nothing nowhere neither unable
    dont doesnt didnt isnt arent wasnt werent wont wouldnt shouldnt couldnt hasnt havent hadnt
    nicht nichts nie niemals niemand nirgends kein keine keinen keinem keiner keines weder ohne
    niet geen nooit niets niemand zonder nergens
    inte inget ingen inga aldrig utan ej ikke ikkje ingen intet aldri uten uden
    sans sin senza sem
    без bez nem nincs nélkül ei eivät ilman değil yok
    δεν δε μη μην όχι χωρίς ποτέ
    لا ليس ليست لم لن بدون غير ما لست
    לא אין בלי אל אינו אינה
        không chẳng chưa đừng tidak bukan jangan tanpa belum
    안 못"""
)
# languages where one negation is said twice: "ne ... pas", "no ... nada", "не ... никогда" count once
PARTICLES = _words("no non não nao ne n не нет nie нельзя ні не nu")
ECHOES = _words(
    """pas jamais rien aucun aucune guère
    nada nadie nunca jamás ningún ninguno ninguna ninguém nenhum nenhuma tampoco
    niente nulla nessuno nessuna nemmeno neanche
    никогда ничего никто никого нигде ни никакой
    nigdy nic nikt żaden żadna nikdy nikdo nic"""
)
# parts of words, in scripts without spaces or with endings; longest first within a language
NEGATING_PARTS = sorted(
    _words("नहीं नही बिना ません なかった ない ずに 않 없 아니 不 没 沒 未 勿 莫"), key=len, reverse=True
)
# words that hold such a part and negate nothing
HARMLESS = sorted(
    _words(
        """対不起 对不起 對不起 不过 不過 差不多 不仅 不僅 不但 不错 不錯 不断 不斷 不久 不同 不管 未来 未來 少ない
    莫斯科 莫大 とんでもない かもしれません かもしれない"""
    ),
    key=len,
    reverse=True,
)
