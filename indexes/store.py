"""A store: one folder, its newest manifest, and the banks that are open in it."""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmcache.indexes import manifest as manifests
from llmcache.indexes.bank import Bank
from llmcache.indexes.errors import (
    ForkedStoreError,
    FormatTooNew,
    LLMCacheError,
    SnapshotDamaged,
    SnapshotNotFound,
    StoreFenced,
)
from llmcache.indexes.io import SUBFOLDERS, Folder, write_whole
from llmcache.indexes.manifest import BankFacts, Manifest, NamespaceFacts
from llmcache.indexes.neighbours import NearChoice

log = logging.getLogger("llmcache")

_FORMAT_LIMIT = 4096
_STAT_LIMIT = 1 << 20
_TEMPORARY = re.compile(r"t-[0-9a-f]{32}(-\d+)?")


class Store:
    """An open store. Any number of processes may have it open; each commits its own segments.

    Not for use by several threads at once, and not after a fork: open it in the worker.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.writer = uuid.uuid4().hex
        self._pid = folder.pid()
        self._banks: dict[tuple[str, str], Bank] = {}
        self._fenced: StoreFenced | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = False) -> Store:
        """Open the store in this folder; with `create`, make one where there is none.

        SnapshotNotFound, FormatTooNew or SnapshotDamaged when that is not possible.
        """
        where = Path(path)
        if where.exists() and not where.is_dir():
            raise SnapshotNotFound(f"{where} is a file; a store is a folder, so give another path")
        if not create and not (where / "FORMAT").exists():
            raise SnapshotNotFound(
                f"there is no store in {where}; make one: llmcache build CORPUS --model M --store {where}"
            )
        if not (where / "FORMAT").exists() and where.exists():
            _refuse_strangers(where)
        try:
            folder = Folder(where, create=create)
        except OSError as error:
            raise _not_opened(where, error) from error
        try:
            return cls.at(folder)
        except BaseException:
            folder.close()
            raise

    @classmethod
    def at(cls, folder: Folder) -> Store:
        """The store in a folder that is open already, which the store then closes; a new one where it is empty."""
        try:
            manifest, damaged = _newest(folder)
        except OSError as error:
            raise _not_opened(folder.path, error) from error
        if damaged:
            log.warning(
                "%s: the newest %d manifests are damaged; opened generation %d. What was stored since is missing",
                folder.path, len(damaged), manifest.generation,
            )  # fmt: skip
        return cls(folder, manifest)

    def close(self) -> None:
        """Give the descriptors back. What was not committed is lost."""
        self._banks = {}
        self.folder.close()

    # -- namespaces and banks -------------------------------------------------------------------------------

    def namespace(self, name: str) -> NamespaceFacts | None:
        return self.manifest.namespaces.get(name)

    def bank(self, namespace: str, name: str, fresh: Callable[[], BankFacts], choice: NearChoice) -> Bank:
        """The bank of this name, opened once; an empty one with the facts of `fresh` where there is none yet."""
        self._check()
        if (namespace, name) not in self._banks:
            space = self.manifest.namespaces.get(namespace)
            facts = space.banks.get(name) if space else None
            self._banks[namespace, name] = Bank(self.folder, facts or fresh(), choice)
        return self._banks[namespace, name]

    # -- committing -----------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """False once a write has failed: the store then only serves what it has."""
        return self._fenced is None

    def declare(self, namespace: str, identity: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Record whose entries a namespace holds, and with which settings; a commit of its own."""

        def change(base: Manifest) -> Manifest:
            old = base.namespaces.get(namespace)
            banks = old.banks if old else {}
            return replace(base, namespaces={**base.namespaces, namespace: NamespaceFacts(identity, config, banks)})

        self._commit(change)

    def commit(self) -> Manifest:
        """Make everything that was put durable and visible to others. Returns the newest manifest.

        StoreFenced or StoreFull when a write fails: nothing of this commit counts then, all before it does.
        """
        self._check()
        if self._fenced:
            raise self._fenced
        for (namespace, name), bank in self._banks.items():
            if bank.has_pending:
                self._commit_rows(namespace, name, bank)
            if bank.near.due():
                self._commit_index(namespace, name, bank)
        return self.manifest

    def _commit_rows(self, namespace: str, name: str, bank: Bank) -> None:
        try:
            segment = bank.seal(uuid.uuid4().hex)
        except OSError as error:
            raise self._fence(error) from error

        def change(base: Manifest) -> Manifest:
            facts = _bank_in(base, namespace, name, bank.facts)
            return base.with_bank(namespace, name, replace(facts, segments=(*facts.segments, segment)))

        self._commit(change)
        try:
            bank.sealed(self.manifest.namespaces[namespace].banks[name], segment)
        except OSError as error:  # committed all the same; the next commit writes these rows once more
            log.warning("what was just committed cannot be opened and is served from memory: %s", error)

    def _commit_index(self, namespace: str, name: str, bank: Bank) -> None:
        try:
            projection, index = bank.near.save(uuid.uuid4().hex)
        except OSError as error:
            raise self._fence(error) from error
        replaced: list[str] = []

        def change(base: Manifest) -> Manifest:
            facts = _bank_in(base, namespace, name, bank.facts)
            replaced[:] = [old.name for old in (facts.projection, facts.index and facts.index.file) if old]
            return base.with_bank(namespace, name, replace(facts, projection=projection, index=index))

        self._commit(change)
        bank.facts = self.manifest.namespaces[namespace].banks[name]
        for old in replaced:  # a reader that is about to open one of these builds its index itself
            try:
                self.folder.remove(old)
            except OSError as error:
                log.info("%s was not removed: %s", old, error)

    def _commit(self, change: Callable[[Manifest], Manifest]) -> None:
        self._check()
        if self._fenced:
            raise self._fenced
        try:
            self.manifest = manifests.commit(self.folder, self.writer, change)
        except StoreFenced as error:
            self._fenced = error
            raise
        except OSError as error:  # the newest manifest could not be listed or read
            raise self._fence(error) from error

    def _fence(self, error: OSError) -> StoreFenced:
        self._fenced = manifests.fenced(error)
        return self._fenced

    def _check(self) -> None:
        if self.folder.pid() != self._pid:
            raise ForkedStoreError(
                f"{self.folder.path} was opened by process {self._pid} and is used by its child {self.folder.pid()}; "
                "open the store in the child"
            )

    # -- counters -------------------------------------------------------------------------------------------

    def write_counters(self, counters: Mapping[str, float]) -> None:
        """Keep this writer's counters beside the store. Advisory: a failure is ignored, a reader never needs them."""
        temporary, name = f"stat/t-{self.writer}", f"stat/{self.writer}.json"
        try:
            self.folder.remove(temporary)
            write_whole(self.folder, temporary, [json.dumps(dict(counters)).encode()])
            self.folder.replace(temporary, name)
        except OSError as error:
            log.info("counters were not kept: %s", error)

    def counters(self, *, without: str = "") -> dict[str, float]:
        """The counters of all writers but one, added up; whatever cannot be read is left out."""
        total: dict[str, float] = {}
        try:
            names = self.folder.names("stat")
        except OSError as error:
            log.info("counters were not read: %s", error)
            return total
        for name in names:
            if not name.endswith(".json") or name == f"{without}.json":
                continue
            try:
                found = manifests.strict_json(self.folder.read(f"stat/{name}", _STAT_LIMIT))
                numbers = {key: value for key, value in found.items() if _is_number(value)}
            except (OSError, ValueError, AttributeError, RecursionError, SnapshotDamaged):
                continue
            for key, value in numbers.items():
                total[key] = total.get(key, 0) + value
        return total


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def _bank_in(base: Manifest, namespace: str, name: str, fresh: BankFacts) -> BankFacts:
    space = base.namespaces.get(namespace)
    if space is None:
        raise LLMCacheError(f"the namespace {namespace!r} was removed by another process; open the store again")
    return space.banks.get(name, replace(fresh, segments=(), projection=None, index=None))


def _newest(folder: Folder) -> tuple[Manifest, list[int]]:
    """The newest whole manifest, and the damaged ones above it; a folder that is no store yet is made one."""
    if "FORMAT" not in folder.names():
        _found(folder)
    _check_format(folder)
    listed = manifests.generations(folder)
    return manifests.newest(folder, listed) if listed else (Manifest(), [])


def _not_opened(where: Path, error: OSError) -> LLMCacheError:
    return LLMCacheError(f"the store {where} cannot be opened: {error.strerror}; check the path and its rights")


def _refuse_strangers(where: Path) -> None:
    names = sorted(one.name for one in where.iterdir())
    if "FORMAT" in names:  # another process has just made the store
        return
    if any(name.startswith("m-") for name in names):
        raise SnapshotDamaged(f"{where} has manifests but no FORMAT file; restore it from a copy")
    strangers = [name for name in names if name not in SUBFOLDERS and not _TEMPORARY.fullmatch(name)]
    if strangers:
        raise SnapshotNotFound(
            f"{where} is not a store and not empty (it holds {strangers[0]!r}); give the path of a new folder"
        )


def _found(folder: Folder) -> None:
    """Make the folder a store. Two processes may do so at once: the file says the same either way."""
    temporary = f"t-{uuid.uuid4().hex}"
    write_whole(folder, temporary, [json.dumps({"magic": "llmcache", "format": manifests.FORMAT}).encode()])
    try:
        folder.link(temporary, "FORMAT")
    except FileExistsError:
        log.debug("another process made the store at the same time")
    finally:
        folder.remove(temporary)
    folder.sync_folder("")


def _check_format(folder: Folder) -> None:
    try:
        found = manifests.strict_json(folder.read("FORMAT", _FORMAT_LIMIT))
        magic, number = found["magic"], found["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SnapshotDamaged(f"{folder.path}/FORMAT is damaged, so this may not be a store") from None
    if magic != "llmcache" or type(number) is not int or number < 1:
        raise SnapshotDamaged(f"{folder.path}/FORMAT is not LLMCache's, so this is not a store")
    if number > manifests.FORMAT:
        raise FormatTooNew(
            f"{folder.path} has format {number}, this LLMCache reads up to {manifests.FORMAT}; "
            "upgrade: pip install -U llmcache"
        )
