"""Rewriting of segments: copy rows of old segments, with bytes and checksums, into a new one, without a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import SegmentFacts
from llmcache.indexes.format.marks import Marks, joined
from llmcache.indexes.format.rows import ALIAS, ROW, STRONG, agree, aligned, digests, portions
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.format.segment_writer import write_segment
from llmcache.indexes.format.write_once import verified

log = logging.getLogger("llmcache")

_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class Pick:
    """Rows of a segment to copy. rows: int64 [n], ascending. aliases: records of ALIAS.

    without: files that cannot be read. "var": copy rows without token ids and source; "fp": with zeros as features.
    """

    segment: Segment
    rows: NDArray[np.int64]
    aliases: NDArray[Any]
    without: frozenset[str] = frozenset()

    @property
    def payload(self) -> int:
        """Bytes of activations."""
        return int(self.segment.rows["nbytes"][self.rows].sum())

    @property
    def marks(self) -> Marks | None:
        """Marks of the rows; None if the segment has none."""
        return None if self.segment.marks is None else self.segment.marks[self.rows]


def readable(segment: Segment, rows: NDArray[np.bool_], aliases: NDArray[np.bool_]) -> Pick:
    """Pick the rows, of those in `rows`, that match their checksums, without the files that are damaged.

    rows: bool [rows]. aliases: bool [aliases].
    """
    places = np.flatnonzero(rows)
    places = places[segment.whole(places)]
    without = frozenset(kind for kind, has in (("var", _has_tokens), ("fp", _has_features)) if not has(segment, places))
    return Pick(segment, places, segment.aliases[aliases], without)


def _has_tokens(segment: Segment, rows: NDArray[np.int64]) -> bool:
    records = segment.rows[rows]
    ends = records["var"].astype(np.int64) + 4 * records["tokens"].astype(np.int64) + records["source"]
    try:
        return int(ends.max(initial=0)) <= verified(segment.folder, segment.facts.file("var")).nbytes
    except SnapshotDamaged as error:
        log.warning("%s: its rows are found by text only", error)
        return False


def _has_features(segment: Segment, rows: NDArray[np.int64]) -> bool:
    try:
        return len(segment.features()) == len(segment)
    except SnapshotDamaged as error:
        log.warning("%s: its rows have no near matches", error)
        return False


def rewrite(
    folder: Folder, id: str, picks: Sequence[Pick], feature_width: int, *, strong: bool = False
) -> SegmentFacts:
    """Write one durable segment with the picked rows. Returns its facts.

    A row's checksum covers its key and bytes, so it is valid in the new segment too, and it is verified on the way.
    Marks are copied unchanged. strong: replace weak checksums by ones that cannot be forged.
    SnapshotDamaged when a row or a file of a source is damaged. After any error no file of the segment remains.
    """
    rows = np.concatenate([np.zeros(0, ROW), *(_records(pick) for pick in picks)])
    steps = aligned(rows["nbytes"].astype(np.uint64))
    rows["offset"] = np.cumsum(steps) - steps
    steps = rows["tokens"].astype(np.uint64) * 4 + rows["source"]
    rows["var"] = np.cumsum(steps) - steps
    aliases = np.concatenate([np.zeros(0, ALIAS), *(pick.aliases for pick in picks)])
    facts = write_segment(
        folder,
        id,
        rows,
        aliases,
        feature_width,
        _payload(picks, rows, strong),
        _variable(picks),
        _features(picks, feature_width),
        marks=joined([(len(pick.rows), pick.marks) for pick in picks]),
    )
    writers = {pick.segment.facts.writer for pick in picks}
    return replace(facts, writer=writers.pop() if len(writers) == 1 else "")


def _records(pick: Pick) -> NDArray[Any]:
    records = pick.segment.rows[pick.rows]
    if "var" in pick.without:
        records = records.copy()
        records["tokens"] = records["source"] = 0
    return records


def _payload(picks: Sequence[Pick], rows: NDArray[Any], strong: bool) -> Iterator[memoryview]:
    """Yield the bytes of the picked rows; with `strong` fill in the checksums of `rows`."""
    first = 0
    for pick in picks:
        for portion in portions(pick.segment.rows["nbytes"][pick.rows]):
            block = _block(pick.segment, pick.rows[portion])
            if strong:
                _strengthen(rows[first + portion.start : first + portion.stop], block)
            yield block
        first += len(pick.rows)


def _strengthen(records: NDArray[Any], block: memoryview) -> None:
    """Fill in checksums that cannot be forged. block: the bytes of these rows, already verified."""
    weak = np.flatnonzero(records["flags"] & STRONG == 0)
    records["flags"] |= STRONG
    starts = (records["offset"] - records["offset"][:1]).astype(np.int64)
    parts = [block[start : start + size] for start, size in zip(starts[weak], records["nbytes"][weak], strict=True)]
    for place, found in zip(weak, digests(records[weak], parts), strict=True):
        records["checksum"][place] = np.frombuffer(found, np.uint8)


def _block(segment: Segment, rows: NDArray[np.int64]) -> memoryview:
    """Copy the bytes of rows, padded as in a segment, and verify the copy, so that only verified bytes are written.

    SnapshotDamaged when a row does not match its checksum.
    """
    records = segment.rows[rows]
    nbytes = records["nbytes"].tolist()
    steps = [aligned(size) for size in nbytes]
    block = np.zeros(sum(steps), np.uint8)
    starts = (np.cumsum(steps) - steps).tolist()
    offsets = (rows * segment.pitch if segment.pitch else records["offset"]).tolist()
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1 if segment.pitch == steps[0] else np.arange(1, len(rows))
    for chunk in np.split(np.arange(len(rows)), breaks):  # adjacent rows of equal size are adjacent in source and copy
        first, last = int(chunk[0]), int(chunk[-1])
        end = starts[last] + nbytes[last]
        stored = segment.data.part(offsets[first], end - starts[first])
        block[starts[first] : starts[first] + stored.nbytes] = stored
    places = zip(starts, nbytes, strict=True)
    good = agree(records, [block.data[start : start + size] for start, size in places])
    if not all(good):
        file, row = segment.facts.file("seg").name, int(rows[good.index(False)])
        raise SnapshotDamaged(f"{file}: row {row} does not match its checksum")
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
