"""Token rows equal those of the model's own `preprocess`, for any number and content of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache.model import tokens
from llmcache.model.tokens import tokenise

TEXTS = [f"question {i}: where is my card{'?' * (i % 3)} {'word ' * (i % 17)}" for i in range(900)]


@pytest.fixture
def short(model: SentenceTransformer) -> Iterator[SentenceTransformer]:
    """The model with a limit of 20 tokens."""
    before = model.max_seq_length
    model.max_seq_length = 20
    yield model
    model.max_seq_length = before


def own(model: SentenceTransformer, texts: Sequence[str], **others: Any) -> list[list[int]]:
    """Return token ids by `preprocess`, one text at a time, so without padding."""
    return [model.preprocess([text], **others)["input_ids"][0].tolist() for text in texts]


def test_many_texts_give_the_rows_of_preprocess(model: SentenceTransformer) -> None:
    rows = tokenise(model, TEXTS, None, None)
    assert [one.tolist() for one in rows.ids] == own(model, TEXTS)
    assert all(one.dtype == np.int32 for column in rows.fields.values() for one in column)
    assert set(rows.fields) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(mask.all() for mask in rows.fields["attention_mask"])


def test_texts_that_are_cut_are_cut_as_preprocess_does(short: SentenceTransformer) -> None:
    few_first = ["a"] * 300 + TEXTS
    rows = tokenise(short, few_first, None, None)
    assert [one.tolist() for one in rows.ids] == own(short, few_first)
    assert max(map(len, rows.ids)) == 20


def test_a_prompt_stands_before_every_text(model: SentenceTransformer) -> None:
    rows = tokenise(model, TEXTS[:600], "query: ", None)
    assert [one.tolist() for one in rows.ids] == own(model, ["query: " + text for text in TEXTS[:600]])


def test_what_may_be_a_picture_goes_to_preprocess(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    preprocess = model.preprocess

    def noted(inputs: list[str], **others: Any) -> Any:
        seen.extend(inputs)
        return preprocess(inputs, **others)

    monkeypatch.setattr(model, "preprocess", noted)
    odd = ["see https://a.org/b", "photo.jpg", "data:image"]
    tokenise(model, ["word " * 60, *TEXTS[:511], *odd, *TEXTS[600:]], None, None)
    assert set(odd) <= set(seen)
    assert len(seen) == 8 + len(odd), "those that are compared, and the odd ones"


def test_a_tokenizer_that_preprocess_does_not_use_alone_is_not_used_alone(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(_: Any, texts: list[str]) -> list[np.ndarray[Any, Any]]:
        return [np.zeros(3, np.int32)] * len(texts)

    monkeypatch.setattr(tokens, "_ids", other)
    rows = tokenise(model, TEXTS, None, None)
    assert [one.tolist() for one in rows.ids] == own(model, TEXTS)
