"""Tests of the in-memory folder: it behaves like a real one, and loses what a real disk may lose."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcache.indexes.errors import SnapshotDamaged, StoreFenced
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.write_once import write_whole
from tests.faults import start
from tests.operations import OPERATIONS, Ledger, MemoryDisk, check, commit, open_in
from tests.simulated_disk.disk import Fault, PowerLoss
from tests.simulated_disk.folder import MemoryFolder

PUT = next(one for one in OPERATIONS if one.name == "put and commit")


def told(act: Callable[[], object]) -> object:
    """Return the result of a call, or the class of its error."""
    try:
        found = act()
    except (OSError, SnapshotDamaged) as error:
        return type(error)
    return sorted(found) if isinstance(found, list) else found


def test_a_folder_in_memory_answers_as_a_real_one(tmp_path: Path) -> None:
    real, memory = Folder(tmp_path / "store", create=True), MemoryFolder(create=True)
    bare = Folder(tmp_path), MemoryFolder()
    steps: list[Callable[[Folder], object]] = [
        lambda folder: write_whole(folder, "t-1", [b"one", b"", b"two"]),
        lambda folder: write_whole(folder, "t-1", [b"again"]),
        lambda folder: folder.names(),
        lambda folder: folder.names("seg"),
        lambda folder: folder.link("t-1", "m-1"),
        lambda folder: folder.link("t-1", "m-1"),
        lambda folder: folder.link("t-2", "m-2"),
        lambda folder: folder.remove("t-1"),
        lambda folder: folder.remove("t-1"),
        lambda folder: folder.read("m-1", 6),
        lambda folder: folder.read("m-1", 5),
        lambda folder: folder.read("t-1", 5),
        lambda folder: folder.size("m-1"),
        lambda folder: folder.size("t-1"),
        lambda folder: folder.map("m-1", 6).tobytes(),
        lambda folder: folder.map("m-1", 7),
        lambda folder: folder.map("m-1", 6).flags.writeable,
        lambda folder: folder.read("seg", 6),
        lambda folder: folder.create("../x"),
        lambda folder: folder.create("elsewhere/x"),
        lambda folder: folder.sync_folder("seg"),
        lambda folder: write_whole(folder, "stat/t-1", [b"1"]),
        lambda folder: folder.replace("stat/t-1", "stat/a.json"),
        lambda folder: folder.replace("stat/t-1", "stat/a.json"),
        lambda folder: write_whole(folder, "stat/t-1", [b"22"]),
        lambda folder: folder.replace("stat/t-1", "stat/a.json"),
        lambda folder: folder.read("stat/a.json", 9),
        lambda folder: folder.names("stat"),
        lambda folder: folder.names(),
    ]
    for number, step in enumerate(steps):
        assert told(lambda step=step: step(memory)) == told(lambda step=step: step(real)), number  # type: ignore[misc]
    assert bare[0].names("seg") == bare[1].names("seg") == []
    for folder in (real, memory, *bare):
        folder.close()


def test_a_folder_in_memory_has_every_call_of_a_real_one() -> None:
    public = {name for name, value in vars(Folder).items() if callable(value) and not name.startswith("_")}
    assert public - {"write", "move_to"} <= set(vars(MemoryFolder))


def test_a_power_loss_keeps_what_was_synced_and_any_part_of_the_rest() -> None:
    folder = MemoryFolder(create=True)
    write_whole(folder, "synced", [b"s" * 9000])
    folder.sync_folder("")
    write_whole(folder, "name-not-synced", [b"n"])
    descriptor = folder.create("bytes-not-synced")
    folder.write(descriptor, b"b" * 9000, 0)
    states = [state.contents() for state in folder.crash_states(1, 400)]
    assert all(state["synced"] == b"s" * 9000 for state in states)
    assert {state.get("name-not-synced") for state in states} == {None, b"n"}
    left = {state.get("bytes-not-synced") for state in states}
    assert {None, b"", b"b" * 9000, bytes(9000)} <= left
    assert any(one and one.strip(b"b") == b"" and 0 < len(one) < 9000 for one in left)  # the first of them
    assert any(one and 0 < one.count(b"b") < 9000 and len(one) == 9000 for one in left)  # torn
    only = [{name in state for name in ("name-not-synced", "bytes-not-synced")} for state in states]
    assert {True, False} in only
    assert folder.killed().contents() == folder.contents()
    assert [state.contents() for state in folder.crash_states(1, 400)] == states


def test_after_a_power_loss_no_call_works() -> None:
    folder = MemoryFolder(create=True, fault=Fault(5))
    with pytest.raises(PowerLoss):
        write_whole(folder, "a", [b"12345678"])
    assert folder.contents() == {"a": b"1234"}
    with pytest.raises(PowerLoss):
        folder.remove("a")


def test_what_a_failed_sync_did_not_keep_no_later_sync_keeps() -> None:
    folder = MemoryFolder()
    descriptor = folder.create("a")
    folder.write(descriptor, b"a", 0)
    folder.fault = Fault(len(folder.calls), errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        folder.sync(descriptor)
    folder.sync(descriptor)
    folder.sync_folder("")
    assert folder.contents() == {"a": b"a"}
    assert all(state.contents() == {"a": b""} for state in folder.crash_states(1, 20))


# -- errors that these folders found ------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["names", "read"])
def test_a_commit_that_cannot_read_the_store_fences_its_writer_and_is_no_system_error(call: str) -> None:
    memory, ledger = start(PUT)
    store = open_in(MemoryDisk(memory), [])
    check(store, ledger, range(60))

    def break_from_here(number: int, name: str) -> None:
        if name == call:
            memory.fault = Fault(number, errno.EIO)

    memory.before = break_from_here
    with pytest.raises(StoreFenced, match="Input/output error"):
        commit(store, ledger, range(30, 33))
    memory.before = None
    assert not store.writable
    check(store, Ledger(set(range(60)), ledger.acknowledged), range(60))
    check(open_in(MemoryDisk(memory), []), ledger, range(60))


def test_rows_that_cannot_be_opened_just_after_their_commit_are_committed_and_served_from_memory() -> None:
    memory, ledger = start(PUT)
    store = open_in(MemoryDisk(memory), [])
    check(store, ledger, range(60))

    def break_once(number: int, name: str) -> None:
        if name == "map":
            memory.fault, memory.before = Fault(number, errno.EMFILE), None

    memory.before = break_once
    commit(store, ledger, range(30, 33))
    assert memory.before is None
    assert store.writable
    check(store, ledger, range(60))
    check(open_in(MemoryDisk(memory.killed()), []), ledger, range(60))
    commit(store, ledger, [33])
    check(open_in(MemoryDisk(memory), []), ledger, range(60))


def test_counters_that_cannot_be_listed_are_none() -> None:
    memory, _ = start(PUT)
    store = open_in(MemoryDisk(memory), [])
    assert store.counters() == {"hits": 1}
    memory.fault = Fault(len(memory.calls), errno.EIO, forever=True)
    assert store.counters() == {}
