"""Near reuse of pairs within a budget, and the models that have no near matches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import processors

from llmcache import CacheConfig, Document, LLMCache
from llmcache.errors import ConfigError
from llmcache.near.calibration.recalibration import Refitting
from llmcache.near.guard.fields import KINDS
from llmcache.near.neighbors.bank_entries import answering_keys, entries_of
from llmcache.near.neighbors.sides import side_of, sides_exchanged, token_bags
from tests import kinds
from tests.conftest import Command
from tests.small_sentences import sentences, tiny_folder, with_prompts

Pair = tuple[str, str]
KNOWN, ASKED = 700, 500
BUDGET = 0.1


def generated(n: int, seed: int, sides: int = 60) -> list[Pair]:
    """Different ordered pairs of different texts; many are there in both orders."""
    random, texts = np.random.default_rng(seed), sentences(sides)
    found: dict[Pair, None] = {}
    while len(found) < n:
        one, other = random.choice(sides, 2, replace=False)
        found[texts[one], texts[other]] = None
    return list(found)


PAIRS = generated(KNOWN + ASKED, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def logits(model: CrossEncoder, pairs: Sequence[Pair]) -> NDArray[np.float32]:
    """Return the model's own logits, [n, labels]."""
    found: Any = model.predict(list(pairs), activation_fn=torch.nn.Identity())
    return np.asarray(found.reshape(len(pairs), -1))


@pytest.fixture(scope="module", params=[1, 3])
def model(request: pytest.FixtureRequest, folder: str) -> CrossEncoder:
    """A model whose logits have mean 0 and deviation 1, with 1 or 3 labels."""
    made: Any = kinds.cross_encoder(folder, request.param)
    head = made.transformers_model.classifier
    with torch.no_grad():
        head.weight.div_(torch.from_numpy(logits(made, PAIRS).std(axis=0))[:, None])
        head.bias.sub_(torch.from_numpy(logits(made, PAIRS).mean(axis=0)))
    result: CrossEncoder = made
    return result


def decision(outputs: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(axis=1))


def far(computed: NDArray[Any], reused: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.minimum(1, np.abs(computed - reused).mean(axis=1) / 4), np.float64)


DRIFTS: dict[str, tuple[dict[str, Any], Callable[[Any, Any], Any]]] = {
    "label": ({"drift": "label", "head": decision}, lambda a, b: decision(a) != decision(b)),
    "own": ({"drift": far}, far),
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("drift", DRIFTS)
def test_near_hits_of_pairs_keep_within_the_budget(
    drift: str, sampled: bool, model: CrossEncoder, tmp_path: Path
) -> None:
    settings, measure = DRIFTS[drift]
    config = CacheConfig(audit_share=0)
    with LLMCache.open(tmp_path / "store", model, config=config) as cache:
        cache.predict(PAIRS[:KNOWN])
        sample = generated(600, 5, sides=100) if sampled else None
        if sample is not None:
            sample = [pair for pair in sample if pair not in PAIRS]
        calibration = cache.calibrate(sample, budget=BUDGET, **settings)
        assert calibration.threshold is not None
        assert calibration.expected <= calibration.bound <= BUDGET
    own = settings["drift"] if callable(settings["drift"]) else None
    asked = PAIRS[KNOWN:]
    with LLMCache.open(tmp_path / "store", model, config=config, drift=own) as cache:
        results = list(cache.run(asked))
    near = np.array([result.tier == "near" for result in results])
    outputs, true = np.array([result.output for result in results]), logits(model, asked)
    assert near.mean() > 0.05
    assert measure(true, outputs).mean() <= BUDGET
    np.testing.assert_allclose(outputs[~near], true[~near], atol=2e-3)


def exchanged(pairs: Sequence[Pair]) -> list[Pair]:
    """Return pairs with their sides exchanged, without those that are among the pairs or asked otherwise."""
    return [(document, query) for query, document in pairs if (document, query) not in PAIRS]


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("prompt", [None, "is it about the same? "])
def test_a_pair_with_exchanged_sides_is_never_answered_by_the_pair(
    prompt: str | None, guard: bool, model: CrossEncoder, tmp_path: Path
) -> None:
    config = CacheConfig(audit_share=0, near_repeats=None)
    with LLMCache.open(tmp_path / "store", model, config=config) as cache:
        cache.predict(PAIRS[:KNOWN], prompt=prompt)
        found = cache.calibrate(budget=0.9, drift=far, prompt=prompt, guard=guard, confidence=None)
        assert found.threshold is not None
        asked = exchanged(PAIRS[:KNOWN])
        results = list(cache.run(asked, prompt=prompt))
        others = list(cache.run(generated(200, 9, sides=120), prompt=prompt))
    assert {result.tier for result in results} == {"miss"}, "whatever the budget"
    np.testing.assert_allclose(
        np.array([result.output for result in results]),
        model.predict(asked, activation_fn=torch.nn.Identity(), prompt=prompt).reshape(len(asked), -1),
        atol=2e-3,
    )
    assert "near" in {result.tier for result in others}


def test_nor_by_a_pair_that_is_almost_the_exchanged_one(model: CrossEncoder, tmp_path: Path) -> None:
    known = [Document(str(i), pair) for i, pair in enumerate(PAIRS[:KNOWN])]
    with LLMCache.open(tmp_path / "store", model, config=CacheConfig(audit_share=0)) as cache:
        cache.warm(known)
        assert cache.calibrate(budget=0.9, drift=far, confidence=None).threshold is not None
        results = list(cache.run(Document("", (f"{document}s", query)) for query, document in PAIRS[:KNOWN]))
    assert "near" in {result.tier for result in results}
    assert not any(result.source == one.id for result, one in zip(results, known, strict=True))


def test_exchanged_sides_are_no_hits_of_a_calibration(model: CrossEncoder, tmp_path: Path) -> None:
    """A sample of nothing but exchanged pairs gives no hit, although its similarities are 1."""
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.predict(PAIRS[:KNOWN])
        found = cache.calibrate(exchanged(PAIRS[:KNOWN]), budget=0.9, drift=far, confidence=None)
        assert found.hits == 0
        assert found.threshold is None


def test_explain_names_the_order_of_the_sides(model: CrossEncoder, tmp_path: Path) -> None:
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.predict(PAIRS[:KNOWN])
        pair = exchanged(PAIRS[:KNOWN])[0]
        assert "neither calibrated" in cache.explain(pair).why
        cache.calibrate(budget=0.9, drift=far, confidence=None)
        said = cache.explain(pair)
        assert (said.tier, said.why) == ("miss", "the guard: they differ in the order of their sides")
        assert cache.explain(PAIRS[0]).tier == "exact"
        for wrong in ("a text", ("a", "b", "c"), ["a", "b"]):
            given: Any = wrong
            with pytest.raises(ConfigError, match="takes a pair"):
                cache.explain(given)


def test_a_background_calibration_refuses_exchanged_sides_too(model: CrossEncoder, tmp_path: Path) -> None:
    both = [*PAIRS[:200], *((document, query) for query, document in PAIRS[:200])]
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.predict(both)
        before = cache.calibrate(budget=0.9, drift="label", head=decision, guard=False, confidence=None)
        assert before.hits == 0, "every pair is there in both orders"
        rows, entries = entries_of(cache.bank, int(before.scope, 16))
        matcher: Any = cache._execution.reuse
        refitting = Refitting(
            entries, np.zeros((len(rows), len(KINDS)), np.uint64), before, matcher.fitted, len(rows),
            answering_keys(cache.bank, rows), pairs=True,
        )  # fmt: skip
        refitting.wait()
        result = refitting.result()
    assert result is not None
    assert result[0].hits == 0


@pytest.mark.parametrize("drift", ["cosine", "beyond", "kl"])
def test_a_drift_that_one_number_cannot_have_is_refused(drift: Any, folder: str, tmp_path: Path) -> None:
    with LLMCache.open(tmp_path / "store", kinds.cross_encoder(folder)) as cache:
        cache.predict(PAIRS[:300])
        with pytest.raises(ConfigError, match="this model gives one per document"):
            cache.calibrate(budget=0.1, drift=drift)


def test_a_model_whose_tokens_do_not_separate_the_sides_is_not_calibrated(folder: str, tmp_path: Path) -> None:
    model: Any = kinds.cross_encoder(folder, 3)
    rules = model.tokenizer.backend_tokenizer
    rules.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.predict(PAIRS[:300])
        with pytest.raises(ConfigError, match="do not tell the two texts of a pair apart"):
            cache.calibrate(budget=0.1, drift=far)
        assert cache.stats().counters.misses == 300
        cache.predict(PAIRS[:300])
        assert cache.stats().counters.misses == 300


# -- token ids ----------------------------------------------------------------------------------------------

Row = NDArray[np.int64]
CLS, SEP = 1, 2


def row(
    first: Sequence[int], second: Sequence[int], prompt: Sequence[int] = (), between: Sequence[int] = (SEP,)
) -> Row:
    return np.array([CLS, *prompt, *first, *between, *second, SEP])


@pytest.mark.parametrize("between", [(SEP,), (SEP, SEP)], ids=["BERT", "RoBERTa"])
@pytest.mark.parametrize("prompt", [(), tuple(range(500, 530))], ids=["alone", "with a prompt"])
def test_exchanged_sides_are_found_among_generated_rows(prompt: tuple[int, ...], between: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)

    def edited(side: list[int]) -> list[int]:
        place = int(random.integers(0, len(side)))
        return [*side[:place], int(random.integers(400, 500)), *side[place + int(random.integers(0, 2)) :]]

    for _ in range(300):
        one, other = (random.integers(10, 400, random.integers(6, 40)).tolist() for _ in range(2))
        pair = row(one, other, prompt, between)
        close = row(edited(one), edited(other), prompt, between)
        turned = row(edited(other), one, prompt, between)
        exact = row(other, one, prompt, between)
        found = sides_exchanged([close, turned, exact], [pair] * 3)
        assert found.tolist() == [False, True, True], (one, other)
        bags = token_bags([pair, close, turned, exact])
        assert [bags[0] == bag for bag in bags] == [True, False, False, True]


def test_sides_are_split_at_the_token_that_ends_the_row() -> None:
    pair = row([10, 11], [12])
    assert pair[side_of(pair)].tolist() == [SEP, 12, SEP]
    assert not side_of(np.array([10, 11, 12])).any()
    assert side_of(np.zeros(0, np.int64)).shape == (0,)
    assert token_bags([]).shape == (0,)
    assert sides_exchanged([], []).shape == (0,)


# -- models without near matches ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"tau": 0.9}, {"config": CacheConfig(tau=0.9)},
     {"config": CacheConfig(layers="all", reuse="layer", layer_tau={0: 0.9})}],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["CrossEncoder", "MultiVectorEncoder"])
def test_a_tau_that_a_model_cannot_have_is_an_error_of_opening(
    kind: str, settings: dict[str, Any], folder: str, tmp_path: Path
) -> None:
    model = kinds.MAKERS[kind](folder)
    with pytest.raises(ConfigError, match=rf"tau=.* a {kind} .*leave it out"):
        LLMCache.open(tmp_path / "store", model, **settings)
    assert not (tmp_path / "store").exists()
    given: Any = PAIRS[:5] if kind == "CrossEncoder" else sentences(5)
    with LLMCache.open(tmp_path / "store", model) as cache:
        list(cache.run(given))
    with pytest.raises(ConfigError, match="leave it out"):
        LLMCache.open(tmp_path / "store", **settings | {"model": model})
    exact = CacheConfig(tau=0.9, reuse="exact")
    for allowed in ({}, {"config": exact}):
        with LLMCache.open(tmp_path / "store", model, **allowed) as cache:  # type: ignore[arg-type]
            assert {result.tier for result in cache.run(given)} == {"exact"}


def test_a_tau_that_is_saved_says_how_to_open_without_it(folder: str, tmp_path: Path) -> None:
    model, path = kinds.multi_vector_encoder(folder), tmp_path / "store"
    with LLMCache.open(path, model) as cache:
        list(cache.run(sentences(5)))
        store = cache._store
        space = store.namespace("default")
        assert space is not None
        store.declare("default", space.identity, {**space.config, "tau": 0.9})
    with pytest.raises(ConfigError, match=r"saved with the namespace, so open with config=CacheConfig\(\)"):
        LLMCache.open(path, model)
    with LLMCache.open(path, model, config=CacheConfig()) as cache:
        assert {result.tier for result in cache.run(sentences(5))} == {"exact"}


@pytest.mark.parametrize("kind", ["SparseEncoder", "MultiVectorEncoder"])
def test_a_calibration_of_matrices_is_one_clear_error(kind: str, folder: str, tmp_path: Path) -> None:
    with LLMCache.open(tmp_path / "store", kinds.MAKERS[kind](folder)) as cache:
        list(cache.run(sentences(200)))
        with pytest.raises(ConfigError, match=f"one vector per document, and a {kind} gives a matrix"):
            cache.calibrate(budget=0.1)
        assert cache.calibration is None
        assert {result.tier for result in cache.run(sentences(200))} == {"exact"}


def test_a_sparse_encoder_gives_the_neighbours_vector_with_a_tau(folder: str, tmp_path: Path) -> None:
    texts = sentences(60)
    with LLMCache.open(tmp_path / "store", kinds.sparse_encoder(folder), tau=0.9) as cache:
        known = {result.id: result.output for result in cache.run(texts)}
        results = list(cache.run([f"{text}s" for text in texts[:20]]))
    near = [result for result in results if result.tier == "near"]
    assert len(near) > 10
    for result in near:
        assert result.similarity is not None
        assert result.similarity >= 0.9
        assert result.source is not None
        np.testing.assert_array_equal(result.output, known[result.source])


def test_the_command_line_says_so_in_one_line(folder: str, tmp_path: Path, llmcache: Command) -> None:
    model, corpus, store = tmp_path / "model", tmp_path / "texts.txt", tmp_path / "store"
    kinds.multi_vector_encoder(folder).save(str(model))
    corpus.write_text("one\ntwo\n")
    assert llmcache("build", corpus, "-m", model, "-s", store).code == 0
    for arguments in (
        ("run", corpus, "-s", store, "-o", tmp_path / "out.jsonl", "--tau", "0.9"),
        ("plan", corpus, "-s", store, "--tau", "0.9"),
        ("plan", corpus, "-s", tmp_path / "new", "-m", model, "--tau", "0.9"),
        ("calibrate", "-s", store, "--budget", "0.1"),
    ):
        done = llmcache(*arguments)
        assert (done.code, done.err.count("\n")) == (2, 1), done
        assert "MultiVectorEncoder" in done.err


def test_a_sentence_transformer_keeps_its_tau(folder: str, tmp_path: Path) -> None:
    model: SentenceTransformer = with_prompts(folder)
    with LLMCache.open(tmp_path / "store", model, tau=0.9) as cache:
        list(cache.run(sentences(30)))
        assert "near" in {result.tier for result in cache.run([f"{text}s" for text in sentences(30)])}
        with pytest.raises(ConfigError, match="takes one text"):
            cache.explain(("a", "b"))
