"""Planning of a repair: find damaged segments and files, the rows to save, and intact segments to adopt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.commits.create import check_format
from llmcache.indexes.commits.generations import generation_name
from llmcache.indexes.commits.leases import leased
from llmcache.indexes.errors import FormatTooNew, SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.codec import DTYPES
from llmcache.indexes.format.manifest import BankFacts, FileFacts, Manifest, SegmentFacts
from llmcache.indexes.format.manifest_json import MAX_BYTES, salvage
from llmcache.indexes.format.rows import HEADER, MAGIC, ROW
from llmcache.indexes.format.segment import Segment, mark_bytes, marks_of, records_of
from llmcache.indexes.maintenance.rewrite import Pick
from llmcache.indexes.maintenance.snapshot import banks
from llmcache.indexes.maintenance.transfer import chunks, files_of, living
from llmcache.indexes.maintenance.verify import Checked, History, check_segment, index_damage, names_in, names_of

_KINDS = ("seg", "row", "key", "var", "fp")


@dataclass(slots=True)
class Plan:
    """Plan of a repair. base: manifest to change. adopted: number of segments. lost: number of entries."""

    base: Manifest
    banks: dict[tuple[str, str], list[SegmentFacts | Pick]] = field(default_factory=dict)  # segments to keep or rewrite
    changed: set[str] = field(default_factory=set)  # ids of segments of the base to rewrite or drop
    indexless: set[tuple[str, str]] = field(default_factory=set)  # banks whose index is dropped
    aside: list[str] = field(default_factory=list)  # names of files to move to the quarantine
    adopted: int = 0
    lost: int = 0

    @property
    def picks(self) -> int:
        """Number of segments to rewrite."""
        return sum(isinstance(part, Pick) for parts in self.banks.values() for part in parts)


def planned(folder: Folder, history: History, grace: float) -> Plan:
    """Plan the repair of a store. grace: as in `repair`."""
    salvaged = list(salvaged_manifests(folder, history))
    check_known(folder, history, salvaged)
    plan = Plan(history.base or (replace(salvaged[0], generation=0) if salvaged else Manifest()))
    for place, facts in banks(plan.base).items():
        parts = [_plan_segment(folder, segment, plan, history.base is None) for segment in facts.segments]
        plan.banks[place] = [part for part in parts if part is not None]
        lost_index = list(index_damage(folder, facts, strict=True))
        if lost_index or (facts.index and plan.changed.intersection(facts.index.segments)):
            plan.indexless.add(place)
            plan.aside += [file.name for file in files_of((facts.projection, facts.index)) if exists(folder, file.name)]
    if _skipped_generations(history):
        _adopt(folder, history, plan, salvaged)
    plan.aside += [generation_name(generation) for generation in history.damaged]
    if not format_whole(folder) and exists(folder, "FORMAT"):
        plan.aside.append("FORMAT")
    plan.aside += [name for name in _unneeded_files(folder, history, plan, grace) if name not in plan.aside]
    return plan


def check_known(folder: Folder, history: History, salvaged: Sequence[Manifest]) -> None:
    """Check that a manifest can be read, or salvaged. SnapshotDamaged when there are only unreadable ones."""
    if history.base is None and history.listed and not salvaged:
        raise SnapshotDamaged(
            f"{folder.path}: none of its {len(history.listed)} manifests can be read, so the model of its entries is "
            "unknown; restore one m-*.json from a copy, or start a new store"
        )


def salvaged_manifests(folder: Folder, history: History) -> Iterator[Manifest]:
    """Yield what can be parsed of the damaged manifests in `_skipped_generations`, newest first."""
    for generation in _skipped_generations(history):
        with suppress(SnapshotDamaged, FileNotFoundError):
            name = generation_name(generation)
            manifest = salvage(folder.read(name, MAX_BYTES))
            if manifest is not None:
                yield manifest


def _skipped_generations(history: History) -> list[int]:
    """Return the damaged generations that the newest intact one is not based on: they are newer, or it skipped them."""
    base = history.base or Manifest()
    return [generation for generation in history.damaged if generation > base.generation or generation in base.skipped]


def _plan_segment(folder: Folder, facts: SegmentFacts, plan: Plan, uncertain: bool) -> SegmentFacts | Pick | None:
    """Return the segment as it is, its intact rows, or None. uncertain: the facts come from a damaged manifest."""
    result = check_segment(folder, facts, strict=True)
    if uncertain and result.broken:
        other = _facts_from_files(folder, facts.id)
        if other is not None:
            facts, result = other, check_segment(folder, other, strict=True)
    if not result.broken and not len(result.rows):
        return facts
    plan.changed.add(facts.id)
    plan.aside += [file.name for file in files_of(facts) if exists(folder, file.name)]
    alive = (
        facts.live if "row" in result.broken else facts.rows if "alive" in result.broken else _count_live(folder, facts)
    )
    pick = _pick(folder, facts, result)
    plan.lost += alive - (len(pick.rows) if pick else 0)
    return pick


def _pick(folder: Folder, facts: SegmentFacts, result: Checked) -> Pick | None:
    """Pick the intact live rows of a damaged segment; None if there are none."""
    if result.records is None or (len(result.rows) == facts.rows and not len(result.aliases)):
        return None
    alive = np.ones(facts.rows, np.bool_) if "alive" in result.broken else living(folder, facts)
    alive[result.rows] = False
    rows = np.flatnonzero(alive)
    if not len(rows):
        return None
    _, _, feature_width = records_of(folder, facts)
    name = facts.file("seg").name
    descriptor, size = folder.open(name)
    folder.close_file(descriptor)
    data = folder.sealed(name, size)
    # pitch 0, since the file may end within the padding of its last row
    segment = Segment(
        facts, folder, result.records, result.aliases, 0, feature_width, data, marks=marks_of(folder, facts)
    )
    return Pick(segment, rows, result.aliases, frozenset(result.broken) & {"var", "fp"})


def _count_live(folder: Folder, facts: SegmentFacts) -> int:
    return int(living(folder, facts).sum())


def exists(folder: Folder, name: str) -> bool:
    """Return whether a name exists in the store."""
    try:
        folder.size(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def format_whole(folder: Folder) -> bool:
    """Return whether the file FORMAT is intact. FormatTooNew for a later version."""
    try:
        check_format(folder)
    except FormatTooNew:
        raise
    except (SnapshotDamaged, FileNotFoundError):
        return False
    return True


def _unneeded_files(folder: Folder, history: History, plan: Plan, grace: float) -> list[str]:
    """List files in seg/ and idx/ that neither an intact manifest, nor the planned one, nor a running commit needs."""
    named = {file.name for manifest in (plan.base, *history.older) for file in files_of(manifest)}
    parts = [part for bank_parts in plan.banks.values() for part in bank_parts]
    named |= {file.name for part in parts if isinstance(part, SegmentFacts) for file in files_of(part)}
    protected = leased(folder, [f"stat/{name}" for name in names_of(folder, "stat")])
    unneeded = []
    for name in names_in(folder):
        if name.startswith(("seg/", "idx/")) and name not in named and name.rpartition("/")[2][:32] not in protected:
            with suppress(FileNotFoundError):  # removed after it was listed
                if folder.age(name) >= grace:
                    unneeded.append(name)
    return unneeded


def _adopt(folder: Folder, history: History, plan: Plan, salvaged: Sequence[Manifest]) -> None:
    """Adopt intact segments of damaged generations: those that a salvaged manifest names, then others that fit exactly
    one bank."""
    manifest = [plan.base, *history.older]
    known = {segment.id for old in manifest for facts in banks(old).values() for segment in facts.segments}
    for salvaged_manifest in salvaged if history.base is not None else ():
        for place, facts in banks(salvaged_manifest).items():
            bank = banks(plan.base).get(place)
            for segment in facts.segments:
                if bank and _shape(bank) == _shape(facts) and segment.id not in known and _is_whole(folder, segment):
                    known.add(segment.id)
                    plan.banks[place].append(segment)
                    plan.adopted += 1
    for id in sorted({name.partition(".")[0] for name in names_of(folder, "seg")} - known):
        rebuilt = _facts_from_files(folder, id)
        places = [place for place, facts in banks(plan.base).items() if rebuilt and _fits(folder, rebuilt, facts)]
        if rebuilt and len(places) == 1 and _is_whole(folder, rebuilt):
            plan.banks[places[0]].append(rebuilt)
            plan.adopted += 1


def _is_whole(folder: Folder, facts: SegmentFacts) -> bool:
    result = check_segment(folder, facts, strict=True)
    return not result.broken and not len(result.rows)


def _shape(facts: BankFacts) -> tuple[str, int, int, int]:
    return facts.dtype, facts.width, facts.rank, facts.feature_width


def _fits(folder: Folder, segment: SegmentFacts, bank: BankFacts) -> bool:
    records, _, feature_width = records_of(folder, segment)
    step = bank.width * DTYPES[bank.dtype]
    sizes = records["nbytes"]
    equal = bool((sizes == step).all()) if bank.rank == 1 else not (sizes % step).any() if step else False
    return equal and feature_width == bank.feature_width


def _facts_from_files(folder: Folder, id: str) -> SegmentFacts | None:
    """Reconstruct the facts of a segment from its files alone; None when the files are inconsistent."""
    try:
        sizes = {kind: _size(folder, f"seg/{id}.{kind}") for kind in _KINDS}
        rows = (sizes["row"] - HEADER.itemsize) // (ROW.itemsize + mark_bytes(folder, f"seg/{id}.row"))
        header = _header(folder, f"seg/{id}.row")
        width = int(header["feature_width"])
        # checked before the files are read, since damaged files may be very large
        if int(header["rows"]) != rows or sizes["key"] % 32 or sizes["fp"] != rows * width * 2:
            return None
        files = tuple(_file_facts(folder, f"seg/{id}.{kind}", sizes[kind], kind != "seg") for kind in _KINDS)
        facts = SegmentFacts(id, rows, sizes["key"] // 32, 0, files)
        records, _, _ = records_of(folder, facts)
    except (SnapshotDamaged, FileNotFoundError, NotADirectoryError, ValueError):
        return None
    variable = int(records["tokens"].sum(dtype=np.int64)) * 4 + int(records["source"].sum(dtype=np.int64))
    if sizes["var"] != variable:
        return None
    return replace(facts, payload=int(records["nbytes"].sum(dtype=np.int64)))


def _size(folder: Folder, name: str) -> int:
    descriptor, size = folder.open(name)
    folder.close_file(descriptor)
    return size


def _header(folder: Folder, name: str) -> NDArray[Any]:
    """Read the header of a .row file, a record of HEADER. SnapshotDamaged when it is not one."""
    raw = np.zeros(HEADER.itemsize, np.uint8)
    descriptor, _ = folder.open(name)
    try:
        folder.read_at(descriptor, raw, 0)
    finally:
        folder.close_file(descriptor)
    header: NDArray[Any] = raw.view(HEADER)[0]
    if header["magic"] != MAGIC or header["record"] != ROW.itemsize:
        raise SnapshotDamaged(f"{name} does not have the header of a .row file")
    return header


def _file_facts(folder: Folder, name: str, size: int, hashed: bool) -> FileFacts:
    digest = hashlib.sha256()
    for part in chunks(folder, name, size) if hashed else ():
        digest.update(part.data)
    return FileFacts(name, size, digest.hexdigest() if hashed else None)
