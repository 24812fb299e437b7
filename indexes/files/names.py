"""Names of sub-folders of a store, and the check of file names."""

from __future__ import annotations

from llmcache.indexes.errors import SnapshotDamaged

SUBFOLDERS = ("seg", "idx", "stat")
QUARANTINE = "quarantine"
"""Folder to which `repair` moves damaged files. It is made when it is first needed."""


def placed(name: str) -> tuple[str, str]:
    """Split a name into sub-folder ("" for the store's) and file name. SnapshotDamaged when it leaves the store."""
    sub, _, leaf = name.rpartition("/")
    if not leaf or leaf in {".", ".."} or "\0" in leaf or sub not in {"", QUARANTINE, *SUBFOLDERS}:
        raise SnapshotDamaged(f"{name!r} is not a name inside a store")
    return sub, leaf
