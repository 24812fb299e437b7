"""Sparse vectors and vectors of tokens in `run` and `Pipeline`: the model's own, in result files and journals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sentence_transformers import SparseEncoder

from llmcache import CacheConfig, LLMCache, Pipeline
from llmcache.encoding.results import Result
from llmcache.errors import ConfigError, CorpusError
from llmcache.pipeline.journal import Journal, beside
from llmcache.pipeline.writers import Form, result_writer
from tests import kinds
from tests.small_sentences import sentences, tiny_folder

TEXTS = ["", *sentences(30), *sentences(5), "longer than the others: " + "x y z " * 20]
OFTEN = CacheConfig(commit_seconds=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["SparseEncoder", "MultiVectorEncoder"])
def model(request: pytest.FixtureRequest, folder: str) -> Any:
    return kinds.MAKERS[request.param](folder)


@pytest.fixture
def cache(model: Any, tmp_path: Path) -> Iterator[LLMCache]:
    with LLMCache.open(tmp_path / "store", model) as opened:
        yield opened


def tables(model: Any, outputs: list[Any]) -> list[Any]:
    """Return outputs as the model itself gives them: dense vectors of a SparseEncoder, token vectors of the other."""
    if not isinstance(model, SparseEncoder):
        return outputs
    dense = np.zeros((len(outputs), model.get_embedding_dimension() or 0), np.float32)
    for row, entries in zip(dense, outputs, strict=True):
        row[entries[:, 0].astype(int)] = entries[:, 1]
    return list(dense)


def assert_models_own(model: Any, outputs: list[Any], texts: list[str]) -> None:
    expected = model.encode(texts)
    expected = expected.to_dense() if isinstance(model, SparseEncoder) else expected
    for ours, theirs in zip(tables(model, outputs), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=3e-5)


def read(out: Path, model: Any) -> list[Any]:
    """Read the outputs of a result file as float32 [entries, 2] or [tokens, width]."""
    if out.suffix == ".parquet":
        given = pyarrow.parquet.read_table(out)["output"].to_pylist()
        if isinstance(model, SparseEncoder):
            given = [[[entry["dimension"], entry["value"]] for entry in row] for row in given]
    else:
        given = [json.loads(line)["output"] for line in out.read_text().splitlines()]
        if isinstance(model, SparseEncoder):
            given = [list(zip(row["dimensions"], row["values"], strict=True)) for row in given]
    return [np.array(row, np.float32).reshape(len(row), -1 if row else 2) for row in given]


def test_outputs_are_the_models_own_in_order(cache: LLMCache, model: Any) -> None:
    cold, warm = list(cache.run(TEXTS)), list(Pipeline(cache, batch_size=2).run(TEXTS))
    for found in (cold, warm):
        assert [result.id for result in found] == [str(i) for i in range(len(TEXTS))]
        assert_models_own(model, [result.output for result in found], TEXTS)
    assert {result.tier for result in warm} == {"exact"}
    assert {result.output.dtype for result in cold} == {np.dtype(np.float32)}
    assert cold[1].output.shape[1] == (2 if isinstance(model, SparseEncoder) else cache.width)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_run_in_many_sittings_gives_the_file_of_one(ending: str, model: Any, tmp_path: Path) -> None:
    given: list[Any] = [None, *TEXTS, 7, *TEXTS[::-2], *sentences(60)]
    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / f"out{ending}", tmp_path / f"out{ending}"
    with LLMCache.open(tmp_path / "whole" / "store", model) as cache:
        written = Pipeline(cache, batch_size=1).write(given, whole)
    assert (written.documents, written.refused) == (len(given) - 2, 2)
    finished, sittings = False, 0
    while not finished:
        with LLMCache.open(tmp_path / "store", model, config=OFTEN) as cache:
            pipeline = Pipeline(cache, batch_size=1)
            finished = pipeline.write(iter(given), out, resume=True, max_documents=40).finished
        sittings += 1
    assert sittings > 2
    assert out.read_bytes() == whole.read_bytes()
    assert not beside(out).exists()
    assert_models_own(model, read(out, model), [text for text in given if isinstance(text, str)])


def test_columns_of_a_parquet_file(cache: LLMCache, model: Any, tmp_path: Path) -> None:
    Pipeline(cache).write(TEXTS[:4], tmp_path / "out.parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "out.parquet")
    kind = schema.field("output").type
    if isinstance(model, SparseEncoder):
        entry = pyarrow.struct([("dimension", pyarrow.int32()), ("value", pyarrow.float32())])
        assert kind.value_type == entry
    else:
        assert kind.value_type == pyarrow.list_(pyarrow.float32(), cache.width)
    assert schema.names == ["id", "output", "tier", "layer", "source", "similarity", "consensus", "audited"]


def test_an_npy_file_is_refused_before_anything_is_computed(cache: LLMCache, tmp_path: Path) -> None:
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"rows of one length; write 'out.npy' as .parquet or .jsonl"):
            Pipeline(cache).write(TEXTS, tmp_path / "out.npy", resume=resume)
    assert cache.stats().counters.documents == 0
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_chunks_have_results_and_documents_of_chunks_have_none(cache: LLMCache, model: Any) -> None:
    text = "A sentence about the card. " * 60
    found = list(Pipeline(cache, chunk="structure", per="chunk").run([text]))
    assert len(found) > 1
    places = [[int(place) for place in result.id.partition("#")[2].split("-")] for result in found]
    assert_models_own(model, [result.output for result in found], [text[start:end] for start, end in places])
    with pytest.raises(ConfigError, match="per='chunk'"):
        Pipeline(cache, chunk="structure")


# -- files and journals without a model ---------------------------------------------------------------------


def matrix(number: int, form: Form, width: int, rows: int) -> Result:
    """Make a result of some rows; those of the form "sparse" have increasing dimensions."""
    values = np.random.default_rng(number).normal(size=(rows, width)).astype(np.float32)
    if form == "sparse":
        values[:, 0] = np.arange(rows) * 3
    return Result(f"d{number}", values, "miss", None, None, None)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
@pytest.mark.parametrize(("form", "width"), [("sparse", 2), ("tokens", 3)])
def test_rows_without_vectors_and_rows_larger_than_the_buffer(
    form: Form, width: int, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcache.pipeline.writers.CHUNK_BYTES", 4 * width * 5)  # five vectors
    given = [matrix(i, form, width, rows) for i, rows in enumerate([0, 2, 9, 0, 3, 2, 1, 11, 0])]
    with result_writer(tmp_path / f"out{ending}", width=width, form=form) as writer:
        writer.write(given)
    model: Any = object.__new__(SparseEncoder) if form == "sparse" else None
    found = read(tmp_path / f"out{ending}", model)
    assert [len(one) for one in found] == [len(one.output) for one in given]
    for one, other in zip(found, given, strict=True):
        np.testing.assert_array_equal(one.ravel(), other.output.ravel())


def test_an_output_of_another_shape_is_refused(tmp_path: Path) -> None:
    for wrong in (np.zeros(3, np.float32), np.zeros((2, 4), np.float32)):
        refused = pytest.raises(ConfigError, match="'x' has shape")
        with refused, result_writer(tmp_path / "out.jsonl", width=3, form="tokens") as writer:
            writer.write([Result("x", wrong, "miss", None, None, None)])


def begun(out: Path) -> None:
    """Make an unfinished run of four rows with 0, 2, 5 and 1 vectors, and a row after its checkpoint."""
    journal, lock = Journal.open(out, {}, 3, resume=True, form="tokens")
    with lock:
        journal.add(matrix(i, "tokens", 3, rows) for i, rows in enumerate([0, 2, 5, 1]))
        journal.checkpoint(journal.here(4, "digest"))
        journal.commit_done()
        journal.add([matrix(9, "tokens", 3, 4)])
        journal.close()


def resumed(out: Path) -> list[Any]:
    journal, lock = Journal.open(out, {}, 3, resume=True, form="tokens")
    with lock:
        try:
            journal.back_to(journal.checkpoints[-1])
            journal.add([matrix(4, "tokens", 3, 2)])
            return list(journal.results())
        finally:
            journal.close()


def test_a_journal_gives_its_rows_back(tmp_path: Path) -> None:
    begun(tmp_path / "out.jsonl")
    found = resumed(tmp_path / "out.jsonl")
    assert [row.id for row in found] == ["d0", "d1", "d2", "d3", "d4"]
    for i, (row, count) in enumerate(zip(found, [0, 2, 5, 1, 2], strict=True)):
        np.testing.assert_array_equal(row.output, matrix(i, "tokens", 3, count).output)


@pytest.mark.parametrize("name", ["vectors.f32", "rows.jsonl", "journal.json"])
def test_a_damaged_journal_gives_its_rows_or_one_error(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    begun(out)
    path = beside(out) / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        begun_again = bytearray(whole)
        begun_again[place] ^= 5
        path.write_bytes(begun_again)
        try:
            found = resumed(out)
        except CorpusError:
            pass
        else:
            assert [len(row.output) for row in found] == [0, 2, 5, 1, 2]
        for file in beside(out).iterdir():
            file.unlink()
        begun(out)


def test_the_journal_of_plain_vectors_names_no_number_of_vectors(tmp_path: Path) -> None:
    journal, lock = Journal.open(tmp_path / "out.jsonl", {}, 3, resume=True)
    with lock:
        journal.add([Result("x", np.zeros(3, np.float32), "miss", None, None, None)])
        journal.checkpoint(journal.here(1, "digest"))
        journal.close()
    content = json.loads((beside(tmp_path / "out.jsonl") / "journal.json").read_text())
    assert content["format"] == 2
    assert all("vectors" not in checkpoint for checkpoint in content["checkpoints"])
    assert (
        beside(tmp_path / "out.jsonl") / "rows.jsonl"
    ).read_text() == '["x", "miss", null, null, null, null, false]\n'
