"""Near matches only come from entries with the same role, prompt and Router module, in every state of the store."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache, snapshot
from llmcache.errors import ConfigError
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.evict import evict
from llmcache.indexes.store import Store
from llmcache.near.neighbors.predictor import LEAST
from tests.small_sentences import sentences, tiny_folder, with_prompts, with_router

Way = Mapping[str, Any]  # keywords of `run` for the role and prompt of a text

PROMPTED: dict[str, Way] = {
    "plain": {},
    "query": {"role": "query"},
    "document": {"role": "document"},
    "topic": {"prompt_name": "topic"},
    "mood": {"prompt_name": "mood"},
    "own prompt": {"prompt": "what is meant: "},
    "no prompt": {"prompt": ""},
    "query about a topic": {"role": "query", "prompt_name": "topic"},
}
ROUTED: dict[str, Way] = {
    "query": {"role": "query"},
    "document": {"role": "document"},
    "query with a prompt": {"role": "query", "prompt": "find: "},
    "document with a prompt": {"role": "document", "prompt": "find: "},
}
MODELS: dict[str, tuple[Callable[[str], SentenceTransformer], dict[str, Way]]] = {
    "prompts": (with_prompts, PROMPTED),
    "router": (with_router, ROUTED),
}
RULES: dict[str, CacheConfig] = {
    "tau": CacheConfig(tau=0.9, projection="none"),
    "layer": CacheConfig(tau=0.9, projection="none", layers=(0, 1), reuse="layer"),
    "calibrated": CacheConfig(audit_share=0, recalibrate=False),
}
KNOWN = 160
TEXTS, ASKED, LATER = (part.tolist() for part in np.split(np.array(sentences(KNOWN + 24)), [KNOWN, KNOWN + 12]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def stored(path: Path, model: SentenceTransformer, config: CacheConfig, ways: Mapping[str, Way]) -> None:
    """Store texts once for each way, with ids that name the way, and a commit after each."""
    texts = TEXTS if config is RULES["calibrated"] else TEXTS[:40]
    with LLMCache.open(path, model, config=config) as cache:
        for name, way in ways.items():
            list(cache.run(documents(name, texts), **way))
            cache.commit()


def calibrated(path: Path, model: SentenceTransformer, config: CacheConfig, way: Way) -> None:
    with LLMCache.open(path, model, config=config) as cache:
        assert cache.calibrate(budget=0.9, drift="cosine", guard=False, **way).threshold is not None


def merged(made: list[Path], target: Path) -> Path:
    snapshot.merge(made, target)
    return target


def compacted(path: Path) -> Path:
    """Evict a third of the store and rewrite the rest."""
    store = Store.open(path)
    try:
        evict(store, int(0.7 * sum(one.stat().st_size for one in path.rglob("*") if one.is_file())), policy="lru")
        compact(store, small=True)
    finally:
        store.close()
    return path


def evicted(path: Path) -> Path:
    store = Store.open(path)
    try:
        assert evict(store, int(0.8 * sum(one.stat().st_size for one in path.rglob("*") if one.is_file()))).rows
    finally:
        store.close()
    return path


def copied(path: Path, target: Path) -> Path:
    snapshot.save(path, target / "snapshot", copy=True)
    snapshot.load(target / "snapshot", target / "loaded")
    return target / "loaded"


def enough(path: Path, name: str) -> bool:
    """Return True if the store still has enough entries of a way for a calibration."""
    store = Store.open(path)
    try:
        bank = store.bank("default", "output", NotImplemented, CacheConfig().near)
        return sum(one.startswith(name + "/") for one in bank.sources(bank.near.live())) >= 2 * LEAST
    finally:
        store.close()


def afterwards(fate: str, path: Path, tmp_path: Path) -> Path:
    """Return the store to ask, after this change."""
    if fate == "evicted":
        return evicted(path)
    if fate == "compacted":
        return compacted(path)
    return copied(path, tmp_path) if fate == "snapshot" else path


def documents(name: str, texts: list[str]) -> list[dict[str, str]]:
    """Return the texts with ids that name the way in which they are asked."""
    return [{"id": f"{name}/{text}", "text": text} for text in texts]


def sources(cache: LLMCache, texts: list[str], way: Way) -> list[set[str]]:
    """Return, for each text, the names of the ways whose entries a near look-up finds."""
    found = []
    for text in texts:
        explanation = cache.explain(text, **way)
        found.append({one.source.partition("/")[0] for one in explanation.neighbours})
    return found


@pytest.mark.parametrize("fate", ["reopened", "merged", "evicted", "compacted", "snapshot"])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("kind", list(MODELS))
def test_a_text_is_never_answered_from_entries_with_another_role_or_prompt_and_is_from_its_own(
    folder: str, tmp_path: Path, kind: str, rule: str, fate: str
) -> None:
    make, ways = MODELS[kind]
    model, config = make(folder), RULES[rule]
    if rule == "calibrated":  # one calibration for each way takes a second
        ways = dict(list(ways.items())[:4])
    if fate == "merged":
        parts = []
        for number, (name, way) in enumerate(ways.items()):
            stored(tmp_path / str(number), model, config, {name: way})
            parts.append(tmp_path / str(number))
        path = merged(parts, tmp_path / "merged")
    else:
        stored(tmp_path / "store", model, config, ways)
        path = afterwards(fate, tmp_path / "store", tmp_path)
    known = {name: np.asarray(_model_of(model, TEXTS, way)) for name, way in ways.items()}
    answered = 0
    for name, way in ways.items():
        if rule == "calibrated":
            if fate in ("evicted", "compacted") and not enough(path, name):
                with pytest.raises(ConfigError, match="too few"):
                    calibrated(path, model, config, way)
                continue
            calibrated(path, model, config, way)
        with LLMCache.open(path, model, config=config) as cache:
            assert all(one <= {name} for one in sources(cache, ASKED, way))
            if rule == "calibrated":
                for other, elsewhere in ways.items():
                    if other != name:
                        given = list(cache.run(documents(other, ASKED[:4]), **elsewhere))
                        assert {one.tier for one in given} <= {"miss", "exact"}
                        assert "another role or prompt" in cache.explain(ASKED[5], **elsewhere).why
            results = list(cache.run(documents(name, LATER), **way))
        for one in results:
            if one.tier == "near":
                answered += 1
                assert rule == "layer" or str(one.source).startswith(name + "/")
                if rule != "calibrated":  # the result equals the output of a text of the same way
                    assert np.abs(known[name] - one.output).max(axis=1).min() < 1e-5
            else:  # the same token ids under another role may have the same layer states
                assert one.tier in ("miss", "exact")
                text = one.id.partition("/")[2]
                assert np.abs(_model_of(model, [text], way) - one.output).max() < 1e-5
    assert answered >= len(ASKED)


def _model_of(model: SentenceTransformer, texts: list[str], way: Way) -> NDArray[np.float32]:
    """Return the vectors of the uncached model."""
    others = {name: value for name, value in way.items() if name != "role"}
    encode: Any = getattr(model, f"encode_{way['role']}") if "role" in way else model.encode
    return np.asarray(encode(texts, **others))


@pytest.mark.parametrize("rule", ["tau", "layer"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_entries_of_one_way_alone_answer_no_text_that_is_asked_in_another(
    folder: str, tmp_path: Path, kind: str, rule: str
) -> None:
    make, ways = MODELS[kind]
    model, config = make(folder), RULES[rule]
    pairs = list(itertools.permutations(ways, 2))
    for name, other in pairs if kind == "router" else pairs[:: 3 if rule == "layer" else 2]:
        path = tmp_path / f"{name}-{other}"
        with LLMCache.open(path, model, config=config) as cache:
            list(cache.run(TEXTS[:12], **ways[name]))
            given = list(cache.run(ASKED[:3], **ways[other]))
            assert [one.tier for one in given] == ["miss"] * 3, (name, other)
            expected = _model_of(model, ASKED[:3], ways[other])
            np.testing.assert_allclose(np.array([one.output for one in given]), expected, atol=1e-5)
            (own,) = cache.run([TEXTS[4] + "."], **ways[name])
            # the layers of a Router have banks for one trunk only
            assert own.tier == "near" or (kind, rule, name[:8]) == ("router", "layer", "document")
        shutil.rmtree(path)


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_entry_of_a_way_is_found_among_many_nearer_ones_of_others(
    folder: str, tmp_path: Path, seed: int
) -> None:
    """The other entries are the asked texts themselves. The reference compares mean token embeddings one by one."""
    random = np.random.default_rng(seed)
    model = with_prompts(folder)
    few = [TEXTS[i] for i in random.permutation(KNOWN)[: random.integers(3, 60)]]
    asked = sentences(40, seed + 100)
    with LLMCache.open(tmp_path / "s", model, config=CacheConfig(tau=0.5)) as cache:
        for crowd in (1, 2, 3):
            for text in asked:
                cache.encode([text + "." * crowd, text], prompt="")
        cache.encode(few, prompt_name=None)
        results = list(cache.run(asked))
    trunk, tokenizer = cast(Any, model[0]).auto_model, cast(Any, model.tokenizer)
    table = trunk.get_input_embeddings().weight.detach().numpy()

    def points(texts: list[str]) -> NDArray[np.float64]:
        means = [table[tokenizer(text)["input_ids"]].mean(axis=0).astype(np.float16) for text in texts]
        rows = np.array(means, np.float64)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float64)

    expected = points(asked) @ points(few).T
    found = np.array([one.similarity for one in results], np.float64)
    assert {one.tier for one in results} <= {"near", "exact"}
    exact = np.array([one.tier == "exact" for one in results])
    np.testing.assert_allclose(found[~exact], expected.max(axis=1)[~exact], atol=2e-3)


def test_a_calibration_says_when_the_entries_have_another_role(folder: str, tmp_path: Path) -> None:
    with LLMCache.open(tmp_path / "s", with_prompts(folder)) as cache:
        cache.encode_document(TEXTS)
        with pytest.raises(ConfigError, match="role= and prompt="):
            cache.calibrate(budget=0.9, drift="cosine")
        assert cache.calibrate(budget=0.9, drift="cosine", role="document", guard=False).threshold is not None
        assert [one.tier for one in cache.run(ASKED[:2], role="document")] == ["near", "near"]
        assert [one.tier for one in cache.run(ASKED[:2], role="query")] == ["miss", "miss"]
        (report,) = cache.stats().near
        assert "2 documents had another role or prompt" in report.why


def test_a_forecast_counts_near_matches_of_the_same_way_only(folder: str, tmp_path: Path) -> None:
    with LLMCache.open(tmp_path / "s", with_prompts(folder), config=RULES["tau"]) as cache:
        cache.encode_query(TEXTS)
        assert cache.plan(ASKED, role="query").near > 0
        assert cache.plan(ASKED, role="document").near == 0
    with LLMCache.open(tmp_path / "s", with_prompts(folder), config=RULES["calibrated"]) as cache:
        cache.calibrate(budget=0.9, drift="cosine", role="query", guard=False)
        assert "another role" in cache.plan(ASKED, role="document").near_from
        assert "as calibrated" in cache.plan(ASKED, role="query").near_from


@pytest.mark.parametrize("rule", ["tau", "layer"])
def test_entries_from_before_there_were_scopes_are_exact_matches_and_answer_no_near_one(
    folder: str, tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_prompts(folder)
    with monkeypatch.context() as older:
        older.setattr("llmcache.indexes.format.manifest_json.FORMAT", 1)
        older.setattr("llmcache.encoding.executor.Executor.marks", lambda *_: None)
        older.setattr("llmcache.layers.layer_banks.scoped", lambda *_: None)
        stored(tmp_path / "s", model, RULES[rule], {"plain": {}})
    (manifest,) = {max((tmp_path / "s").glob("m-*.json"))}
    assert b'"format":1' in manifest.read_bytes()
    with LLMCache.open(tmp_path / "s", model, config=RULES[rule]) as cache:
        assert {one.tier for one in cache.run(TEXTS[:40])} == {"exact"}
        given = list(cache.run(ASKED))
        assert "near" not in {one.tier for one in given[:1]}
        np.testing.assert_allclose(given[0].output, model.encode(ASKED[0]), atol=1e-5)
        assert {one.tier for one in cache.run([text + "." for text in ASKED])} == {"near"}, "what is new answers"
    assert b'"format":2' in max((tmp_path / "s").glob("m-*.json")).read_bytes()


def test_a_calibration_from_before_there_were_scopes_is_off_and_says_so(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_prompts(folder)
    with monkeypatch.context() as older:
        older.setattr("llmcache.encoding.executor.Executor.marks", lambda *_: None)
        stored(tmp_path / "old", model, RULES["calibrated"], {"plain": {}})
    with LLMCache.open(tmp_path / "old", model) as cache, pytest.raises(ConfigError, match="older versions"):
        cache.calibrate(budget=0.9, drift="cosine")
    stored(tmp_path / "s", model, RULES["calibrated"], {"plain": {}})
    calibrated(tmp_path / "s", model, RULES["calibrated"], {})
    store = Store.open(tmp_path / "s")
    space = store.namespace("default")
    assert space is not None
    setting = {name: one for name, one in space.config["calibration"].items() if name != "scope"}
    store.declare("default", space.identity, {**space.config, "calibration": setting})
    store.close()
    with LLMCache.open(tmp_path / "s", model, config=RULES["calibrated"]) as cache:
        assert "calibrate again" in cache.near_is_off
        assert {one.tier for one in cache.run(LATER)} == {"miss"}
