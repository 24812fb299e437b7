"""Files that a store no longer needs: which they are, and removing them."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from itertools import pairwise

from llmcache.indexes.commits.generations import generation_name, generations
from llmcache.indexes.commits.leases import LEASE, leased
from llmcache.indexes.errors import FormatTooNew, SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import SUBFOLDERS
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.manifest_json import MAX_BYTES, from_bytes

log = logging.getLogger("llmcache")

_ID = r"[0-9a-f]{32}"
_TEMPORARY = re.compile(rf"(stat/)?t-{_ID}(-\d+)?")
_DATA = re.compile(rf"(seg/{_ID}(-{_ID})?\.(seg|row|var|fp|key|alive)|idx/{_ID}\.(faiss|proj))")
_ADVISORY = re.compile(rf"FORMAT|lock|stat/{_ID}\.(json|use|runs)")
_OF_MANIFEST = re.compile(r"m-(\d{12})(\.json|(-[0-9a-f]{32})?\.sig)")
_FORMS = (_DATA, _ADVISORY, LEASE, _OF_MANIFEST, _TEMPORARY)


@dataclass(frozen=True, slots=True)
class Garbage:
    """sizes: bytes of each file that is not needed, by name. manifests: how many of them are manifests.

    blocked: names of damaged manifests; while there are any, nothing is garbage, since what they name is not known.
    """

    sizes: dict[str, int]
    manifests: int
    blocked: tuple[str, ...]


def files(folder: Folder) -> dict[str, tuple[int, float]]:
    """Size and time of the last change of every file of the store, by name. Files of other names are left out."""
    found = {}
    for sub in ("", *SUBFOLDERS):
        for name, facts in folder.listing(sub).items():
            whole = f"{sub}/{name}" if sub else name
            if any(form.fullmatch(whole) for form in _FORMS):
                found[whole] = facts
    return found


def disk_bytes(folder: Folder) -> int:
    """Size of the store in bytes: the sum of its own files. Foreign files in the folder do not count."""
    return sum(size for size, _ in files(folder).values())


def garbage(folder: Folder, grace: float, superseded: float) -> Garbage:
    """Files that may be removed.

    grace: seconds for which a file in no manifest is left alone, beside those that a living writer has a lease on.
    superseded: seconds for which a manifest that has a successor, and what only it names, are left alone; the newest
    manifest and its predecessor stay in any case.
    """
    found = files(folder)
    # In this order: a file of the listing above had a lease before it was created, and a lease ends after its files
    # were published, so what is neither leased now nor named by the manifests below will never be named.
    protected = leased(folder, found)
    known, damaged = _manifests(folder)
    if damaged or not known:
        return Garbage({}, 0, damaged)
    now, newest = folder.now(), known[0]
    named, dropped, kept = set(newest.files), set[str](), {newest.generation, newest.parent}
    for successor, manifest in pairwise(known):
        # of the younger of the two: a writer that lost with a used number (publishing.commit) publishes again soon
        both = (successor, manifest)
        since = max(found.get(generation_name(each.generation), (0, now))[1] for each in both)
        if superseded > 0 and now - since < superseded:  # at 0, also on a disk whose clock is ahead of ours
            named |= manifest.files
            kept.add(manifest.generation)
        else:
            dropped |= manifest.files  # nobody names them again: `once` in publishing.commit
    pruned, listed = {one.generation for one in known} - kept, {one.generation for one in known}

    def removable(name: str, changed: float) -> bool:
        old = now - changed > grace
        if match := _OF_MANIFEST.fullmatch(name):
            number = int(match[1])  # a signature without its manifest is of a commit that was killed, or lost
            return number in pruned or (number not in listed and old)
        if _DATA.fullmatch(name) and name not in named:
            return name.rpartition("/")[2][:32] not in protected and (name in dropped or old)
        if LEASE.fullmatch(name):
            return old and not folder.locked(name)
        return bool(_TEMPORARY.fullmatch(name)) and old

    sizes = {name: size for name, (size, changed) in found.items() if removable(name, changed)}
    return Garbage(sizes, len(pruned), ())


def _manifests(folder: Folder) -> tuple[list[Manifest], tuple[str, ...]]:
    """All manifests that are listed, newest first, and the names of damaged ones."""
    known, damaged = [], []
    for generation in generations(folder):
        name = generation_name(generation)
        try:
            known.append(from_bytes(folder.read(name, MAX_BYTES), name))
        except FormatTooNew:
            raise
        except SnapshotDamaged:
            damaged.append(name)
        except FileNotFoundError:  # another process collects too
            continue
    return known, tuple(damaged)


def remove(folder: Folder, names: list[str]) -> None:
    """Remove files; one that cannot be removed is left for the next time."""
    # manifests first, oldest first: what is left when this is cut short is a store without some of its past
    for name in sorted(names, key=lambda name: (not name.startswith("m-"), name)):
        try:
            if LEASE.fullmatch(name):
                folder.remove_unlocked(name)
            else:
                folder.remove(name)
        except OSError as error:
            log.warning("%s was not removed: %s", name, error)
