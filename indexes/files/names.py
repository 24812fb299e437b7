"""Names inside a store: its sub-folders, and what is in none of them."""

from __future__ import annotations

from llmcache.indexes.errors import SnapshotDamaged

SUBFOLDERS = ("seg", "idx", "stat")
QUARANTINE = "quarantine"
"""Where `repair` puts what is damaged. It is made when it is first needed."""


def placed(name: str) -> tuple[str, str]:
    """Sub-folder ("" for the store's own) and name in it; SnapshotDamaged when the name leads out of a store."""
    sub, _, leaf = name.rpartition("/")
    if not leaf or leaf in {".", ".."} or "\0" in leaf or sub not in {"", QUARANTINE, *SUBFOLDERS}:
        raise SnapshotDamaged(f"{name!r} is not a name inside a store")
    return sub, leaf
