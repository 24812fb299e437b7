"""Find stored rows of a decoder that contain a text or are a part of it, for a purge by text.

A decoder stores more than prompts: a choice follows its prompt, and perplexity is computed in windows of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.eviction.dependents import holds_chains
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.chains import Chains
from llmcache.indexes.store import Store

_LEAST = 4  # tokens of a common part from which a row is purged with a text
_TOKEN = 4  # bytes of a token id


def tokens_of_parts(store: Store, namespace: str, texts: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """Return the token ids of stored rows that contain one of the texts, or that are windows of one.

    texts: token ids without special tokens, int32 [tokens] each. Their first token is not compared, since it depends on
    the character before the text. Texts of fewer than 5 tokens find nothing here.
    """
    wholes = [np.ascontiguousarray(ids, "<i4").tobytes() for ids in texts]
    inner = [whole[_TOKEN:] for whole in wholes if len(whole) > _LEAST * _TOKEN]
    found: dict[bytes, None] = {}
    for row in _stored(store, namespace):
        middle = row[_TOKEN:-_TOKEN]  # without a first special token and a last one, or the number that ends a row
        part = len(middle) >= _LEAST * _TOKEN and any(_within(middle, whole) for whole in wholes)
        if part or any(_within(ids, row) for ids in inner):
            found[row] = None
    return [np.frombuffer(row, "<i4").astype(np.int32) for row in found]


def _within(part: bytes, whole: bytes) -> bool:
    """Return whether token ids occur in others. Both int32 little-endian."""
    at = whole.find(part)
    while at >= 0 and at % _TOKEN:
        at = whole.find(part, at + 1)
    return at >= 0


def _stored(store: Store, namespace: str) -> Iterator[bytes]:
    """Yield the token ids of all rows, and of all chains of KV blocks.

    Unreadable segments are left out: a purge removes them as a whole.
    """
    for name, bank in store.latest().namespaces[namespace].banks.items():
        segments = []
        for facts in bank.segments:
            try:
                segment = Segment.open(store.folder, facts)
                rows = segment.tokens_of(np.arange(len(segment)))
            except (SnapshotDamaged, FileNotFoundError):
                continue
            if holds_chains(name):
                segments.append(segment)
            else:
                yield from (np.ascontiguousarray(row, "<i4").tobytes() for row in rows)
        try:
            yield from Chains(segments).paths()
        except SnapshotDamaged:
            continue
