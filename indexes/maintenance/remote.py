"""Push and pull of stores to and from a URL, file by file, each verified, the manifest last.

The files at the URL have the store's own layout, so that they can be opened there as a folder. Files never change after
a manifest names them, so intact files that exist already are not sent again.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.commits.create import check_format, found, refuse_strangers
from llmcache.indexes.commits.generations import generation_name, generations, newest
from llmcache.indexes.commits.leases import Lease
from llmcache.indexes.commits.signatures import signatures
from llmcache.indexes.errors import ConfigError, LLMCacheError, SnapshotDamaged, SnapshotNotFound
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import SUBFOLDERS
from llmcache.indexes.format.manifest import FileFacts, Manifest, SegmentFacts
from llmcache.indexes.format.manifest_json import MAX_BYTES
from llmcache.indexes.format.segment import records_of
from llmcache.indexes.format.write_once import write_whole
from llmcache.indexes.maintenance.mergeable import same_identity
from llmcache.indexes.maintenance.snapshot import advised, banks, failing
from llmcache.indexes.maintenance.transfer import checked, files_of
from llmcache.indexes.store import Store
from llmcache.indexes.urls import has_secrets, redacted, without_secrets_of

_CHUNK = 2 << 20
_FORMAT = "FORMAT"
_SMALL = 4096


@dataclass(frozen=True, slots=True)
class TransferResult:
    """Result of a push or pull. files, bytes: of the whole store. sent, sent_bytes: files that did not exist yet."""

    url: str
    path: str
    generation: int
    entries: int
    files: int
    bytes: int
    sent: int
    sent_bytes: int
    dry_run: bool


def push(
    store: str | os.PathLike[str],
    url: str,
    *,
    key: bytes | None = None,
    sizes_only: bool = False,
    dry_run: bool = False,
) -> TransferResult:
    """Upload the newest generation of a store to a URL supported by fsspec. Skips intact files that exist there.

    After an interruption the same call continues; readers of the URL find the previous generation until it is complete.
    Bytes are verified as they are read, so a damaged store is not pushed. No file is removed at the URL.
    key: of a signed store. sizes_only: take existing files of the right size for intact, without reading them back.
    ConfigError for an invalid URL; LLMCacheError when the URL has another store, or one with later commits of its own.
    """
    with closing(Store.open(store, key=key, uses=False)) as source, closing(Remote(url)) as remote:
        manifest = source.manifest
        if not manifest.generation:
            raise LLMCacheError(f"{source.folder.path} is empty; fill it first: llmcache build")
        data = source.folder.read(generation_name(manifest.generation), MAX_BYTES)
        _check_follows(
            _newest_remote(remote, key), manifest, data, remote, source.folder, remote.path, "push to another URL"
        )
        sizes = {f"{sub}/{name}": size for sub in ("seg", "idx") for name, size in remote.sizes(sub).items()}
        segments = _segments(manifest)
        missing = [
            file
            for file in _files(manifest)
            if sizes.get(file.name) != file.size or not (sizes_only or _is_same(remote, source.folder, file))
        ]
        if not dry_run:
            try:
                for file in missing:
                    remote.write(file.name, _checked(source.folder, file, segments))
            except SnapshotDamaged as error:
                raise advised(error, source.folder) from error
            remote.write(_FORMAT, partial(_small_file, source.folder, _FORMAT))
            for name in _signatures(source.folder, manifest.generation):
                remote.write(name, partial(_small_file, source.folder, name))
            remote.write(generation_name(manifest.generation), lambda: iter([data]))
        return _result_of(url, source.folder.path, manifest, missing, dry_run)


def pull(
    url: str, target: str | os.PathLike[str], *, key: bytes | None = None, dry_run: bool = False
) -> TransferResult:
    """Download the newest generation at a URL into a new folder, or into a store that was pulled from there before.

    Each file is verified against the manifest before it gets its name. After an interruption the same call continues;
    the folder becomes a store, or reaches the new generation, only when all files are there.
    key: require that the manifest is signed with it. Without it, everybody who can write to the URL is trusted.
    ConfigError, SnapshotNotFound, SnapshotDamaged or UntrustedSnapshot for problems at the URL; LLMCacheError when the
    folder has another store, or one with later commits of its own.
    """
    where = Path(target)
    if where.exists() and not where.is_dir():
        raise LLMCacheError(f"{where} is a file; give the path of a folder")
    with closing(Remote(url)) as source:
        manifest = _newest_remote(source, key)
        if manifest is None:
            raise SnapshotNotFound(
                f"there is no store at {source.path}; push one there: llmcache snapshot push STORE {source.path}"
            )
        data = source.read(generation_name(manifest.generation), MAX_BYTES)
        if where.exists() and not (where / _FORMAT).exists():
            refuse_strangers(where)
        if dry_run and not where.exists():
            return _result_of(url, where, manifest, list(_files(manifest)), dry_run)
        with failing(where), closing(Folder(where, create=not dry_run)) as folder, Lease(folder) as lease:
            local = _newest_local(folder)
            _check_follows(
                local, manifest, data, folder, source, where, "pull to a new folder and `llmcache snapshot merge`"
            )
            segments = _segments(manifest)
            missing = [file for file in _files(manifest) if not _is_intact(folder, file, segments)]
            if not dry_run:
                for file in missing:
                    lease.add(file.name.rpartition("/")[2][:32])
                    _download(source, folder, file, segments)
                _publish(source, folder, manifest, data)
        return _result_of(url, where, manifest, missing, dry_run)


# -- remote files ---------------------------------------------------------------------------------------------


class Remote:
    """Folder of a store at a URL. Names are relative, as in `Folder`: "seg/<id>.row"."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._disk, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise ConfigError(f"{redacted(url)} needs a library that is not installed: {error}") from error
        except Exception as error:  # libraries raise errors of their own, which may contain the URL
            reason = " ".join(without_secrets_of(url, str(error)).split()) or type(error).__name__
            cause = None if has_secrets(url) else error
            raise ConfigError(f"{redacted(url)} is not a URL that can be reached: {reason}") from cause
        self.path = redacted(url)  # for messages
        self._url = url

    def close(self) -> None:
        self._disk.clear_instance_cache()

    def _path_of(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def sizes(self, sub: str = "") -> dict[str, int | None]:
        """Return the size in bytes of each file in one sub-folder, by name, None if unknown; {} if it is missing."""
        with self._translated_errors():
            try:
                listed = self._disk.ls(self._path_of(sub), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry.get("size") for entry in listed}

    def names(self, sub: str = "") -> list[str]:
        return list(self.sizes(sub))

    def read(self, name: str, limit: int) -> bytes:
        """Read a whole file. FileNotFoundError, or SnapshotDamaged when it has more than `limit` bytes."""
        content = b""
        for part in self.chunks(name):
            content += part
            if len(content) > limit:
                raise SnapshotDamaged(f"{name} has more than the {limit:,} bytes that such a file may have")
        return content

    def chunks(self, name: str) -> Iterator[bytes]:
        with self._translated_errors(), self._disk.open(self._path_of(name), "rb", block_size=_CHUNK) as file:
            while part := file.read(_CHUNK):
                yield part

    def write(self, name: str, parts: Callable[[], Iterator[Any]]) -> None:
        """Write a whole file. An incomplete file is removed, if possible."""
        path = self._path_of(name)
        with self._translated_errors():
            self._disk.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                with self._disk.open(path, "wb") as file:
                    for part in parts():
                        file.write(bytes(part))
            except BaseException:
                self._remove(path)
                raise

    def _remove(self, path: str) -> None:
        try:
            self._disk.rm_file(path)
        except Exception:  # any error of a library; the size shows later that the file is incomplete
            return

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Turn the errors of a URL's library, whatever their type, into LLMCacheError with advice."""
        try:
            yield
        except (LLMCacheError, FileNotFoundError):
            raise
        except Exception as error:
            reason = " ".join(without_secrets_of(self._url, str(error)).split()) or type(error).__name__
            raise LLMCacheError(
                f"{self.path}: {reason}; the files sent so far stay there, and the same command continues"
            ) from (None if has_secrets(self._url) else error)  # a traceback would show the library's own message


def _newest_remote(remote: Remote, key: bytes | None) -> Manifest | None:
    """Read the newest intact manifest at a URL; None if there are no files at all."""
    folder = cast(Folder, remote)  # the functions below call only `names` and `read`, which `Remote` has
    listed = generations(folder)
    if listed:
        try:
            check_format(folder)
        except FileNotFoundError:
            raise SnapshotDamaged(
                f"{remote.path} has manifests but no FORMAT file; push the store there again"
            ) from None
        return newest(folder, listed, key)[0]
    foreign = sorted(set(remote.names()) - {*SUBFOLDERS, _FORMAT})
    if foreign:
        raise LLMCacheError(f"{remote.path} is not a store and not empty (it holds {foreign[0]!r}); take another URL")
    return None


def _newest_local(folder: Folder) -> Manifest | None:
    listed = generations(folder)
    return newest(folder, listed)[0] if listed else None


def _check_follows(
    old: Manifest | None,
    new: Manifest,
    data: bytes,
    target: Folder | Remote,
    source: Folder | Remote,
    where: object,
    advice: str,
) -> None:
    """Check that the target is empty, at this generation, or at an ancestor of it. LLMCacheError when it is not."""
    if old is None:
        return
    name = generation_name(old.generation)
    existing = target.read(name, MAX_BYTES)
    if old.generation == new.generation and existing == data:
        return
    if old.generation >= new.generation:
        raise LLMCacheError(
            f"{where} has generation {old.generation}, this is generation {new.generation}: it is another store, or "
            f"has later commits of its own; {advice}"
        )
    try:
        descends = source.read(name, MAX_BYTES) == existing
    except FileNotFoundError:  # collected: it counts as an ancestor when the new generation has all its segments
        new_ids = {segment.id for facts in banks(new).values() for segment in facts.segments}
        same = all(
            same_identity(space, new.namespaces[name])
            for name, space in old.namespaces.items()
            if name in new.namespaces
        )
        descends = same and new_ids >= {segment.id for facts in banks(old).values() for segment in facts.segments}
    if not descends:
        raise LLMCacheError(f"{where} has another store, or one with later commits of its own; {advice}")


# -- files ------------------------------------------------------------------------------------------------------


def _files(manifest: Manifest) -> Iterator[FileFacts]:
    """Yield all files of a manifest, .seg files last, since the .row files have their checksums."""
    return iter(sorted(set(files_of(manifest)), key=lambda file: file.name.endswith(".seg")))


def _segments(manifest: Manifest) -> dict[str, SegmentFacts]:
    """Return the segments by the name of their .seg file."""
    return {segment.file("seg").name: segment for facts in banks(manifest).values() for segment in facts.segments}


def _checked(
    folder: Folder, file: FileFacts, segments: Mapping[str, SegmentFacts], name: str | None = None
) -> Callable[[], Iterator[NDArray[np.uint8]]]:
    """Return a function that yields the verified bytes of a file. name: current name of the file, if different."""

    def parts() -> Iterator[NDArray[np.uint8]]:
        segment = segments.get(file.name)
        records = records_of(folder, segment)[0] if segment else None
        yield from checked(folder, replace(file, name=name or file.name), records)

    return parts


def _is_same(remote: Remote, folder: Folder, file: FileFacts) -> bool:
    """Return whether a file at the URL has the same bytes as here."""
    return _digest(remote.chunks(file.name)) == _digest(checked(folder, replace(file, sha256=None)))


def _digest(parts: Iterator[Any]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(memoryview(part))
    return digest.digest()


def _is_intact(folder: Folder, file: FileFacts, segments: Mapping[str, SegmentFacts]) -> bool:
    try:
        for _ in _checked(folder, file, segments)():
            pass
    except (SnapshotDamaged, OSError):
        return False
    return True


def _download(source: Remote, folder: Folder, file: FileFacts, segments: Mapping[str, SegmentFacts]) -> None:
    """Download a file, verify it against the manifest, and only then give it its name."""
    temporary = f"t-{uuid.uuid4().hex}"
    try:
        write_whole(folder, temporary, _at_most_size(source.chunks(file.name), file))
        for _ in _checked(folder, file, segments, temporary)():
            pass
        folder.remove(file.name)  # an existing file is damaged
        folder.link(temporary, file.name)
    except FileNotFoundError:
        raise SnapshotDamaged(f"{source.path}: {file.name} is missing; push the store there again") from None
    except SnapshotDamaged as error:
        message = str(error).replace(temporary, file.name)
        raise SnapshotDamaged(f"{source.path}: {message}; push the store there again") from error
    finally:
        folder.remove(temporary)


def _at_most_size(parts: Iterator[bytes], file: FileFacts) -> Iterator[bytes]:
    size = 0
    for part in parts:
        size += len(part)
        if size > file.size:
            raise SnapshotDamaged(f"{file.name} has more than {file.size:,} bytes")
        yield part


def _small_file(folder: Folder, name: str) -> Iterator[bytes]:
    yield folder.read(name, _SMALL)


def _signatures(folder: Folder | Remote, generation: int) -> list[str]:
    listed = signatures(cast(Folder, folder))
    return [name for name, signed_generation in listed.items() if signed_generation == generation]


def _publish(source: Remote, folder: Folder, manifest: Manifest, data: bytes) -> None:
    """Make the downloaded files durable, then the manifest's signature, then the manifest."""
    for sub in ("seg", "idx"):
        folder.sync_folder(sub)
    if _FORMAT not in folder.names():
        found(folder)
    present = set(folder.names())
    parts = [(name, source.read(name, _SMALL)) for name in _signatures(source, manifest.generation)]
    for name, content in [*parts, (generation_name(manifest.generation), data)]:
        if name in present:
            continue
        temporary = f"t-{uuid.uuid4().hex}"
        write_whole(folder, temporary, [content])
        try:
            folder.link(temporary, name)
        finally:
            folder.remove(temporary)
        folder.sync_folder("")


def _result_of(url: str, path: Path, manifest: Manifest, sent: list[FileFacts], dry_run: bool) -> TransferResult:
    files = list(_files(manifest))
    rows = sum(segment.live for bank in banks(manifest).values() for segment in bank.segments)
    sizes = sum(file.size for file in files), sum(file.size for file in sent)
    return TransferResult(
        redacted(url), os.fspath(path), manifest.generation, rows, len(files), sizes[0], len(sent), sizes[1], dry_run
    )
