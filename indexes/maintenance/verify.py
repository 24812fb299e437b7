"""Verification: read all bytes of a store, and report damage and the resulting losses."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.commits.create import check_format, not_opened
from llmcache.indexes.commits.generations import generation_name, generations
from llmcache.indexes.errors import FormatTooNew, SnapshotDamaged, SnapshotNotFound
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import QUARANTINE, SUBFOLDERS
from llmcache.indexes.format.manifest import BankFacts, FileFacts, Manifest, SegmentFacts
from llmcache.indexes.format.manifest_json import MAX_BYTES, from_bytes
from llmcache.indexes.format.rows import ALIAS, ROW
from llmcache.indexes.format.segment import records_of
from llmcache.indexes.format.write_once import verified
from llmcache.indexes.maintenance.snapshot import banks
from llmcache.indexes.maintenance.transfer import checked, files_of, living, row_chunks

_OURS = re.compile(r"FORMAT|lock|m-\d{12}(\.json|(-[0-9a-f]{32})?\.sig)")
_TEMPORARY = re.compile(r"t-[0-9a-f]{32}.*")


@dataclass(frozen=True, slots=True)
class Finding:
    """Problem with one file. what: the problem. lost: data that is lost with it. damage: False for leftover files."""

    file: str
    what: str
    lost: str
    damage: bool = True


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of a verification. bytes: of the files in the newest manifest. others: bytes of all other files."""

    generation: int
    entries: int
    files: int
    bytes: int
    others: int
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Return whether no file is damaged; leftover files are allowed."""
        return not any(finding.damage for finding in self.findings)


@dataclass(slots=True)
class History:
    """Manifests of a store, newest first.

    listed: generations. base: the newest intact manifest. older: the other intact ones. damaged: reasons by generation.
    """

    listed: list[int]
    base: Manifest | None
    older: list[Manifest]
    damaged: dict[int, str]


@dataclass(slots=True)
class Checked:
    """Result of checking a segment. broken: reasons by kind of file. rows: damaged live rows, int64."""

    facts: SegmentFacts
    records: NDArray[Any] | None
    aliases: NDArray[Any]
    broken: dict[str, str] = field(default_factory=dict)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def verify(store: str | os.PathLike[str]) -> Verification:
    """Read and check all bytes of the store in this folder: manifests, files, and the checksums of all rows.

    Changes no file and needs no lock. Memory: 64 MiB, and about 150 bytes for each row of the largest bank.
    SnapshotNotFound when there is no store; FormatTooNew for a later format; LLMCacheError when the disk fails.
    """
    with closing(opened(Path(store))) as folder:
        return verification(folder)


def verification(folder: Folder) -> Verification:
    """Verify the store in an open folder, see `verify`."""
    findings = [*_format(folder), *_parts(folder)]
    history = history_of(folder)
    findings += _manifests(folder, history)
    named: list[FileFacts] = []
    entries = 0
    for place, facts in banks(history.base or Manifest()).items():
        named += files_of(facts)
        entries += sum(segment.rows for segment in facts.segments)
        findings += _bank("/".join(place), folder, facts)
    leftovers, others = _other_files(folder, history, {file.name for file in named})
    generation = history.base.generation if history.base else 0
    size = sum(file.size for file in named)
    return Verification(generation, entries, len(named), size, others, tuple(findings + leftovers))


def opened(path: Path) -> Folder:
    """Open the folder of a store that may be damaged. Files are read, never mapped: truncation would kill the process.

    SnapshotNotFound when there is no store; LLMCacheError when the folder cannot be read.
    """
    try:
        if not path.is_dir() or not any(_OURS.fullmatch(entry.name) for entry in path.iterdir()):
            raise SnapshotNotFound(f"there is no store in {path}; give the folder that holds FORMAT and m-*.json")
        return Folder(path, reading="pread")
    except OSError as error:
        raise not_opened(path, error) from error


def odd_parts(folder: Folder) -> dict[str, str]:
    """Return sub-folders and `lock` of a store that are of another type, with the problem, by name.

    Problems with links contain the word "link": the target of the link may be intact.
    """
    odd = {}
    for name in (*SUBFOLDERS, QUARANTINE, "lock"):
        kind, wanted = folder.kind(name), "file" if name == "lock" else "folder"
        if kind not in {"", wanted}:
            odd[name] = f"is a {kind}, and should be a {wanted}"
    return odd


def _parts(folder: Folder) -> Iterator[Finding]:
    lost = {"seg": "all entries", "idx": "nothing: indexes are built again", "stat": "counters and uses of rows"}
    odd = odd_parts(folder)
    for name, what in odd.items():
        lasting = lost.get(name, "nothing")
        yield Finding(name, what, f"{lasting}; nothing can be stored or maintained until it is repaired")
    for name in (*SUBFOLDERS, QUARANTINE):
        try:
            folder.names(name)
        except OSError as error:
            if name not in odd:
                yield Finding(name, said(error, folder), lost.get(name, "nothing"))


def _format(folder: Folder) -> Iterator[Finding]:
    try:
        check_format(folder)
    except FormatTooNew:
        raise
    except (SnapshotDamaged, OSError) as error:
        yield Finding("FORMAT", said(error, folder), "the store cannot be opened until it is repaired")


def said(error: Exception, folder: Folder) -> str:
    """Return the message of an error without the path of the store."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return text.replace(f"{folder.path}/", "")


def _raise_if_strict(error: Exception, strict: bool) -> None:
    """With `strict`, raise errors of the disk. A missing file is damage, but an unreadable one may be intact later."""
    if strict and isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


# -- manifests ----------------------------------------------------------------------------------------------


def history_of(folder: Folder, *, strict: bool = False) -> History:
    """Read all manifests. strict: raise OSErrors of the disk instead of reporting them as damage."""
    history = History(generations(folder), None, [], {})
    for generation in history.listed:
        name = generation_name(generation)
        try:
            manifest = from_bytes(folder.read(name, MAX_BYTES), name)
        except FormatTooNew:
            raise
        except (SnapshotDamaged, OSError) as error:
            _raise_if_strict(error, strict)
            history.damaged[generation] = said(error, folder)
            continue
        if manifest.generation != generation:
            history.damaged[generation] = f"{name} says that it is generation {manifest.generation}"
        elif history.base is None:
            history.base = manifest
        else:
            history.older.append(manifest)
    return history


def _manifests(folder: Folder, history: History) -> Iterator[Finding]:
    base = history.base.generation if history.base else 0
    for generation, what in history.damaged.items():
        lost = "an older generation; nothing that is in use"
        if generation > base:
            lost = f"what was stored since generation {base}" if base else "all entries, until the store is repaired"
        yield Finding(generation_name(generation), what, lost)


# -- banks --------------------------------------------------------------------------------------------------


def _bank(name: str, folder: Folder, facts: BankFacts) -> Iterator[Finding]:
    results = [check_segment(folder, segment) for segment in facts.segments]
    for result in results:
        yield from _segment(name, result)
    keys = [result.records["key"] for result in results if result.records is not None]
    known = np.unique(np.concatenate([np.zeros((0, 2), "<u8"), *keys]).view("V16"))
    for result in results:
        rows = np.ascontiguousarray(result.aliases["row"]).view("V16")
        nowhere = len(rows) - int(np.isin(rows, known).sum())
        if nowhere:
            file = result.facts.file("key").name
            yield Finding(file, f"{nowhere} of its names lead to no row", "nothing: they are misses", False)
    for broken, what in index_damage(folder, facts):
        yield Finding(broken, what, "nothing: it is built again from the features")


def check_segment(folder: Folder, facts: SegmentFacts, *, strict: bool = False) -> Checked:
    """Read all files of a segment and verify the checksums of its live rows.

    strict: raise OSErrors of the disk instead of reporting them as damage.
    """
    result = Checked(facts, None, np.zeros(0, ALIAS))

    def attempt(kind: str, reading: Callable[[], Any]) -> Any:
        try:
            return reading()
        except (SnapshotDamaged, OSError) as error:
            _raise_if_strict(error, strict)
            result.broken[kind] = said(error, folder)
            return None

    for kind in ("row", "key", "var", "fp"):  # in chunks, since a damaged file may be very large
        attempt(kind, lambda kind=kind: [None for _ in checked(folder, facts.file(kind))])  # type: ignore[misc]
    row_file = None if "row" in result.broken else attempt("row", lambda: records_of(folder, facts))
    aliases = None if "key" in result.broken else attempt("key", lambda: _aliases(folder, facts))
    alive = None if row_file is None else attempt("alive", lambda: living(folder, facts))
    if aliases is not None:
        result.aliases = aliases
    if row_file is not None:
        result.records = row_file[0]
        bad = attempt("seg", lambda: _bad_rows(folder, facts, row_file[0], result))
        bad = np.arange(facts.rows) if bad is None else bad
        result.rows = bad if alive is None else bad[alive[bad]]
    else:  # without records only the existence and size of .seg can be checked
        attempt("seg", lambda: _bad_rows(folder, facts, np.zeros(0, ROW), result))
    return result


def _aliases(folder: Folder, facts: SegmentFacts) -> NDArray[Any]:
    if facts.file("key").size != facts.aliases * ALIAS.itemsize:
        raise SnapshotDamaged(f"{facts.file('key').name} does not hold the {facts.aliases} aliases of its manifest")
    return verified(folder, facts.file("key")).view(ALIAS)


def _bad_rows(folder: Folder, facts: SegmentFacts, records: NDArray[Any], result: Checked) -> NDArray[np.int64]:
    file = facts.file("seg")
    descriptor, size = folder.open(file.name)
    folder.close_file(descriptor)
    if size != file.size:
        result.broken["seg"] = f"{file.name} has {size:,} bytes where the manifest says {file.size:,}"
    bad = [rows for _, rows in row_chunks(folder, file.name, size, records, min(size, file.size))]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *bad]))


def _segment(bank: str, result: Checked) -> Iterator[Finding]:
    facts, broken = result.facts, result.broken
    lost = {
        "row": f"{facts.rows} entries of {bank}",
        "key": f"{facts.aliases} names of entries of {bank}; they are found by their tokens",
        "var": f"token ids and sources of {facts.rows} entries of {bank}; they are found by their text",
        "fp": f"near matches to {facts.rows} entries of {bank}",
        "alive": f"which of {facts.rows} entries of {bank} are evicted",
        "seg": f"{len(result.rows)} of {facts.rows} entries of {bank}",
    }
    names = {file.name.rpartition(".")[2]: file.name for file in files_of(facts)}
    for kind, what in broken.items():
        yield Finding(names.get(kind, facts.id), what, lost[kind])
    if len(result.rows) and "seg" not in broken and "row" not in broken:
        shown = ", ".join(map(str, result.rows[:5].tolist())) + (", ..." if len(result.rows) > 5 else "")
        yield Finding(names["seg"], f"rows {shown} do not agree with their checksums", lost["seg"])


def index_damage(folder: Folder, facts: BankFacts, *, strict: bool = False) -> Iterator[tuple[str, str]]:
    """Yield damaged files of the projection and the index, each with the reason."""
    for file in files_of((facts.projection, facts.index)):
        try:
            for _ in checked(folder, file):
                pass
        except (SnapshotDamaged, OSError) as error:
            _raise_if_strict(error, strict)
            yield file.name, said(error, folder)
    covered = _covered(facts)
    if facts.index and covered not in {None, facts.index.count}:
        yield facts.index.file.name, f"it has {facts.index.count} rows, the segments that it is of have {covered}"


def _covered(facts: BankFacts) -> int | None:
    """Count the rows that the bank's index must have: all of a segment, or, if its bitmap is named, the live ones.

    Returns None if the index is of segments or bitmaps that were replaced: readers then build another index.
    """
    if facts.index is None:
        return None
    segments = {known_segment.id: known_segment for known_segment in facts.segments}
    covered = 0
    for name in facts.index.segments:
        id, dash, _ = name.partition("-")
        segment = segments.get(id)
        if segment is None or (dash and (segment.alive is None or segment.alive.name != f"seg/{name}.alive")):
            return None
        covered += segment.live if dash else segment.rows
    return covered


# -- other files --------------------------------------------------------------------------------------------


def _other_files(folder: Folder, history: History, named: set[str]) -> tuple[list[Finding], int]:
    older = {file.name for manifest in history.older for file in files_of(manifest)}
    findings, size = [], 0
    for name in names_in(folder):
        if name in named:
            continue
        try:
            size += folder.size(name)
        except OSError:  # removed after it was listed
            continue
        leaf = name.rpartition("/")[2]
        if _OURS.fullmatch(name) or name.startswith((QUARANTINE + "/", "stat/")):
            continue
        if _TEMPORARY.fullmatch(leaf):
            what = "a writer's temporary file"
        elif name in older:
            what = "belongs to an older generation"
        else:
            what = "no manifest names it"
        findings.append(Finding(printable(name), what, "nothing", damage=False))
    return findings, size


def names_in(folder: Folder) -> list[str]:
    """List all names in the store's folder and sub-folders, except the sub-folders themselves."""
    names = [name for name in sorted(folder.names()) if name not in {*SUBFOLDERS, QUARANTINE}]
    return names + [f"{sub}/{name}" for sub in (*SUBFOLDERS, QUARANTINE) for name in sorted(names_of(folder, sub))]


def names_of(folder: Folder, sub: str) -> list[str]:
    """List the names in a sub-folder; none if it is not a folder (`odd_parts`) or cannot be read."""
    try:
        return folder.names(sub)
    except OSError:
        return []


def printable(name: str) -> str:
    """Escape undecodable bytes and control characters of a file name, so that it can be printed to any terminal."""
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in shown)
