"""Roofline of the tiers: bytes and operations of each, beside the measured limits of the machine.

Limits and tiers are measured in turn in one process, so that a busy machine slows both. A floor is the time of a tier
if its bytes moved at the speed of `memcpy`, or its operations ran at that of a large matrix product.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache.arrays import Floats32
from llmcache.bench.harness.conditions import load
from llmcache.bench.harness.turns import Measurement, Row, Turn, freed, in_turn, steady
from llmcache.cache import LLMCache
from llmcache.decoders.kv_buffer import KVBuffer, KVLayout
from llmcache.decoders.prefix_cache import restore
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.search.vector_index import VectorIndex, choose_kind
from llmcache.indexes.store import Store
from llmcache.model.batching import compute, token_embedding
from llmcache.model.encoders import Sentences
from llmcache.model.features import features
from llmcache.near.neighbors.correction import Voting
from llmcache.near.neighbors.index import Entries, HostNeighborIndex, rounded
from llmcache.near.neighbors.predictor import LANDMARKS, Predictor, directions

BATCH, TOKENS, WIDTH = 256, 150, 384
"""Rows read together, and the shape of one row of a layer's bank: float32 [150, 384]."""
BEGINNING, BLOCK = 512, 16
"""Tokens of a decoder's prefix, and of one KV block."""
QUERY = 12
"""Tokens of a query."""
HELD = 200_000
"""Most entries that near reuse holds in memory (`llmcache.near.neighbors.bank_entries.MOST`)."""
_COPIED = 256 << 20
_SIDE = 2048
_ROWS = 2048  # of a layer, 472 MB
_BEGINNINGS = 8  # 315 MB


@dataclass(frozen=True, slots=True)
class _Task:
    tier: str
    what: str
    documents: int
    moved: float
    operations: float
    act: Callable[[], object]


def roofline(
    model: SentenceTransformer, texts: Sequence[str], *, repeats: int = 5, entries: Sequence[int] = (10_000, 1_000_000)
) -> Row:
    """Measure all tiers against their floors, and near look-ups against the model.

    texts: a few thousand distinct documents. entries: store sizes for near look-ups, which are compared with the
    model's time for a query of 12 tokens.
    Returns rows, near (a row per size) and the limits. Of a row, seconds and share (floor over seconds) are medians;
    bytes and operations are those of one repeat.
    """
    before = load()
    found: list[tuple[_Task, Measurement]] = []
    copies, products = [], []
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as name:
        for task in _tasks(model, list(dict.fromkeys(texts)), Path(name)):
            made = in_turn([*_limits(), Turn(task.what, task.documents, steady(task.act))], repeats)
            copies += [_COPIED / seconds for seconds in made["copy"].seconds]
            products += [2 * _SIDE**3 / seconds for seconds in made["product"].seconds]
            found.append((task, made[task.what]))
    # medians over all repeats: a copy during the kernel's page reclaim is several times as slow as the next
    copied, multiplied = statistics.median(copies), statistics.median(products)
    rows = []
    for task, measured in found:
        moving, counting = task.moved / copied, task.operations / multiplied
        bound, floor = ("memory", moving) if moving >= counting else ("arithmetic", counting)
        shares = [floor / seconds for seconds in measured.seconds]
        rows.append({
            "tier": task.tier, "what": task.what, "documents": task.documents, "bound": bound,
            "bytes": task.moved, "operations": task.operations, "seconds": measured.median,
            "microseconds_per_document": 1e6 / measured.rate,
            "floor_seconds": floor, "share": statistics.median(shares), "shares": shares,
        })  # fmt: skip
    near = [near_look_up(model, size, repeats) for size in entries]
    return {
        "rows": rows, "near": near, "load": [before, load()],
        "copy_bytes_per_second": copied, "operations_per_second": multiplied,
    }  # fmt: skip


def _limits() -> list[Turn]:
    """Return a copy into new memory, which every read makes, and a large matrix product."""
    source, square = np.ones(_COPIED // 8, np.float64), np.ones((_SIDE, _SIDE), np.float32)

    return [
        Turn("copy", 1, steady(freed(source.copy))),
        Turn("product", 1, steady(freed(lambda: square @ square))),
    ]


# -- tiers --------------------------------------------------------------------------------------------------


def _tasks(model: SentenceTransformer, texts: list[str], folder: Path) -> Iterator[_Task]:
    with closing(Store.open(folder / "layer", create=True)) as store:
        bank, keys = _layer(store)
        order = np.random.default_rng(1).permutation(_ROWS)
        batches = [keys[order[start : start + BATCH]] for start in range(0, _ROWS, BATCH)]
        size = _ROWS * TOKENS * WIDTH * 4
        yield _Task(
            "exact", f"rows of {TOKENS} x {WIDTH} float32, batches of {BATCH}", _ROWS, size, 0,
            freed(lambda: [bank.read(bank.find(batch)) for batch in batches]),
        )  # fmt: skip
    yield from _beginnings(folder)
    with LLMCache.open(folder / "output", model) as cache:
        outputs = np.asarray(cache.encode(texts, batch_size=64))
        cache.commit()
        characters = sum(map(len, texts))
        yield _Task(
            "exact", "texts to vectors, end to end", len(texts), outputs.nbytes + characters, 0,
            lambda: cache.encode(texts, batch_size=64),
        )  # fmt: skip
        execution = Sentences(model)
        tokens = execution.tokenise(texts, None, None)
        embedding = token_embedding(model)
        width = int(embedding.shape[1])
        total = int(tokens.lengths.sum())
        yield _Task(
            "near", "fingerprints: mean token embeddings", len(texts), 4.0 * width * total, 0,
            lambda: features(embedding, tokens.ids, "mean"),
        )  # fmt: skip
    predictor = _predictor(width, outputs.shape[1])
    raw = features(embedding, tokens.ids, "mean")
    flops = 2.0 * (width * 256 + 256 * LANDMARKS + LANDMARKS * outputs.shape[1])
    yield _Task(
        "near", f"predicted outputs, {LANDMARKS} landmarks", len(raw), 0, flops * len(raw), lambda: predictor(raw)
    )
    yield from _searches()
    yield from _storing(folder, texts, outputs)


def _beginnings(folder: Path) -> Iterator[_Task]:
    """Restore keys, values and states of GPT-2-small's shape from KV blocks into the layout of a forward."""
    heads, dim, layers = 12, 64, 12
    shape = KVLayout(((heads, dim),) * (2 * layers), heads * dim, torch.float32, True, True, tuple)
    each = BEGINNING // BLOCK
    with closing(Store.open(folder / "prefix", create=True)) as store:
        store.declare("default", {"name": "bench"}, {})
        bank = store.bank("default", "prefix", lambda: shape.facts, _NO_INDEX)
        random = np.random.default_rng(5)
        keys = []
        for _ in range(_BEGINNINGS):
            keys.append(_put(bank, list(random.standard_normal((each, BLOCK, shape.record), np.float32)), BLOCK))
            store.commit()

        def act() -> None:
            for one in keys:
                held = KVBuffer.empty(shape, [BEGINNING + 1], [0], BEGINNING + 1, torch.device("cpu"))
                restore(held, 0, list(bank.read(bank.find(one)).values), BEGINNING)

        size = _BEGINNINGS * BEGINNING * shape.record * 4
        yield _Task("prefix", f"beginnings of {BEGINNING} tokens, GPT-2-small", _BEGINNINGS, size, 0, act)


def _searches() -> Iterator[_Task]:
    """Search a flat index, which compares every vector: bound by arithmetic in large batches."""
    random = np.random.default_rng(2)
    vectors = _units(random.standard_normal((10_000, 64)))
    queries = _units(random.standard_normal((2048, 64)))
    index = VectorIndex.build(vectors, kind="flat")
    operations = 2.0 * len(queries) * len(vectors) * 64
    yield _Task(
        "near", "8 nearest of 10,000, flat, 64 components", len(queries), 0, operations,
        lambda: index.nearest(queries, 8),
    )  # fmt: skip


def _storing(folder: Path, texts: list[str], outputs: Floats32) -> Iterator[_Task]:
    """Put and commit vectors; the floor is a copy, to which the disk adds."""
    count = [0]

    def store() -> None:
        count[0] += 1
        with closing(Store.open(folder / f"stored-{count[0]}", create=True)) as opened:
            opened.declare("default", {"name": "bench"}, {})
            _put(opened.bank("default", "output", lambda: BankFacts("float32", outputs.shape[1], 1, 0), _NO_INDEX),
                 outputs)  # fmt: skip
            opened.commit()

    yield _Task("store", f"vectors of {outputs.shape[1]} float32, committed", len(outputs), outputs.nbytes, 0, store)


_NO_INDEX = NearChoice(projection="none", index="flat")


def _layer(store: Store) -> tuple[Bank, NDArray[np.uint64]]:
    store.declare("default", {"name": "bench"}, {})
    bank = store.bank("default", "layer-0", lambda: BankFacts("float32", WIDTH, 2, 0), _NO_INDEX)
    random = np.random.default_rng(0)
    keys = []
    for _ in range(0, _ROWS, BATCH):
        keys.append(_put(bank, list(random.standard_normal((BATCH, TOKENS, WIDTH), np.float32))))
        store.commit()
    return bank, np.concatenate(keys)


def _put(bank: Bank, values: Any, tokens: int = TOKENS) -> NDArray[np.uint64]:
    n = len(values)
    keys = np.random.default_rng(len(bank)).integers(1, 1 << 63, (n, 2)).astype(np.uint64)
    bank.put(
        keys, values, tokens=[np.arange(tokens, dtype=np.int32)] * n, sources=[""] * n,
        features=np.zeros((n, 0), np.float32), cost=np.full(n, 0.002, np.float32),
    )  # fmt: skip
    return keys


# -- near look-ups ------------------------------------------------------------------------------------------


def near_look_up(model: SentenceTransformer, entries: int, repeats: int) -> Row:
    """Measure milliseconds per query of 12 tokens: near look-ups with corrected results, plain look-ups, the model.

    Entries are drawn around centres. Near reuse holds at most 200,000 of them in memory; the plain rule (`tau`)
    searches an index over all of them.
    """
    random = np.random.default_rng(3)
    held = min(entries, HELD)
    tokens = [random.integers(1000, 20_000, QUERY).astype(np.int32) for _ in range(2048)]
    sentences = Sentences(model)
    queries = sentences.tokenise(["a"], None, None).like(tokens)
    embedding = token_embedding(model)
    width, out = int(embedding.shape[1]), int(model.get_embedding_dimension() or 0)
    raw = features(embedding, tokens, "mean")
    predictor, like = _predictor(width, out), random.integers(0, len(raw), held)
    predictions = predictor(raw)[like] + 0.1 * random.standard_normal((held, out), np.float32)
    outputs = _units(random.standard_normal((held, out), np.float32))
    known = Entries(raw[like].astype(np.float16), outputs, [tokens[i] for i in like.tolist()])
    memory = HostNeighborIndex(known, predictor, Voting(), predictions=rounded(predictions))
    plain = VectorIndex.build(_units(random.standard_normal((entries, 128), np.float32)), kind=choose_kind(entries))
    asked, some = _units(random.standard_normal((len(tokens), 128))), queries.take(range(512))
    nothing = np.zeros((len(tokens), 0), np.float32)

    def plain_look_up() -> None:
        features(embedding, tokens, "mean")
        rows, _ = plain.nearest(asked, 1)
        outputs[rows[:, 0] % held].copy()

    def corrected() -> None:
        memory.look_up(Entries(features(embedding, tokens, "mean"), nothing, tokens))

    made = in_turn(
        [
            Turn("model", 512, steady(lambda: list(compute(sentences, some, 64, None)))),
            Turn("corrected", len(tokens), steady(corrected), "model"),
            Turn("plain", len(tokens), steady(plain_look_up), "model"),
        ],
        repeats,
    )
    return {
        "entries": entries, "held": held, "index": plain.kind,
        **{f"{name}_milliseconds": 1e3 / one.rate for name, one in made.items()},
        **{f"{name}_share": statistics.median(1 / ratio for ratio in made[name].ratios)
           for name in ("corrected", "plain")},
    }  # fmt: skip


def _predictor(width: int, out: int) -> Predictor:
    """Create a random predictor of the usual size; its predictions do not matter here."""
    random = np.random.default_rng(4)
    return Predictor(
        mean=np.zeros(width, np.float32), matrix=_normal(random, width, min(width, 256)),
        landmarks=_normal(random, LANDMARKS, min(width, 256)), weights=_normal(random, LANDMARKS, out),
        offset=np.zeros(out, np.float32), basis=directions(_normal(random, 2 * out, out)),
        gamma=0.002, penalty=0.1, entries=10_000, held_out=0.9,
    )  # fmt: skip


def _normal(random: np.random.Generator, rows: int, columns: int) -> Floats32:
    return random.standard_normal((rows, columns), np.float32)


def _units(vectors: NDArray[np.floating]) -> Floats32:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
