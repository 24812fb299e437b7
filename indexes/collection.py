"""Files that a store no longer needs: which they are, and removing them."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from itertools import pairwise

from llmcache.indexes.errors import FormatTooNew, SnapshotDamaged
from llmcache.indexes.generations import generation_name, generations
from llmcache.indexes.io import Folder
from llmcache.indexes.manifest import Manifest
from llmcache.indexes.parsing import MAX_BYTES, from_bytes
from llmcache.indexes.places import SUBFOLDERS

log = logging.getLogger("llmcache")

_ID = r"[0-9a-f]{32}"
_TEMPORARY = re.compile(rf"(stat/)?t-{_ID}(-\d+)?")
_DATA = re.compile(rf"(seg/{_ID}(-{_ID})?\.(seg|row|var|fp|key|alive)|idx/{_ID}\.(faiss|proj))")
_OF_MANIFEST = re.compile(r"m-(\d{12})(\.json|(-[0-9a-f]{32})?\.sig)")


@dataclass(frozen=True, slots=True)
class Garbage:
    """sizes: bytes of each file that is not needed, by name. manifests: how many of them are manifests.

    blocked: names of damaged manifests; while there are any, nothing is garbage, since what they name is not known.
    """

    sizes: dict[str, int]
    manifests: int
    blocked: tuple[str, ...]


def files(folder: Folder) -> dict[str, tuple[int, float]]:
    """Size and time of the last change of every plain file of the store, by name."""
    found = {}
    for sub in ("", *SUBFOLDERS):
        found.update({f"{sub}/{name}" if sub else name: facts for name, facts in folder.listing(sub).items()})
    return found


def disk_bytes(folder: Folder) -> int:
    """What the store takes up: the sizes of all its files."""
    return sum(size for size, _ in files(folder).values())


def garbage(folder: Folder, grace: float, superseded: float) -> Garbage:
    """What may be removed.

    grace: seconds for which a file in no manifest is left alone; its writer may be about to publish it.
    superseded: seconds for which a manifest that has a successor, and what only it names, are left alone; the newest
    manifest and its predecessor stay in any case.
    """
    found = files(folder)  # before the manifests: what is published from now on is then named by one that is read
    known, damaged = _manifests(folder)
    if damaged or not known:
        return Garbage({}, 0, damaged)
    now, newest = folder.now(), known[0]
    named, dropped, kept = set(newest.files), set[str](), {newest.generation, newest.parent}
    for pair in pairwise(known):
        # of the younger of the two: a writer that lost with a used number (publishing.commit) publishes again soon
        since = max(found.get(generation_name(each.generation), (0, now))[1] for each in pair)
        one = pair[1]
        if superseded > 0 and now - since < superseded:  # at 0, also on a disk whose clock is ahead of ours
            named |= one.files
            kept.add(one.generation)
        else:
            dropped |= one.files  # nobody names them again: `once` in publishing.commit
    pruned, listed = {one.generation for one in known} - kept, {one.generation for one in known}

    def goes(name: str, changed: float) -> bool:
        if match := _OF_MANIFEST.fullmatch(name):
            number = int(match[1])  # a signature without its manifest is of a commit that was killed, or lost
            return number in pruned or (number not in listed and now - changed > grace)
        if _DATA.fullmatch(name) and name not in named:
            return name in dropped or now - changed > grace
        return bool(_TEMPORARY.fullmatch(name)) and now - changed > grace

    sizes = {name: size for name, (size, changed) in found.items() if goes(name, changed)}
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
            folder.remove(name)
        except OSError as error:
            log.warning("%s was not removed: %s", name, error)
