"""New segments from rows of old ones: bytes and checksums go along as they are, and nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.io import Folder
from llmcache.indexes.manifest import SegmentFacts
from llmcache.indexes.segment import ALIAS, ROW, Segment, aligned, verified, write_segment

_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class Pick:
    """Rows of a segment that go on. rows: int64 [n], ascending. aliases: records of ALIAS.

    without: files that cannot be read. "var": the rows go on without token ids and source; "fp": with features of zero.
    """

    segment: Segment
    rows: NDArray[np.int64]
    aliases: NDArray[Any]
    without: frozenset[str] = frozenset()

    @property
    def payload(self) -> int:
        """Bytes of activations."""
        return int(self.segment.rows["nbytes"][self.rows].sum())


def rewrite(folder: Folder, id: str, picks: Sequence[Pick], feature_width: int) -> SegmentFacts:
    """Write one durable segment that holds what was picked. Any error leaves no file of it behind.

    A row's checksum is over its key and bytes, so it is as good in the new place. SnapshotDamaged when a file of a
    segment is not whole.
    """
    rows = np.concatenate([np.zeros(0, ROW), *(_records(pick) for pick in picks)])
    steps = aligned(rows["nbytes"].astype(np.uint64))
    rows["offset"] = np.cumsum(steps) - steps
    steps = rows["tokens"].astype(np.uint64) * 4 + rows["source"]
    rows["var"] = np.cumsum(steps) - steps
    aliases = np.concatenate([np.zeros(0, ALIAS), *(pick.aliases for pick in picks)])
    facts = write_segment(
        folder, id, rows, aliases, feature_width, _payload(picks), _variable(picks), _features(picks, feature_width)
    )
    writers = {pick.segment.facts.writer for pick in picks}
    return replace(facts, writer=writers.pop() if len(writers) == 1 else "")


def _records(pick: Pick) -> NDArray[Any]:
    records = pick.segment.rows[pick.rows]
    if "var" in pick.without:
        records = records.copy()
        records["tokens"] = records["source"] = 0
    return records


def _payload(picks: Sequence[Pick]) -> Iterator[memoryview]:
    for pick in picks:
        sizes = aligned(pick.segment.rows["nbytes"][pick.rows].astype(np.uint64))
        cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // np.uint64(_BLOCK))) + 1
        for rows in np.split(pick.rows, cuts):
            if len(rows):
                yield _block(pick.segment, rows)


def _block(segment: Segment, rows: NDArray[np.int64]) -> memoryview:
    """The bytes of some rows as they stand in a segment, each at a multiple of 64."""
    pitch = segment.pitch
    if pitch and int(rows[-1]) - int(rows[0]) + 1 == len(rows):
        found = segment.data.part(int(rows[0]) * pitch, len(rows) * pitch)
        if found.nbytes == len(rows) * pitch and pitch == aligned(int(segment.rows["nbytes"][rows[0]])):
            return found.data
    parts = segment.payload(rows)
    steps = [aligned(nbytes) for nbytes in segment.rows["nbytes"][rows].tolist()]
    block = np.zeros(sum(steps), np.uint8)
    if isinstance(parts, np.ndarray):
        block.reshape(len(rows), -1)[:, : parts.shape[1]] = parts
    else:
        at = 0
        for part, step in zip(parts, steps, strict=True):
            block[at : at + part.nbytes] = part
            at += step
    return block.data


def _variable(picks: Sequence[Pick]) -> Iterator[memoryview]:
    for pick in picks:
        if "var" in pick.without:
            continue
        data = verified(pick.segment.folder, pick.segment.facts.file("var"))
        records = pick.segment.rows[pick.rows]
        starts = records["var"].astype(np.int64)
        ends = starts + 4 * records["tokens"].astype(np.int64) + records["source"]
        for run in np.split(np.arange(len(records)), np.flatnonzero(starts[1:] != ends[:-1]) + 1):
            if len(run):
                yield data[starts[run[0]] : ends[run[-1]]].data


def _features(picks: Sequence[Pick], width: int) -> Iterator[memoryview]:
    for pick in picks:
        for rows in np.array_split(pick.rows, 1 + len(pick.rows) * width * 2 // _BLOCK):
            if "fp" in pick.without:
                yield np.zeros(len(rows) * width * 2, np.uint8).data
            elif len(rows) and width:
                yield np.ascontiguousarray(pick.segment.features()[rows]).view(np.uint8).reshape(-1).data
