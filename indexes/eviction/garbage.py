"""Garbage of a store: find the files that it no longer needs, and remove them."""

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
    """Files that may be removed. sizes: bytes of each, by name. manifests: number of superseded manifests.

    blocked: names of damaged manifests. While there are any, no file is garbage, since the files they name are unknown.
    """

    sizes: dict[str, int]
    manifests: int
    blocked: tuple[str, ...]


def files(folder: Folder) -> dict[str, tuple[int, float]]:
    """List the store's own files, by name, with size in bytes and time of the last change. Skips foreign names."""
    facts_of = {}
    for sub in ("", *SUBFOLDERS):
        for name, facts in folder.listing(sub).items():
            path = f"{sub}/{name}" if sub else name
            if any(form.fullmatch(path) for form in _FORMS):
                facts_of[path] = facts
    return facts_of


def disk_bytes(folder: Folder) -> int:
    """Sum the sizes of the store's own files, in bytes. Foreign files in the folder do not count."""
    return sum(size for size, _ in files(folder).values())


def garbage(folder: Folder, grace: float, superseded: float) -> Garbage:
    """Find the files that may be removed.

    grace: seconds after its last change for which a file in no manifest is kept. Files under a lease are always kept.
    superseded: seconds for which a manifest with a successor is kept, with the files that only it names. The newest
    manifest and its predecessor are always kept.
    """
    listing = files(folder)
    # The order matters. A file in the listing above had a lease before it was created, and a lease ends only after its
    # files were published. So a file that is neither leased now nor named by the manifests below is never named.
    protected = leased(folder, listing)
    manifests, damaged = _manifests(folder)
    if damaged or not manifests:
        return Garbage({}, 0, damaged)
    now, newest = folder.now(), manifests[0]
    named, dropped, kept_generations = set(newest.files), set[str](), {newest.generation, newest.parent}
    for successor, manifest in pairwise(manifests):
        # Count from the younger of the two: a writer that lost with a reused number (publish.commit) republishes soon.
        both = (successor, manifest)
        since = max(listing.get(generation_name(each.generation), (0, now))[1] for each in both)
        if superseded > 0 and now - since < superseded:  # 0 keeps nothing, even if the disk's clock is ahead of ours
            named |= manifest.files
            kept_generations.add(manifest.generation)
        else:
            dropped |= manifest.files  # no manifest names them again: `once` in publish.commit
    listed = {each.generation for each in manifests}
    pruned = listed - kept_generations

    def removable(name: str, changed: float) -> bool:
        old = now - changed > grace
        if match := _OF_MANIFEST.fullmatch(name):
            number = int(match[1])  # a signature without a manifest comes from a commit that was killed or lost
            return number in pruned or (number not in listed and old)
        if _DATA.fullmatch(name) and name not in named:
            return name.rpartition("/")[2][:32] not in protected and (name in dropped or old)
        if LEASE.fullmatch(name):
            return old and not folder.locked(name)
        return bool(_TEMPORARY.fullmatch(name)) and old

    sizes = {name: size for name, (size, changed) in listing.items() if removable(name, changed)}
    return Garbage(sizes, len(pruned), ())


def _manifests(folder: Folder) -> tuple[list[Manifest], tuple[str, ...]]:
    """Read all manifests of the folder. Returns the intact ones, newest first, and the names of damaged ones."""
    manifests, damaged = [], []
    for generation in generations(folder):
        name = generation_name(generation)
        try:
            manifests.append(from_bytes(folder.read(name, MAX_BYTES), name))
        except FormatTooNew:
            raise
        except SnapshotDamaged:
            damaged.append(name)
        except FileNotFoundError:  # another process collected it
            continue
    return manifests, tuple(damaged)


def remove(folder: Folder, names: list[str]) -> None:
    """Remove files. A file that cannot be removed is logged and left for the next collection."""
    # manifests first, oldest first, so that an interruption leaves a store without some old generations
    for name in sorted(names, key=lambda name: (not name.startswith("m-"), name)):
        try:
            if LEASE.fullmatch(name):
                folder.remove_unlocked(name)
            else:
                folder.remove(name)
        except OSError as error:
            log.warning("%s was not removed: %s", name, error)
