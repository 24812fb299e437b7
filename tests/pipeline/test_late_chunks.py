"""Late chunks: means of the token embeddings of the whole document, whatever the cutting, and computed once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from llmcache import Document, LLMCache, Pipeline
from llmcache.errors import ConfigError
from llmcache.pipeline.chunking import Chunk, chunks
from llmcache.pipeline.late_chunks import LateChunks
from llmcache.planning.purging import purge_documents
from tests import kinds
from tests.small_sentences import WIDTH, sentences, tiny_folder

LIMIT = 48  # tokens that the model reads
SHORT = [". ".join(sentences(2, seed=seed))[:40] for seed in range(6)]
LONG = ["\n\n".join(sentences(9, seed=seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["plain", "dense and norm"])
def model(request: pytest.FixtureRequest, folder: str) -> SentenceTransformer:
    torch.manual_seed(5)
    tail = [] if request.param == "plain" else [Dense(WIDTH, 12), Normalize()]
    modules = [Transformer(folder), Pooling(WIDTH, pooling_mode="mean"), *tail]
    made = SentenceTransformer(modules=modules, prompts={"query": "query: "}, device="cpu")
    made.max_seq_length = LIMIT
    return made


@pytest.fixture
def cache(model: SentenceTransformer, tmp_path: Path) -> Iterator[LLMCache]:
    with LLMCache.open(tmp_path / "store", model) as opened:
        yield opened


def sizes(length: int) -> Callable[[str], list[tuple[int, int]]]:
    """Return a function that cuts at the spaces after every `length` characters."""

    def cut(text: str) -> list[tuple[int, int]]:
        return [(chunk.start, chunk.end) for chunk in chunks(text, limit=length, least=length // 2)]

    return cut


def tail(model: SentenceTransformer, mean: Any) -> Any:
    """Run the modules after the pooling, one by one."""
    features: Any = {"sentence_embedding": torch.tensor(mean, dtype=torch.float32)[None]}
    for module in list(model.children())[2:]:
        features = module(features)
    return features["sentence_embedding"][0].detach().numpy()


def direct(model: SentenceTransformer, text: str, spans: list[tuple[int, int]], prompt: str = "") -> Any:
    """Return the vectors of chunks of a text that the model reads at once, from its own token embeddings."""
    states: Any = model.encode(prompt + text, output_value="token_embeddings")
    offsets = model.tokenizer(prompt + text, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) == len(states)
    vectors = []
    for start, end in spans:
        places = [i for i, (_, last) in enumerate(offsets) if start + len(prompt) < last <= end + len(prompt)]
        vectors.append(tail(model, states.numpy()[places].astype(np.float64).mean(0)))
    return np.array(vectors)


def outputs(pipeline: Pipeline, texts: Any) -> Any:
    return np.array([result.output for result in pipeline.run(texts)])


@pytest.mark.parametrize("prompt", ["", "about: "])
@pytest.mark.parametrize("length", [8, 15, 1000])
def test_chunks_are_means_of_the_documents_token_embeddings(
    cache: LLMCache, model: SentenceTransformer, length: int, prompt: str
) -> None:
    cut = sizes(length)
    pipeline = Pipeline(cache, chunk=cut, per="chunk", late=True, prompt=prompt or None)
    texts = [text[: 30 if prompt else 40] for text in SHORT]
    expected = np.concatenate([direct(model, text, cut(text), prompt) for text in texts])
    np.testing.assert_allclose(outputs(pipeline, texts), expected, rtol=1e-4, atol=1e-6)


def test_another_cutting_computes_nothing(cache: LLMCache) -> None:
    first = list(Pipeline(cache, chunk=sizes(12), per="chunk", late=True).run(SHORT + LONG))
    assert {result.tier for result in first} == {"miss"}
    computed = cache.stats().counters.misses
    again = list(Pipeline(cache, chunk=sizes(20), per="chunk", late=True).run(SHORT + LONG))
    assert {(result.tier, result.layer) for result in again} == {("exact", "tokens")}
    assert cache.stats().counters.misses == computed
    whole = list(Pipeline(cache, chunk=sizes(20), late=True).run(SHORT + LONG))
    assert [result.id for result in whole] == [str(i) for i in range(len(SHORT + LONG))]


def test_windows_of_long_documents_cover_every_token_once(model: SentenceTransformer) -> None:
    late = LateChunks(model, None)
    encode = model.tokenizer.backend_tokenizer.encode
    for text in [*LONG, "x-" * 100, "a " * 200, "word" * 30 + " end. " + "y " * 50]:
        (windows,) = late.windows([text], [[Chunk(0, len(text), text)]])
        assert not isinstance(windows, str)
        assert len(windows) > 1
        assert all(len(window.ends) <= LIMIT for window in windows)
        assert all(after.start < before.end for before, after in itertools.pairwise(windows))
        own = [end for window in windows for end in window.ends.tolist() if end >= 0]
        model.tokenizer.backend_tokenizer.no_truncation()
        ends = [end for _, end in encode(text, add_special_tokens=False).offsets]
        assert own == ends  # in order, none twice, none left out


def test_chunks_of_long_documents_are_pooled_over_their_windows(cache: LLMCache, model: SentenceTransformer) -> None:
    late, cut = LateChunks(model, None), sizes(60)
    got = outputs(Pipeline(cache, chunk=cut, per="chunk", late=True), LONG)
    expected = []
    for text in LONG:
        (windows,) = late.windows([text], [[Chunk(0, len(text), text)]])
        assert not isinstance(windows, str)
        encode: Any = model.encode
        states: Any = [
            encode(text[window.start : window.end], output_value="token_embeddings").numpy() for window in windows
        ]
        for start, end in cut(text):
            rows = [
                state[(window.ends > start) & (window.ends <= end)]
                for window, state in zip(windows, states, strict=True)
            ]
            expected.append(tail(model, np.concatenate(rows).astype(np.float64).mean(0)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prompt", ["q", "about", "note-"])
def test_a_prompt_that_joins_the_first_word_loses_no_window(model: SentenceTransformer, prompt: str) -> None:
    """The first token of the text may begin in the prompt."""
    late = LateChunks(model, prompt)
    for text in ("word and again " * 12, "x-" * 60):
        (windows,) = late.windows([text], [[Chunk(0, len(text), text)]])
        assert not isinstance(windows, str)
        assert windows[0].start == 0
        assert all(window.end > window.start for window in windows)
        ends = [end for window in windows for end in window.ends.tolist() if end >= 0]
        assert ends == sorted(set(ends))
        assert len(ends) == len(text.replace(" ", ""))  # a token for each character


def test_context_reaches_chunks(cache: LLMCache) -> None:
    """A chunk has another vector in another document, unlike chunks that are embedded by themselves."""
    texts = ["the rate. it is low", "the lamp. it is low"]
    cut: Any = lambda text: [(0, 9), (10, len(text))]  # noqa: E731
    late = outputs(Pipeline(cache, chunk=cut, per="chunk", late=True), texts)
    alone = outputs(Pipeline(cache, chunk=cut, per="chunk"), texts)
    assert np.abs(late[1] - late[3]).max() > 1e-3
    np.testing.assert_allclose(alone[1], alone[3], atol=1e-6)


def test_random_cuttings_of_random_texts(cache: LLMCache, model: SentenceTransformer) -> None:
    """Spans may overlap, repeat, and lie in any order."""
    drawn = random.Random(3)
    for _ in range(40):
        text = "".join(drawn.choice("ab cd. e") for _ in range(40)).strip() or "a"
        spans: list[tuple[int, int]] = []
        while len(spans) < 4:
            start = drawn.randrange(len(text))
            end = drawn.randrange(start + 1, len(text) + 1)
            if text[start:end].strip():
                spans.append((start, end))

        def cut(_: str, spans: list[tuple[int, int]] = spans) -> list[tuple[int, int]]:
            return spans

        pipeline = Pipeline(cache, chunk=cut, per="chunk", late=True)
        ends = [end for _, end in model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
        got = list(pipeline.run([text]))
        if all(any(start < end <= stop for end in ends) for start, stop in spans):
            np.testing.assert_allclose([one.output for one in got], direct(model, text, spans), rtol=1e-4, atol=1e-6)
        else:
            assert not got
            assert "without tokens" in pipeline.errors[0].reason


def test_a_chunk_without_tokens_is_refused_with_the_document(cache: LLMCache) -> None:
    pipeline = Pipeline(cache, chunk=lambda text: [(0, 1), (1, 2), (2, len(text))], per="chunk", late=True)
    results = list(pipeline.run(["a b", "abc", ""]))
    assert [result.id for result in results] == ["1#0-1", "1#1-2", "1#2-3"]
    assert [(record.place, record.id) for record in pipeline.errors] == [(0, "0"), (2, "2")]
    assert pipeline.refused == 2


def test_an_interrupted_run_is_continued(cache: LLMCache, tmp_path: Path) -> None:
    texts = [Document(f"d{i}", text) for i, text in enumerate((SHORT + LONG) * 3)]

    def pipeline(length: int = 12, late: bool = True) -> Pipeline:
        return Pipeline(cache, chunk=sizes(length), per="chunk", late=late, batch_size=1, prefetch=0)

    pipeline().write(texts, tmp_path / "whole.parquet")
    stopped = pipeline().write(texts, tmp_path / "parts.parquet", max_documents=1)
    if not stopped.finished:
        with pytest.raises(ConfigError, match="late"):
            pipeline(late=False).write(texts, tmp_path / "parts.parquet", resume=True)
        pipeline().write(texts, tmp_path / "parts.parquet", resume=True)
    tables = [pyarrow.parquet.read_table(tmp_path / name) for name in ("whole.parquet", "parts.parquet")]
    assert tables[0]["id"].to_pylist() == tables[1]["id"].to_pylist()
    for one, other in zip(*(table["output"].to_pylist() for table in tables), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_purge_by_id_removes_the_windows(model: SentenceTransformer, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with LLMCache.open(store, model) as cache:
        documents = [Document("short", SHORT[0]), Document("long", LONG[0]), Document("kept", LONG[1])]
        [*Pipeline(cache, chunk=sizes(20), per="chunk", late=True).run(documents)]
    purge_documents(store, ids=["short", "long"])
    with LLMCache.open(store, model) as cache:
        tiers = {one.id: one.tier for one in Pipeline(cache, chunk=sizes(1000), late=True).run(documents)}
    assert tiers == {"short": "miss", "long": "miss", "kept": "exact"}


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder", "MultiVectorEncoder", "cls", "max", "lower"])
def test_models_without_late_chunks_are_refused(folder: str, tmp_path: Path, kind: str) -> None:
    if kind in kinds.MAKERS:
        made = kinds.MAKERS[kind](folder)
    else:
        mode: Any = kind if kind in ("cls", "max") else "mean"
        made = SentenceTransformer(modules=[Transformer(folder), Pooling(WIDTH, pooling_mode=mode)], device="cpu")
        made[0].__dict__["do_lower_case"] = kind == "lower"
    refused = pytest.raises(ConfigError, match=r"late=True|leave chunk out")
    with LLMCache.open(tmp_path / "store", made) as cache, refused:
        Pipeline(cache, chunk="structure", per="chunk", late=True)


def test_late_needs_chunks(cache: LLMCache) -> None:
    tokens = {"chunk": "structure", "per": "chunk", "output_value": "token_embeddings"}
    cases: list[dict[str, Any]] = [{}, tokens]
    for settings in cases:
        with pytest.raises(ConfigError, match="late=True pools the vectors of chunks"):
            Pipeline(cache, late=True, **settings)
