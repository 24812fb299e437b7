"""Purge: remove entries from the store at once, with all files and derived data that could contain them.

The remaining rows are copied into new segments, and a manifest names these. Then all other generations and all files
that the new manifest does not name are removed: old segments, indexes and projections, bitmaps, files of incomplete
commits, and quarantined files. Calibrations to which an entry may have contributed are dropped, and unfinished runs of
the namespace are discarded. Stop the writers before: their uncommitted files are removed too.
"""

from __future__ import annotations

import logging
import re
import uuid
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

from llmcache.indexes.commits.generations import generation_name, generations
from llmcache.indexes.commits.publish import fencing
from llmcache.indexes.commits.signatures import signatures
from llmcache.indexes.errors import ConfigError
from llmcache.indexes.eviction.budget import waiting_lock
from llmcache.indexes.files.names import QUARANTINE
from llmcache.indexes.format.manifest import BankFacts, Manifest, NamespaceFacts, SegmentFacts
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.derived import without
from llmcache.indexes.maintenance.purge_selection import Documents, Doomed, Mask, Part, Selection, among, select
from llmcache.indexes.maintenance.rewrite import readable, rewrite
from llmcache.indexes.maintenance.verify import printable
from llmcache.indexes.stats import unfinished
from llmcache.indexes.stats.runs import journal_name, read_journals, write_journal
from llmcache.indexes.store import Store

__all__ = ["Doomed", "Purged", "among", "purge"]

log = logging.getLogger("llmcache")

Replaced: TypeAlias = dict[str, SegmentFacts | None]  # new segment by the old one's id, None if no row is left

_OURS = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{32})?\.[a-z]{1,8}|t-.*")
_TEMPORARY = "t-"


@dataclass(slots=True)
class Purged:
    """Result of a purge, or of its dry run.

    rows: entries removed, including evicted ones whose bytes still existed. aliases: removed. damaged: rows that should
    have been copied and could not be read, so that they are lost too. segments: copied or dropped. files, bytes:
    removed, with all old generations. written: bytes of the copies. calibrations: dropped, so that near reuse is off
    until the bank is calibrated again. unfinished: runs discarded.
    """

    rows: int = 0
    aliases: int = 0
    damaged: int = 0
    segments: int = 0
    files: int = 0
    bytes: int = 0
    written: int = 0
    calibrations: int = 0
    unfinished: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def purge(store: Store, doomed: Doomed, *, dry_run: bool = False) -> Purged:
    """Remove entries and all files that could contain them. Closes the store's open banks and drops pending rows.

    Repeats the selection until the newest manifest has none of the entries, since writers may commit meanwhile.
    ConfigError for an unknown namespace. StoreFenced or StoreFull when the disk fails: entries to remove may then still
    exist, and all other entries do. Busy while another process evicts, compacts or collects, or while an unfinished run
    is active.
    """
    with fencing(), nullcontext() if dry_run else waiting_lock(store.folder):
        return _purge_locked(store, doomed, dry_run=dry_run)


def _purge_locked(store: Store, doomed: Doomed, *, dry_run: bool) -> Purged:
    if doomed.namespace is not None and doomed.namespace not in store.latest().namespaces:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(f"the store has no namespace {doomed.namespace!r}; it has {known}")
    purged, before, documents = Purged(), store.latest(), Documents(doomed)
    runs = unfinished.runs(store.folder, doomed.namespace, doomed.unfinished)
    if dry_run:
        selection = select(store.folder, before, doomed, documents)
        purged.unfinished = sum(map(unfinished.is_there, runs))
        replaced = _replacements(store, selection, purged, dry_run=True)
        _sweep(store, doomed, purged, before.generation, (selection, replaced), documents, dry_run=True)
        return purged
    store.close_banks()  # otherwise closing the store would write usage records with the keys of rows
    store.publish(lambda base: base)  # raises before any change if the store cannot be written; later bases are ours
    purged.unfinished = sum(unfinished.discard(store.folder, run) for run in runs)
    while selection := select(store.folder, store.manifest, doomed, documents):
        _change(store, selection, _replacements(store, selection, purged, dry_run=False), doomed.whole)
    if doomed.whole is not None and doomed.whole in store.manifest.namespaces:  # it had no segments
        _change(store, Selection(), {}, doomed.whole)
    _sweep(store, doomed, purged, before.generation, (Selection(), {}), documents, dry_run=False)
    return purged


def _change(store: Store, selection: Selection, replaced: Replaced, whole: str | None) -> None:
    store.publish(lambda base: _without(base, selection, replaced, whole))


def _without(base: Manifest, selection: Selection, replaced: Replaced, whole: str | None) -> Manifest:
    """Return the manifest with segments replaced, without the selected calibrations, and without one namespace."""
    spaces = {
        name: _space_without(space, selection.settings.get(name, frozenset()), replaced)
        for name, space in base.namespaces.items()
        if name != whole
    }
    return replace(base, namespaces=spaces)


def _space_without(space: NamespaceFacts, settings: frozenset[str], replaced: Replaced) -> NamespaceFacts:
    banks = {name: _bank_without(bank, replaced) for name, bank in space.banks.items()}
    if not settings & set(space.config):
        return replace(space, banks=banks)
    config, dropped = without(space, settings)
    return replace(space, config=config, banks={name: bank for name, bank in banks.items() if name not in dropped})


def _bank_without(bank: BankFacts, replaced: Replaced) -> BankFacts:
    segments = tuple(new for segment in bank.segments if (new := replaced.get(segment.id, segment)) is not None)
    covered = {name.partition("-")[0] for name in bank.index.segments} if bank.index else set()
    if segments == bank.segments and covered <= {segment.id for segment in segments}:
        return bank
    # fingerprints reveal documents as activations do, and a PCA is computed from them
    return replace(bank, segments=segments, projection=None, index=None)


# -- copying ------------------------------------------------------------------------------------------------


def _replacements(store: Store, selection: Selection, purged: Purged, *, dry_run: bool) -> Replaced:
    """Return the replacement of each affected segment, by id; written to disk unless it is a dry run."""
    replaced: Replaced = {}
    purged.calibrations += sum(map(len, selection.settings.values()))
    for part in selection.going:
        if part.segment is None and not part.whole:
            _count(purged, 0, 0)
            purged.damaged += part.facts.rows
            replaced[part.facts.id] = None
        elif part.whole:
            _count(purged, part.facts.rows, part.facts.aliases)
            replaced[part.facts.id] = None
        else:
            _count(purged, int(part.rows.sum()), int(part.aliases.sum()))
            replaced[part.facts.id] = None if dry_run else _copy_remaining(store, part, purged)
    return replaced


def _count(purged: Purged, rows: int, aliases: int) -> None:
    purged.segments, purged.rows, purged.aliases = purged.segments + 1, purged.rows + rows, purged.aliases + aliases


def _copy_remaining(store: Store, part: Part, purged: Purged) -> SegmentFacts | None:
    """Write a new segment with the remaining rows and aliases of an old one. Returns None if there are none."""
    old = part.segment
    assert old is not None
    rows: Mask = old.living() & ~part.rows
    if not rows.any() and part.aliases.all():
        return None
    return _rewrite_rows(store, old, rows, ~part.aliases, purged)


def _rewrite_rows(store: Store, old: Segment, rows: Mask, aliases: Mask, purged: Purged) -> SegmentFacts:
    facts = rewrite(
        store.folder, uuid.uuid4().hex, [readable(old, rows, aliases)], old.feature_width, strong=store.signs
    )
    purged.damaged += int(rows.sum()) - facts.rows
    purged.written += sum(file.size for file in facts.files)
    return facts


# -- sweeping -----------------------------------------------------------------------------------------------


def _sweep(
    store: Store,
    doomed: Doomed,
    purged: Purged,
    before: int,
    leaving: tuple[Selection, Replaced],
    documents: Documents,
    *,
    dry_run: bool,
) -> None:
    """Remove all files that the newest manifest does not need.

    before: generation at which the purge started; manifests of its own steps are not counted. leaving: selection and
    replacements that a dry run did not commit.
    """
    folder = store.folder
    own = f"{doomed.writer}.json"
    names_in = {
        sub: folder.names(sub) for sub in ("seg", "idx", QUARANTINE)
    }  # before the manifest: later files are new
    older, signed = generations(folder), signatures(folder)
    manifest = store.latest()
    needed = _without(manifest, *leaving, doomed.whole).files
    foreign = [f"{sub}/{name}" for sub in ("seg", "idx") for name in names_in[sub] if not _OURS.fullmatch(name)]
    if foreign:
        log.warning(
            "%d foreign files in the store's folder were not removed, the first is %s",
            len(foreign),
            printable(foreign[0]),
        )
    unused = [f"{sub}/{name}" for sub, names in names_in.items() for name in names]
    unused = [name for name in unused if name not in needed and name not in foreign]
    unused += [name for name in folder.names() if name.startswith(_TEMPORARY)]
    superseded = {name: one for name, one in signed.items() if one != manifest.generation}
    superseded |= {generation_name(generation): generation for generation in older if generation != manifest.generation}
    unused += superseded
    # usage records contain keys of rows, and only the choice of rows to evict depends on them
    listing = (".use", ".runs") if doomed.whole is not None else (".use",)
    stat = folder.names("stat")
    unused += [f"stat/{name}" for name in stat if name.endswith(listing) or name == own or name.startswith(_TEMPORARY)]
    for name in unused:
        if superseded.get(name, 0) <= before:
            purged.bytes += folder.size(name)
            purged.files += 1
        if not dry_run:
            folder.remove(name)
    if not dry_run:
        _forget_corpora(store, documents)
    for sub in () if dry_run else ("", *(sub for sub, names in names_in.items() if names)):
        folder.sync_folder(sub)  # a power loss must not restore the files


def _forget_corpora(store: Store, documents: Documents) -> None:
    """Remove journal records of runs whose corpus is named like a purged document, or starts with a purged source."""
    names = {*documents.names, *documents.doomed.ids}
    prefixes = tuple(documents.doomed.sources)
    if not names and not prefixes:
        return
    for name in store.folder.names("stat"):
        writer, _, kind = name.rpartition(".")
        if kind == "runs":
            records = read_journals(store.folder, [writer])
            kept = [
                record
                for record in records
                if record.get("corpus", "") not in names
                and not str(record.get("corpus", "")).startswith(prefixes or ("\0",))
            ]
            if len(kept) < len(records):
                write_journal(store.folder, writer, kept) if kept else store.folder.remove(journal_name(writer))
