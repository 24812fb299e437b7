"""Every input is answered in full or refused by name: none is silently cut, split or dropped, and counts add up."""

from __future__ import annotations

import itertools
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import LLMCache, Pipeline
from llmcache.document import Document
from llmcache.errors import ConfigError, CorpusError, LLMCacheError
from llmcache.pipeline.chunked import Chunked, _by_caller
from llmcache.pipeline.chunking import Chunk
from llmcache.records import RejectedRecord, intake
from tests.conftest import Command

IDS = ["a", 7, None, float("nan"), 3.0, np.int64(9), np.float32("nan"), uuid.UUID(int=5), "None", "nan"]


@pytest.fixture
def cache(store: Path, model: SentenceTransformer) -> Iterator[LLMCache]:
    with LLMCache.open(store, model) as opened:
        yield opened


# -- one where many are meant -----------------------------------------------------------------------------


def single_inputs() -> dict[str, Any]:
    """Single documents, and values that are no documents, by name."""
    return {
        "text": "card",
        "empty text": "",
        "bytes": b"card",
        "path": Path("corpus.jsonl"),
        "document": Document("a", "card"),
        "record": {"id": "a", "text": "card"},
        "columns": {"id": ["a", "b"], "text": ["one", "two"]},
        "mapping without a text": {"body": "card"},
        "number": 3,
        "nothing": None,
    }


def calibrated_with(cache: LLMCache, given: Any) -> None:
    if given is None:  # means the entries themselves
        raise ConfigError("documents must be a collection")
    cache.calibrate(given, budget=0.1, drift="cosine")


WAYS: dict[str, Any] = {
    "run": lambda cache, given: list(cache.run(given)),
    "warm": lambda cache, given: cache.warm(given),
    "plan": lambda cache, given: cache.plan(given),
    "pipeline": lambda cache, given: list(Pipeline(cache).run(given)),
    "calibrate": calibrated_with,
}


@pytest.mark.parametrize("kind", single_inputs())
@pytest.mark.parametrize("way", WAYS)
def test_one_input_where_many_are_meant_is_refused_by_name(cache: LLMCache, kind: str, way: str) -> None:
    with pytest.raises(LLMCacheError, match=r"documents (are|must be)") as refused:
        WAYS[way](cache, single_inputs()[kind])
    assert "\n" not in str(refused.value)
    assert len(cache) == 0, "no letter, key or column name was taken for a document"


@pytest.mark.parametrize("way", ["run", "heads"])
def test_records_that_are_no_documents_are_named_with_their_place(
    cache: LLMCache, model: SentenceTransformer, way: str
) -> None:
    for bad in (None, 3, b"bytes", {"text": None}, {"body": "x"}, {"id": [1], "text": "x"}, "half \ud800"):
        records: list[Any] = ["one", "two", bad, "three"]
        with pytest.raises(CorpusError, match="document 2 "):
            list(cache.run(records) if way == "run" else cache.run_heads(records, {"same": model}))


def tables(ids: list[Any], texts: list[str]) -> dict[str, Any]:
    """Make the same documents as every kind of table that is installed."""
    pd = pytest.importorskip("pandas", reason="install the extra 'test' for frames")
    pl = pytest.importorskip("polars", reason="install the extra 'test' for frames")
    datasets = pytest.importorskip("datasets", reason="install the extra 'test' for data sets")
    import pyarrow as pa

    numbers = pd.array(ids, dtype="Int64")
    given = {
        "pandas, nullable": pd.DataFrame({"id": numbers, "text": texts}),
        "pandas, Arrow types": pd.DataFrame({"id": pd.array(ids, dtype="int64[pyarrow]"), "text": texts}),
        "pandas, objects": pd.DataFrame({"id": pd.Series(ids, dtype=object), "text": texts}),
        "pandas, floats": pd.DataFrame({"id": pd.Series(ids, dtype=float), "text": texts}),
        "pandas, strings": pd.DataFrame({"id": numbers, "text": pd.array(texts, dtype="string")}),
        "polars": pl.DataFrame({"id": ids, "text": texts}),
        "arrow": pa.table({"id": ids, "text": texts}),
        "arrow, large strings": pa.table({"id": ids, "text": pa.array(texts, pa.large_string())}),
        "arrow, dictionary": pa.table({"id": ids, "text": pa.array(texts).dictionary_encode()}),
    }
    plain = datasets.Dataset.from_dict({"id": ids, "text": texts})
    for form in (None, "torch", "numpy", "arrow", "pandas", "polars"):
        given[f"data set, {form}"] = plain.with_format(form)
    for form in (None, "torch", "numpy", "arrow"):
        given[f"data set as a stream, {form}"] = plain.to_iterable_dataset().with_format(form)
    given["data set, a column formatted"] = plain.with_format("torch", columns=["id"])
    return given


@pytest.mark.parametrize("missing", [False, True])
def test_every_kind_of_table_gives_all_its_documents(missing: bool) -> None:
    ids, texts = [11, None if missing else 12, 13, 14], ["one", "", "three, with more", "\u56db"]
    expected = [
        Document(str(place if id is None else id), text)
        for place, (id, text) in enumerate(zip(ids, texts, strict=True))
    ]
    for kind, given in tables(ids, texts).items():
        assert list(intake(given)) == expected, kind


def test_run_takes_tables_as_pipelines_do(cache: LLMCache, model: SentenceTransformer) -> None:
    pd = pytest.importorskip("pandas", reason="install the extra 'test' for frames")
    found = list(cache.run(pd.DataFrame({"text": ["a", "b", "c"]})))
    np.testing.assert_allclose([one.output for one in found], model.encode(["a", "b", "c"]), atol=1e-6)


@pytest.mark.parametrize("id", IDS)
def test_an_id_is_kept_as_it_is_and_a_missing_one_becomes_the_place(cache: LLMCache, id: Any) -> None:
    missing = id is None or (isinstance(id, float | np.floating) and math.isnan(id))
    expected = "1" if missing else str(int(id)) if isinstance(id, float) else str(id)
    records: list[Any] = ["first", {"id": id, "text": "second"}]
    assert [one.id for one in cache.run(records)] == ["0", expected]
    assert [one.id for one in Pipeline(cache).run(records)] == ["0", expected]


def test_every_record_is_answered_or_refused(cache: LLMCache) -> None:
    pick = Random(5)
    kinds: list[Any] = ["a text", "", None, 3, b"x", {"text": "t"}, {"body": "t"}, {"id": None, "text": "u"}, "\ud800"]
    records = [pick.choice(kinds) for _ in range(300)]
    pipeline = Pipeline(cache)
    answered = sum(1 for _ in pipeline.run(records))
    assert answered + pipeline.refused == len(records)
    assert answered == sum(isinstance(one, Document) for one in intake(records))
    assert pipeline.refused == sum(isinstance(one, RejectedRecord) for one in intake(records))


# -- chunks -----------------------------------------------------------------------------------------------

LETTERS = {
    "chinese": "\u94f6\u884c\u8d26\u6237\u5ba2\u670d\u52a1\u624b\uff0c",
    "japanese": "\u30ab\u30fc\u30c9\u304c\u5c4a\u304d\u307e\u305b\u3093",
    "korean": "\uce74\ub4dc\uac00\uc624\uc9c0\uc54a\uc558\uc5b4\uc694",
    "base64": "ABCDEFGHijklmnop0123456789+/",
    "hexadecimal": "0123456789abcdef",
    "emoji": "\U0001f600\U0001f44d\U0001f3fd\u2764\ufe0f",
    "url": "abc/def?x=%20&y=-_.",
}


@pytest.mark.parametrize(("letters", "size"), list(itertools.product(LETTERS, [100, 900, 5000])))
def test_the_model_reads_text_without_spaces_to_its_end(
    cache: LLMCache, model: SentenceTransformer, letters: str, size: int
) -> None:
    pick = Random(size)
    text = "".join(pick.choice(LETTERS[letters]) for _ in range(size))
    (found,) = Pipeline(cache, chunk="structure").run([text])
    assert isinstance(found, Chunked)
    assert found.spans is not None
    assert "".join(text[start:end] for start, end in found.spans) == text
    limit = model.max_seq_length
    assert limit is not None
    counts = [len(model.tokenizer(text[start:end], truncation=False)["input_ids"]) for start, end in found.spans]
    assert max(counts) <= limit


def test_text_that_the_model_cannot_read_whole_however_it_is_cut_is_refused(
    store: Path, fresh_model: SentenceTransformer
) -> None:
    fresh_model.max_seq_length = 2  # its two special tokens
    with LLMCache.open(store, fresh_model) as cache:
        pipeline = Pipeline(cache, chunk="structure")
        assert [one.id for one in pipeline.run(["", "words that do not fit"])] == ["0"]
    assert "cannot be cut into parts that the model reads whole" in pipeline.errors[0].reason


def windows(text: str, size: int, step: int) -> list[tuple[int, int]]:
    """Return positions of overlapping windows, like those of text splitters for retrieval."""
    starts = range(0, max(1, len(text) - size + step), step)
    return [(start, min(start + size, len(text))) for start in starts]


@pytest.mark.parametrize("seed", range(40))
def test_overlapping_chunks_given_as_texts_get_their_places(seed: int) -> None:
    pick = Random(seed)
    words = [f"w{pick.randrange(10_000)}" for _ in range(pick.randrange(5, 80))]  # hardly any repeats
    text = " ".join(words)
    size = pick.randrange(20, 60)
    spans = windows(text, size, pick.randrange(3, size + 1))
    (found,) = _by_caller(lambda whole: [whole[start:end] for start, end in spans], [Document("a", text)])
    assert isinstance(found, list), found
    assert [(one.start, one.end) for one in found] == spans


@pytest.mark.parametrize("seed", range(40))
def test_chunks_of_text_that_repeats_itself_are_where_their_text_is_and_leave_nothing_out(seed: int) -> None:
    pick = Random(seed)
    text = "".join(pick.choice(["ab ", "a", "b", " "]) for _ in range(60)).strip() or "a"
    size = pick.randrange(2, 12)
    spans = windows(text, size, pick.randrange(1, size + 1))
    (found,) = _by_caller(lambda whole: [whole[start:end] for start, end in spans], [Document("a", text)])
    assert isinstance(found, list), found
    for (start, end), one in zip(spans, found, strict=True):
        assert text[one.start : one.end] == one.text == text[start:end]


@pytest.mark.parametrize("bad", [None, 3, (1,), (0, 99), (-1, 2), ("a", "b"), "not in it", (2, 1), [0.5, 2.0], b"one"])
def test_a_chunk_that_is_none_refuses_its_document_alone(cache: LLMCache, bad: Any) -> None:
    pipeline = Pipeline(cache, chunk=lambda text: ["one", bad] if text == "one two" else [text])
    assert [one.id for one in pipeline.run(["fine", "one two", "fine too"])] == ["0", "2"]
    assert [one.id for one in pipeline.errors] == ["1"]
    assert "cannot be cut" in pipeline.errors[0].reason
    numpy_pair: Any = (np.int64(0), np.int64(3))
    assert _by_caller(lambda _: [numpy_pair], [Document("a", "one two")]) == [[Chunk(0, 3, "one")]]


# -- encode -----------------------------------------------------------------------------------------------

TEXTS = ["where is my card", "", "the fee was charged twice"]


def test_every_way_to_call_encode_is_answered_by_the_cache(cache: LLMCache, model: SentenceTransformer) -> None:
    ways: dict[str, Any] = {
        "inputs": lambda encode: encode(inputs=TEXTS),
        "their former name": lambda encode: encode(sentences=TEXTS),
        "pool and chunk_size of None": lambda encode: encode(TEXTS, pool=None, chunk_size=None),
        "a chunk_size without a pool": lambda encode: encode(TEXTS, chunk_size=8),
        "task of None": lambda encode: encode(TEXTS, task=None),
        "positional": lambda encode: encode(TEXTS, None, None, 2, False, "sentence_embedding", "float32", True, False),
        "a tuple": lambda encode: encode(tuple(TEXTS)),
        "an array": lambda encode: encode(np.array(TEXTS)),
    }
    for name, way in ways.items():
        np.testing.assert_allclose(way(cache.encode), way(model.encode), atol=1e-6, err_msg=name)
    for role in ("query", "document"):
        mine, theirs = getattr(cache, f"encode_{role}"), getattr(model, f"encode_{role}")
        np.testing.assert_allclose(mine(TEXTS, None, None, 2), theirs(TEXTS, None, None, 2), atol=1e-6)
        np.testing.assert_allclose(mine(inputs=TEXTS), theirs(inputs=TEXTS), atol=1e-6)
    assert cache.stats().counters.bypassed == 0


def test_what_goes_past_the_cache_says_why_once(cache: LLMCache, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        cache.encode(TEXTS, output_value=None)
    said = [one.getMessage() for one in caplog.records if "past the cache" in one.getMessage()]
    assert said == ["encode goes past the cache: output_value=None is not kept"]
    assert cache.stats().counters.bypassed == 2 * len(TEXTS)


def test_a_model_whose_encode_is_the_cache_s_own_does_not_call_itself_for_ever(
    store: Path, fresh_model: SentenceTransformer
) -> None:
    plain = fresh_model.encode(TEXTS)
    tokens: Any = fresh_model.encode(TEXTS, output_value="token_embeddings")
    with LLMCache.open(store, fresh_model) as cache:
        fresh_model.encode = cache.encode  # type: ignore[method-assign]
        np.testing.assert_allclose(fresh_model.encode(TEXTS), plain, atol=1e-6)
        again: Any = fresh_model.encode_query(TEXTS, output_value="token_embeddings")
        for mine, theirs in zip(again, tokens, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
        assert [one.tier for one in cache.run(TEXTS)] == ["exact"] * 3


def test_a_frame_is_not_taken_for_its_column_names(cache: LLMCache) -> None:
    pd = pytest.importorskip("pandas", reason="install the extra 'test' for frames")
    with pytest.raises(ConfigError, match="one of its columns"):
        cache.encode(pd.DataFrame({"text": TEXTS}))
    np.testing.assert_array_equal(cache.encode(pd.Series(TEXTS)), cache.encode(TEXTS))


# -- counts -----------------------------------------------------------------------------------------------


def test_filling_a_store_counts_nothing_as_saved_and_using_it_does(cache: LLMCache) -> None:
    first, second = cache.warm(TEXTS), cache.warm(TEXTS)
    assert (first.misses, second.exact) == (3, 3)
    assert cache.stats().counters.saved_seconds == 0
    list(cache.run(TEXTS))
    saved = cache.stats().counters.saved_seconds
    assert saved > 0
    cache.warm(TEXTS)
    assert cache.stats().counters.saved_seconds == saved


def test_a_run_that_is_interrupted_counts_what_was_answered(cache: LLMCache) -> None:
    list(cache.run(TEXTS))

    def stop(answered: int, computed: int) -> None:
        if computed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(cache.run([*TEXTS, *(f"new text {i}" for i in range(50))], batch_size=8, progress=stop))
    counters = cache.stats().counters
    assert counters.documents == 3 + 3 + 8
    assert counters.misses == 3 + 8


@pytest.mark.parametrize("command", ["build", "run"])
def test_the_command_line_says_what_was_read_answered_refused_and_left_out(
    llmcache: Command, tmp_path: Path, model_path: str, command: str
) -> None:
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "one"}\nnot JSON\n{"text": 3}\n{"text": "two"}\n')
    for name in ("notes.md", "deeper/more.MD", "scan.pdf", "README", ".hidden.md"):
        (folder / name).write_text("text")
    store, out = tmp_path / "store", tmp_path / "out.jsonl"
    if command == "run":
        llmcache("build", folder, "--model", model_path, "--store", store, "--skip-bad")
    options = ["--store", store, "--skip-bad", *(["--model", model_path] if command == "build" else ["--out", out])]
    shown = llmcache(command, folder, *options)
    assert shown.code == 0
    assert "4 files in the folders were not read (2 .md" in shown.err
    assert "records read" in shown.out
    counts = json.loads(llmcache(command, folder, *options, "--json").out)
    assert (counts["read"], counts["documents"], counts["refused"], counts["files_skipped"]) == (4, 2, 2, 4)


# -- documents that are longer than the model reads ----------------------------------------------------------


@pytest.mark.parametrize("tokens", [-1, 0, 1, 300])
def test_documents_that_fill_the_model_s_length_are_counted(
    cache: LLMCache, model: SentenceTransformer, tokens: int
) -> None:
    limit = model.max_seq_length
    assert limit is not None
    text = " ".join(["card"] * (limit - 2 + tokens))  # with the two special tokens: limit + tokens
    cache.encode([text, "short", text])
    assert cache.stats().counters.at_limit == (1 if tokens >= 0 else 0)


@pytest.mark.parametrize("chunk", ["none", "structure"])
def test_a_run_warns_of_documents_that_may_be_cut_off(
    llmcache: Command, tmp_path: Path, model_path: str, chunk: str
) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["short", "card " * 900]))
    built = llmcache("build", corpus, "--model", model_path, "--store", tmp_path / "store")
    ran = llmcache("run", corpus, "--store", tmp_path / "new", "--model", model_path, "--out", out, "--chunk", chunk)
    assert built.code == ran.code == 0
    said = "1 documents fill the model's maximum length"
    assert said in built.err
    assert (said in ran.err) == (chunk == "none")


# -- models that are no transformers ------------------------------------------------------------------------


def without_tokens() -> dict[str, Any]:
    """SentenceTransformers that do not read token ids with a mask, by their first module."""
    from sentence_transformers.sentence_transformer.modules import BoW, Pooling, StaticEmbedding, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
    from tokenizers import Tokenizer, models

    words = ["where", "is", "my", "card"]
    vectors = np.eye(len(words), 8, dtype=np.float32)
    library = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="where"))
    return {
        "WordEmbeddings": [WordEmbeddings(WhitespaceTokenizer(vocab=words), vectors), Pooling(8)],
        "BoW": [BoW(vocab=words)],
        "StaticEmbedding": [StaticEmbedding(library, embedding_weights=vectors)],
    }


@pytest.mark.parametrize("first", ["WordEmbeddings", "BoW", "StaticEmbedding"])
def test_a_model_that_reads_no_token_ids_is_refused_with_the_reason(store: Path, first: str) -> None:
    model = SentenceTransformer(modules=without_tokens()[first], device="cpu")
    with pytest.raises(ConfigError, match=first):
        LLMCache.open(store, model)
    assert not store.exists()


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_the_demo_s_model_is_found_offline_by_the_name_it_has_on_the_hub(
    store: Path, model: SentenceTransformer, name: str, llmcache: Command, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "where is my card"}\n')
    assert llmcache("build", corpus, "--model", name, "--store", store).code == 0
    with LLMCache.open(store) as cache:  # the store says which model it was made with, by that name
        assert cache.identity.name == name
        (found,) = cache.run(["where is my card"])
    assert found.tier == "exact"
    np.testing.assert_allclose(found.output, model.encode("where is my card"), atol=1e-6)
