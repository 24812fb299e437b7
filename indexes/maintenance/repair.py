"""Repair: move damaged files to the quarantine, and commit a generation with the intact data."""

from __future__ import annotations

import os
import uuid
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.create import found
from llmcache.indexes.commits.generations import LAST, generation_name, generations, newest
from llmcache.indexes.commits.leases import Lease
from llmcache.indexes.commits.trust import check_own
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import QUARANTINE, SUBFOLDERS
from llmcache.indexes.format.manifest import Manifest, SegmentFacts
from llmcache.indexes.maintenance.repair_plan import (
    Plan,
    check_known,
    exists,
    format_whole,
    planned,
    salvaged_manifests,
)
from llmcache.indexes.maintenance.rewrite import Pick, rewrite
from llmcache.indexes.maintenance.snapshot import banks, failing
from llmcache.indexes.maintenance.transfer import files_of
from llmcache.indexes.maintenance.verify import History, history_of, odd_parts, opened, printable


@dataclass(frozen=True, slots=True)
class Repair:
    """Result of a repair, or of its dry run. generation: the store's newest afterwards.

    set_aside: files moved to quarantine/. rewritten: segments rewritten with their intact rows. adopted: segments that
    no intact manifest named. lost: number of entries that are no longer in the store.
    """

    generation: int
    set_aside: tuple[str, ...]
    rewritten: int
    adopted: int
    lost: int


def repair(
    store: str | os.PathLike[str], *, dry_run: bool = False, grace: float = 3600.0, key: bytes | None = None
) -> Repair:
    """Move damaged files to `quarantine/` and commit a generation without them. No file is deleted.

    Intact rows stay: a segment with damaged files or rows is rewritten without them. Intact segments of a damaged
    generation are adopted. A damaged index is dropped, and rebuilt when it is needed.
    grace: seconds for which a file in no manifest may belong to a commit in progress.
    key: signs the new generation; required for a signed store.
    UntrustedSnapshot when others can write to the folder, since adopted segments could then be theirs.
    SnapshotDamaged when no manifest tells the model of the entries. StoreFull or LLMCacheError when the disk fails: a
    file that cannot be read now does not count as damaged, so move it away first if the disk has lost it for good.
    """
    with closing(opened(Path(store))) as folder:
        return repaired(folder, dry_run=dry_run, grace=grace, key=key)


def repaired(folder: Folder, *, dry_run: bool = False, grace: float = 3600.0, key: bytes | None = None) -> Repair:
    """Repair the store in an open folder, see `repair`. Busy while another process evicts, compacts or collects."""
    with failing(folder.path):
        check_own(folder)
        format_whole(folder)  # raises FormatTooNew: a store of a later format is not changed
        odd = _odd_parts(folder)
        history = history_of(folder, strict=True)
        check_known(folder, history, list(salvaged_manifests(folder, history)))
        if not dry_run:
            if history.base is not None:
                publishing.check_signable(folder, history.base, key)  # before anything is made
            for name in odd:  # they cannot be read, and the next steps need their names
                folder.set_aside(name)
            folder.make()
        with nullcontext() if dry_run else folder.lock():
            done = _repair_locked(folder, dry_run, grace, key)
        return replace(done, set_aside=tuple(map(printable, sorted({*odd, *done.set_aside}))))


def _odd_parts(folder: Folder) -> list[str]:
    """List sub-folders and `lock` that are of another type. SnapshotDamaged for links in place of sub-folders."""
    odd = odd_parts(folder)
    for name, problem in odd.items():
        if name in SUBFOLDERS and "link" in problem:
            raise SnapshotDamaged(
                f"{folder.path}/{name} is a link, and its target may be intact: put the folder itself in its "
                "place, or remove the link to give up the target's files; then repair again"
            )
    return [name for name in odd if name != QUARANTINE]


def _repair_locked(folder: Folder, dry_run: bool, grace: float, key: bytes | None) -> Repair:
    history = history_of(folder, strict=True)
    plan = planned(folder, history, grace)
    aside = tuple(sorted(plan.aside))
    if dry_run:
        return Repair(plan.base.generation, aside, plan.picks, plan.adopted, plan.lost)
    with Lease(folder) as lease:
        generation = _commit(folder, history, plan, key, lease)
    for name in aside:
        if exists(folder, name):
            folder.set_aside(name)
    if not format_whole(folder):
        found(folder)
    folder.sync_folder("")
    return Repair(generation, aside, plan.picks, plan.adopted, plan.lost)


# -- committing ---------------------------------------------------------------------------------------------


def _commit(folder: Folder, history: History, plan: Plan, key: bytes | None, lease: Lease) -> int:
    """Write and commit the new generation, if it differs from the base. Returns the newest generation."""
    passed_over = any(plan.base.generation < generation < LAST for generation in history.damaged)
    if not (plan.changed or plan.adopted or plan.indexless or passed_over):
        return plan.base.generation
    made: list[str] = []
    try:
        new: dict[tuple[str, str], list[SegmentFacts]] = {}
        for place, parts in plan.banks.items():
            new[place] = []
            for part in parts:
                if isinstance(part, Pick):
                    facts = rewrite(folder, lease.new(), [part], banks(plan.base)[place].feature_width)
                    made += [file.name for file in files_of(facts)]
                    new[place].append(facts)
                else:
                    new[place].append(part)
        if history.listed[0] >= LAST:  # a damaged manifest with the last number would block all commits
            folder.set_aside(generation_name(history.listed[0]))
        return publishing.commit(
            folder, uuid.uuid4().hex, lambda base: _with_changes(base, plan, new), key=key, salvaged=plan.base
        ).generation
    except BaseException:
        listed = generations(folder)
        with suppress(SnapshotDamaged):
            if {file.name for file in files_of(newest(folder, listed)[0])}.intersection(made):
                raise  # the generation was published, only its last sync failed
        for name in made:
            folder.remove(name)
        raise


def _with_changes(base: Manifest, plan: Plan, new: dict[tuple[str, str], list[SegmentFacts]]) -> Manifest:
    """Return the newest manifest with this repair's changes. Segments that others committed meanwhile stay."""
    planned = {segment.id for facts in banks(plan.base).values() for segment in facts.segments}
    for place, facts in banks(base).items():
        own_ids = planned | {segment.id for segment in new.get(place, ())}
        later = [segment for segment in facts.segments if segment.id not in own_ids]
        facts = replace(facts, segments=(*new.get(place, ()), *later))
        if place in plan.indexless:
            facts = replace(facts, projection=None, index=None)
        base = base.with_bank(*place, facts)
    return base
