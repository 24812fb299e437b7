"""The generations of a store: which manifests a folder has, and the newest that is whole."""

from __future__ import annotations

import re

from llmcache.indexes.commits.signatures import is_signed
from llmcache.indexes.errors import FormatTooNew, SnapshotDamaged, SnapshotNotFound, UntrustedSnapshot
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.manifest_json import MAX_BYTES, from_bytes

LAST = 10**12 - 1
"""The highest generation that a manifest's name can say."""
_NAME = re.compile(r"m-(\d{12})\.json")
_MOST_DAMAGED = 256  # manifests that are tried before giving up


def generation_name(generation: int) -> str:
    return f"m-{generation:012d}.json"


def generations(folder: Folder) -> list[int]:
    """Generations that one listing shows, newest first."""
    return sorted((int(match[1]) for name in folder.names() if (match := _NAME.fullmatch(name))), reverse=True)


def newest(folder: Folder, listed: list[int], key: bytes | None = None) -> tuple[Manifest, list[int]]:
    """The newest manifest of a listing that verifies, and the generations above it that do not.

    key: count only what is signed with it. UntrustedSnapshot when nothing is.
    SnapshotNotFound when the listing is empty, SnapshotDamaged when none of it verifies. A manifest of a newer
    format is never passed over for an older one: that would undo what the newer program wrote.
    """
    damaged: list[int] = []
    unsigned = 0
    for generation in listed[:_MOST_DAMAGED]:
        name = generation_name(generation)
        try:
            data = folder.read(name, MAX_BYTES)
            if key is not None and not is_signed(folder, generation, data, key):
                unsigned += 1
                raise SnapshotDamaged(f"{name} is not signed with the key given")
            found = from_bytes(data, name)
            if found.generation != generation:  # it would undo what came since
                raise SnapshotDamaged(f"{name} holds generation {found.generation}: an older file was copied over it")
            return found, damaged
        except FormatTooNew:
            raise
        except (FileNotFoundError, SnapshotDamaged):
            damaged.append(generation)
    if unsigned:
        raise UntrustedSnapshot(
            f"{folder.path}: none of its {unsigned} manifests is signed with the key given; ask its owner for the key, "
            "or let the owner open and commit it with trust='own' and this key"
        )
    if damaged:
        raise SnapshotDamaged(
            f"{folder.path}: none of its {len(damaged)} manifests is whole; the newest is "
            f"{generation_name(damaged[0])}: restore it from a copy, or start a new store"
        )
    raise SnapshotNotFound(f"{folder.path} holds no manifest, so it is not a store; make one with `llmcache build`")
