"""Inputs of `predict` and `rank` that are no pairs of texts: errors are those of the model, or say what was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder

from llmcache import LLMCache
from llmcache.errors import ConfigError, CorpusError
from tests import kinds
from tests.small_sentences import tiny_folder

GOOD: list[Any] = [("a query", "a document"), ["another", "pair"], ("", "")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return kinds.cross_encoder(tiny_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def cache(model: CrossEncoder, tmp_path: Path) -> Iterator[LLMCache]:
    with LLMCache.open(tmp_path / "store", model) as opened:
        yield opened


def outcome(ask: Callable[[], Any]) -> Any:
    """Return the result of a call, or its exception."""
    try:
        return ask()
    except Exception as error:  # of any type: types are compared
        return error


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([""], "the input is no pair of texts: it has 1 side;"),
        ([[]], "input 0 is no pair of texts: it has 0 sides"),
        ([["a"]], "input 0 is no pair of texts: it has 1 side;"),
        ([["a", "b", "c"]], "input 0 is no pair of texts: it has 3 sides"),
        (("a", "b", "c"), "the input is no pair of texts: it has 3 sides"),
        ([("a", "b"), ("a",)], "input 1 is no pair of texts: it has 1 side;"),
        ([("a", "b"), ("a", "b", "c")], "input 1 .* it has 3 sides"),
        ([("a", "b"), ("a", None)], "input 1 .* it has a side that is None"),
        ([{"query": "a", "document": "b"}], "the input is no pair of texts: it has 1 side;"),
        ([np.array(["a", "b"])], "the input is no pair of texts: it has 1 side;"),
        (np.array([["a"], ["b"]]), "input 0 is no pair of texts: it has 1 side;"),
        (None, "a list of pairs, got None"),
    ],
)
def test_an_input_that_is_no_pair_is_named(wrong: Any, said: str, model: CrossEncoder, cache: LLMCache) -> None:
    assert isinstance(outcome(lambda: model.predict(wrong)), ValueError)
    with pytest.raises(ConfigError, match=said) as error:
        cache.predict(wrong)
    assert isinstance(error.value, ValueError)
    assert len(cache) == 0


def test_no_argument_at_all_is_an_error_of_the_call(model: CrossEncoder, cache: LLMCache) -> None:
    for asked in (model, cache):
        predict: Any = asked.predict
        with pytest.raises(TypeError):
            predict()


def test_no_pairs_and_no_documents_give_empty_results(model: CrossEncoder, cache: LLMCache) -> None:
    empty: list[Any] = [[], (), np.empty((0, 2), object)]
    for nothing in empty:
        ours, theirs = cache.predict(nothing), model.predict(nothing)
        assert (type(ours), ours.shape, ours.dtype) == (type(theirs), theirs.shape, theirs.dtype)
    assert cache.rank("a query", []) == model.rank("a query", []) == []


@pytest.mark.parametrize(
    ("query", "documents"), [(None, ["a"]), ("q", [None]), ("q", None), ("q", [1]), (1, ["a"]), (["q"], [["a"]])]
)
def test_rankings_of_what_is_no_text_fail_as_the_models(
    query: Any, documents: Any, model: CrossEncoder, cache: LLMCache
) -> None:
    theirs = outcome(lambda: model.rank(query, documents))
    assert isinstance(theirs, Exception)
    assert isinstance(outcome(lambda: cache.rank(query, documents)), type(theirs))


def test_one_text_instead_of_documents_is_refused(cache: LLMCache) -> None:
    """The model ranks the characters of the text."""
    with pytest.raises(ConfigError, match="a list of documents"):
        cache.rank("a query", "one document")


TEXTS = ["", "a", "a longer text", np.str_("b")]
OTHERS: list[Any] = [
    None, 0, 1.5, True, b"x", [], ["a"], {"text": "a"}, {}, ("a",), np.array("a"), np.array(["a", "b"]), float("nan"),
    object(),
]  # fmt: skip


def generated(seed: int) -> Any:
    """Return an input of `predict` that may be malformed in any place."""
    random = np.random.default_rng(seed)

    def one_of(values: list[Any]) -> Any:
        return values[int(random.integers(0, len(values)))]

    def pair() -> Any:
        sides = [one_of(TEXTS if random.random() < 0.8 else OTHERS) for _ in range(one_of([0, 1, 2, 2, 2, 2, 3]))]
        return one_of([tuple(sides), sides])

    if random.random() < 0.2:
        return pair()
    members = [one_of([one_of(GOOD), pair(), pair(), one_of([*TEXTS, *OTHERS])]) for _ in range(one_of([0, 1, 2, 3]))]
    return one_of([tuple(members), members])


@pytest.mark.parametrize("part", range(4))
def test_generated_inputs_give_the_models_result_or_an_error_of_its_type(
    part: int, model: CrossEncoder, cache: LLMCache
) -> None:
    failed = 0
    for seed in range(150 * part, 150 * (part + 1)):
        given = generated(seed)
        theirs, ours = outcome(partial(model.predict, given)), outcome(partial(cache.predict, given))
        if isinstance(theirs, Exception):
            failed += 1
            assert isinstance(ours, type(theirs) | ConfigError), (seed, given, theirs, ours)
            assert len(str(ours).splitlines()) == 1 or not isinstance(ours, ConfigError)
        else:
            assert type(ours) is type(theirs), (seed, given, ours)
            np.testing.assert_allclose(ours, theirs, atol=3e-5, err_msg=f"{seed}: {given}")
    assert 20 < failed < 140, "both kinds of inputs were generated"
    expected = model.predict(GOOD)  # the cache goes on after every error, and has stored nothing wrong
    np.testing.assert_allclose(cache.predict(GOOD), expected, atol=3e-5)


def test_records_that_are_no_pairs_are_refused_by_run_and_warm(cache: LLMCache) -> None:
    wrongs: list[Any] = [[""], [[]], [["a"]], [["a", "b", "c"]], [("a", None)], [None], [{"query": "a"}], [1]]
    for wrong in wrongs:
        for method in (cache.run, cache.warm):
            ask: Any = method
            with pytest.raises(CorpusError, match=r"^document 0 "):
                list(ask(wrong) or ())
    assert len(cache) == 0
