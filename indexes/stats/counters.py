"""Advisory files of writers: counters (`stat/<writer>.json`) and usage records (`stat/<writer>.use`).

Each writer replaces its own files as a whole, so that no writer waits for another. `fold` merges the files of writers
that ended long ago. No file here is needed to read an entry, and files that cannot be read are skipped.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest_json import strict_json
from llmcache.indexes.format.write_once import write_whole
from llmcache.indexes.stats.runs import journal_name, read_journals, write_journal
from llmcache.indexes.stats.usage import UseTable, read_uses, use_name, write_uses

log = logging.getLogger("llmcache")

_LIMIT = 1 << 20
WRITER = re.compile(r"[0-9a-f]{32}")


def read_counters(folder: Folder) -> dict[str, dict[str, Any]]:
    """Read the counters of each writer, by writer. Writers whose counters were folded into others are left out."""
    contents: dict[str, dict[str, Any]] = {}
    for name in folder.names("stat"):
        if name.endswith(".json"):
            try:
                content = strict_json(folder.read(f"stat/{name}", _LIMIT))
            except (OSError, ValueError, RecursionError, SnapshotDamaged):
                continue
            if isinstance(content, dict):
                contents[name.removesuffix(".json")] = content
    folded = {writer for content in contents.values() for writer in _folded(content)}
    return {writer: content for writer, content in contents.items() if writer not in folded}


def total_counters(folder: Folder, *, without: str = "") -> dict[str, float]:
    """Add up the counters of all writers except `without`. Returns {} when the folder cannot be listed."""
    try:
        contents = read_counters(folder)
    except OSError as error:
        log.info("counters were not read: %s", error)
        return {}
    return add_up(content for writer, content in contents.items() if writer != without)


def _folded(content: dict[str, Any]) -> list[str]:
    listed = content.get("folded")
    return [writer for writer in listed if isinstance(writer, str)] if isinstance(listed, list) else []


def add_up(contents: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Combine the numbers of several files by name, see `combined`. Values that are no numbers are skipped."""
    total: dict[str, float] = {}
    for content in contents:
        for key, value in content.items():
            if _is_number(value):
                total[key] = combined(key, total.get(key, 0), value)
    return total


def combined(name: str, one: float, other: float) -> float:
    """Combine two values of a counter: their sum, or the larger one if the name ends in "_largest"."""
    return max(one, other) if name.endswith("_largest") else one + other


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def write_counters(folder: Folder, writer: str, content: dict[str, Any]) -> None:
    """Replace this writer's counters. OSError when they cannot be written; callers may ignore it."""
    temporary = f"stat/t-{writer}"
    folder.remove(temporary)
    write_whole(folder, temporary, [json.dumps(content).encode()])
    folder.replace(temporary, f"stat/{writer}.json")


def keep_counters(folder: Folder, writer: str, counters: Mapping[str, float]) -> None:
    """Replace this writer's counters like `write_counters`. A failure is logged and ignored."""
    try:
        write_counters(folder, writer, dict(counters))
    except OSError as error:
        log.info("counters were not written: %s", error)


def use_files(folder: Folder) -> list[str]:
    """List the files of usage records, without those that were folded into another writer's."""
    names = [name for name in folder.names("stat") if name.endswith(".use")]
    counted = {writer for content in read_counters(folder).values() for writer in _folded(content)}
    return [f"stat/{name}" for name in names if name.removesuffix(".use") not in counted]


def fold(folder: Folder, writers: list[str], new: str) -> None:
    """Merge the counters, usage records and journals of these writers into files of the writer `new`; remove theirs.

    The new counters list the writers that were folded, whose files no longer count from then on. The new counters are
    written first and the old files are removed last. A process that is killed in between may lose usage records, but
    nothing is counted twice.
    """
    contents = read_counters(folder)
    present = {name.rpartition(".")[0] for name in folder.names("stat")}
    folded_before = {other for writer in writers for other in _folded(contents.get(writer, {}))}
    uses = UseTable.of(read_uses(folder, [use_name(writer) for writer in writers if writer not in folded_before]))
    total = add_up(contents[writer] for writer in writers if writer in contents)
    write_counters(folder, new, {**total, "folded": sorted({*writers, *(folded_before & present)})})
    if len(uses.records):
        write_uses(folder, new, uses.records)
    if runs := read_journals(folder, [writer for writer in writers if writer not in folded_before]):
        write_journal(folder, new, runs)
    for writer in sorted({*writers, *(folded_before & present)}):
        folder.remove(use_name(writer))
        folder.remove(journal_name(writer))
        folder.remove(f"stat/{writer}.json")
