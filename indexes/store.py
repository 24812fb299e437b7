"""Store: one folder, its newest manifest, and the banks that are open in it."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.background import BackgroundWriter
from llmcache.indexes.commits.bank_commit import Place, commit_index, commit_rows
from llmcache.indexes.commits.create import check_age, folder_at, not_opened, prepared
from llmcache.indexes.commits.namespaces import declared, dropped
from llmcache.indexes.commits.pending_marks import drop_since, last_batches
from llmcache.indexes.commits.reload import newest_segments, outdated
from llmcache.indexes.commits.trust import Trust, check_asked, judged, latest, no_writing
from llmcache.indexes.errors import Busy, ForkedStoreError, StoreFenced
from llmcache.indexes.eviction import budget as eviction
from llmcache.indexes.files.folder import Folder, Reading
from llmcache.indexes.format.manifest import BankFacts, Manifest, NamespaceFacts
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.stats import counters as counting
from llmcache.indexes.stats.usage import USE, write_uses

log = logging.getLogger("llmcache")


class Store:
    """Open store. Any number of processes may have the same store open; each commits its own segments.

    A Store is not thread-safe, and cannot be used after a fork: open the store in the worker.
    """

    def __init__(self, folder: Folder, manifest: Manifest, trust: Trust = "own", key: bytes | None = None) -> None:
        """trust: level that was found, "own", "signed" or "untrusted". key: signs the commits; None signs nothing."""
        self.folder = folder
        self.manifest = manifest
        self.trust = trust
        self._key = key
        self.writer = uuid.uuid4().hex
        self._pid = folder.pid()
        self._banks: dict[Place, Bank] = {}
        self._background = BackgroundWriter(folder)
        self._fenced: StoreFenced | None = None
        self.budget: eviction.Budget | None = None
        """Limit on the folder's bytes; None: no limit. The code that opens the store sets it."""
        self.read_only = False
        """True if the store was opened read-only: nothing is written below its folder."""
        self.keeps_uses = True
        """True if the store records how often rows were read."""
        self.not_stored = 0  # rows dropped because they did not fit the budget
        self.evicted = 0  # rows that this object evicted to make room

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        reading: Reading = "auto",
        uses: bool = True,
        trust: Trust = "auto",
        key: bytes | None = None,
        min_generation: int = 0,
        allow_untrusted: bool = False,
        read_only: bool = False,
    ) -> Store:
        """Open the store in this folder; with `create`, make one if there is none.

        reading: how activations are read, see `Folder`. uses: record how often rows are read, in the store's folder.
        trust: "own" requires that only this user can write to the folder; "signed", that its manifest is signed with
            `key`; "untrusted" requires neither; "auto" means "signed" if there is a key, else "own".
        key: at least 32 bytes; signs the commits.
        min_generation: refuse an older generation, which protects against a store that was rolled back.
        allow_untrusted: open an untrusted store instead of refusing it. It is read-only, and a row is a hit only when
            its token ids are equal.
        read_only: write nothing below the folder, neither commits nor counters. `commit` then raises StoreFenced.
        SnapshotNotFound, FormatTooNew, SnapshotDamaged or UntrustedSnapshot when the store cannot be opened like this.
        """
        check_asked(trust, key)
        folder = folder_at(Path(path), create=create and not read_only, reading=reading)
        try:
            store = cls.at(folder, trust=trust, key=key, min_generation=min_generation, allow_untrusted=allow_untrusted)
        except BaseException:
            folder.close()
            raise
        store.keeps_uses = uses
        if read_only:
            store.only_read("it was opened with read_only=True")
        return store

    @classmethod
    def at(
        cls,
        folder: Folder,
        *,
        trust: Trust = "auto",
        key: bytes | None = None,
        min_generation: int = 0,
        allow_untrusted: bool = False,
    ) -> Store:
        """Open the store in a folder that is open already, and make one if the folder is empty.

        The store owns the folder from then on and closes it.
        """
        try:
            prepared(folder)
            level, manifest, damaged = judged(folder, trust, key, allow_untrusted=allow_untrusted)
            check_age(folder, manifest, min_generation)
            store = cls(folder, manifest, level, key)
            store._fenced = no_writing(folder, manifest, level, key)
        except OSError as error:
            raise not_opened(folder.path, error) from error
        if damaged:
            log.warning(
                "%s: the newest %d manifests are damaged%s; opened generation %d. Entries stored after it are missing",
                folder.path, len(damaged), " or not signed" if level == "signed" else "", manifest.generation,
            )  # fmt: skip
        return store

    def only_read(self, reason: str) -> None:
        """Refuse writes from now on. reason: goes into the error that commits raise."""
        self.read_only = True
        self._fenced = self._fenced or StoreFenced(
            f"{self.folder.path} is read-only, since {reason}; open the store again where it can be written"
        )

    def close(self) -> None:
        """Write usage counts and close the folder. Pending rows are lost."""
        if self.folder.pid() == self._pid:  # no thread survives a fork
            self._background.give_up()
            if not self._fenced:
                self.write_uses()
        self._banks = {}
        self.folder.close()

    # -- namespaces and banks -------------------------------------------------------------------------------

    def namespace(self, name: str) -> NamespaceFacts | None:
        """Return the facts of a namespace as of the manifest in memory; None if there is no such namespace."""
        return self.manifest.namespaces.get(name)

    def bank(self, namespace: str, name: str, fresh: Callable[[], BankFacts], choice: NearChoice) -> Bank:
        """Return the bank of this name, opened at most once. fresh: returns the facts of a bank that does not exist."""
        self._check()
        if (namespace, name) not in self._banks:
            space = self.manifest.namespaces.get(namespace)
            facts = space.banks.get(name) if space else None
            bank = Bank(self.folder, facts or fresh(), choice, trust=self.trust, strong=self.signs)
            self._banks[namespace, name] = bank
            # missing files may belong to a generation that was collected: the newest one names other files
            if bank.lost and outdated(self.folder, self.manifest):
                self.reload()
        return self._banks[namespace, name]

    def reload(self) -> Manifest:
        """Move to the newest generation, so that commits of other writers are found. Returns its manifest.

        Pending rows are kept. Rows may get other numbers. ModelMismatch when a namespace in use belongs to another
        model in that generation, UntrustedSnapshot when that generation does not reach the level of trust at which
        the store was opened; the store then stays at its generation.
        """
        self._check()
        manifest, opened = newest_segments(self.folder, self.manifest, self._banks, self.trust, self._key)
        for place, (facts, segments, lost) in opened.items():
            self._banks[place].follow(facts, segments, lost)
        self.manifest = manifest
        return manifest

    # -- committing -----------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Return whether the store still takes commits: False once a write has failed, or if it is read-only."""
        return self._fenced is None

    @property
    def pending_bytes(self) -> int:
        """Bytes of pending activations, those that were put and not committed yet."""
        return sum(bank.pending_bytes for bank in self._banks.values())

    def pending(self) -> dict[Place, tuple[int, int]]:
        """Finish a background commit, then return what is pending in each open bank, a mark for `drop_pending`."""
        if self.writable:
            self.finish_commit()
        return {place: bank.pending for place, bank in self._banks.items()}

    def drop_pending(self, after: Mapping[Place, tuple[int, int]]) -> int:
        """Drop the pending rows that were put since `pending` returned `after`. Returns their number."""
        return sum(bank.drop_pending(after.get(place, (0, 0))) for place, bank in self._banks.items())

    def discard(self) -> int:
        """Drop all pending rows, and what the background writer has written of them. Returns the number of rows."""
        self._background.give_up()
        return self.drop_pending({})

    def last_put(self) -> dict[Place, object]:
        """Return the last pending batch of each open bank, None if it has none. Does not wait for the background."""
        return last_batches(self._banks)

    def drop_since(self, last: Mapping[Place, object]) -> int:
        """Drop rows put after these batches, or all that a bank has pending without its batch. Returns their number."""
        return drop_since(self._banks, last)

    def committed(self, writer: str) -> int:
        """Count the segments of a writer in the manifest that is in memory."""
        banks = [bank for space in self.manifest.namespaces.values() for bank in space.banks.values()]
        return sum(segment.writer == writer for bank in banks for segment in bank.segments)

    def declare(
        self, namespace: str, identity: Mapping[str, Any], config: Mapping[str, Any], secret_check: str = ""
    ) -> None:
        """Commit a namespace's model identity, settings and check of the secret, as a generation of its own.

        An existing namespace keeps its secret_check, because its keys were made with that secret.
        """
        self.publish(declared(namespace, identity, config, secret_check))

    def drop(self, namespace: str, name: str) -> None:
        """Commit the removal of a derived bank, as a generation of its own. Its files stay until garbage collection."""
        self.publish(dropped(namespace, name))
        self._banks.pop((namespace, name), None)

    @property
    def signs(self) -> bool:
        """Return whether commits are signed. Rows then need checksums that cannot be forged."""
        return self._key is not None

    def latest(self) -> Manifest:
        """Read the newest manifest of the folder, at the level of trust at which the store was opened."""
        return latest(self.folder, self._key if self.trust == "signed" else None)[0]

    def commit(self) -> Manifest:
        """Make all pending rows durable and visible to other processes. Returns the newest manifest.

        StoreFenced or StoreFull when a write fails: earlier commits then stay, and this one has no effect.
        """
        self._check()
        if self._fenced:
            raise self._fenced
        self.finish_commit()
        for place, bank in self._banks.items():
            if bank.has_pending:
                self._commit_rows(place, bank)
            if bank.near.due():
                self._commit_index(place, bank)
        if self._banks:
            self.write_uses()
        return self.manifest

    def commit_behind(self) -> Manifest:
        """Start writing all pending rows in a thread; `finish_commit` or `commit` publishes them.

        Finishes the previous background commit first. With a budget this is `commit`, since files may have to be
        evicted before new ones are written.
        """
        if self.budget is not None:
            return self.commit()
        self.finish_commit()
        for place, bank in self._banks.items():
            if bank.has_pending:
                self._background.begin(place, bank)
        return self.manifest

    @property
    def commit_ready(self) -> bool:
        """Return whether the background commit is written, so that `finish_commit` does not wait."""
        return self._background.commit_ready

    def finish_commit(self) -> Manifest:
        """Wait for the segments of `commit_behind`, publish them, and return the manifest. Errors as `commit`."""
        self._check()
        if self._fenced:
            raise self._fenced
        publish = partial(self.publish, once=True)
        for started in self._background.taken():
            try:
                commit_rows(self.folder, publish, self.writer, started.place, started.bank, started.flush, started)
            except OSError as error:
                raise self._fence(error) from error
        return self.manifest

    def _commit_rows(self, place: Place, bank: Bank) -> None:
        def commit_all() -> None:
            for flush in bank.flush_batches():
                commit_rows(self.folder, partial(self.publish, once=True), self.writer, place, bank, flush)

        try:
            if self.budget is None:
                commit_all()
                return
            with eviction.waiting_lock(self.folder):
                if self._room_for(bank.sealed_bytes(), self.budget) is not None:
                    commit_all()
                else:
                    self.not_stored += bank.drop_pending()
        except Busy as error:
            log.info("the commit is postponed: %s", error)
        except OSError as error:  # writing a file, taking the lock or reading file sizes failed
            raise self._fence(error) from error

    def _room_for(self, nbytes: int, budget: eviction.Budget) -> int | None:
        """Evict until `nbytes` fit the budget. Returns the free bytes, None if they cannot fit."""
        self.write_uses()
        evicted: set[str] = set()
        spaces = self.manifest.namespaces.values()
        live = {facts.id: facts.live for space in spaces for bank in space.banks.values() for facts in bank.segments}
        try:
            return eviction.make_room(self.folder, self.publish, budget, nbytes, evicted)
        finally:
            if evicted:
                self.evicted += sum(live.get(id, 0) for id in evicted)
                self.forget(evicted)

    def _commit_index(self, place: Place, bank: Bank) -> None:
        try:
            room = eviction.free_bytes(self.folder, self.budget) if self.budget else None
            commit_index(self.folder, self.publish, place, bank, room)
        except OSError as error:
            raise self._fence(error) from error

    def forget(self, evicted: Container[str]) -> None:
        """Drop evicted segments, by id, from the open banks, and rows that are dead in the manifest in memory."""
        for (namespace, name), bank in self._banks.items():
            space = self.manifest.namespaces.get(namespace)
            if space and name in space.banks:
                bank.forget(space.banks[name], evicted)

    def close_banks(self) -> None:
        """Close the open banks. Their pending rows and usage counts are lost."""
        self._background.give_up()
        self._banks = {}

    def publish(self, change: Callable[[Manifest], Manifest], *, once: bool = False) -> Manifest:
        """Commit a change of the manifest as this store's writer, see `publish.commit`. Returns the newest manifest.

        Open banks stay as they are.
        """
        self._check()
        if self._fenced:
            raise self._fenced
        try:
            signed = self.trust == "signed"
            self.manifest = publishing.commit(
                self.folder, self.writer, change, key=self._key, signed_base=signed, once=once
            )
        except StoreFenced as error:
            self._fenced = error
            raise
        except OSError as error:  # the newest manifest could not be listed or read
            raise self._fence(error) from error
        return self.manifest

    def _fence(self, error: OSError) -> StoreFenced:
        """Refuse writes from now on. Returns the error to raise, which every later commit raises too."""
        self._fenced = publishing.fenced(error)
        return self._fenced

    def _check(self) -> None:
        if self.folder.pid() != self._pid:
            raise ForkedStoreError(
                f"{self.folder.path} was opened by process {self._pid} and is used by its child {self.folder.pid()}; "
                "open the store in the child"
            )

    # -- counters -------------------------------------------------------------------------------------------

    def write_counters(self, counters: Mapping[str, float]) -> None:
        """Write this writer's counters to the store's folder. Failures are logged and ignored: no reader needs them."""
        if self.read_only:
            return
        counting.keep_counters(self.folder, self.writer, counters)

    def counters(self, *, without: str = "") -> dict[str, float]:
        """Add up the counters of all writers except `without`. Files that cannot be read are skipped."""
        return counting.total_counters(self.folder, without=without)

    # -- usage ----------------------------------------------------------------------------------------------

    def write_uses(self) -> None:
        """Write how often and when rows of the open banks were read. Failures are logged and ignored."""
        if not self.keeps_uses or self.read_only:
            return
        records = np.concatenate([np.zeros(0, USE), *(bank.use_records() for bank in self._banks.values())])
        if not len(records):
            return
        try:
            if self.budget and eviction.free_bytes(self.folder, self.budget) < records.nbytes:
                return
            write_uses(self.folder, self.writer, records)
        except OSError as error:
            log.info("the usage of rows was not written: %s", error)
