"""Check that the files named by a new manifest exist, and drop from it the segments whose files are missing.

Leases protect files that are being committed from collectors. These checks are for removals that leases cannot
prevent: a person's `rm`, a purge, an older version of this program, or a file system without locks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from llmcache.indexes.commits.generations import generations, newest
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import Manifest


def missing(folder: Folder, names: Iterable[str]) -> str:
    """Return the first of these files that does not exist; "" if there is none. Other disk errors are ignored."""
    for name in names:
        try:
            folder.size(name)
        except FileNotFoundError:
            return name
        except OSError:
            continue
    return ""


def lost(folder: Folder, names: Iterable[str]) -> str:
    """Return the first of these files that the newest manifest names and that does not exist; "" if there is none.

    A missing file that the manifest does not name was evicted meanwhile. LLMCacheError or OSError when no manifest can
    be read.
    """
    if absent := missing(folder, names):
        listed = generations(folder)
        named = newest(folder, listed)[0].files if listed else frozenset()
        return missing(folder, (name for name in names if name in named)) if named else ""
    return absent


def without(manifest: Manifest, ids: Collection[str]) -> Manifest:
    """Return the manifest without the segments of these ids."""
    for namespace, space in manifest.namespaces.items():
        for name, bank in space.banks.items():
            segments = tuple(segment for segment in bank.segments if segment.id not in ids)
            if segments != bank.segments:
                manifest = manifest.with_bank(namespace, name, replace(bank, segments=segments))
    return manifest
