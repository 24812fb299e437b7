"""Journals of runs, by day, corpus and namespace: one advisory file per writer (`stat/<writer>.runs`).

Each line is a record, a JSON object. Like the counters, a file is replaced as a whole by its writer and merged by
`counters.fold`. No reader needs the files, and lines that cannot be read are skipped.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable
from typing import Any, TypeAlias

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest_json import strict_json
from llmcache.indexes.format.write_once import write_whole
from llmcache.indexes.urls import redacted

Record: TypeAlias = dict[str, Any]

_LIMIT = 1 << 20  # bytes of a file
_MOST = 1000  # records of a file: the newest are kept
_NAMED = 200  # characters of a name
_BINS = 50
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_NAMES = ("namespace", "corpus", "model")
_SUMS = ("runs", "evicted_rows")
_LAST = ("entries", "bytes")

BINS = _BINS
"""Number of equal bins from 0 to 1 of a record's similarity histograms; the first includes values below 0."""


def journal_name(writer: str) -> str:
    """Return the name of a writer's journal."""
    return f"stat/{writer}.runs"


def day_of(seconds: float) -> str:
    """Format the UTC day of a time in seconds since the epoch, as in "2026-11-21"."""
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def write_journal(folder: Folder, writer: str, records: Iterable[Record]) -> None:
    """Replace this writer's journal; the oldest records are cut off above 1 MiB. OSError when it cannot be written."""
    lines = [json.dumps(record, separators=(",", ":"), sort_keys=True).encode() + b"\n" for record in merged(records)]
    while lines and sum(map(len, lines)) > _LIMIT:
        lines = lines[len(lines) // 4 + 1 :]
    temporary = f"stat/t-{writer}"
    folder.remove(temporary)
    write_whole(folder, temporary, lines)
    folder.replace(temporary, journal_name(writer))


def read_journals(folder: Folder, writers: Iterable[str]) -> list[Record]:
    """Read the journals of these writers and merge their records, see `merged`. Oldest first."""
    records: list[Record] = []
    for writer in writers:
        try:
            raw = folder.read(journal_name(writer), _LIMIT)
        except (OSError, SnapshotDamaged):
            continue
        for line in raw.split(b"\n"):
            try:
                record = checked(strict_json(line))
            except (ValueError, RecursionError, SnapshotDamaged):
                continue
            if record is not None:
                records.append(record)
    return merged(records)


def checked(raw: Any) -> Record | None:
    """Return the valid fields of a parsed record, without the others; None if it has no valid day."""
    if not isinstance(raw, dict) or not isinstance(raw.get("day"), str) or not _DAY.fullmatch(raw["day"]):
        return None
    record: Record = {"day": raw["day"]}
    for name in _NAMES:
        if isinstance(raw.get(name), str):
            record[name] = redacted(raw[name])[:_NAMED]
    for name in ("begin", "end", *_SUMS, *_LAST):
        if _is_number(raw.get(name)):
            record[name] = raw[name]
    counters = raw.get("counters")
    if isinstance(counters, dict):
        record["counters"] = {name[:_NAMED]: value for name, value in counters.items() if _is_number(value)}
    for name in ("asked", "near"):
        bins = raw.get(name)
        if (
            isinstance(bins, list)
            and len(bins) == _BINS
            and all(type(value) is int and _is_number(value) for value in bins)
        ):
            record[name] = bins
    forecast = raw.get("forecast")
    if isinstance(forecast, dict):
        record["forecast"] = {name[:_NAMED]: value for name, value in forecast.items() if _is_number(value)}
    return record


def _is_number(value: object) -> bool:
    return (type(value) is int and 0 <= value < 1 << 53) or (
        type(value) is float and math.isfinite(value) and value >= 0
    )


def merged(records: Iterable[Record]) -> list[Record]:
    """Merge records of the same day, namespace, corpus and model. Returns the newest 1,000, oldest first."""
    by_place: dict[tuple[str, ...], Record] = {}
    for record in sorted(records, key=lambda record: float(record.get("end", 0))):
        place = (record["day"], *(str(record.get(name, "")) for name in _NAMES))
        by_place[place] = _sum_of(by_place[place], record) if place in by_place else record
    return sorted(by_place.values(), key=lambda record: (str(record["day"]), float(record.get("end", 0))))[-_MOST:]


def _sum_of(earlier: Record, later: Record) -> Record:
    both: Record = {**earlier, **later}
    for name in _SUMS:
        if name in both:
            both[name] = earlier.get(name, 0) + later.get(name, 0)
    if "begin" in earlier:
        both["begin"] = min(earlier["begin"], later.get("begin", earlier["begin"]))
    mine, theirs = earlier.get("counters", {}), later.get("counters", {})
    both["counters"] = {name: mine.get(name, 0) + theirs.get(name, 0) for name in {**mine, **theirs}}
    for name in ("asked", "near"):
        if name in earlier and name in later:
            both[name] = [a + b for a, b in zip(earlier[name], later[name], strict=True)]
    return both
