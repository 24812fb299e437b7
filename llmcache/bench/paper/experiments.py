"""Registry of the experiments, with their parts and sizes."""

from __future__ import annotations

from functools import partial

from llmcache.bench.harness.turns import Row
from llmcache.bench.paper import accuracy, fingerprints, memory
from llmcache.bench.paper import eviction as evictions
from llmcache.bench.paper import layer_hits as layerwise
from llmcache.bench.paper import thresholds as taus
from llmcache.bench.paper.decoders import decoders
from llmcache.bench.paper.latency import BATCH, latency
from llmcache.bench.paper.models import REAL, SHAPES
from llmcache.bench.paper.records import LABELLED, Experiments, Work
from llmcache.bench.paper.texts import READERS

KNOWN = 528
"""Known documents of the latency experiment: from 512 on fingerprints are compressed by PCA."""


def _latency(work: Work, model: str, data: str) -> list[Row]:
    made = work.made(model)
    asked = (work.repeats + 1) * min(BATCH, max(2, work.known(KNOWN) // 8))
    workload = READERS[data](work.data).whole(work.known(KNOWN), asked)
    with work.folder() as folder:
        rows = latency(made, workload, folder / "caches", work.repeats)
        if made.decoder is not None:
            rows += decoders(made, workload, folder / "decoder", work.repeats)
    return rows


def _layers(work: Work, model: str, data: str) -> list[Row]:
    if data in LABELLED:
        workload = work.labelled(data, 2000, 500)
    else:
        known = 640 if model == REAL else 320
        workload = READERS[data](work.data).whole(work.known(known), work.asked(known // 4))
    return layerwise.layer_hits(work.made(model), workload)


def _taus(work: Work, data: str) -> list[Row]:
    with work.folder() as folder:
        return taus.taus(work.model, work.labelled(data, 4000, 600), folder, min(3, work.repeats))


def _fingerprints(work: Work, data: str) -> list[Row]:
    return fingerprints.fingerprints(work.model, work.labelled(data, 4000, 1000), work.repeats)


def _memory(work: Work, data: str) -> list[Row]:
    with work.folder() as folder:
        return memory.memory(work.model, work.labelled(data, 1600, 600), folder)


def _replayed(work: Work, data: str) -> list[Row]:
    docs = evictions.documents(work.model, work.labelled(data, 2000, 8))
    return evictions.evictions(docs, evictions.REQUESTS if work.limit is None else 10 * work.limit)


def _stored(work: Work, data: str) -> list[Row]:
    workload = work.labelled(data, 3000, 8)
    requests = 4000 if work.limit is None else 4 * work.limit
    with work.folder() as folder:
        return evictions.in_a_store(work.model, workload, folder, requests, 2 << 20)


EXPERIMENTS: Experiments = {
    "latency": {
        f"{model}, {data}": partial(_latency, model=model, data=data) for model in (REAL, *SHAPES) for data in READERS
    },
    "layers": {
        **{f"{REAL}, {data}": partial(_layers, model=REAL, data=data) for data in (*READERS, "BANKING77")},
        "BERT-base, WikiText-2": partial(_layers, model="BERT-base", data="WikiText-2"),
    },
    "accuracy": accuracy.parts(),
    "memory": {"BANKING77": partial(_memory, data="BANKING77")},
    "tau": {name: partial(_taus, data=name) for name in LABELLED},
    "fingerprints": {name: partial(_fingerprints, data=name) for name in LABELLED},
    "eviction": {
        "replay": partial(_replayed, data="BANKING77"),
        "store": partial(_stored, data="BANKING77"),
    },
}
