"""Pairs of texts in `run`, `warm` and `Pipeline`: a CrossEncoder's logits, in order, and every record is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from sentence_transformers import CrossEncoder

from llmcache import CacheConfig, Document, LLMCache, Pipeline
from llmcache.errors import ConfigError, CorpusError
from llmcache.planning.preview import forecast_against
from llmcache.records import FieldSpec, RejectedRecord, intake
from tests import kinds
from tests.small_sentences import sentences, tiny_folder, with_prompts

PAIRS = [(query, document) for query in sentences(6) for document in [*sentences(5, seed=1), ""]]
FIELDS = FieldSpec(("query", "document"))
OFTEN = CacheConfig(commit_seconds=0.05)


@dataclass
class Judged:
    query: str
    document: str
    id: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=[1, 3])
def labels(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture(scope="module")
def model(folder: str, labels: int) -> CrossEncoder:
    return kinds.cross_encoder(folder, labels)


@pytest.fixture
def cache(model: CrossEncoder, tmp_path: Path) -> Iterator[LLMCache]:
    with LLMCache.open(tmp_path / "store", model) as opened:
        yield opened


def logits(model: CrossEncoder, pairs: list[tuple[str, str]], labels: int) -> Any:
    return model.predict(pairs, activation_fn=torch.nn.Identity()).reshape(len(pairs), labels)


def test_outputs_are_the_models_logits_in_order(cache: LLMCache, model: CrossEncoder, labels: int) -> None:
    expected = logits(model, PAIRS, labels)
    cold, warm = list(cache.run(PAIRS)), list(cache.run([list(pair) for pair in PAIRS], chunk=5))
    piped = list(Pipeline(cache, batch_size=2).run(iter(PAIRS)))
    for found, tier in ((cold, "miss"), (warm, "exact"), (piped, "exact")):
        assert [result.id for result in found] == [str(i) for i in range(len(PAIRS))]
        assert {result.tier for result in found} == {tier}
        np.testing.assert_allclose([result.output for result in found], expected, atol=3e-5)
    assert cold[0].output.shape == (labels,)


def test_warm_computes_each_pair_once_and_predict_finds_it(cache: LLMCache, model: CrossEncoder) -> None:
    counts = cache.warm([*PAIRS, PAIRS[0]])
    assert (counts.documents, counts.exact, counts.misses) == (len(PAIRS) + 1, 1, len(PAIRS))
    np.testing.assert_allclose(cache.predict(PAIRS), model.predict(PAIRS), atol=3e-5)
    assert cache.stats().counters.misses == len(PAIRS)


def records(kind: str) -> Any:
    pairs = PAIRS[:4]
    columns = {"query": [a for a, _ in pairs], "document": [b for _, b in pairs], "id": [7, 8, 9, 10]}
    if kind == "frame":
        return pytest.importorskip("pandas", reason="install the extra 'test' for frames").DataFrame(columns)
    if kind == "data set":
        return pytest.importorskip("datasets", reason="install the extra 'test'").Dataset.from_dict(columns)
    if kind == "table":
        return pyarrow.table(columns)
    if kind == "batches":
        return pyarrow.table(columns).to_reader(max_chunksize=2)
    if kind == "documents":
        return [Document(str(i), pair) for i, pair in enumerate(pairs, 7)]
    if kind == "objects":
        return [Judged(*pair, i) for i, pair in enumerate(pairs, 7)]
    return [{"document": b, "query": a, "id": i} for i, (a, b) in enumerate(pairs, 7)]


@pytest.mark.parametrize("kind", ["mappings", "objects", "documents", "frame", "table", "batches", "data set"])
def test_every_kind_of_record_gives_the_same_pairs(kind: str) -> None:
    expected = [Document(str(i), pair) for i, pair in enumerate(PAIRS[:4], 7)]
    assert list(intake(records(kind), FIELDS)) == expected


def test_pairs_without_ids_get_their_position() -> None:
    given = [*PAIRS[:2], list(PAIRS[2]), np.array(PAIRS[3])]
    assert list(intake(given, FIELDS)) == [Document(str(i), pair) for i, pair in enumerate(PAIRS[:4])]


BAD: list[tuple[Any, str]] = [
    (("a", None), "null under 'document'"),
    ((float("nan"), "b"), "null under 'query'"),
    (("a", 3), "a number under 'document'"),
    (("a",), "has 1 text,"),
    (("a", "b", "c"), "has 3 texts"),
    ((), "has 0 texts"),
    ("a text", "is one text, not a pair"),
    (Document("7", "a text"), "is one text, not a pair"),
    ({"query": "a"}, "no field 'document'"),
    ({"text": "a"}, "no field 'query', only 'text'"),
    ({"query": "a", "document": None}, "null under 'document'"),
    ({"a", "b"}, "neither a pair of texts nor a record with 'query' and 'document'"),
    (b"ab", "neither a pair"),
    (None, "neither a pair"),
    (("a", "\ud800"), "half of a surrogate pair"),
    (("a" * 6, "b" * 6), "has 12 characters, more than max_characters=11"),
]


@pytest.mark.parametrize(("record", "said"), BAD, ids=[said for _, said in BAD])
def test_a_record_that_is_no_pair_is_refused_with_its_reason(record: Any, said: str) -> None:
    (taken,) = intake([record], FieldSpec(("query", "document"), most=11))
    assert isinstance(taken, RejectedRecord)
    assert said in taken.reason


def test_refused_records_and_results_add_up(cache: LLMCache) -> None:
    bad = [record for record, _ in BAD[:-1]]
    pipeline = Pipeline(cache, batch_size=1)
    given = [one for pair, wrong in zip(PAIRS, bad, strict=False) for one in (pair, wrong)]
    found = list(pipeline.run(given))
    assert [result.id for result in found] == [str(2 * i) for i in range(len(bad))]
    assert [error.place for error in pipeline.errors] == [2 * i + 1 for i in range(len(bad))]
    assert pipeline.refused == len(bad)
    with pytest.raises(CorpusError, match=r"document 1 .* null under 'document'"):
        list(Pipeline(cache, strict=True).run(given))
    with pytest.raises(CorpusError, match=r"document 1 .*null under 'document'"):
        list(cache.run(given))


def test_other_names_of_the_fields(cache: LLMCache) -> None:
    given = [{"a": a, "b": b, "query": "", "document": ""} for a, b in PAIRS]
    named = Pipeline(cache, text_field=("a", "b")).run(given)
    for one, other in zip(named, Pipeline(cache).run(PAIRS), strict=True):
        np.testing.assert_array_equal(one.output, other.output)
    with pytest.raises(CorpusError, match="no column 'document'"):
        list(Pipeline(cache).run(pyarrow.table({"query": ["a"], "answer": ["b"]})))


@pytest.mark.parametrize("ending", [".parquet", ".npy", ".jsonl"])
def test_a_run_in_many_sittings_gives_the_file_of_one(
    ending: str, model: CrossEncoder, labels: int, tmp_path: Path
) -> None:
    given = [("a", None), *PAIRS, *PAIRS[::-3], ("a", "b", "c")]
    names = [f"out{ending}", *(["out.npy.jsonl"] if ending == ".npy" else [])]
    (tmp_path / "whole").mkdir()
    with LLMCache.open(tmp_path / "whole" / "store", model) as cache:
        whole = Pipeline(cache, batch_size=1).write(given, tmp_path / "whole" / names[0])
    assert (whole.refused, whole.documents) == (2, len(given) - 2)
    finished, sittings = False, 0
    while not finished:
        with LLMCache.open(tmp_path / "store", model, config=OFTEN) as cache:
            pipeline = Pipeline(cache, batch_size=1)
            written = pipeline.write(iter(given), tmp_path / names[0], resume=True, max_documents=20)
            finished, sittings = written.finished, sittings + 1
    assert sittings > 1
    for name in names:
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if ending == ".parquet":
        rows = pyarrow.parquet.read_table(tmp_path / names[0])["output"].to_pylist()
        np.testing.assert_allclose(rows[: len(PAIRS)], logits(model, PAIRS, labels), atol=3e-5)


def test_an_unfinished_run_is_not_continued_with_the_sides_exchanged(cache: LLMCache, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    given = PAIRS * 4
    assert not Pipeline(cache, batch_size=1).write(given, out, resume=True, max_documents=1).finished
    with pytest.raises(CorpusError, match="are not those"):
        Pipeline(cache, batch_size=1).write([(b, a) for a, b in given], out, resume=True)
    with pytest.raises(ConfigError, match="text_field"):
        Pipeline(cache, batch_size=1, text_field=("document", "query")).write(given, out, resume=True)


def test_stored_pairs_are_counted_before_a_run(cache: LLMCache) -> None:
    cache.warm(PAIRS[:10])
    cache.commit()
    given = [Document(str(i), pair) for i, pair in enumerate([*PAIRS, *PAIRS[:3]])]
    counts = forecast_against(cache._store, "default", None, given)
    assert (counts.documents, counts.distinct, counts.known) == (len(PAIRS) + 3, len(PAIRS), 10)


def test_what_pairs_cannot_do_is_said(cache: LLMCache, folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chunk cuts documents of one text"):
        Pipeline(cache, chunk="structure")
    with pytest.raises(ConfigError, match="one pair of texts; give a list"):
        cache.run(PAIRS[0])
    for wrong in ("text", ("query",), ("query", "query"), ("query", "document", "id")):
        with pytest.raises(ConfigError, match="name two fields"):
            Pipeline(cache, text_field=wrong)
    with (
        LLMCache.open(tmp_path / "texts", with_prompts(folder)) as other,
        pytest.raises(ConfigError, match="name one field"),
    ):
        Pipeline(other, text_field=("query", "document"))
