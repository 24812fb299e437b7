"""Estimates for stores of very many documents, from measured constants. Needs neither torch nor FAISS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmcache.errors import ConfigError
from llmcache.indexes.format.manifest import BankFacts, FileFacts, Manifest, NamespaceFacts, SegmentFacts
from llmcache.indexes.format.manifest_json import MAX_BYTES, to_bytes

# measured on two cores; docs/scaling.md names the sources
OVERHEAD = 118.8  # bytes of an entry beyond output, features and token ids (`bench store`, store.json)
KEYS = 231.3  # resident bytes of an entry in an open store (`bench open`, open-1000000.json)
OPENING = 1.104e-6  # seconds an entry (the same)
INDEX = {"ivf-fp16": 270.6, "ivf-sq8": 142.6, "hnsw": 784.2}  # bytes a vector of 128 components (index-100000.json)
LOOK_UP = {"ivf-fp16": 31.8e-6, "ivf-sq8": 34.4e-6, "hnsw": 56.9e-6}  # seconds a query among 100,000 (the same)
HITS = 246_000  # documents a second (`bench encode`, encode-banking77.json)
COMPUTED = 622  # documents a second computed by the model, short queries, two cores
SEGMENT = 256 << 20  # bytes of outputs after which a commit is due


@dataclass(frozen=True, slots=True)
class Job:
    """Size of a job.

    width: components of an output. tokens: per document. shards: stores, one per machine. memory: bytes per machine.
    gigabits: network speed of a machine, gigabits per second. rate: documents that a machine computes per second.
    """

    documents: float = 1e9
    width: int = 384
    tokens: int = 150
    shards: int = 16
    memory: float = 64e9
    gigabits: float = 10
    rate: float = COMPUTED
    index: str = "ivf-sq8"


def arithmetic(job: Job) -> list[dict[str, Any]]:
    """Estimate all quantities. Returns rows of name, total and value per shard, in the unit given in the name.

    ConfigError for numbers that are not above 0, or an unknown index.
    """
    if job.index not in INDEX or min(job.documents, job.width, job.tokens, job.shards, job.gigabits, job.rate) <= 0:
        raise ConfigError(f"all numbers have to be above 0, and the index one of {', '.join(INDEX)}")
    entry = 4 * job.width + 2 * job.width + 4 * job.tokens + OVERHEAD
    segments = math.ceil(job.documents * 4 * job.width / SEGMENT)
    per_segment = manifest_bytes_per_segment()
    each = job.documents / job.shards

    def row(name: str, total: float, part: float) -> dict[str, Any]:
        return {"quantity": name, "in all": total, "a shard": part}

    growth = math.sqrt(each / 1e5) if job.index != "hnsw" else max(1.0, math.log(each) / math.log(1e5))
    return [
        row("entries", job.documents, each),
        row("disk, bytes", job.documents * entry, each * entry),
        row("disk without features and token ids, bytes", job.documents * (4 * job.width + OVERHEAD),
            each * (4 * job.width + OVERHEAD)),
        row("memory of keys, bytes", job.documents * KEYS, each * KEYS),
        row(f"memory of the index ({job.index}), bytes", job.documents * INDEX[job.index], each * INDEX[job.index]),
        row("opening, seconds", job.documents * OPENING, each * OPENING),
        row("segments of 256 MiB", segments, math.ceil(segments / job.shards)),
        row("manifest, bytes", segments * per_segment, segments * per_segment / job.shards),
        row("segments that a manifest may name", job.shards * (MAX_BYTES // per_segment), MAX_BYTES // per_segment),
        row("computing it all, hours", job.documents / job.rate / 3600, each / job.rate / 3600),
        row("all of it as hits, hours", job.documents / HITS / 3600, each / HITS / 3600),
        row(f"push or pull at {job.gigabits:g} Gbit/s, hours", *(8 * one * entry / job.gigabits / 3.6e12
            for one in (job.documents, each))),
        row("near look-up, ms a query (extrapolated)", 1e3 * LOOK_UP[job.index] * growth * job.shards,
            1e3 * LOOK_UP[job.index] * growth),
        row("shards at least, for keys and index in memory",
            math.ceil(job.documents * (KEYS + INDEX[job.index]) / job.memory), 1),
    ]  # fmt: skip


def manifest_bytes_per_segment() -> int:
    """Compute the bytes that one more segment adds to a written manifest."""
    sizes = []
    for count in (100, 200):
        segments = tuple(_segment(f"{n:032x}") for n in range(count))
        bank = BankFacts("float32", 384, 1, 384, segments)
        sizes.append(len(to_bytes(Manifest(1, 0, 0.0, "", (), {"default": NamespaceFacts({}, {}, {"output": bank})}))))
    return round((sizes[1] - sizes[0]) / 100)


def _segment(id: str) -> SegmentFacts:
    kinds = {"seg": None, "row": "0" * 64, "key": "0" * 64, "var": "0" * 64, "fp": "0" * 64}
    files = tuple(FileFacts(f"seg/{id}.{kind}", 10**7, digest) for kind, digest in kinds.items())
    return SegmentFacts(id, 10**5, 10**5, 10**8, files, writer=id)
