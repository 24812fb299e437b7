"""The guard of a calibrated cache reads the original texts: it separates texts with the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmcache import CacheConfig, LLMCache, snapshot
from llmcache.errors import ConfigError
from llmcache.indexes.format.marks import kinds_of, unmarked
from llmcache.near.guard.rules import KINDS, RULES_VERSION
from llmcache.near.marks import FieldDigests, part_read
from llmcache.near.matcher import UNREAD
from tests.small_sentences import sentences, tiny_folder, with_prompts

CONFIG = CacheConfig(audit_share=0, recalibrate=False)
KNOWN = sentences(150)
DIFFERENT = {  # the same place of two texts, filled with these
    "a negation written as n't": ("{s}, and I can pay it", "{s}, and I can't pay it"),
    "a negation written as a word": ("{s} and it was sent", "{s} and it was not sent"),
    "morning and afternoon": ("{s} at 3:30am", "{s} at 3:30pm"),
    "a minus sign": ("{s} when it is 5 degrees", "{s} when it is -5 degrees"),
    "a quotation": ('{s} under the name "Blue Bird"', '{s} under the name "Blue Fish"'),
    "a URL": ("{s}, see https://example.com/a", "{s}, see https://example.com/b"),
    "an e-mail address": ("{s}, write to ann@example.com", "{s}, write to bob@example.com"),
    "a version number": ("{s} with version 3.11.2", "{s} with version 3.11.3"),
    "a number": ("{s} for 20 pounds", "{s} for 30 pounds"),
}
ALIKE = {
    "a spelling of not": ("{s} and I don't know it", "{s} and I do not know it"),
    "a spelling of the time": ("{s} at 15:30", "{s} at 3:30 pm"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def calibrated(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a store with one text of every pair, calibrated so that only the guard refuses matches."""
    path = tmp_path_factory.mktemp("calibrated") / "store"
    with LLMCache.open(path, with_prompts(folder), config=CONFIG) as cache:
        cache.encode(KNOWN)
        cache.encode([one for pair in (DIFFERENT | ALIKE).values() for one in filled(pair[0])])
        cache.calibrate(budget=0.9, drift="cosine")
    return path


def filled(text: str) -> list[str]:
    return [text.format(s=start) for start in KNOWN[:6]]


@pytest.fixture
def cache(folder: str, calibrated: Path, tmp_path: Path) -> Iterator[LLMCache]:
    snapshot.save(calibrated, tmp_path / "store", copy=True)
    with LLMCache.open(tmp_path / "store", with_prompts(folder), config=CONFIG) as opened:
        everything_is_near(opened)
        yield opened


def everything_is_near(cache: LLMCache) -> None:
    """Let the gate pass every match, so that only the guard decides."""
    reuse: Any = cache._execution.reuse
    reuse.audits.thresholds[:] = -1e9


@pytest.mark.parametrize("kind", list(DIFFERENT))
def test_texts_that_differ_in_what_a_tokenizer_may_lose_never_answer_each_other(cache: LLMCache, kind: str) -> None:
    known, asked = (filled(text) for text in DIFFERENT[kind])
    before = {text: cache.explain(text).tier for text in known}
    assert set(before.values()) == {"exact"}
    allowed = FieldDigests()(asked)
    for mine, one in zip(allowed, cache.run(asked), strict=True):
        if one.tier == "near":  # then the source has the same fields
            source = cache._execution.bank.marks(np.array([_row(cache, str(one.source))]))
            np.testing.assert_array_equal(source["fields"][0], mine)
            assert one.source not in {_key(cache, other) for other in known}
        else:
            assert one.tier == "miss"


@pytest.mark.parametrize("kind", list(ALIKE))
def test_texts_that_are_only_spelled_otherwise_may_answer_each_other(cache: LLMCache, kind: str) -> None:
    asked = filled(ALIKE[kind][1])
    assert "near" in {one.tier for one in cache.run(asked)}


def _key(cache: LLMCache, text: str) -> str:
    execution = cache._execution
    return execution.bank.key(int(execution.bank.find_text(execution.keys_of(text, None, None)[0])[0]))


def _row(cache: LLMCache, key: str) -> int:
    keys = np.frombuffer(bytes.fromhex(key), np.uint64).reshape(1, 2)
    return int(cache._execution.bank.find(keys)[0])


def test_entries_whose_fields_were_read_by_other_rules_pass_no_guard(
    cache: LLMCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sentences(170)[150:]
    found = {text: cache.explain(text).tier for text in plain}
    assert "near" in found.values()
    monkeypatch.setattr("llmcache.near.marks.RULES_VERSION", RULES_VERSION + 1)
    for text, tier in found.items():
        explanation = cache.explain(text)
        assert explanation.tier == "miss"
        assert tier == "miss" or UNREAD in explanation.why


def test_a_pattern_of_ones_own_is_read_in_texts_that_are_stored_from_then_on(folder: str, tmp_path: Path) -> None:
    pattern = r"ref\w+"
    named = [f"{text} by refalpha" for text in KNOWN]
    with LLMCache.open(tmp_path / "s", with_prompts(folder), config=CONFIG) as cache:
        cache.encode(KNOWN)
        with pytest.raises(ConfigError, match="regular expression"):
            cache.calibrate(budget=0.9, drift="cosine", guard_pattern="(")
        nothing = cache.calibrate(budget=0.9, drift="cosine", guard_pattern=pattern)
        assert nothing.hits == 0, "no entry was read with the pattern"
        cache.encode(named)
        cache.calibrate(budget=0.9, drift="cosine", guard_pattern=pattern)
    with LLMCache.open(tmp_path / "s", with_prompts(folder), config=CONFIG) as cache:
        everything_is_near(cache)
        others = sentences(170)[150:]
        same = list(cache.run([f"{text} by refalpha" for text in others]))
        assert "near" in {one.tier for one in same}
        assert {one.tier for one in cache.run([f"{text} by refbeta" for text in others])} == {"miss"}


def test_a_secret_goes_into_the_digests_and_no_text_into_the_store(folder: str, tmp_path: Path) -> None:
    texts = ["the fee was 4711 pounds", "the fee was 4712 pounds"]
    plain = FieldDigests()(texts)
    seen = []
    for number in range(2):
        secret = bytes([number]) * 32
        path = tmp_path / str(number)
        with LLMCache.open(path, with_prompts(folder), secret=secret) as cache:
            cache.encode(texts)
            marks = cache._execution.bank.marks(np.arange(2))
        assert kinds_of(marks) == len(KINDS)
        assert not np.isin(marks["fields"], plain).any()
        assert (marks["fields"][0] != marks["fields"][1]).tolist() == (plain[0] != plain[1]).tolist()
        seen.append(marks["fields"])
        assert not any(b"4711" in one.read_bytes() for one in path.rglob("*.row"))
    assert not np.isin(seen[0], seen[1]).any()


def test_digests_that_are_not_known_are_equal_to_none() -> None:
    fields, texts = FieldDigests(), ["plain", "plain", "5 pounds"]
    known = fields.marks(1, texts)
    np.testing.assert_array_equal(fields.of(known), fields(texts))
    strange = fields.of(unmarked(3, len(KINDS)))
    again = fields.of(unmarked(3))
    every = np.concatenate([fields(texts), strange[:, :1].repeat(len(KINDS), 1), again])
    assert len(np.unique(every[3:, 0])) == 6
    assert not np.isin(every[3:], every[:3]).any()


@pytest.mark.parametrize("seed", range(20))
def test_of_a_long_text_at_least_the_part_is_read_that_the_model_sees(folder: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    tokenizer = with_prompts(folder).tokenizer
    limit = int(random.integers(5, 40))
    words = ["".join(random.choice(list("abcdef5"), random.integers(1, 90))) for _ in range(200)]
    text = "".join(word + " " * int(random.integers(1, 50)) for word in words)
    part = part_read(text, limit)
    seen = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    assert tokenizer(part, truncation=True, max_length=limit)["input_ids"] == seen
    assert part_read("short", limit) == "short"
