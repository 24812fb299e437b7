# ruff: noqa: RUF001, E501 - texts in several scripts
"""The field guard on pairs of texts by kind of field and language, and on texts that could be slow to read."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcache.near.guard.rules import (
    RULES_VERSION,
    FieldGuard,
    digests,
    refused,
)
from tests.near.guard_cases import Pair, drawn_pairs, mistakes, table, written_pairs

KINDS = ["number", "date", "time", "sign", "amount", "currency", "identifier", "quotation", "address", "negation"]
LANGUAGES = ["de", "en", "es", "fr", "hi", "ko", "zh"]
ROUNDS = int(os.environ.get("LLMCACHE_GUARD_ROUNDS", "12"))
ACCEPTED, REFUSED = 0.03, 0.05  # highest shares of errors


def _checked(pairs: list[Pair]) -> None:
    counts, wrong = mistakes(pairs)
    report = table(counts) + "\n" + "\n".join(map(str, wrong[:20]))
    changed, accepted, respelled, lost = (sum(row[place] for row in counts.values()) for place in range(4))
    assert accepted < ACCEPTED * changed, report
    assert lost < REFUSED * respelled, report


def test_the_written_pairs_are_of_all_kinds_and_languages() -> None:
    pairs = written_pairs()
    assert sum(pair.refuse for pair in pairs) >= 150
    assert sum(not pair.refuse for pair in pairs) >= 150
    assert {pair.kind for pair in pairs} >= set(KINDS)
    assert {pair.language for pair in pairs} >= set(LANGUAGES)


def test_written_pairs_are_refused_when_a_field_changed_and_accepted_when_only_its_spelling_did() -> None:
    _checked(written_pairs())


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_pairs_of_each_kind_are_refused_when_changed_and_accepted_when_respelled(kind: str) -> None:
    _checked([pair for pair in drawn_pairs(1, ROUNDS) if pair.kind == kind])


@pytest.mark.parametrize("language", LANGUAGES)
def test_drawn_pairs_of_each_language_are_refused_when_changed_and_accepted_when_respelled(language: str) -> None:
    _checked([pair for pair in drawn_pairs(2, ROUNDS) if pair.language == language])


def test_some_thousands_of_pairs_are_drawn() -> None:
    pairs = drawn_pairs(1, 25)
    assert len(pairs) > 3000
    assert pairs == drawn_pairs(1, 25)
    assert pairs != drawn_pairs(2, 25)


def test_digests_judge_drawn_pairs_as_the_texts_do() -> None:
    pairs = drawn_pairs(3, 3)
    found = refused(digests([pair.one for pair in pairs]), digests([pair.other for pair in pairs]))
    _, wrong = mistakes(pairs)
    assert [(kind >= 0) != pair.refuse for pair, kind in zip(pairs, found.tolist(), strict=True)] == [
        pair in wrong for pair in pairs
    ]


def test_the_case_and_white_space_of_drawn_texts_do_not_matter() -> None:
    texts = [pair.one for pair in drawn_pairs(4, 3) if pair.language in ("en", "es", "fr")]
    loud = [f"  {text.upper()}\n".replace(" ", "  ") for text in texts]
    assert [texts[place] for place in np.flatnonzero(refused(digests(texts), digests(loud)) >= 0)] == []


def test_digests_of_other_rules_do_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = FieldGuard().digests(["pay 5"])
    monkeypatch.setattr("llmcache.near.guard.rules.RULES_VERSION", RULES_VERSION + 1)
    assert FieldGuard().unequal(ours, FieldGuard().digests(["pay 5"])).tolist() == [0]


WORDS = sorted({word for pair in written_pairs() for text in (pair.one, pair.other) for word in text.split()})


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=9), st.sampled_from([" ", "", ".", "-", ","]))
def test_any_mixture_of_words_of_these_languages_is_read(parts: list[str], joint: str) -> None:
    text = joint.join(parts)
    assert refused(digests([text]), digests([text])).tolist() == [-1]


@pytest.mark.parametrize(
    "unit",
    [
        "a", "1", " 1", "1 ", "1.", "1,", "1-", "a-", "a1-", "a@", "a.", "/a", "#a", "--a", "_", '"', "'", " '", "`", "“", "«", "‘a",
        "one ", "twenty-", "hundred ", "thousand ", "million ", "half ", "and ", "quatre-vingt-", "zweitausend", "minus ", "one and ",
        "mon ", "may ", "1 may ", "in may ", "1:", "1:00 ", "am ", "half past ", "12 o'", "+1 ", "00 ", "(555) ", "ab12 ", "de12 ", "v1.", "http://",
        "no ", "n't ", "not only ", "i know ", "i don't know ", "can't ", "dollars ", "$", "5 de ", "k", "1k ", "1/2 ", "x y", "no. ",
        "more than 5 ", "at least ", "before ", "before 1 ", "last ", "AB-", "A+ ", ">", "5+ ", "5 or more ", "5 km/h ", "3 days ago ", "il y a ", "5 V ", "Mb ",
        "以上", "不超过5", "下周", "3天前", "이상 ", "से कम ", "nineties ", "5 % points ", "5 per ", "us$5 ",
        "一", "千", "万", "三点", "一点", "百分之", "星期", "不", "没", "是不是", "半", "일", "만", "세 ", "오후 ", "안 ", "지 마", "एक ", "सौ ", "न ", "साढ़े ", "बजे ",
    ],
)  # fmt: skip
def test_a_long_run_of_anything_is_read_in_time_that_grows_with_its_length(unit: str) -> None:
    """Four times the length may take ten times as long; a quadratic search takes sixteen times as long."""

    def seconds(size: int) -> float:
        text = unit * (size // len(unit.encode()))
        began = time.process_time()
        digests([text])
        return time.process_time() - began

    short = max(seconds(8_000), 0.02)
    assert min(seconds(32_000), seconds(32_000)) < 10 * short


@pytest.mark.timeout(120)
@pytest.mark.parametrize("unit", ["1", "一"])
def test_a_whole_megabyte_is_read(unit: str) -> None:
    digests([unit * (1_000_000 // len(unit.encode()))])
