"""A store: one folder, its newest manifest, and the banks that are open in it."""

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
    """An open store. Any number of processes may have it open; each commits its own segments.

    Not for use by several threads at once, and not after a fork: open it in the worker.
    """

    def __init__(self, folder: Folder, manifest: Manifest, trust: Trust = "own", key: bytes | None = None) -> None:
        """trust: "own", "signed" or "untrusted", as it was found. key: what commits are signed with."""
        self.folder = folder
        self.manifest = manifest
        self.trust = trust
        self._key = key
        self.writer = uuid.uuid4().hex
        self._pid = folder.pid()
        self._banks: dict[Place, Bank] = {}
        self._behind = BackgroundWriter(folder)
        self._fenced: StoreFenced | None = None
        self.budget: eviction.Budget | None = None
        """How large the folder may become; None is without bound. Set by whoever opens the store."""
        self.read_only = False
        """True if the store was opened read-only: nothing is written below its folder."""
        self.keeps_uses = True
        self.not_stored = 0  # rows given up because the budget had no place for them
        self.evicted = 0  # rows that this opening evicted to make room

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
        """Open the store in this folder; with `create`, make one where there is none.

        reading: how activations are read, see `Folder`. uses: keep beside the store how often rows were read.
        trust: "own", the folder is this user's alone; "signed", its manifest is signed with `key`; "untrusted",
            neither; "auto" looks for a signature where there is a key, and for the owner where there is none.
        key: at least 32 bytes; commits are signed with it.
        min_generation: refuse an older one, against a store that was put back to an earlier state.
        allow_untrusted: open an untrusted store all the same. It is then only read, and only equal token ids match.
        read_only: write nothing below the folder: no commits, no counters. `commit` is then StoreFenced.
        SnapshotNotFound, FormatTooNew, SnapshotDamaged or UntrustedSnapshot when that is not possible.
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
        """The store in a folder that is open already, which the store then closes; a new one where it is empty."""
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
                "%s: the newest %d manifests are damaged%s; opened generation %d. What was stored since is missing",
                folder.path, len(damaged), " or not signed" if level == "signed" else "", manifest.generation,
            )  # fmt: skip
        return store

    def only_read(self, reason: str) -> None:
        """Write nothing from now on. reason: why, for the error of a commit."""
        self.read_only = True
        self._fenced = self._fenced or StoreFenced(
            f"nothing is written to {self.folder.path}, since {reason}; open the store again where it can be written"
        )

    def close(self) -> None:
        """Give the descriptors back. What was not committed is lost."""
        if self.folder.pid() == self._pid:  # no thread survives a fork
            self._behind.give_up()
            if not self._fenced:
                self.write_uses()
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
            bank = Bank(self.folder, facts or fresh(), choice, trust=self.trust, strong=self.signs)
            self._banks[namespace, name] = bank
            # files that are gone may belong to a generation that is gone: a newer one names others
            if bank.lost and outdated(self.folder, self.manifest):
                self.reload()
        return self._banks[namespace, name]

    def reload(self) -> Manifest:
        """Move to the newest generation: what other writers have committed is found from now on. Returns its manifest.

        What was put and not committed is kept. Rows may have other numbers afterwards. ModelMismatch when a namespace
        that is in use belongs to another model now, UntrustedSnapshot when nobody vouches any more for what was
        vouched for at the opening; the store then stays where it is.
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
        """False once a write has failed: the store then only serves what it has."""
        return self._fenced is None

    @property
    def pending_bytes(self) -> int:
        """Activations that were put and not committed yet."""
        return sum(bank.pending_bytes for bank in self._banks.values())

    def pending(self) -> dict[Place, tuple[int, int]]:
        """What waits in each open bank: a mark for `drop_pending`. What is on its way is waited for first."""
        if self.writable:
            self.finish_commit()
        return {place: bank.pending for place, bank in self._banks.items()}

    def drop_pending(self, after: Mapping[Place, tuple[int, int]]) -> int:
        """Give up what was put and not committed since `pending` gave this; returns how many rows that was."""
        return sum(bank.drop_pending(after.get(place, (0, 0))) for place, bank in self._banks.items())

    def discard(self) -> int:
        """Give up all that was put and not committed, what a thread is writing included; returns how many rows."""
        self._behind.give_up()
        return self.drop_pending({})

    def last_put(self) -> dict[Place, object]:
        """The last batch that waits in each open bank, None where none does; nothing is waited for."""
        return last_batches(self._banks)

    def drop_since(self, last: Mapping[Place, object]) -> int:
        """Give up what was put after these batches, or all where they wait no more. Returns how many rows that was."""
        return drop_since(self._banks, last)

    def committed(self, writer: str) -> int:
        """Segments of a writer that the manifest names, as this store knows it."""
        banks = [bank for space in self.manifest.namespaces.values() for bank in space.banks.values()]
        return sum(one.writer == writer for bank in banks for one in bank.segments)

    def declare(
        self, namespace: str, identity: Mapping[str, Any], config: Mapping[str, Any], secret_check: str = ""
    ) -> None:
        """Record whose entries a namespace holds, with which settings and secret; a commit of its own.

        A namespace that is there keeps its secret_check: its keys were made with that secret.
        """
        self.publish(declared(namespace, identity, config, secret_check))

    def drop(self, namespace: str, name: str) -> None:
        """Remove a bank that is derived from others; a commit of its own. Its files are left to gc."""
        self.publish(dropped(namespace, name))
        self._banks.pop((namespace, name), None)

    @property
    def signs(self) -> bool:
        """Whether commits are signed; rows then need checksums that cannot be forged."""
        return self._key is not None

    def latest(self) -> Manifest:
        """The newest manifest of the folder now, at the level of trust that the store was opened with."""
        return latest(self.folder, self._key if self.trust == "signed" else None)[0]

    def commit(self) -> Manifest:
        """Make everything that was put durable and visible to others. Returns the newest manifest.

        StoreFenced or StoreFull when a write fails: nothing of this commit counts then, all before it does.
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
        """Begin to commit everything that was put, in a thread; it counts from `land` or `commit` on.

        What was begun before is waited for first. With a budget, for which files may have to go before new ones are
        written, this is `commit`.
        """
        if self.budget is not None:
            return self.commit()
        self.finish_commit()
        for place, bank in self._banks.items():
            if bank.has_pending:
                self._behind.begin(place, bank)
        return self.manifest

    @property
    def commit_ready(self) -> bool:
        """Whether what `commit_behind` began is written, so that `land` does not wait."""
        return self._behind.commit_ready

    def finish_commit(self) -> Manifest:
        """Let what `commit_behind` began count, once it is written. Returns the newest manifest; errors as `commit`."""
        self._check()
        if self._fenced:
            raise self._fenced
        publish = partial(self.publish, once=True)
        for one in self._behind.taken():
            try:
                commit_rows(self.folder, publish, self.writer, one.place, one.bank, one.lot, one)
            except OSError as error:
                raise self._fence(error) from error
        return self.manifest

    def _commit_rows(self, place: Place, bank: Bank) -> None:
        def commit_all() -> None:
            for lot in bank.lots():
                commit_rows(self.folder, partial(self.publish, once=True), self.writer, place, bank, lot)

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
            log.info("nothing is committed for now: %s", error)
        except OSError as error:  # a file could not be written, the lock not be had, or the sizes not be looked at
            raise self._fence(error) from error

    def _room_for(self, nbytes: int, budget: eviction.Budget) -> int | None:
        """Bytes that are free in the budget, at least this many, after evicting what has to go; None: never."""
        self.write_uses()
        gone: set[str] = set()
        spaces = self.manifest.namespaces.values()
        live = {one.id: one.live for space in spaces for bank in space.banks.values() for one in bank.segments}
        try:
            return eviction.make_room(self.folder, self.publish, budget, nbytes, gone)
        finally:
            if gone:
                self.evicted += sum(live.get(id, 0) for id in gone)
                self.forget(gone)

    def _commit_index(self, place: Place, bank: Bank) -> None:
        try:
            room = eviction.free_bytes(self.folder, self.budget) if self.budget else None
            commit_index(self.folder, self.publish, place, bank, room)
        except OSError as error:
            raise self._fence(error) from error

    def forget(self, gone: Container[str]) -> None:
        """Let the open banks go of these segments, and of rows that the newest manifest known here says are dead."""
        for (namespace, name), bank in self._banks.items():
            space = self.manifest.namespaces.get(namespace)
            if space and name in space.banks:
                bank.forget(space.banks[name], gone)

    def close_banks(self) -> None:
        """Give the open banks up, with what was put and not committed, and what they know of the use of their rows."""
        self._behind.give_up()
        self._banks = {}

    def publish(self, change: Callable[[Manifest], Manifest], *, once: bool = False) -> Manifest:
        """Commit a change (`publishing.commit`) as this store's writer; returns the newest manifest.

        Open banks do not follow it.
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
        """Stop writing: the error to raise, which every later commit raises too."""
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
        """Keep this writer's counters beside the store. Advisory: a failure is ignored, a reader never needs them."""
        if self.read_only:
            return
        try:
            counting.write_counters(self.folder, self.writer, dict(counters))
        except OSError as error:
            log.info("counters were not kept: %s", error)

    def counters(self, *, without: str = "") -> dict[str, float]:
        """The counters of all writers but one, added up; whatever cannot be read is left out."""
        return counting.total_counters(self.folder, without=without)

    # -- usage ----------------------------------------------------------------------------------------------

    def write_uses(self) -> None:
        """Keep how often and when the open banks' rows were read beside the store. Advisory, like the counters."""
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
            log.info("the uses of rows were not kept: %s", error)
