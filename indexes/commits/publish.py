"""Commits: publish the next generation by put-if-absent, without locks and without lost updates.

Garbage collection (`maintenance.gc`) removes old manifests, so a generation number can become free again. Suppose a
writer lists generation 10, is suspended, and resumes when 20 is the newest and 11 was collected. It could then link
its manifest as 11 without an error: durable, acknowledged, and never read. So a writer lists the folder again after
the link. Collection never removes the newest manifest. Hence, when the second listing shows no higher number, none
existed when the number was taken: the number was new, and the base was the newest generation. When the listing does
show a higher number, there are two cases. Either another writer built on this commit meanwhile, and the newest
manifest has the change already. Or the number was used before, and the change is published again on top of the newest
manifest. Changes are idempotent, so the cases need not be told apart. To all other processes, a manifest that lost is
just an old manifest.

A collector may at once remove files that only such a manifest names. So no second manifest may name the files of a
manifest that lost; the writer writes them again (`once`).
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

from llmcache.indexes.commits.generations import LAST, generation_name, generations, newest
from llmcache.indexes.commits.signatures import announce, signature_name, signatures
from llmcache.indexes.errors import CommitConflict, LLMCacheError, SnapshotDamaged, StoreFenced, StoreFull
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.manifest_json import MAX_BYTES, from_bytes, to_bytes
from llmcache.indexes.format.write_once import write_whole

_ROUNDS = 200

Publish: TypeAlias = Callable[[Callable[[Manifest], Manifest]], Manifest]
"""Function that applies a change to the newest manifest, publishes the result, and returns it once it is durable."""


class Republished(CommitConflict):
    """Commit that was linked and lost: it is not part of the store, and its files must not be named again."""


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

    The change is applied again to the new base whenever another writer was faster, so it must be a pure delta and
    idempotent. Base and number come from one directory listing: with two, the update of a writer in between would be
    lost.

    key: signs the manifest. signed_base: build only on manifests signed with `key`, so that foreign changes never get
    our signature; if only the owner can write, an unsigned base is fine.
    salvaged: base to use when no manifest is intact; without it that raises SnapshotDamaged.
    once: the change names new files, which no second manifest may name. Republished when one would have to.
    StoreFenced or StoreFull when a write fails; earlier commits are untouched. CommitConflict after 200 rounds.
    """
    linked = False
    for _ in range(_ROUNDS):
        listed = generations(folder)
        try:
            base, damaged = newest(folder, listed, key if signed_base else None) if listed else (Manifest(), [])
        except SnapshotDamaged:
            if generations(folder)[:1] != listed[:1]:  # all of them were collected after they were listed
                continue
            if salvaged is None:
                raise
            base, damaged = salvaged, listed
        check_signable(folder, base, key)
        generation = (listed[0] if listed else 0) + 1
        if generation > LAST:
            raise StoreFenced(
                f"{folder.path}: {generation_name(LAST)} has the last possible number; run `llmcache repair`"
            )
        changed = change(base)
        if linked and changed == base:
            return base
        if linked and once:
            raise Republished(
                f"another writer committed {generation_name(base.generation)} first, so files of this commit may have "
                "been removed; write them again"
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
        time.sleep(random.uniform(0, 0.02))  # so that two writers that lost a round do not collide in the next
    raise CommitConflict(f"{folder.path}: other writers won {_ROUNDS} rounds in a row; commit again")


def _highest(folder: Folder) -> int:
    try:
        return generations(folder)[0]
    except OSError as error:  # this writer cannot tell whether the commit took effect
        raise fenced(error) from error


def _publish(folder: Folder, temporary: str, data: bytes, generation: int, key: bytes | None) -> bool:
    name = generation_name(generation)
    if len(data) > MAX_BYTES:
        raise LLMCacheError(f"a manifest of {len(data):,} bytes is over the limit; compact the store")
    try:
        from_bytes(data, name)
    except SnapshotDamaged as error:
        raise LLMCacheError(f"the manifest is not committed, because it cannot be read back: {error}") from error
    try:
        announced = announce(folder, generation, data, key) if key is not None else None
        write_whole(folder, temporary, [data])
        try:
            folder.link(temporary, name)
        # FileNotFoundError: the temporary file was collected while this process was suspended
        except (FileExistsError, FileNotFoundError):
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
    """Check that a signed store stays signed. StoreFenced when `base` is signed and there is no key."""
    if key is None and base.generation in signatures(folder).values():
        raise StoreFenced(
            f"{folder.path} is signed, and this commit would not be; open the store with its key to store anything"
        )


@contextmanager
def fencing() -> Iterator[None]:
    """Turn OSErrors inside the block into `fenced` errors."""
    try:
        yield
    except OSError as error:
        raise fenced(error) from error


def fenced(error: OSError) -> StoreFenced:
    """Return the error for a failed write. Never retry: after a failed fsync the next one may falsely succeed."""
    reason = f"writing to the store failed ({os.strerror(error.errno or 0)}); what was committed before is safe"
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StoreFull(f"{reason}; free some space and open the store again")
    return StoreFenced(f"{reason}; open the store again")
