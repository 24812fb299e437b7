"""Chunks: they cover the text, keep to the limit, begin where a reader would cut, and an edit touches few of them."""

from __future__ import annotations

import json
import lzma
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcache.chunking import chunks
from llmcache.errors import ConfigError
from tests.conftest import DATA

PIECES = [
    "# Title\n",
    "A sentence. ",
    'He said "no." ',
    "word ",
    "\n\n",
    "\n",
    "\u9577\u3002",
    "x" * 30,
    "  ",
    "Title\n---\n",
]


def texts_of(text: str, **others: Any) -> list[str]:
    return [one.text for one in chunks(text, **others)]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.integers(1, 80), st.integers(0, 40))
def test_chunks_are_slices_in_order_with_only_white_space_between_them(text: str, limit: int, least: int) -> None:
    at = 0
    for one in chunks(text, limit=limit, least=min(least, limit)):
        assert text[at : one.start].strip() == ""
        assert one.text == text[one.start : one.end] == one.text.strip() != ""
        assert len(one.text) <= limit or not any(space in one.text for space in " \n"), "only a word may be longer"
        at = one.end
    assert text[at:].strip() == ""


def test_short_paragraphs_are_joined_and_a_heading_stays_with_what_follows() -> None:
    text = "# One\n\nshort\n\nalso short\n\n# Two\n\nThe second part."
    assert texts_of(text, least=15) == ["# One\n\nshort\n\nalso short", "# Two\n\nThe second part."]
    assert texts_of(text, least=0) == ["# One\n\nshort", "also short", "# Two\n\nThe second part."]


def test_a_long_paragraph_is_cut_at_sentences_and_a_long_sentence_at_words() -> None:
    assert texts_of("One two. Three four! Five six?", limit=21, least=0) == ["One two. Three four!", "Five six?"]
    assert texts_of("one two three four", limit=9, least=0) == ["one two", "three", "four"]
    assert texts_of("unbreakable", limit=4, least=0) == ["unbreakable"]


def test_the_length_may_be_any_measure() -> None:
    found = chunks("a b c d e f", limit=2, least=0, length=lambda text: len(text.split()))
    assert [one.text for one in found] == ["a b", "c d", "e f"]


def test_an_insertion_changes_only_the_chunks_it_touches() -> None:
    paragraphs = [f"Paragraph {i} has some words of its own. " * (1 + i % 5) for i in range(60)]
    before = texts_of("\n\n".join(paragraphs))
    after = texts_of("\n\n".join([*paragraphs[:20], "Something new.", *paragraphs[20:]]))
    assert len(set(after) - set(before)) <= 2
    assert len(before) > 20


def test_revised_policies_are_mostly_exact_repeats() -> None:
    path = DATA / "dup-site-policy-revisions" / "revisions.jsonl.xz"
    if not path.exists():
        pytest.skip(f"the policy revisions are not at {path}; set LLMCACHE_DATA to the folder that holds them")
    seen: set[str] = set()
    known: set[str] = set()
    total = repeated = count = 0
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for revision in map(json.loads, lines):
            first = revision["doc"] not in known
            known.add(revision["doc"])
            for one in texts_of(revision["text"]):
                if not first:
                    total, count, repeated = total + len(one), count + 1, repeated + len(one) * (one in seen)
                seen.add(one)
    assert repeated / total > 0.88
    assert total / count > 400


@pytest.mark.parametrize(("limit", "least"), [(0, 0), (10, 11), (10, -1)])
def test_limits_that_make_no_sense_are_refused(limit: int, least: int) -> None:
    with pytest.raises(ConfigError, match=r"limit.*least"):
        chunks("a", limit=limit, least=least)
    assert chunks("  \n\n ") == []
