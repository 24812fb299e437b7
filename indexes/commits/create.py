"""Creation of stores, and the check that a folder is a store of a format that this version can open."""

from __future__ import annotations

import errno
import json
import logging
import re
import uuid
from pathlib import Path

from llmcache.indexes.errors import FormatTooNew, LLMCacheError, SnapshotDamaged, SnapshotNotFound, UntrustedSnapshot
from llmcache.indexes.files.folder import Folder, Reading
from llmcache.indexes.files.names import SUBFOLDERS
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.manifest_json import strict_json
from llmcache.indexes.format.write_once import write_whole

log = logging.getLogger("llmcache")

LAYOUT = 1
"""Version in the file FORMAT, for the layout of folders and names. Manifests have their own version."""
_FORMAT_LIMIT = 4096
_UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_TEMPORARY = re.compile(r"t-[0-9a-f]{32}(-\d+)?")


def folder_at(where: Path, *, create: bool, reading: Reading) -> Folder:
    """Open the folder of a store; with `create`, also an empty or missing folder that can become one.

    SnapshotNotFound or SnapshotDamaged when the folder is neither; LLMCacheError when it cannot be opened.
    """
    try:
        _check_place(where, create=create)
    except OSError as error:
        raise not_opened(where, error) from error
    try:
        return Folder(where, create=create, reading=reading)
    except OSError as error:
        if not create or error.errno not in _UNWRITABLE or not (where / "FORMAT").exists():
            raise not_opened(where, error) from error
    # a store on a read-only disk that lacks sub-folders which would be empty
    return folder_at(where, create=False, reading=reading)


def _check_place(where: Path, *, create: bool) -> None:
    if where.exists() and not where.is_dir():
        raise SnapshotNotFound(f"{where} is a file; a store is a folder, so give another path")
    if not create and not (where / "FORMAT").exists():
        raise SnapshotNotFound(
            f"there is no store in {where}; make one: llmcache build CORPUS --model M --store {where}"
        )
    if not (where / "FORMAT").exists() and where.exists():
        refuse_strangers(where)


def prepared(folder: Folder) -> None:
    """Make the folder a store unless it is one, and check its format."""
    if "FORMAT" not in folder.names():
        found(folder)
    check_format(folder)


def check_age(folder: Folder, manifest: Manifest, least: int) -> None:
    """Check that the store is at generation `least` or later. UntrustedSnapshot when it is older."""
    if manifest.generation < least:
        raise UntrustedSnapshot(
            f"{folder.path} is at generation {manifest.generation}, at least {least} was asked for: it was rolled "
            "back, or is another store; get a newer copy"
        )


def not_opened(where: Path, error: OSError) -> LLMCacheError:
    """Return the error for a store that the disk does not let us open."""
    return LLMCacheError(f"the store {where} cannot be opened: {error.strerror}; check the path and its rights")


def refuse_strangers(where: Path) -> None:
    """Check that a folder without FORMAT has no files but those of a store that is being made.

    SnapshotDamaged when it has manifests, SnapshotNotFound when it has foreign files.
    """
    names = sorted(path.name for path in where.iterdir())
    if "FORMAT" in names:  # another process has just made the store
        return
    if any(name.startswith("m-") for name in names):
        raise SnapshotDamaged(f"{where} has manifests but no FORMAT file; restore it from a copy")
    strangers = [name for name in names if name not in SUBFOLDERS and not _TEMPORARY.fullmatch(name)]
    if strangers:
        raise SnapshotNotFound(
            f"{where} is not a store and not empty (it holds {strangers[0]!r}); give the path of a new folder"
        )


def found(folder: Folder) -> None:
    """Make the folder a store by writing FORMAT. Two processes may do so at once: both write the same content."""
    folder.restrict()
    temporary = f"t-{uuid.uuid4().hex}"
    write_whole(folder, temporary, [json.dumps({"magic": "llmcache", "format": LAYOUT}).encode()])
    try:
        folder.link(temporary, "FORMAT")
    except FileExistsError:
        log.debug("another process made the store at the same time")
    finally:
        folder.remove(temporary)
    folder.sync_folder("")


def check_format(folder: Folder) -> None:
    """Check the file FORMAT. SnapshotDamaged when it is not LLMCache's, FormatTooNew for a later version."""
    try:
        content = strict_json(folder.read("FORMAT", _FORMAT_LIMIT))
        magic, number = content["magic"], content["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SnapshotDamaged(f"{folder.path}/FORMAT is damaged, so this may not be a store") from None
    if magic != "llmcache" or type(number) is not int or number < 1:
        raise SnapshotDamaged(f"{folder.path}/FORMAT is not LLMCache's, so this is not a store")
    if number > LAYOUT:
        raise FormatTooNew(
            f"{folder.path} has format {number}, this LLMCache reads up to {LAYOUT}; upgrade: pip install -U llmcache"
        )
