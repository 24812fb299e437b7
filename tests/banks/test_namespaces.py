"""Namespaces and untrusted stores with a whole cache: which calls hit, which miss, and which are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache
from llmcache.banks.namespaces import secret_check
from llmcache.errors import ConfigError, SnapshotNotFound, UntrustedSnapshot
from llmcache.indexes.store import Store

A, B = b"a" * 32, b"b" * 32
KEY = b"k" * 32
TEXT, SPELT, NEAR = "How do I locate my card?", "HOW DO I  locate my card?", "How do I locate my card??"
TIERS = {"text": TEXT, "tokens": SPELT, "near": NEAR}  # queries after TEXT was stored


def asked(store: Path, model: SentenceTransformer, text: str, **how: Any) -> tuple[str, dict[str, int]]:
    """Return the tier of a text and the way it was matched."""
    with LLMCache.open(store, model, tau=0.9, **how) as cache:
        (result,) = cache.run([text])
        counters = cache.stats().counters
        np.testing.assert_allclose(result.output, model.encode(text), atol=0.2 if result.tier == "near" else 1e-5)
        found = {"text": counters.exact_text, "tokens": counters.exact_tokens, "near": counters.near}
        return result.tier, found


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("secret", [None, A])
def test_the_same_namespace_hits(model: SentenceTransformer, store: Path, tier: str, secret: bytes | None) -> None:
    how = {"namespace": "team-a", "secret": secret}
    assert asked(store, model, TEXT, **how)[0] == "miss"
    name, found = asked(store, model, TIERS[tier], **how)
    assert name == ("near" if tier == "near" else "exact")
    assert found == {one: int(one == tier) for one in TIERS}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("secret", [None, A, B])
def test_another_namespace_does_not(model: SentenceTransformer, store: Path, tier: str, secret: bytes | None) -> None:
    asked(store, model, TEXT, namespace="team-a", secret=A)
    assert asked(store, model, TIERS[tier], namespace="team-b", secret=secret) == ("miss", dict.fromkeys(TIERS, 0))


@pytest.mark.parametrize("tier", ["text", "tokens"])
def test_the_rows_of_one_secret_are_not_found_under_another_even_in_one_bank(
    model: SentenceTransformer, store: Path, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(store, model, TEXT, namespace="team-a", secret=A)
    monkeypatch.setattr("llmcache.opening.admit", lambda *_: None)  # switch off the check at opening
    for secret in (B, None):
        with LLMCache.open(store, model, namespace="team-a", secret=secret) as cache:
            assert [one.tier for one in cache.run([TIERS[tier]])] == ["miss"]


def test_namespaces_share_no_file(model: SentenceTransformer, store: Path) -> None:
    for name in ("a", "b"):
        with LLMCache.open(store, model, namespace=name, secret=A) as cache:
            cache.encode(["one", "two"])
            cache.rebuild()
    opened = Store.open(store)
    names = {}
    for name, space in opened.manifest.namespaces.items():
        bank = space.banks["output"]
        files = [file.name for segment in bank.segments for file in segment.files]
        assert bank.projection is not None
        assert bank.index is not None
        names[name] = {*files, bank.projection.name, bank.index.file.name}
    opened.close()
    assert len(names["a"]) == len(names["b"]) == 7
    assert not names["a"] & names["b"]


@pytest.mark.parametrize(
    ("made_with", "given", "said"),
    [(A, B, "not the secret"), (A, None, "has a secret; give it"), (None, A, "made without a secret")],
)
def test_a_wrong_secret_is_refused_at_opening(
    model: SentenceTransformer, store: Path, made_with: bytes | None, given: bytes | None, said: str
) -> None:
    LLMCache.open(store, model, namespace="n", secret=made_with).close()
    for given_model in (model, None):
        with pytest.raises(ConfigError, match=said):
            LLMCache.open(store, given_model, namespace="n", secret=given)
    LLMCache.open(store, model, namespace="n", secret=made_with).close()


def test_a_secret_may_be_in_a_file(model: SentenceTransformer, store: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(A + b"\n")
    asked(store, model, TEXT, namespace="n", secret=A)
    assert asked(store, model, TEXT, namespace="n", secret_file=tmp_path / "secret")[0] == "exact"
    with pytest.raises(ConfigError, match="both given"):
        LLMCache.open(store, model, namespace="n", secret=A, secret_file=tmp_path / "secret")


@pytest.mark.parametrize("secret", [b"", b"short", b"x" * 31, "t" * 32])
def test_a_secret_that_could_be_guessed_is_refused_and_leaves_no_store(
    model: SentenceTransformer, store: Path, secret: Any
) -> None:
    with pytest.raises(ConfigError, match="at least 32 bytes"):
        LLMCache.open(store, model, secret=secret)
    assert not store.exists()


@pytest.mark.parametrize("name", ["", None, "a\nb", "\x1b[2J", "x" * 201, b"bytes", 3])
def test_a_namespace_that_is_empty_or_no_name_is_refused(model: SentenceTransformer, store: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match="a namespace is a name"):
        LLMCache.open(store, model, namespace=name)
    assert not store.exists()


def test_a_store_keeps_nothing_of_a_secret_but_its_check(model: SentenceTransformer, store: Path) -> None:
    secret = b"fifty bytes that must never be found in any file.."
    asked(store, model, TEXT, namespace="n", secret=secret)
    for file in store.rglob("*"):
        assert not file.is_file() or secret[:16] not in file.read_bytes()
    opened = Store.open(store)
    assert opened.manifest.namespaces["n"].secret_check == secret_check(secret)
    opened.close()
    assert len(secret_check(secret)) == 16
    assert secret_check(b"") == ""


def test_two_processes_that_make_a_namespace_with_different_secrets_do_not_both_get_it(
    model: SentenceTransformer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare = Store.declare

    def late(self: Store, *arguments: Any) -> None:
        monkeypatch.setattr(Store, "declare", declare)
        asked(store, model, TEXT, namespace="n", secret=A)
        declare(self, *arguments)

    monkeypatch.setattr(Store, "declare", late)
    with pytest.raises(ConfigError, match="not the secret"):
        LLMCache.open(store, model, namespace="n", secret=B)
    assert asked(store, model, TEXT, namespace="n", secret=A)[0] == "exact"


# -- trust, through the cache -------------------------------------------------------------------------------


def test_an_untrusted_store_serves_equal_tokens_only(
    model: SentenceTransformer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked(store, model, TEXT)
    before = sorted(store.rglob("*"))
    how = {"trust": "untrusted", "allow_untrusted": True}
    with caplog.at_level(logging.WARNING, "llmcache"):
        assert asked(store, model, TEXT, **how) == ("exact", {"text": 0, "tokens": 1, "near": 0})
    assert "near matches are off" in caplog.text
    assert asked(store, model, NEAR, **how) == ("miss", {"text": 0, "tokens": 0, "near": 0})
    assert sorted(store.rglob("*")) == before


def test_an_untrusted_store_does_not_choose_the_model(model: SentenceTransformer, store: Path) -> None:
    asked(store, model, TEXT)
    store.chmod(0o777)
    with pytest.raises(UntrustedSnapshot, match="chmod"):
        LLMCache.open(store, model)
    with pytest.raises(UntrustedSnapshot, match="which model to load"):
        LLMCache.open(store, allow_untrusted=True)


def test_nobody_makes_an_untrusted_store(model: SentenceTransformer, store: Path) -> None:
    with pytest.raises(SnapshotNotFound):
        LLMCache.open(store, model, allow_untrusted=True)
    assert not store.exists()


def test_a_signed_store_serves_all_tiers(model: SentenceTransformer, store: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    asked(store, model, TEXT, key=KEY)
    store.chmod(0o777)
    for tier, text in TIERS.items():
        _, found = asked(store, model, text, key_file=tmp_path / "key", config=CacheConfig())
        assert found == {one: int(one == tier) for one in TIERS}
    with pytest.raises(UntrustedSnapshot, match="none of its"):
        LLMCache.open(store, model, key=b"x" * 32)
