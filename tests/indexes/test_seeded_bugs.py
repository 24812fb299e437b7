"""Tests of the tests: each bug that is switched on here is found by the named test."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.generations import generation_name, generations, newest
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format import rows as records
from llmcache.indexes.format import segment as segments
from llmcache.indexes.format import write_once as files
from llmcache.indexes.format.manifest import Manifest
from llmcache.indexes.format.manifest_json import to_bytes
from llmcache.indexes.format.rows import ROW
from llmcache.indexes.format.write_once import write_whole
from llmcache.indexes.search.vector_index import VectorIndex
from llmcache.indexes.store import Store
from llmcache.model import keys
from tests import faults, operations
from tests.damage import with_checksum_of
from tests.faults import Tally, interleavings, power_losses, start
from tests.operations import (
    FEATURES,
    OPERATIONS,
    Ledger,
    MemoryDisk,
    Violation,
    bank_of,
    check,
    fill,
    open_in,
    values_of,
)
from tests.simulated_disk.folder import MemoryFolder

Patch = pytest.MonkeyPatch
PUT = next(one for one in OPERATIONS if one.name == "put and commit")


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    """Keep other tests' shared stores separate from those made with a bug."""
    logging.disable(logging.CRITICAL)
    for cached in (operations.key_of, faults._prepared):
        cached.cache_clear()
    yield
    for cached in (operations.key_of, faults._prepared):
        cached.cache_clear()
    logging.disable(logging.NOTSET)


# -- what finds them ----------------------------------------------------------------------------------------


def power_loss_at_any_call() -> Tally:
    return power_losses(PUT, states=15, second=0)


def fault_at_any_call() -> Tally:
    return faults.faults(PUT, codes=[errno.EIO], states=4)


def another_writer_at_any_call() -> Tally:
    return interleavings(PUT)


def documents_alike_but_for_role_and_prompt() -> Tally:
    tally = Tally()
    with tally.trial("documents", "entries 0 to 19 and their twins"):
        memory = MemoryFolder()
        ledger = fill(MemoryDisk(memory))
        check(open_in(MemoryDisk(memory), []), ledger, range(48))
    return tally


def rewrite(memory: MemoryFolder, name: str, change: Callable[[bytearray], object]) -> None:
    """Damage a file in place."""
    data = bytearray(memory.read(name, 1 << 30))
    change(data)
    descriptor = memory.reopen(name)
    memory.write(descriptor, bytes(data), 0)
    memory.sync(descriptor)
    memory.close_file(descriptor)


def _read_after(change: Callable[[bytearray], object]) -> Tally:
    """Read all entries after this change of each file of activations."""
    tally = Tally()
    memory, ledger = start(PUT)
    for name in memory.names("seg"):
        if name.endswith(".seg"):
            with tally.trial("damaged files", name):
                damaged = memory.killed()
                rewrite(damaged, f"seg/{name}", change)
                check(open_in(MemoryDisk(damaged), []), ledger, range(24), complete=False)
    return tally


def flipped_bit() -> Tally:
    def flip(data: bytearray) -> None:
        data[100] ^= 1

    return _read_after(flip)


def records_with_each_others_keys() -> Tally:
    """Swap the keys of two rows and correct the sha256 over them, like a bug in the writer."""

    def swap(data: bytearray) -> None:
        for at in range(64, 64 + 16):
            data[at], data[at + ROW.itemsize] = data[at + ROW.itemsize], data[at]

    tally = Tally()
    memory, ledger = start(PUT)
    newest = max(name for name in memory.names() if name.startswith("m-"))
    with tally.trial("damaged files", "swapped keys"):
        for name in memory.names("seg"):
            if name.endswith(".row"):
                rewrite(memory, f"seg/{name}", swap)
                right = with_checksum_of(
                    memory.read(newest, 1 << 20), f"seg/{name}", memory.read(f"seg/{name}", 1 << 20)
                )
                memory.remove(newest)
                write_whole(memory, newest, [right])
        check(open_in(MemoryDisk(memory), []), ledger, range(24), complete=False)
    return tally


def index_that_names_rows_that_are_not_there() -> Tally:
    """Damage an index after its checksum is verified, so that it returns ids beyond its end."""
    tally = Tally()
    with tally.trial("searches", "ids beyond the end"), Patch.context() as patch:
        real = VectorIndex._search
        patch.setattr(VectorIndex, "_search", lambda *args: (lambda near: (near[0], near[1] + 7))(real(*args)))
        memory, _ = start(PUT)
        bank = bank_of(open_in(MemoryDisk(memory), []))
        rows, similarity = bank.nearest(values_of(range(20))[:, :FEATURES], 3)
        if rows.max() >= len(bank) or not ((rows >= 0) == (similarity > -np.inf)).all():
            raise Violation(f"the bank has {len(bank)} rows, and row {rows.max()} is near")
    return tally


# -- the bugs -----------------------------------------------------------------------------------------------


def _unsynced(folder: Folder, name: str, parts: Iterable[bytes | memoryview]) -> int:
    descriptor, size = folder.create(name), 0
    for part in parts:
        folder.write(descriptor, part, size)
        size += memoryview(part).nbytes
    folder.close_file(descriptor)
    return size


def no_fsync_of_the_segment(patch: Patch) -> None:
    patch.setattr(files, "write_whole", _unsynced)


def no_fsync_of_the_manifest(patch: Patch) -> None:
    patch.setattr(publishing, "write_whole", _unsynced)


def _without_sync_of(patch: Patch, sub: str) -> None:
    real = MemoryFolder.sync_folder
    patch.setattr(MemoryFolder, "sync_folder", lambda self, name: None if name == sub else real(self, name))


def no_fsync_of_the_folder_after_link(patch: Patch) -> None:
    _without_sync_of(patch, "")


def no_fsync_of_the_folder_before_publish(patch: Patch) -> None:
    _without_sync_of(patch, "seg")


def _publish(folder: Folder, new: Manifest, base: Manifest, generation: int) -> bool:
    new = replace(new, generation=generation, parent=base.generation, writer="w" * 32)
    temporary = f"t-{'w' * 32}-{generation}"
    return publishing._publish(folder, temporary, to_bytes(new), generation, None)


def stale_base(patch: Patch) -> None:
    def publish(self: Store, change: Callable[[Manifest], Manifest], **asked: Any) -> Manifest:
        while True:
            number = max(generations(self.folder), default=0) + 1
            if _publish(self.folder, change(self.manifest), self.manifest, number):
                self.manifest = replace(change(self.manifest), generation=number)
                return self.manifest

    patch.setattr(Store, "publish", publish)


def base_and_number_from_two_listings(patch: Patch) -> None:
    def commit(folder: Folder, writer: str, change: Callable[[Manifest], Manifest], **asked: Any) -> Manifest:
        while True:
            listed = generations(folder)
            base = newest(folder, listed)[0] if listed else Manifest()
            number = max(generations(folder), default=0) + 1
            if _publish(folder, change(base), base, number):
                return newest(folder, [number])[0]

    patch.setattr(publishing, "commit", commit)


def publish_by_overwriting(patch: Patch) -> None:
    real = MemoryFolder.link

    def link(self: MemoryFolder, name: str, new: str) -> None:
        self.remove(new)
        real(self, name, new)

    patch.setattr(MemoryFolder, "link", link)


def rewrite_of_a_published_file(patch: Patch) -> None:
    real = publishing.commit

    def commit(folder: Folder, writer: str, change: Callable[[Manifest], Manifest], **asked: Any) -> Manifest:
        listed = generations(folder)
        if not listed:
            return real(folder, writer, change, **asked)
        base, _ = newest(folder, listed)
        new = replace(change(base), created=folder.now())
        assert isinstance(folder, MemoryFolder)
        descriptor = folder.reopen(generation_name(listed[0]))
        folder.write(descriptor, to_bytes(new), 0)
        folder.sync(descriptor)
        folder.close_file(descriptor)
        return new

    patch.setattr(publishing, "commit", commit)


def role_and_prompt_not_in_the_key(patch: Patch) -> None:
    real = keys.key_seed
    patch.setattr(keys, "key_seed", lambda identity, kind, role, prompt: real(identity, kind, None, None))


def identity_not_in_the_key(patch: Patch) -> None:
    real = keys.key_seed
    patch.setattr(keys, "key_seed", lambda identity, kind, role, prompt: real(b"", kind, role, prompt))


def key_fields_without_their_lengths(patch: Patch) -> None:
    patch.setattr(keys, "_length", lambda length: b"")


def checksum_not_compared(patch: Patch) -> None:
    patch.setattr(segments, "agree", lambda records, parts: [True] * len(records))


def checksum_not_bound_to_the_key(patch: Patch) -> None:
    real = records.heads

    def heads(records: Any) -> bytes:
        keyless = records.copy()
        keyless["key"] = 0
        return real(keyless)

    patch.setattr(records, "heads", heads)


def ids_not_bounds_checked(patch: Patch) -> None:
    def nearest(self: VectorIndex, queries: Any, k: int, *, beside: bool = False) -> tuple[Any, Any]:
        found, near = self._search(queries, min(k, len(self)), beside)
        return near, found

    patch.setattr(VectorIndex, "nearest", nearest)


def retry_of_a_failed_fsync(patch: Patch) -> None:
    real = MemoryFolder.sync

    def sync(self: MemoryFolder, descriptor: int) -> None:
        try:
            real(self, descriptor)
        except OSError:
            real(self, descriptor)

    patch.setattr(MemoryFolder, "sync", sync)


def short_write_ignored(patch: Patch) -> None:
    def write(self: Folder, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        if len(data):
            self.write_some(descriptor, memoryview(data).cast("B"), offset)

    patch.setattr(Folder, "write", write)


class Seeded(NamedTuple):
    bug: Callable[[Patch], None]
    found_by: Callable[[], Tally]


SEEDED = (
    Seeded(no_fsync_of_the_segment, power_loss_at_any_call),
    Seeded(no_fsync_of_the_manifest, power_loss_at_any_call),
    Seeded(no_fsync_of_the_folder_after_link, power_loss_at_any_call),
    Seeded(no_fsync_of_the_folder_before_publish, power_loss_at_any_call),
    Seeded(rewrite_of_a_published_file, power_loss_at_any_call),
    Seeded(stale_base, another_writer_at_any_call),
    Seeded(publish_by_overwriting, another_writer_at_any_call),
    Seeded(base_and_number_from_two_listings, another_writer_at_any_call),
    Seeded(role_and_prompt_not_in_the_key, documents_alike_but_for_role_and_prompt),
    Seeded(identity_not_in_the_key, documents_alike_but_for_role_and_prompt),
    Seeded(key_fields_without_their_lengths, documents_alike_but_for_role_and_prompt),
    Seeded(checksum_not_compared, flipped_bit),
    Seeded(checksum_not_bound_to_the_key, records_with_each_others_keys),
    Seeded(ids_not_bounds_checked, index_that_names_rows_that_are_not_there),
    Seeded(retry_of_a_failed_fsync, fault_at_any_call),
    Seeded(short_write_ignored, fault_at_any_call),
)


@pytest.mark.parametrize("seeded", SEEDED, ids=lambda seeded: f"{seeded.bug.__name__}-by-{seeded.found_by.__name__}")
def test_a_seeded_bug_is_found(seeded: Seeded, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        seeded.bug(patch)
        assert seeded.found_by().failures


@pytest.mark.parametrize(
    "found_by", dict.fromkeys(seeded.found_by for seeded in SEEDED), ids=lambda found_by: found_by.__name__
)
def test_without_a_bug_nothing_is_found(found_by: Callable[[], Tally]) -> None:
    assert found_by().failures == []


def test_the_account_of_what_is_expected_is_not_the_store_itself() -> None:
    memory, _ = start(PUT)
    with pytest.raises(Violation, match="acknowledged and lost: \\[60\\]"):
        check(open_in(MemoryDisk(memory), []), Ledger({60}, {60}), range(72))
    with pytest.raises(Violation, match="never begun"):
        check(open_in(MemoryDisk(memory), []), Ledger(), range(72))
