"""Commits: the next generation, published by put-if-absent. No lock, and no update is lost.

Old manifests are removed (`maintenance.gc`), so that a number can become free again. A writer that listed
generation 10, was stopped, and woke up when 20 was the newest and 11 had been collected, would link its 11
without an error: durable, acknowledged, and read by nobody. So the listing is looked at once more after the
link. Collecting never removes the newest manifest, hence: when nothing higher is listed, nothing higher was
there when the number was taken, so it was not taken before, and the base was the newest. When something higher
is listed, either somebody built on this commit in the meantime, and the change is part of the newest manifest
already; or the number was a used one, and the change is published again on top of the newest. Nothing needs to
tell the two apart, since changes are idempotent, and a manifest that lost is just an old one to everybody else.

Just an old one: whoever collects may remove at once the files that it names and the newest does not. So files
that were named by a manifest which lost must not be named by another one; the writer makes them anew (`once`).
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

from llmcache.indexes.commits.generations import (
    LAST,
    generation_name,
    generations,
    newest,
)
from llmcache.indexes.commits.signatures import announce, signature_name, signatures
from llmcache.indexes.errors import CommitConflict, LLMCacheError, SnapshotDamaged, StoreFenced, StoreFull
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.manifest_json import MAX_BYTES, from_bytes, to_bytes
from llmcache.indexes.format.write_once import write_whole

_ROUNDS = 200

Publish: TypeAlias = Callable[[Callable[[Manifest], Manifest]], Manifest]
"""Takes a change of the newest manifest, publishes the result, and returns it once it is durable."""


class Republished(CommitConflict):
    """A commit was linked, is not part of the store, and its files are not to be named again."""


def commit(
    folder: Folder,
    writer: str,
    change: Callable[[Manifest], Manifest],
    *,
    key: bytes | None = None,
    signed_base: bool = False,
    salvaged: Manifest | None = None,
    once: bool = False,
) -> Manifest:
    """Publish `change(newest manifest)` as the next generation and return it once it is durable.

    The change is applied again to the new base whenever another writer was faster, so it must be a pure delta, and
    applied to a manifest that has it already it must give an equal one.
    Base and number come from one directory listing: two listings would lose the update of a writer in between.
    key: sign the manifest with it. signed_base: go on from manifests signed with it only, so that a stranger's changes
    never get our signature; where the owner alone can write, an unsigned base is fine.
    salvaged: what to change where no manifest is whole; without it that is SnapshotDamaged.
    once: the change names files of its own, which no second manifest may name anew: Republished where one would.
    StoreFenced or StoreFull when a write fails; what was committed before is untouched.
    """
    linked = False
    for _ in range(_ROUNDS):
        listed = generations(folder)
        try:
            base, damaged = newest(folder, listed, key if signed_base else None) if listed else (Manifest(), [])
        except SnapshotDamaged:
            if generations(folder)[:1] != listed[:1]:  # all of them were collected since they were listed
                continue
            if salvaged is None:
                raise
            base, damaged = salvaged, listed
        check_signable(folder, base, key)
        generation = (listed[0] if listed else 0) + 1
        if generation > LAST:
            raise StoreFenced(f"{folder.path}: there is no number after {generation_name(LAST)}; run `llmcache repair`")
        changed = change(base)
        if linked and changed == base:
            return base
        if linked and once:
            raise Republished(
                f"{generation_name(base.generation)} and others were there before; what this names may be gone"
            )
        new = replace(
            changed,
            generation=generation,
            parent=base.generation,
            created=round(max(0.0, folder.now()), 3),
            writer=writer,
            skipped=tuple(sorted({*base.skipped, *damaged})),
        )
        if _publish(folder, f"t-{writer}-{generation}", to_bytes(new), generation, key):
            linked = True
            if _highest(folder) == generation:
                return new
            continue
        time.sleep(random.uniform(0, 0.02))  # two losers of one round should not meet again in the next
    raise CommitConflict(f"{folder.path}: other writers won {_ROUNDS} rounds in a row; commit again")


def _highest(folder: Folder) -> int:
    try:
        return generations(folder)[0]
    except OSError as error:  # the commit may count or not; this writer cannot know
        raise fenced(error) from error


def _publish(folder: Folder, temporary: str, data: bytes, generation: int, key: bytes | None) -> bool:
    name = generation_name(generation)
    if len(data) > MAX_BYTES:
        raise LLMCacheError(f"a manifest of {len(data):,} bytes is over the limit; compact the store")
    try:
        from_bytes(data, name)
    except SnapshotDamaged as error:
        raise LLMCacheError(f"not committed, since it could not be read back: {error}") from error
    try:
        announced = announce(folder, generation, data, key) if key is not None else None
        write_whole(folder, temporary, [data])
        try:
            folder.link(temporary, name)
        except (FileExistsError, FileNotFoundError):  # the latter: collected, since this process slept for so long
            if announced:
                folder.remove(announced)
            return False
        finally:
            folder.remove(temporary)
        if announced:
            folder.replace(announced, signature_name(generation))
        folder.sync_folder("")
    except OSError as error:
        raise fenced(error) from error
    return True


def check_signable(folder: Folder, base: Manifest, key: bytes | None) -> None:
    """StoreFenced where the generation to build on is signed, and the next one would not be."""
    if key is None and base.generation in signatures(folder).values():
        raise StoreFenced(f"{folder.path} is signed, and this would not be; open it with its key to store anything")


@contextmanager
def fencing() -> Iterator[None]:
    """Turns what a disk says inside the block into the error for it, `fenced`."""
    try:
        yield
    except OSError as error:
        raise fenced(error) from error


def fenced(error: OSError) -> StoreFenced:
    """The error for a write that failed. Never retried: after a failed fsync the kernel may call the next a success."""
    reason = f"writing to the store failed ({os.strerror(error.errno or 0)}); what was committed before is safe"
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StoreFull(f"{reason}; free some space and open the store again")
    return StoreFenced(f"{reason}; open the store again")
