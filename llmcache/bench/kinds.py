"""Measurements of every kind of model: the plain library beside a cache that holds none or all of the inputs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from llmcache.bench.harness.turns import Action, Measurement, Row, Turn, freed, in_turn, steady
from llmcache.cache import LLMCache
from llmcache.errors import ConfigError
from llmcache.pipeline.chunking import chunks
from llmcache.pipeline.pipeline import Pipeline

_QUERIES, _DOCUMENTS = 100, 50  # sides of the grid of pairs
_LIMIT, _OTHER = 800, 400  # most characters of a chunk in the first and in the second cutting of the documents


@dataclass(frozen=True, slots=True)
class Kind:
    """One comparison. inputs: texts, or pairs. method: of model and cache, by name. settings: of its calls."""

    name: str
    model: Any
    inputs: Sequence[Any]
    method: str
    settings: dict[str, Any]

    def by(self, owner: Any) -> Any:
        """Call the method of the model, or of a cache of it, on all inputs."""
        return getattr(owner, self.method)(list(self.inputs), **self.settings)


def pairs_of(texts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Return pairs of different texts, in a fixed order: each text with the next one."""
    return list(zip(texts[:count], [*texts[1:], texts[0]][:count], strict=True))


def compared(kind: Kind, repeats: int) -> list[Row]:
    """Measure the plain library and the cache with none (stored durably) and all of the inputs. Returns one row each.

    difference: largest difference of any number to the plain library's.
    """
    base = "plain library"
    reference = kind.by(kind.model)  # warms up, too
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as name:
        folder = Path(name)
        with LLMCache.open(folder / "full", kind.model) as cache:
            kind.by(cache)

        @contextmanager
        def empty(_: int) -> Iterator[Action]:
            with LLMCache.open(folder / "new", kind.model) as cache:

                def computed() -> Any:
                    outputs = kind.by(cache)
                    cache.commit()
                    return outputs

                yield computed
            shutil.rmtree(folder / "new")

        @contextmanager
        def full(_: int) -> Iterator[Action]:
            with LLMCache.open(folder / "full", kind.model) as cache:
                kind.by(cache)  # maps the files, and audits the first hits
                yield lambda: kind.by(cache)

        made = in_turn(
            [
                Turn(base, len(kind.inputs), steady(lambda: kind.by(kind.model)), base),
                Turn("all miss", len(kind.inputs), empty, base),
                Turn("all hit", len(kind.inputs), full, base, least=0.2),
            ],
            repeats,
            warm=0,
            keep=1,
        )
    return _rows(kind.name, made, reference)


def _rows(kind: str, made: Mapping[str, Measurement], reference: Any) -> list[Row]:
    """Return the measurements of a kind as rows, each with its largest difference to the reference."""
    for row in made.values():
        row.difference = difference(row.outputs[-1], reference)
    names = ("name", "documents", "seconds", "rate", "ratio", "difference")
    return [{"kind": kind} | row.row(*names) for row in made.values()]


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of any number of two results of an `encode` or `predict`. Infinity for shapes."""
    if isinstance(ours, list):
        return max((difference(one, other) for one, other in zip(ours, theirs, strict=True)), default=0.0)
    arrays = [_dense(one) for one in (ours, theirs)]
    if arrays[0].shape != arrays[1].shape:
        return float("inf")
    return float(np.abs(arrays[0] - arrays[1]).max(initial=0.0))


def _dense(values: Any) -> Any:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    return (values.to_dense() if values.is_sparse else values).float().cpu().numpy()


def grid(model: CrossEncoder, texts: Sequence[str], repeats: int) -> list[Row]:
    """Measure 100 x 50 pairs, of which half are stored: the queries with every second document. Returns one row each.

    ConfigError for fewer than 150 texts.
    """
    if len(texts) < _QUERIES + _DOCUMENTS:
        raise ConfigError(f"the corpus has {len(texts)} different texts; the grid needs {_QUERIES + _DOCUMENTS}")
    queries, documents = texts[:_QUERIES], texts[_QUERIES : _QUERIES + _DOCUMENTS]
    pairs = [(query, document) for query in queries for document in documents]
    known = [(query, document) for query in queries for document in documents[::2]]
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as name:
        folder = Path(name)
        with LLMCache.open(folder / "half", model) as cache:
            cache.predict(known)

        @contextmanager
        def half(_: int) -> Iterator[Action]:
            shutil.copytree(folder / "half", folder / "work")
            with LLMCache.open(folder / "work", model) as cache:
                cache.predict(known)

                def scored() -> Any:
                    scores = cache.predict(pairs)
                    cache.commit()
                    return scores

                yield scored
            shutil.rmtree(folder / "work")

        base = "plain library"
        plain = steady(lambda: model.predict(pairs))
        made = in_turn(
            [Turn(base, len(pairs), plain, base), Turn("half stored", len(pairs), half, base)], repeats, keep=1
        )
    return _rows("100 x 50 pairs", made, made[base].outputs[-1])


def late(model: SentenceTransformer, documents: Sequence[str], repeats: int) -> list[Row]:
    """Measure late chunks of documents that were cut otherwise before. Returns one row each.

    difference: largest difference to chunks pooled directly from the model's token embeddings, of documents that the
    model reads at once.
    """

    def cut(limit: int, text: str) -> list[tuple[int, int]]:
        return [(chunk.start, chunk.end) for chunk in chunks(text, limit=limit, least=limit // 4)]

    def cutting(limit: int) -> Callable[[str], list[tuple[int, int]]]:
        return partial(cut, limit)

    base = "model alone, the documents"
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as name:
        with LLMCache.open(Path(name) / "store", model) as cache:
            [*Pipeline(cache, chunk=cutting(_LIMIT), per="chunk", late=True).run(documents)]

        @contextmanager
        def again(_: int) -> Iterator[Action]:
            with LLMCache.open(Path(name) / "store", model) as cache:
                pipeline = Pipeline(cache, chunk=cutting(_OTHER), per="chunk", late=True)
                [*pipeline.run(documents[:8])]  # maps the files, and audits the first hits
                yield lambda: [*pipeline.run(documents)]

        plain = steady(freed(lambda: model.encode(list(documents), show_progress_bar=False)))
        made = in_turn(
            [
                Turn(base, len(documents), plain, base),
                Turn("late chunks, cut anew", len(documents), again, base, least=0.2),
            ],
            repeats,
            warm=0,
            keep=1,
        )
    results = {result.id: result.output for result in made["late chunks, cut anew"].outputs[-1]}
    made["late chunks, cut anew"].difference = _late_difference(model, documents[:64], cutting(_OTHER), results)
    names = ("name", "documents", "seconds", "rate", "ratio", "difference")
    return [{"kind": "late chunks"} | row.row(*names) for row in made.values()]


def _late_difference(model: SentenceTransformer, documents: Sequence[str], cut: Any, results: dict[str, Any]) -> float:
    """Return the largest difference of late chunks to means of the token embeddings that the model itself gives."""
    largest, tokenizer = 0.0, model.tokenizer
    for number, text in enumerate(documents):
        read = tokenizer(text, return_offsets_mapping=True)
        if len(read["input_ids"]) > (model.max_seq_length or len(read["input_ids"])):
            continue
        states: Any = model.encode(text, output_value="token_embeddings", show_progress_bar=False)
        ends = np.array(read["offset_mapping"])[:, 1]
        for start, end in cut(text):
            mean = states.numpy()[(ends > start) & (ends <= end)].astype(np.float64).mean(0)
            direct = mean / np.linalg.norm(mean)
            largest = max(largest, float(np.abs(results[f"{number}#{start}-{end}"] - direct).max()))
    return largest
