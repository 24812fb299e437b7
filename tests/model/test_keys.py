"""Keys: different fields have different keys, equal fields equal keys."""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcache.model.keys import (
    framed,
    key,
    key_seed,
    optional,
    text_keys,
    token_keys,
)

MODEL = hashlib.sha256(b"a model").digest()
OTHER = hashlib.sha256(b"another model").digest()


def by_hand(secret: bytes, *fields: bytes) -> bytes:
    """Compute a key independently: 8-byte little-endian lengths, sha256 or HMAC, first 16 bytes."""
    message = b""
    for field in fields:
        message += len(field).to_bytes(8, "little") + field
    whole = hmac.digest(secret, message, "sha256") if secret else hashlib.sha256(message).digest()
    return whole[:16]


@pytest.mark.parametrize("secret", [b"", b"salt of a namespace"])
def test_a_key_agrees_with_the_format_written_out_by_hand(secret: bytes) -> None:
    assert key(MODEL, "text", b"ab", b"c", secret=secret) == by_hand(secret, MODEL, b"text", b"ab", b"c")


@pytest.mark.parametrize("secret", [b"", b"salt of a namespace"])
def test_keys_of_a_batch_agree_with_the_format_written_out_by_hand(secret: bytes) -> None:
    texts = ["", "card payment", "grüße", "日本語", "\ud800", "x" * 5000]
    got = text_keys(key_seed(MODEL, "text", "query", "q: ", secret), texts)
    assert got.dtype == np.uint8
    assert got.shape == (6, 16)
    assert got.flags.c_contiguous
    for row, text in zip(got, texts, strict=True):
        field = text.encode("utf-8", "surrogatepass")
        assert row.tobytes() == by_hand(secret, MODEL, b"text", b"=query", b"=q: ", field)
        assert row.tobytes() == key(MODEL, "text", optional("query"), optional("q: "), field, secret=secret)


def test_token_rows_agree_with_the_format_written_out_by_hand() -> None:
    rows = [np.arange(n, dtype=np.int32).tobytes() for n in (0, 1, 7, 500)]
    got = token_keys(key_seed(MODEL, "tokens", None, None), rows)
    assert [one.tobytes() for one in got] == [by_hand(b"", MODEL, b"tokens", b"", b"", row) for row in rows]


def test_an_empty_batch_has_no_keys() -> None:
    seed = key_seed(MODEL, "text", None, None)
    assert text_keys(seed, []).shape == token_keys(seed, []).shape == (0, 16)


def test_a_seed_gives_the_same_keys_every_time() -> None:
    seed = key_seed(MODEL, "text", None, None, b"s")
    assert (text_keys(seed, ["a", "b"])[1] == text_keys(seed, ["b"])[0]).all()


def test_whatever_decides_an_answer_changes_the_key() -> None:
    seeds = {
        (identity, kind, role, prompt, secret): key_seed(identity, kind, role, prompt, secret)
        for identity in (MODEL, OTHER)
        for kind in ("text", "tokens")
        for role in (None, "", "query", "document")
        for prompt in (None, "", "query", "query: ")
        for secret in (b"", b"one", b"two")
    }
    texts = ["", "a", "ab", "query"]
    keys = {row.tobytes() for seed in seeds.values() for row in text_keys(seed, texts)}
    assert len(keys) == len(seeds) * len(texts)


def test_a_text_and_tokens_of_the_same_bytes_have_different_keys() -> None:
    text = text_keys(key_seed(MODEL, "text", None, None), ["abcd"])
    tokens = token_keys(key_seed(MODEL, "tokens", None, None), [b"abcd"])
    assert text.tobytes() != tokens.tobytes()


def test_moving_a_letter_from_one_field_to_the_next_changes_the_key() -> None:
    assert key(MODEL, "text", b"ab", b"c") != key(MODEL, "text", b"a", b"bc")
    assert key(MODEL, "text", b"abc") != key(MODEL, "text", b"abc", b"")


def test_a_lone_surrogate_is_a_text_like_any_other() -> None:
    keys = text_keys(key_seed(MODEL, "text", None, None), ["\ud800", "\udc00", "?", ""])
    assert len(np.unique(keys, axis=0)) == 4
    key_seed(MODEL, "text", None, "\ud800")


@given(st.lists(st.binary(max_size=12), max_size=5), st.lists(st.binary(max_size=12), max_size=5))
def test_only_equal_fields_give_equal_bytes(first: list[bytes], second: list[bytes]) -> None:
    assert (framed(*first) == framed(*second)) == (first == second)


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_the_fields_can_be_read_back_from_the_bytes(fields: list[bytes]) -> None:
    data, back = framed(*fields), []
    while data:
        length = int.from_bytes(data[:8], "little")
        back.append(data[8 : 8 + length])
        data = data[8 + length :]
    assert back == fields
