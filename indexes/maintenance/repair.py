"""Repair: what is damaged is set aside, and a new generation names what is left."""

from __future__ import annotations

import os
import uuid
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.create import found
from llmcache.indexes.commits.generations import (
    LAST,
    generation_name,
    generations,
    newest,
)
from llmcache.indexes.commits.leases import Lease
from llmcache.indexes.commits.trust import check_own
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import QUARANTINE, SUBFOLDERS
from llmcache.indexes.format.manifest import (
    Manifest,
    SegmentFacts,
)
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
from llmcache.indexes.maintenance.verify import (
    History,
    history_of,
    odd_parts,
    opened,
    printable,
)


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did, or with `dry_run` would do. generation: the store's newest afterwards.

    set_aside: files that went to quarantine/. rewritten: segments made anew from their whole rows. adopted: segments
    that only a damaged manifest named. lost: entries that no longer are in the store.
    """

    generation: int
    set_aside: tuple[str, ...]
    rewritten: int
    adopted: int
    lost: int


def repair(
    store: str | os.PathLike[str], *, dry_run: bool = False, grace: float = 3600.0, key: bytes | None = None
) -> Repair:
    """Set what is damaged aside in `quarantine/` and commit a generation without it. Nothing is deleted.

    Rows that are whole stay: a segment with damaged files or rows is written anew without them. Segments of a damaged
    generation are taken in again when they are whole. A damaged index is dropped, and built again when it is needed.
    grace: seconds for which a file that no manifest names may belong to a commit that is under way.
    key: what the new generation is signed with; a signed store is not repaired without. UntrustedSnapshot when the
    folder is not this user's alone: what is taken in again would be anybody's.
    SnapshotDamaged when no manifest says whose entries these are; StoreFull or LLMCacheError when the disk fails: what
    cannot be read now is not taken for damaged, so move it away first if the disk has lost it for good.
    """
    with closing(opened(Path(store))) as folder:
        return repaired(folder, dry_run=dry_run, grace=grace, key=key)


def repaired(folder: Folder, *, dry_run: bool = False, grace: float = 3600.0, key: bytes | None = None) -> Repair:
    """`repair` of the store in a folder that is open. Busy while another process evicts, compacts or collects."""
    with failing(folder.path):
        check_own(folder)
        format_whole(folder)  # a later format is left alone
        odd = _odd_parts(folder)
        history = history_of(folder, strict=True)
        check_known(folder, history, list(salvaged_manifests(folder, history)))
        if not dry_run:
            if history.base is not None:
                publishing.check_signable(folder, history.base, key)  # before anything is made
            for name in odd:  # nothing in them can be read, and what comes next needs their places
                folder.set_aside(name)
            folder.make()
        with nullcontext() if dry_run else folder.lock():
            done = _repaired(folder, dry_run, grace, key)
        return replace(done, set_aside=tuple(map(printable, sorted({*odd, *done.set_aside}))))


def _odd_parts(folder: Folder) -> list[str]:
    """Names that sub-folders and the lock should have and that something else has. SnapshotDamaged for links."""
    odd = odd_parts(folder)
    for name, what in odd.items():
        if name in SUBFOLDERS and "link" in what:
            raise SnapshotDamaged(
                f"{folder.path}/{name} is a link, and what it leads to may be whole: put the folder itself in its "
                "place, or remove the link to give up what was in it; then repair again"
            )
    return [name for name in odd if name != QUARANTINE]


def _repaired(folder: Folder, dry_run: bool, grace: float, key: bytes | None) -> Repair:
    history = history_of(folder, strict=True)
    plan = planned(folder, history, grace)
    aside = tuple(sorted(plan.aside))
    if dry_run:
        return Repair(plan.base.generation, aside, plan.picks, plan.adopted, plan.lost)
    with Lease(folder) as lease:
        generation = _done(folder, history, plan, key, lease)
    for name in aside:
        if exists(folder, name):
            folder.set_aside(name)
    if not format_whole(folder):
        found(folder)
    folder.sync_folder("")
    return Repair(generation, aside, plan.picks, plan.adopted, plan.lost)


# -- doing --------------------------------------------------------------------------------------------------


def _done(folder: Folder, history: History, plan: Plan, key: bytes | None, lease: Lease) -> int:
    """Write and commit the new generation, when anything of it is new; its number."""
    passed_over = any(plan.base.generation < one < LAST for one in history.damaged)
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
        if history.listed[0] >= LAST:  # no number comes after it, and nothing whole is lost with it
            folder.set_aside(generation_name(history.listed[0]))
        return publishing.commit(
            folder, uuid.uuid4().hex, lambda base: _changed(base, plan, new), key=key, salvaged=plan.base
        ).generation
    except BaseException:
        listed = generations(folder)
        with suppress(SnapshotDamaged):
            if {one.name for one in files_of(newest(folder, listed)[0])}.intersection(made):
                raise  # the generation is there, only its last sync failed
        for name in made:
            folder.remove(name)
        raise


def _changed(base: Manifest, plan: Plan, new: dict[tuple[str, str], list[SegmentFacts]]) -> Manifest:
    """The newest manifest with this repair's changes; segments that others have committed meanwhile stay."""
    planned = {one.id for facts in banks(plan.base).values() for one in facts.segments}
    for place, facts in banks(base).items():
        mine = planned | {one.id for one in new.get(place, ())}
        later = [one for one in facts.segments if one.id not in mine]
        facts = replace(facts, segments=(*new.get(place, ()), *later))
        if place in plan.indexless:
            facts = replace(facts, projection=None, index=None)
        base = base.with_bank(*place, facts)
    return base
