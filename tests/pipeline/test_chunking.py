"""Chunks cover the text, keep to the limit and begin at headings and paragraphs; an edit changes few of them."""

from __future__ import annotations

import json
import lzma
import unicodedata
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcache.errors import ConfigError
from llmcache.pipeline.chunking import chunks
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
        assert len(one.text) <= limit
        at = one.end
    assert text[at:].strip() == ""


def test_short_paragraphs_are_joined_and_a_heading_stays_with_what_follows() -> None:
    text = "# One\n\nshort\n\nalso short\n\n# Two\n\nThe second part."
    assert texts_of(text, least=15) == ["# One\n\nshort\n\nalso short", "# Two\n\nThe second part."]
    assert texts_of(text, least=0) == ["# One\n\nshort", "also short", "# Two\n\nThe second part."]


def test_a_long_paragraph_is_cut_at_sentences_and_a_long_sentence_at_words() -> None:
    assert texts_of("One two. Three four! Five six?", limit=21, least=0) == ["One two. Three four!", "Five six?"]
    assert texts_of("one two three four", limit=9, least=0) == ["one two", "three", "four"]
    assert "".join(texts_of("unbreakable", limit=4, least=0)) == "unbreakable"
    assert max(map(len, texts_of("unbreakable", limit=4, least=0))) <= 4


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


UNSPACED = {
    "chinese": "\u94f6\u884c\u8d26\u6237\u5ba2\u670d\u52a1\u624b\u7eed\u8d39\u7528\uff0c\u3002",
    "japanese": "\u30ab\u30fc\u30c9\u304c\u5c4a\u304d\u307e\u305b\u3093\u3001",
    "thai": "\u0e1a\u0e31\u0e15\u0e23\u0e02\u0e2d\u0e07\u0e09\u0e31\u0e19\u0e22\u0e31\u0e07",
    "base64": "ABCDEFGHIJKLMNOPabcdefghijklmnop0123456789+/=",
    "one letter": "x",
    "decomposed": "e\u0301a\u0308o\u0302\u0323",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f44d\U0001f3fd",
    "numbers": "0123456789.,;-",
}


@pytest.mark.parametrize("alphabet", UNSPACED)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 1500), limit=st.integers(8, 200))
def test_text_without_spaces_is_cut_to_the_limit_and_nothing_of_it_is_left_out(
    alphabet: str, seed: int, size: int, limit: int
) -> None:
    pick = Random(seed)
    text = "".join(pick.choice(UNSPACED[alphabet]) for _ in range(size))
    found = chunks(text, limit=limit, least=0)
    assert "".join(one.text for one in found) == text
    for one in found:
        assert one.text == text[one.start : one.end]
        marks = sum(unicodedata.category(letter)[0] == "M" or letter == "\u200d" for letter in one.text)
        assert len(one.text) <= limit or marks, "only a character with its marks may be longer"
        assert not unicodedata.category(one.text[0]).startswith("M") or one.start == 0


@given(seed=st.integers(0, 2**32), at=st.integers(0, 3999))
def test_an_insertion_into_text_without_spaces_or_punctuation_changes_only_the_chunks_near_it(
    seed: int, at: int
) -> None:
    pick = Random(seed)
    text = "".join(pick.choice(UNSPACED["base64"][:32]) for _ in range(4000))
    before, after = (texts_of(one, limit=100, least=0) for one in (text, text[:at] + "Z" + text[at:]))
    assert len(set(after) - set(before)) <= 30 < len(after) - 10, (
        "fixed windows would change every chunk behind the insertion"
    )
