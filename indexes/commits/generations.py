"""Generations of a store: list the manifests of a folder, and read the newest intact one."""

from __future__ import annotations

import re

from llmcache.indexes.commits.signatures import is_signed
from llmcache.indexes.errors import FormatTooNew, SnapshotDamaged, SnapshotNotFound, UntrustedSnapshot
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.manifest_json import MAX_BYTES, from_bytes

LAST = 10**12 - 1
"""Highest generation number that fits the name of a manifest."""
_NAME = re.compile(r"m-(\d{12})\.json")
_MOST_DAMAGED = 256  # manifests to try before giving up


def generation_name(generation: int) -> str:
    """Return the file name of a generation's manifest."""
    return f"m-{generation:012d}.json"


def generations(folder: Folder) -> list[int]:
    """List the generations of a folder, newest first, from one directory listing."""
    return sorted((int(match[1]) for name in folder.names() if (match := _NAME.fullmatch(name))), reverse=True)


def newest(folder: Folder, listed: list[int], key: bytes | None = None) -> tuple[Manifest, list[int]]:
    """Read the newest manifest of a listing that verifies. Returns it and the damaged generations above it.

    key: skip manifests that are not signed with this key. UntrustedSnapshot when none is signed with it.
    SnapshotNotFound when the listing is empty, SnapshotDamaged when no manifest verifies. FormatTooNew when a manifest
    has a newer format: it is never skipped, since that would undo what the newer program wrote.
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
            manifest = from_bytes(data, name)
            if manifest.generation != generation:  # taking it would undo the generations after the one it holds
                raise SnapshotDamaged(
                    f"{name} holds generation {manifest.generation}: an older file was copied over it"
                )
            return manifest, damaged
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
            f"{folder.path}: none of its {len(damaged)} manifests is intact; the newest is "
            f"{generation_name(damaged[0])}: restore it from a copy, or start a new store"
        )
    raise SnapshotNotFound(f"{folder.path} holds no manifest, so it is not a store; make one with `llmcache build`")
