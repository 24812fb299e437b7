# ruff: noqa: RUF001 - texts in many scripts
"""The field guard: texts that must not share a result, in several languages and spellings."""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcache.bench.guard import altered, measure
from llmcache.errors import ConfigError
from llmcache.near.guard.rules import (
    KINDS,
    FieldGuard,
    differs,
    digests,
    fields,
    refused,
)
from llmcache.near.neighbors.correction import eligible_sources
from tests.conftest import DATA

DIFFERENT = [
    ("number", "Top up 20 pounds", "Top up 30 pounds"),
    ("number", "It weighs 5 kg", "It weighs 5 lb"),
    ("number", "a fee of 5 %", "a fee of 5 $"),
    ("number", "send $5 please", "send €5 please"),
    ("number", "within 5 days", "within 5 weeks"),
    ("number", "minus: -5 degrees", "plus: 5 degrees"),
    ("number", "from 10 to 20", "from 10 to 25"),
    ("number", "from 3 to 5", "from 5 to 3"),
    ("identifier", "from PDF to HTML", "from HTML to PDF"),
    ("number", "World War I", "World War II"),
    ("number", "my two cards", "my three cards"),
    ("number", "drei Karten", "vier Karten"),
    ("number", "il y a 3 jours", "il y a 4 jours"),
    ("number", "لدي ٣ بطاقات", "لدي ٤ بطاقات"),
    ("number", "मेरे पास ५ कार्ड हैं", "मेरे पास ६ कार्ड हैं"),
    ("number", "我有3张卡", "我有4张卡"),
    ("number", "全角１２", "全角１３"),
    ("number", "10² metres", "102 metres"),
    ("number", "5½ hours", "51/2 hours"),
    ("number", "twice: 5 and 5", "once: 5"),
    ("date", "due on 3 May 2024", "due on 4 May 2024"),
    ("date", "due on 2024-05-03", "due on 2024-05-04"),
    ("date", "am 3. März", "am 3. April"),
    ("date", "el 3 de mayo de 2024", "el 3 de junio de 2024"),
    ("date", "5月3日", "5月4日"),
    ("date", "on Monday", "on Tuesday"),
    ("date", "at 2 pm", "at 2 am"),
    ("date", "at 14:30", "at 14:35"),
    ("identifier", "canon powershot sd890is", "canon powershot sd880is"),
    ("identifier", "twin2x4096-6400c5c", "twin2x2048-6400c5c"),
    ("identifier", "case lcs-csj by sony", "case lcs-csq by sony"),
    ("identifier", "error 0x80070057", "error 0x80070058"),
    ("identifier", "python 3.11.2", "python 3.11.3"),
    ("identifier", "ip 10.0.0.1", "ip 10.0.0.2"),
    ("number", "part 0620", "part 620"),
    ("identifier", "write to ann@example.com", "write to bob@example.com"),
    ("identifier", "see https://example.com/a", "see https://example.com/b"),
    ("identifier", "open /etc/hosts", "open /etc/passwd"),
    ("identifier", "edit notes.txt", "edit notes.csv"),
    ("identifier", "call set_up", "call tear_down"),
    ("identifier", "a 3-d film", "a 3-b film"),
    ("identifier", "learn php", "learn sql"),
    ("identifier", "learn C++", "learn C"),
    ("identifier", "vitamin C", "vitamin K"),
    ("quoted", 'the book "War"', 'the book "Peace"'),
    ("quoted", "das Buch „Krieg“", "das Buch „Frieden“"),
    ("quoted", "le livre « Guerre »", "le livre « Paix »"),
    ("quoted", "「戦争」という本", "「平和」という本"),
    ("negation", "I can pay", "I can't pay"),
    ("negation", "I can pay", "I can\u2019t pay"),
    ("negation", "it is safe", "it is not safe"),
    ("negation", "with sugar, without milk", "with sugar and milk"),
    ("negation", "always open", "never open"),
    ("negation", "refundable", "non-refundable"),
    ("negation", "Ich kann zahlen", "Ich kann nicht zahlen"),
    ("negation", "Ich habe eine Karte", "Ich habe keine Karte"),
    ("negation", "Je peux payer", "Je ne peux pas payer"),
    ("negation", "Puedo pagar", "No puedo pagar"),
    ("negation", "Posso pagare", "Non posso pagare"),
    ("negation", "Posso pagar", "Não posso pagar"),
    ("negation", "Ik kan betalen", "Ik kan niet betalen"),
    ("negation", "Mogę zapłacić", "Nie mogę zapłacić"),
    ("negation", "Я могу платить", "Я не могу платить"),
    ("negation", "Μπορώ να πληρώσω", "Δεν μπορώ να πληρώσω"),
    ("negation", "我能付款", "我不能付款"),
    ("negation", "払います", "払いません"),
    ("negation", "돈이 있다", "돈이 없다"),
    ("negation", "أستطيع الدفع", "لا أستطيع الدفع"),
    ("negation", "मैं भुगतान कर सकता हूँ", "मैं भुगतान नहीं कर सकता"),
]

ALIKE = [
    ("1,234.50", "1234.5"),
    ("1.234,50 €", "€1234.5"),
    ("1\u202f234,5 km", "1234.5km"),
    ("1'234 CHF", "CHF 1,234"),
    ("1\u20442", "½"),
    ("5 percent", "5%"),
    ("USD 5", "$5.00"),
    ("rs500", "Rs. 500"),
    (".5 litres", "0.5 litres"),
    ("２０２４", "2024"),
    ("٣٫٥", "3.5"),
    ("2 cards", "two cards"),
    ("World War 2", "World War II"),
    ("the 3rd try", "3. Versuch"),
    ("a 15-inch screen", "a 15 inch screen"),
    ("3 May 2024", "May 3rd, 2024"),
    ("3 May 2024", "2024-05-03"),
    ("3. Mai 2024", "03.05.2024"),
    ("3 de mayo de 2024", "le 3 mai 2024"),
    ("2024年5月3日", "2024/5/3"),
    ("25/12/2023", "12/25/2023"),
    ("2:30 pm", "14:30"),
    ("2 p.m.", "2pm"),
    ("usb-1870", "USB1870"),
    ("dmc-fs3s", "DMC_FS3S".replace("_", "-")),
    ("version 2.1.0", "v2.1.0"),
    ("we do not have no. 5", "number 5 isn't here"),
    ("Je ne peux pas", "je peux pas"),
    ("No tengo nada", "no tengo dinero"),
    ("Я никогда не плачу", "Я не плачу"),
    ("对不起，我要付款", "请让我付款"),
    ("“error” found", '"Error" found'),
    ("is it may or might", "may it be"),
    ("and/or", "or"),
]


@pytest.mark.parametrize(("kind", "one", "other"), DIFFERENT)
def test_texts_that_differ_in_a_field_are_told_apart(kind: str, one: str, other: str) -> None:
    assert differs(one, other) == kind
    assert differs(other, one) == kind


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_another_spelling_of_the_same_field_is_no_difference(one: str, other: str) -> None:
    assert differs(one, other) is None, (fields(one), fields(other))


def test_a_pattern_of_the_users_own_is_a_field() -> None:
    ticket = re.compile(r"\b[A-Z]{3}\b")
    assert differs("fly to LHR", "fly to JFK") == "identifier"  # no vowels: already a code
    assert differs("fly to OSL", "fly to ARN") is None
    assert differs("fly to OSL", "fly to ARN", ticket) == "pattern"
    colour = re.compile(r"in (?:the colour )?(red|blue)")
    assert differs("one in red", "one in the colour red", colour) is None
    assert differs("one in red", "one in blue", colour) == "pattern"


def test_kinds_left_out_do_not_count() -> None:
    assert differs("pay 5", "don't pay 6", kinds=("negation",)) == "negation"
    assert differs("pay 5", "pay 6", kinds=("negation",)) is None


def test_digests_agree_with_the_comparison_of_texts() -> None:
    ones, others = [one for _, one, _ in DIFFERENT], [other for _, _, other in DIFFERENT]
    found = refused(digests(ones), digests(others))
    assert [KINDS[place] for place in found] == [differs(*pair) for pair in zip(ones, others, strict=True)]
    alike = refused(digests([one for one, _ in ALIKE]), digests([other for _, other in ALIKE]))
    assert (alike == -1).all()
    assert digests(ones).shape == (len(ones), len(KINDS))
    assert digests([]).shape == (0, len(KINDS))
    assert refused(digests(["pay 5"]), digests(["pay 6"]), kinds=("date",)).tolist() == [-1]


def test_digests_made_with_another_pattern_never_match() -> None:
    ours, theirs = digests(["hello"]), digests(["hello"], re.compile("x"))
    assert (refused(ours, theirs) >= 0).all()


words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Sc", "Zs"), max_codepoint=0x3000), max_size=30)
tokens = st.sampled_from(
    [
        "5",
        "-5",
        "1,234.5",
        "$",
        "€",
        "kg",
        "3",
        "May",
        "2024",
        "2024-05-03",
        "14:30",
        "pm",
        "not",
        "can't",
        "no",
        "pas",
        "ab-12",
        "v1.2.3",
        "a@b.org",
        "https://a.b/c",
        "/usr/lib",
        '"Name"',
        "x_y",
        "two",
        "II",
        "lcs-csj",
        "½",
        "٣",
    ]
)
texts = words | st.lists(tokens | words, max_size=8).map(" ".join)


@given(texts)
def test_a_text_does_not_differ_from_itself(text: str) -> None:
    assert differs(text, text) is None


@given(texts, texts)
def test_the_order_of_the_two_texts_does_not_matter(one: str, other: str) -> None:
    assert differs(one, other) == differs(other, one)


@given(texts, texts, texts)
def test_texts_without_a_difference_form_classes(one: str, other: str, third: str) -> None:
    if differs(one, other) is None and differs(other, third) is None:
        assert differs(one, third) is None
    rows = digests([one, other])
    assert (refused(rows[:1], rows[1:])[0] == -1) == (differs(one, other) is None)


@given(st.lists(tokens, max_size=8), st.sampled_from(["  ", "\n", "\t ", " \r\n"]))
def test_case_and_white_space_do_not_matter(parts: list[str], space: str) -> None:
    text = " ".join(parts)
    assert differs(text, text.upper()) is None
    assert differs(text, text.lower()) is None
    assert differs(text, f" {space.join(parts)}{space}") is None


@given(texts)
def test_the_form_of_unicode_does_not_matter(text: str) -> None:
    assert differs(unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)) is None


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_two_numbers_differ_exactly_when_they_are_not_equal(one: int, other: int) -> None:
    assert (differs(f"pay {one} now", f"pay {other} now") is None) == (one == other)
    assert differs(f"pay {one} now", f"pay {one:,} now") is None
    assert differs(f"pay {one} now", f"pay {one}.00 now") is None


@pytest.mark.timeout(60)
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["a", "a-", "a.", "1", "1.", "1,", "/a", "a@", '"', "`", "_", "--a", "不", " no", "may 1 ", "a1-"])
)
def test_no_text_takes_more_time_than_its_length_asks_for(unit: str) -> None:
    fields(unit * 20_000)  # would take minutes if a pattern backtracked


def test_a_measurement_without_data_says_what_it_looks_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has none of dup-products"):
        measure(tmp_path, lambda texts: np.zeros((len(texts), 2), np.float32))


def test_a_measurement_counts_what_is_kept_and_what_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dup-products"
    folder.mkdir()
    pairs = [
        [1, "red mouse ab-12", "red mouse ab12"],
        [1, "red mouse ab-12", "red mouse ab-12 for 5 $"],
        [0, "red mouse ab-12", "red mouse ab-13"],
        [0, "red mouse by gh", "red mouse by ij"],
    ]
    with gzip.open(folder / "product_pairs.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(["shop", "test", *pair]) + "\n" for pair in pairs)
    row = measure(tmp_path, lambda texts: np.zeros((len(texts), 2), np.float32))[0]
    assert (row["without"], row["without_wrong"], row["accepted"], row["wrong"]) == (4, 2, 2, 1)
    assert (row["good_kept"], row["wrong_kept"], row["precision"]) == (0.5, 0.5, 0.5)
    assert row["good_refused_by"] == {"number": 1}
    assert row["wrong_refused_by"] == {"identifier": 1}


def test_no_two_products_that_differ_in_a_model_number_are_taken_for_one() -> None:
    path = DATA / "dup-products" / "product_pairs.jsonl.gz"
    if not path.exists():
        pytest.skip(f"dup-products is not in {DATA}; set LLMCACHE_DATA to the folder that holds it")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        pairs = [(a, b) for _, _, label, a, b in map(json.loads, list(lines)[::4]) if not int(label)]
    found = refused(digests([a for a, _ in pairs]), digests([b for _, b in pairs]))
    assert len(pairs) > 4000
    assert np.flatnonzero(found == -1).tolist() == []
    texts, others = altered([a for a, _ in pairs])
    assert len(texts) > 3000
    assert (refused(digests(texts), digests(others)) >= 0).all()


def test_the_first_neighbour_that_counts_and_has_the_same_fields_is_the_source() -> None:
    rules = FieldGuard()
    asked = rules.digests(["a fee of 35 pounds"] * 4)
    texts = [
        ["fee: 15 pounds", "fee of 35 pounds", "35 pounds, a fee"],
        ["35 pounds", "15 pounds", "35 pounds"],
        ["15 pounds", "not 35 pounds", "25 pounds"],
        ["15 pounds", "35 pounds", "25 pounds"],
    ]
    theirs = np.array([rules.digests(row) for row in texts])
    eligible = np.ones((4, 3), np.bool_)
    eligible[3, 1] = False
    place, kind = rules.sharing(asked, theirs, eligible)
    assert place.tolist() == [1, 0, 0, 0]
    assert [None if one < 0 else KINDS[one] for one in kind.tolist()] == [None, None, "number", "number"]


def test_only_what_counts_half_as_much_as_the_nearest_may_be_the_source() -> None:
    similarity = np.array([[0.9, 0.899, 0.5], [0.9, -np.inf, -np.inf]], np.float32)
    assert eligible_sources(similarity, 0.05).tolist() == [[True, True, False], [True, False, False]]
