"""Chains of KV blocks that continue each other, and the blocks that belong to a document.

A bank of prefixes (keys and values of a decoder) has a row per block of tokens. The source of a row names the previous
block, by its key in hexadecimal, or is `FIRST`. Rows of versions that did not record this have an empty source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.eviction.dependents import FIRST, KEY
from llmcache.indexes.format.segment import Segment

_TOKEN = 4  # bytes of a token id


def block_source(previous: bytes) -> str:
    """Return the source to store with a block. previous: key of the previous block, b"" for the first block."""
    return previous.hex() or FIRST


@dataclass(slots=True)
class _Block:
    """KV block. tokens: its token ids, int32 little-endian. parent: key of the previous block, b"" for a first block,
    None if not recorded. children: keys of the blocks that continue it."""

    tokens: bytes
    parent: bytes | None
    children: list[bytes] = field(default_factory=list)


class Chains:
    """Blocks of a bank as trees."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        """segments: of a bank of prefixes. SnapshotDamaged when their token ids or sources cannot be read."""
        self._blocks: dict[bytes, _Block] = {}
        for segment in segments:
            rows = np.arange(len(segment))
            keys = np.ascontiguousarray(segment.rows["key"])
            for key, tokens, source in zip(keys, segment.tokens_of(rows), segment.sources(rows), strict=True):
                parent = bytes.fromhex(source) if KEY.fullmatch(source) else b"" if source == FIRST else None
                self._blocks.setdefault(key.tobytes(), _Block(tokens.tobytes(), parent))
        self._longest = max((len(block.tokens) for block in self._blocks.values()), default=0)
        self._firsts: dict[bytes, list[bytes]] = {}  # first blocks, by their first token
        self._loose: dict[bytes, list[bytes]] = {}  # blocks of unknown position, by their first token
        for key, block in self._blocks.items():
            if block.parent:
                above = self._blocks.get(block.parent)
                if above is not None:
                    above.children.append(key)
                    continue
            starts = self._firsts if block.parent == b"" else self._loose
            starts.setdefault(block.tokens[:_TOKEN], []).append(key)

    def paths(self) -> Iterator[bytes]:
        """Yield the token ids of every chain, from its first block to a last one, int32 little-endian."""
        roots = [key for starts in (self._firsts, self._loose) for keys in starts.values() for key in keys]
        stack = [(key, b"") for key in roots]
        while stack:
            key, before = stack.pop()
            block = self._blocks[key]
            tokens = before + block.tokens
            if not block.children:
                yield tokens
            stack += [(child, tokens) for child in block.children]

    def of(self, documents: Iterable[NDArray[np.int32] | bytes]) -> set[bytes]:
        """Return the keys of the blocks to purge with these documents, given as token ids.

        A block is purged when its tokens match the document at the block's position, or when it continues the whole
        document, on which it then depends. A block that is shared with another document stays: one with a following
        block that stays. A block of unknown position is purged when its tokens occur in the document at a position
        where a block can start.
        """
        inside: dict[bytes, None] = {}  # blocks inside a document, parents before children
        purged: set[bytes] = set()
        for ids in documents:
            whole = ids if isinstance(ids, bytes) else np.ascontiguousarray(ids, "<i4").tobytes()
            if whole:
                self._walk(whole, self._possible_starts(whole), inside, purged)
        for key in reversed(inside):
            if all(child in purged for child in self._blocks[key].children):
                purged.add(key)
        return purged

    def _possible_starts(self, whole: bytes) -> list[tuple[bytes, bytes]]:
        """Find blocks that may start a match, each with the document's token bytes from its position on."""
        starts = [(key, whole) for key in self._firsts.get(whole[:_TOKEN], ())]
        for at in range(0, len(whole), self._longest or len(whole)):
            rest = whole[at:]
            starts += [(key, rest) for key in self._loose.get(rest[:_TOKEN], ())]
        return starts

    def _walk(
        self, whole: bytes, starts: Sequence[tuple[bytes, bytes]], inside: dict[bytes, None], purged: set[bytes]
    ) -> None:
        """Follow a document along the chains from the blocks in `starts`."""
        stack = list(starts)
        while stack:
            key, rest = stack.pop()
            block = self._blocks[key]
            if rest.startswith(block.tokens):
                inside.setdefault(key)
                remaining = rest[len(block.tokens) :]
                if remaining:
                    stack += [(child, remaining) for child in block.children]
                else:
                    self._add_with_descendants(block.children, purged)
            elif block.tokens.startswith(rest):
                self._add_with_descendants([key], purged)

    def _add_with_descendants(self, keys: Iterable[bytes], purged: set[bytes]) -> None:
        stack = list(keys)
        while stack:
            key = stack.pop()
            if key not in purged:
                purged.add(key)
                stack += self._blocks[key].children
