"""Pipelines: inputs, refused records, memory, and results of chunks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache import Document, LLMCache, Pipeline
from llmcache.errors import ConfigError, CorpusError, ModelMismatch
from llmcache.pipeline.chunked import Chunked
from llmcache.pipeline.chunking import Chunk
from llmcache.records import intake

TEXTS = ["Where is my card?", "It has not come.", "Where is my card?", "Refund me"]
POLICY = "# Privacy\n\n" + "We keep what you write. " * 30 + "\n\n# Terms\n\n" + "You may leave at any time. " * 40


@dataclass
class Ticket:
    text: Any
    id: Any = None


class Row(NamedTuple):
    id: str
    text: str


@pytest.fixture
def cache(store: Path, model: SentenceTransformer, one_thread: None) -> Iterator[LLMCache]:
    with LLMCache.open(store, model) as opened:
        yield opened


def readers() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "llmcache-reader"]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_results_are_the_models_own_in_order_with_provenance(
    cache: LLMCache, model: SentenceTransformer, prefetch: int
) -> None:
    texts = [f"query number {i % 150}" for i in range(200)]
    found = list(Pipeline(cache, batch_size=2, prefetch=prefetch).run(texts))
    assert [one.id for one in found] == [str(i) for i in range(200)]
    assert [one.tier for one in found] == ["miss"] * 150 + ["exact"] * 50
    assert [one.source for one in found[150:]] == [str(i) for i in range(50)]
    np.testing.assert_allclose([one.output for one in found], model.encode(texts), atol=1e-6)
    assert not readers()


def records(kind: str) -> Any:
    """Return TEXTS with the ids a, b, c, d, as one kind of records."""
    ids, columns = "abcd", {"id": list("abcd"), "text": TEXTS}
    if kind == "mappings":
        return [{"id": id, "text": text, "more": 1} for id, text in zip(ids, TEXTS, strict=True)]
    if kind == "documents":
        return (Document(id, text) for id, text in zip(ids, TEXTS, strict=True))
    if kind == "dataclasses":
        return [Ticket(text, id) for id, text in zip(ids, TEXTS, strict=True)]
    if kind == "named tuples":
        return [Row(id, text) for id, text in zip(ids, TEXTS, strict=True)]
    if kind.startswith("pandas"):
        pd = pytest.importorskip("pandas", reason="install the extra 'test' for frames")
        frame = pd.DataFrame({**columns, "other": [1.5, None, 2, "x"]})
        return [frame[:1], frame[1:]] if kind.endswith("chunks") else frame
    if kind.startswith("polars"):
        pl = pytest.importorskip("polars", reason="install the extra 'test' for frames")
        frame = pl.DataFrame(columns)
        return frame.iter_slices(3) if kind.endswith("chunks") else frame
    if kind.startswith("arrow"):
        import pyarrow as pa

        table = pa.table(columns)
        return {"arrow": table, "arrow batches": table.to_batches(2), "arrow stream": table.to_reader(2)}[kind]
    datasets = pytest.importorskip("datasets", reason="install the extra 'test' for data sets")
    data = datasets.Dataset.from_dict({**columns, "other": [1, 2, 3, 4]})
    return data.to_iterable_dataset() if kind.endswith("stream") else data


KINDS = ["mappings", "documents", "dataclasses", "named tuples", "pandas", "pandas in chunks", "polars"]
KINDS += ["polars in chunks", "arrow", "arrow batches", "arrow stream", "data set", "data set as a stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_come_out_of_whatever_holds_them(kind: str) -> None:
    assert list(intake(records(kind))) == [Document(id, text) for id, text in zip("abcd", TEXTS, strict=True)]


def test_a_series_and_an_array_of_texts_are_texts() -> None:
    pd = pytest.importorskip("pandas", reason="install the extra 'test' for frames")
    for texts in (pd.Series(TEXTS), np.array(TEXTS), iter(TEXTS)):
        assert list(intake(texts)) == [Document(str(i), text) for i, text in enumerate(TEXTS)]


def test_a_column_of_whole_numbers_with_a_hole_still_gives_them_as_ids() -> None:
    pd = pytest.importorskip("pandas", reason="install the extra 'test' for frames")
    frame = pd.DataFrame({"id": [7, None, 9], "text": ["a", "b", "c"]})
    assert [one.id for one in intake(frame)] == ["7", "1", "9"]


def test_what_is_no_document_is_collected_and_the_rest_answered(cache: LLMCache) -> None:
    stream: list[Any] = [
        "good",
        None,
        3,
        b"bytes",
        {"text": float("nan")},
        {"id": "x"},
        {"text": "t", "id": [1]},
        "half \ud800",
    ]
    stream += [Ticket(None, "no text"), Ticket("fine", 5), "", "x" * 101, {"text": "last"}]
    pipeline = Pipeline(cache, max_characters=100)
    assert [one.id for one in pipeline.run(stream)] == ["0", "5", "10", "12"]
    assert pipeline.refused == len(pipeline.errors) == 9
    assert [(one.place, one.id) for one in pipeline.errors[:3]] == [(1, "1"), (2, "2"), (3, "3")]
    reasons = " / ".join(one.reason for one in pipeline.errors)
    for said in ("null", "a number", "bytes", "no field 'text', only 'id'", "surrogate", "101 characters"):
        assert said in reasons
    assert pipeline.errors[4].id == "x"
    with pytest.raises(CorpusError, match=r"document 1 .* is null"):
        list(Pipeline(cache, strict=True).run(stream))


def test_many_errors_are_counted_and_the_first_hundred_kept(cache: LLMCache) -> None:
    pipeline = Pipeline(cache, batch_size=1)
    assert [one.id for one in pipeline.run([*[None] * 5000, "a"])] == ["5000"]
    assert (pipeline.refused, len(pipeline.errors)) == (5000, 100)


def test_a_frame_without_the_column_says_which_there_are(cache: LLMCache) -> None:
    pd = pytest.importorskip("pandas", reason="install the extra 'test' for frames")
    frame = pd.DataFrame({"body": ["a"]})
    with pytest.raises(CorpusError, match=r"no column 'text', only 'body'; .*text_field"):
        list(Pipeline(cache).run(frame))
    assert [one.id for one in Pipeline(cache, text_field="body").run(frame)] == ["0"]
    pl = pytest.importorskip("polars", reason="install the extra 'test' for frames")
    with pytest.raises(ConfigError, match="lazy"):
        list(Pipeline(cache).run(pl.LazyFrame({"text": ["a"]})))


@pytest.mark.parametrize("one", ["a text", b"bytes", {"text": "a"}])
def test_one_document_instead_of_many_is_an_error(cache: LLMCache, one: Any) -> None:
    with pytest.raises(ConfigError, match="must be a collection"):
        list(Pipeline(cache).run(one))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_generator_that_raises_loses_nothing_that_came_before(cache: LLMCache, prefetch: int) -> None:
    def documents() -> Iterator[str]:
        for i in range(70):
            yield f"text {i}"
        raise ZeroDivisionError("in the corpus")

    found: list[str] = []
    results = Pipeline(cache, batch_size=1, prefetch=prefetch).run(documents())
    with pytest.raises(ZeroDivisionError, match="in the corpus"):
        found.extend(one.id for one in results)
    assert found == [str(i) for i in range(70)]
    assert not readers()


def test_a_generator_that_leaves_python_does_not_hang_the_pipeline(cache: LLMCache) -> None:
    def documents() -> Iterator[str]:
        yield "a"
        raise SystemExit(4)

    with pytest.raises(SystemExit):
        list(Pipeline(cache).run(documents()))


def test_closing_in_the_middle_ends_the_reading_and_keeps_what_was_computed(cache: LLMCache) -> None:
    taken = []

    def endless() -> Iterator[str]:
        i = 0
        while True:
            taken.append(i)
            yield f"text {i % 40}"
            i += 1

    results = Pipeline(cache, batch_size=1, prefetch=2).run(endless())
    assert next(results).tier == "miss"
    results.close()
    assert not readers()
    assert len(taken) <= 4 * 32 + 1, "of each part ahead, and the one that was answered"
    assert len(cache) == 32


def test_an_iterator_that_is_forgotten_ends_its_thread_too(cache: LLMCache) -> None:
    results = Pipeline(cache, batch_size=1).run(f"text {i}" for i in range(10_000))
    next(results)
    del results
    gc.collect()
    assert not readers()


def test_closing_does_not_wait_for_an_iterator_that_never_answers(cache: LLMCache) -> None:
    asked, release = threading.Event(), threading.Event()

    def documents() -> Iterator[str]:
        yield from (f"text {i}" for i in range(32))
        asked.set()
        release.wait()

    results = Pipeline(cache, batch_size=1).run(documents())
    next(results)
    asked.wait()
    results.close()
    release.set()


def test_two_pipelines_share_a_cache_turn_by_turn(cache: LLMCache) -> None:
    one = Pipeline(cache, batch_size=1).run(f"text {i}" for i in range(100))
    other = Pipeline(cache, batch_size=1, chunk="structure").run(f"text {i}" for i in range(100))
    pairs = list(zip(one, other, strict=True))
    assert [pair[1].tier for pair in pairs] == ["exact"] * 100
    for mine, theirs in pairs:
        np.testing.assert_array_equal(mine.output, theirs.output)


def test_settings_that_make_no_sense_are_refused(cache: LLMCache) -> None:
    odd: list[dict[str, Any]] = [{"batch_size": 0}, {"prefetch": -1}, {"chunk": "words"}, {"per": "chunk"}]
    for settings in [*odd, {"per": "word", "chunk": "structure"}, {"max_characters": 0}]:
        with pytest.raises(ConfigError):
            Pipeline(cache, **settings)


def test_a_pipeline_notices_that_the_weights_changed(store: Path, fresh_model: SentenceTransformer) -> None:
    import torch

    with LLMCache.open(store, fresh_model) as cache:
        pipeline = Pipeline(cache)
        assert len(list(pipeline.run(["a"]))) == 1
        with torch.no_grad():
            next(fresh_model.parameters()).add_(1)
        with pytest.raises(ModelMismatch):
            list(pipeline.run(["b"]))


# -- chunks -----------------------------------------------------------------------------------------------


def test_a_document_of_chunks_has_their_vectors_spans_and_weighted_mean(
    cache: LLMCache, model: SentenceTransformer
) -> None:
    (found,) = Pipeline(cache, chunk="structure").run([{"id": "p", "text": POLICY}])
    assert isinstance(found, Chunked)
    assert found.spans is not None
    assert len(found.spans) >= 3
    parts = [POLICY[start:end] for start, end in found.spans]
    assert "".join("".join(parts).split()) == "".join(POLICY.split())
    alone = model.encode(parts)
    np.testing.assert_allclose(found.vectors, alone, atol=1e-6)
    mean = np.average(alone, axis=0, weights=[len(part) for part in parts])
    np.testing.assert_allclose(found.output, mean / np.linalg.norm(mean), atol=1e-6)
    assert [one.id for one in found.chunks] == [f"p#{start}-{end}" for start, end in found.spans]
    assert (found.tier, found.layer, found.similarity) == ("miss", None, None)


def test_an_edit_computes_the_chunks_it_touches_alone(cache: LLMCache) -> None:
    pipeline = Pipeline(cache, chunk="structure")
    (first,) = pipeline.run([{"id": "v1", "text": POLICY}])
    (second,) = pipeline.run(
        [{"id": "v2", "text": POLICY.replace("# Terms", "# New\n\nSomething was added.\n\n# Terms")}]
    )
    assert isinstance(first, Chunked)
    assert isinstance(second, Chunked)
    tiers = [one.tier for one in second.chunks]
    assert tiers.count("miss") == 1
    assert len(tiers) == len(first.chunks) + 1
    assert {one.source for one in second.chunks if one.tier == "exact"} == {one.id for one in first.chunks}
    (third,) = pipeline.run([{"id": "v3", "text": POLICY}])
    assert (third.tier, third.similarity, third.layer, third.source) == ("exact", 1.0, "output", None)
    np.testing.assert_array_equal(third.output, first.output)


def test_chunks_come_out_one_by_one_on_request(cache: LLMCache) -> None:
    whole = [one for one in Pipeline(cache, chunk="structure").run([POLICY, "short"]) if isinstance(one, Chunked)]
    single = list(Pipeline(cache, chunk="structure", per="chunk").run([POLICY, "short"]))
    assert [one.id for one in single] == [chunk.id for one in whole for chunk in one.chunks]
    assert single[-1].id == "1#0-5"


def test_a_document_of_one_chunk_has_the_vector_that_encode_gives(cache: LLMCache) -> None:
    texts = ["Where is my card?", "", "  \n\n "]
    plain = cache.encode(texts)
    found = list(Pipeline(cache, chunk="structure").run(texts))
    assert [one.tier for one in found] == ["exact"] * 3
    np.testing.assert_array_equal([one.output for one in found], plain)


@pytest.mark.parametrize("text", ["\U0001f600 \u9577 " * 300, "0 1 2 3 4 5 6 7 8 9 " * 80, "a" * 5000, "\u9577" * 900])
def test_the_model_reads_every_chunk_to_its_end(cache: LLMCache, model: SentenceTransformer, text: str) -> None:
    (found,) = Pipeline(cache, chunk="structure").run([text])
    assert isinstance(found, Chunked)
    assert found.spans is not None
    most = model.max_seq_length
    assert most is not None
    for start, end in found.spans:
        tokens = len(model.tokenizer(text[start:end], truncation=False)["input_ids"])
        assert tokens <= most or not any(space in text[start:end] for space in " \n"), "only a word may be longer"
    assert "".join(text[start:end] for start, end in found.spans).replace(" ", "") == text.replace(" ", "")


def test_chunks_may_be_your_own(cache: LLMCache) -> None:
    text = "one two one"
    for cutting in (
        str.split,
        lambda text: [(0, 3), (4, 7), (8, 11)],
        lambda text: [Chunk(0, 3, ""), Chunk(4, 7, ""), Chunk(8, 11, "")],
    ):
        (found,) = Pipeline(cache, chunk=cutting).run([text])
        assert isinstance(found, Chunked)
        assert found.spans is not None
        assert found.spans.tolist() == [[0, 3], [4, 7], [8, 11]]


def test_a_document_that_cannot_be_cut_is_one_error(cache: LLMCache) -> None:
    def halves(text: str) -> list[str]:
        return [text[: 10 // len(text)], "not in it"] if text != "fine" else ["fi", "ne"]

    pipeline = Pipeline(cache, chunk=halves)
    assert [one.id for one in pipeline.run(["", "text", "fine", None])] == ["2"]
    assert [(one.place, one.id) for one in pipeline.errors] == [(0, "0"), (1, "1"), (3, "3")]
    reasons = [one.reason for one in pipeline.errors[:2]]
    assert "ZeroDivisionError" in reasons[0]
    assert "no part of its 4 characters" in reasons[1]


# -- size -------------------------------------------------------------------------------------------------


def test_a_document_of_ten_megabytes_goes_through_in_chunks(cache: LLMCache) -> None:
    line = "The same paragraph again, which is about a hundred characters long so that two make a chunk of text.\n\n"
    text = line * (10_000_000 // len(line))
    (found,) = Pipeline(cache, chunk="structure").run([text])
    assert isinstance(found, Chunked)
    assert len(found.chunks) > 40_000
    assert len(cache) <= 3
    pipeline = Pipeline(cache)
    assert list(pipeline.run([text + "x" * len(line)])) == []
    assert pipeline.refused == 1


def test_a_hundred_thousand_documents_are_never_in_memory_together(cache: LLMCache) -> None:
    alive = most = 0

    class Text(str):
        """Document that counts its living instances."""

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def documents() -> Iterator[Text]:
        nonlocal alive, most
        for i in range(100_000):
            alive += 1
            most = max(most, alive)
            yield Text(f"word {i % 90}")

    count = sum(1 for _ in Pipeline(cache, batch_size=8, prefetch=2).run(documents()))
    assert count == 100_000
    assert cache.stats().counters.misses == 90
    assert most <= 5 * 8 * 32, "in the queue, in the thread, and being answered"
