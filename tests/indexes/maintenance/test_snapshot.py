"""Tests of snapshots, merges, verification and repair: intact data stays, and damage is reported."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache import snapshot
from llmcache.banks.counters import Counters
from llmcache.cli.main import main
from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.generations import LAST, generation_name
from llmcache.indexes.errors import (
    FormatTooNew,
    LLMCacheError,
    ModelMismatch,
    SnapshotDamaged,
    SnapshotNotFound,
    StoreFull,
    UntrustedSnapshot,
)
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import ROW, Keys
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from llmcache.report.statistics import statistics

WIDTH = 24
SPAWN = multiprocessing.get_context("spawn")
EXACT = NearChoice(index="flat", projection="none")
EVERYTHING = range(120)


def keys_of(numbers: Sequence[int]) -> Keys:
    first = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def text_keys_of(numbers: Sequence[int]) -> Keys:
    return keys_of(numbers)[:, ::-1].copy()


def values_of(numbers: Sequence[int]) -> NDArray[np.float32]:
    rows = [np.random.default_rng(number).standard_normal(WIDTH) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, WIDTH)


def bank_of(store: Store, namespace: str = "default", model: str = "m", dtype: str = "float32") -> Bank:
    if store.namespace(namespace) is None:
        store.declare(namespace, {"digest": model, "name": f"/models/{model}"}, {"tau": None})
    return store.bank(namespace, "layer", lambda: BankFacts(dtype, WIDTH, 1, WIDTH), EXACT)


def put(bank: Bank, numbers: Sequence[int]) -> None:
    kept = bank.put(
        keys_of(numbers),
        values_of(numbers),
        tokens=[np.array([number], np.int32) for number in numbers],
        sources=[f"document {number}" for number in numbers],
        features=values_of(numbers),
        cost=np.ones(len(numbers), np.float32),
    )
    assert kept.all()
    bank.alias(text_keys_of(numbers), keys_of(numbers))


def made(path: Path, *parts: Sequence[int], model: str = "m", index: bool = False) -> Path:
    """Make a store with one segment per part."""
    with closing(Store.open(path, create=True)) as store:
        for numbers in parts:
            put(bank_of(store, model=model), numbers)
            store.commit()
        if index:
            bank_of(store).nearest(values_of([0]), 1)
            store.commit()
    return path


def contents(path: Path, numbers: Sequence[int] = EVERYTHING) -> dict[int, bytes]:
    """Return what a reader finds for each key: values, tokens, source, and whether text and fingerprint find it."""
    with closing(Store.open(path)) as store:
        bank = bank_of(store)
        rows = bank.find(keys_of(numbers))
        present = np.flatnonzero(rows >= 0)
        reading = bank.read(rows[present])
        texts = bank.find_text(text_keys_of(numbers))
        nearest, _ = bank.nearest(values_of(numbers), 1)
        found = {}
        for i, value, intact in zip(present.tolist(), reading.values, reading.intact, strict=True):
            if intact:
                row = int(rows[i])
                facts = (
                    bank.tokens(row).tolist(),
                    bank.source(row),
                    bool(texts[i] == row),
                    near(bank, int(nearest[i, 0])) == bank.key(row),
                )
                found[numbers[i]] = value.tobytes() + repr(facts).encode()
        return found


def near(bank: Bank, row: int) -> str:
    return bank.key(row) if row >= 0 else ""


def expected(numbers: Sequence[int]) -> dict[int, bytes]:
    """Return the same as `contents`, from the values that were put."""
    values = values_of(numbers)
    return {
        number: values[i].tobytes() + repr(([number], f"document {number}", True, True)).encode()
        for i, number in enumerate(numbers)
    }


def everything_in(path: Path) -> dict[str, bytes | None]:
    """List files and folders, without the usage records that every reader writes."""
    found = [one for one in sorted(path.rglob("*")) if one.suffix != ".use"]
    return {str(one.relative_to(path)): one.read_bytes() if one.is_file() else None for one in found}


def bytes_on_disk(path: Path) -> int:
    return sum(
        os.path.getsize(os.path.join(where, name))
        for sub in ("seg", "idx")
        for where, _, names in os.walk(path / sub)
        for name in names
    )


def files_of(path: Path, kind: str) -> list[Path]:
    """List the files of the newest generation with this extension, in the manifest's order."""
    with closing(Store.open(path)) as store:
        facts = store.manifest.namespaces["default"].banks["layer"]
        if kind in ("faiss", "proj"):
            file = facts.projection
            if kind == "faiss":
                file = facts.index.file if facts.index else None
            assert file is not None
            return [path / file.name]
        return [path / one.file(kind).name for one in facts.segments]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with three segments and an index."""
    return made(tmp_path / "store", range(30), range(30, 45), range(45, 60), index=True)


@pytest.fixture(scope="session")
def other_disk() -> Iterator[Path]:
    """A folder on another file system."""
    where = Path("/dev/shm")
    if not os.access(where, os.W_OK) or where.stat().st_dev == Path("/tmp").stat().st_dev:
        pytest.skip("there is no second file system to write to")
    path = where / f"llmcache-test-{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


# -- save and load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_a_snapshot_is_a_store_with_the_same_bits(store: Path, tmp_path: Path, copy: bool) -> None:
    before = everything_in(store)
    saved = snapshot.save(store, tmp_path / "snap", copy=copy)
    assert everything_in(store) == before
    assert (saved.entries, saved.linked) == (60, 0 if copy else saved.bytes)
    assert saved.bytes == bytes_on_disk(tmp_path / "snap")
    loaded = snapshot.load(tmp_path / "snap", tmp_path / "again", copy=copy)
    assert loaded.generation == 1
    for path in (store, tmp_path / "snap", tmp_path / "again"):
        assert contents(path) == expected(range(60))
        assert snapshot.verify(path).whole
    files = [one for one in everything_in(tmp_path / "again").items() if one[0].startswith(("seg/", "idx/"))]
    assert dict(files) == {name: data for name, data in before.items() if name.startswith(("seg/", "idx/"))}
    assert sorted(os.listdir(tmp_path)) == ["again", "snap", "store"]


def test_only_what_the_newest_generation_names_goes_along(store: Path, tmp_path: Path) -> None:
    with closing(Store.open(store)) as opened:
        opened.write_counters({"documents": 7})
    (store / "seg" / ("0" * 32 + ".seg")).write_bytes(b"left over")
    (store / "notes.txt").write_bytes(b"mine")
    snapshot.save(store, tmp_path / "snap")
    names = sorted(everything_in(tmp_path / "snap"))
    assert [name for name in names if not name.startswith(("seg/", "idx/"))] == [
        "FORMAT", "idx", generation_name(1), "seg", "stat",
    ]  # fmt: skip
    assert len(names) == 5 + 3 * 5 + 2
    assert (tmp_path / "snap").stat().st_mode & 0o777 == 0o700


def test_a_snapshot_goes_to_another_disk_and_back(store: Path, tmp_path: Path, other_disk: Path) -> None:
    assert snapshot.save(store, other_disk / "snap").linked == 0
    assert snapshot.load(other_disk / "snap", tmp_path / "back").linked == 0
    assert contents(other_disk / "snap") == contents(tmp_path / "back") == expected(range(60))


def test_a_copied_snapshot_opens_and_loads(store: Path, tmp_path: Path) -> None:
    snapshot.save(store, tmp_path / "snap")
    shutil.copytree(tmp_path / "snap", tmp_path / "copied")
    (tmp_path / "synced").mkdir()
    for name in sorted(everything_in(tmp_path / "snap"), reverse=True):  # another order, other times and rights
        path = tmp_path / "synced" / name
        path.parent.mkdir(exist_ok=True)
        if (tmp_path / "snap" / name).is_file():
            path.write_bytes((tmp_path / "snap" / name).read_bytes())
            path.chmod(0o644)
    for copied in ("copied", "synced"):
        assert contents(tmp_path / copied) == expected(range(60))
        snapshot.load(tmp_path / copied, tmp_path / f"{copied} store")
        assert contents(tmp_path / f"{copied} store") == expected(range(60))


def test_files_that_others_may_write_are_never_linked_and_a_store_of_them_is_refused(
    store: Path, tmp_path: Path
) -> None:
    files = files_of(store, "seg")
    for file in files:
        file.chmod(0o666)
    with closing(Folder(store)) as source, closing(Folder(tmp_path / "other", create=True)) as target:
        for file in files:
            name = f"seg/{file.name}"
            assert not target.link_from(source, name, name)
    for work in (snapshot.save, snapshot.load):
        with pytest.raises(UntrustedSnapshot, match="may be written by other users"):
            work(store, tmp_path / "snap")
    with pytest.raises(UntrustedSnapshot, match="may be written by other users"):
        snapshot.repair(store)
    assert not (tmp_path / "snap").exists()
    assert snapshot.verify(store).whole


def test_a_snapshot_stays_as_it_is_while_its_store_goes_on(store: Path, tmp_path: Path) -> None:
    snapshot.save(store, tmp_path / "snap")
    before = everything_in(tmp_path / "snap")
    made(store, range(60, 70), index=True)
    shutil.rmtree(store / "seg")
    assert everything_in(tmp_path / "snap") == before
    assert contents(tmp_path / "snap") == expected(range(60))


def test_sizes_are_counted_alike_before_and_after(store: Path, tmp_path: Path) -> None:
    snapshot.save(store, tmp_path / "snap")
    snapshot.load(tmp_path / "snap", tmp_path / "again", copy=True)
    found = []
    for path in (store, tmp_path / "snap", tmp_path / "again"):
        with closing(Store.open(path)) as opened:
            banks = statistics(opened, Counters()).banks
        found.append(banks)
        assert sum(one.bytes for one in banks) == bytes_on_disk(path) == snapshot.verify(path).bytes
    assert found[0] == found[1] == found[2]


def test_an_empty_store_can_be_saved(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", create=True).close()
    assert snapshot.save(tmp_path / "store", tmp_path / "snap").entries == 0
    assert snapshot.verify(tmp_path / "snap").whole


def test_what_is_there_already_is_not_replaced(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    before = everything_in(tmp_path)
    for name in ("file", "full", "link", "store"):
        with pytest.raises(LLMCacheError, match="exists and is not"):
            snapshot.save(store, tmp_path / name)
    assert everything_in(tmp_path) == before
    (tmp_path / "empty").mkdir()
    snapshot.save(store, tmp_path / "empty")
    assert contents(tmp_path / "empty") == expected(range(60))


def test_a_dry_run_makes_nothing(store: Path, tmp_path: Path) -> None:
    before = everything_in(tmp_path)
    assert snapshot.save(store, tmp_path / "snap", dry_run=True).entries == 60
    assert snapshot.load(store, tmp_path / "snap", dry_run=True).entries == 60
    assert snapshot.merge([store], tmp_path / "snap", dry_run=True)[0].entries == 60
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("kind", ["seg", "row", "key", "var", "fp", "faiss", "proj"])
def test_load_refuses_any_damage_and_names_the_file(store: Path, tmp_path: Path, kind: str) -> None:
    snapshot.save(store, tmp_path / "snap", copy=True)
    file = files_of(tmp_path / "snap", kind)[-1]
    flip(file, file.stat().st_size // 2 if kind != "seg" else 5)
    for copy in (False, True):
        with pytest.raises(SnapshotDamaged, match=f"{file.name}.*llmcache repair"):
            snapshot.load(tmp_path / "snap", tmp_path / "again", copy=copy)
    with pytest.raises(SnapshotDamaged, match=file.name):
        snapshot.save(tmp_path / "snap", tmp_path / "again", copy=True)
    assert sorted(os.listdir(tmp_path)) == ["snap", "store"]


def test_a_store_that_is_none_is_said(tmp_path: Path) -> None:
    for call in (
        lambda: snapshot.save(tmp_path / "none", tmp_path / "snap"),
        lambda: snapshot.merge([tmp_path / "none"], tmp_path / "snap"),
        lambda: snapshot.verify(tmp_path / "none"),
        lambda: snapshot.verify(tmp_path),
        lambda: snapshot.repair(tmp_path),
    ):
        with pytest.raises(SnapshotNotFound):
            call()
    assert os.listdir(tmp_path) == []


# -- merge --------------------------------------------------------------------------------------------------


def workers(tmp_path: Path) -> list[Path]:
    """Three stores that overlap within and across segments, and one with a duplicate row."""
    return [
        made(tmp_path / "w1", range(20), range(20, 40), index=True),
        made(tmp_path / "w2", range(10, 20), range(35, 60)),
        made(tmp_path / "w3", range(60, 70), range(65, 80), range(0)),
    ]


@pytest.mark.parametrize("copy", [False, True])
def test_a_merge_is_the_union_without_duplicates(tmp_path: Path, copy: bool) -> None:
    sources = workers(tmp_path)
    before = [everything_in(path) for path in sources]
    union: dict[int, bytes] = {}
    for path in sources:
        union = {**contents(path), **union}
    merged = snapshot.merge(sources, tmp_path / "all", copy=copy)
    assert contents(tmp_path / "all") == union == expected(range(80))
    assert [everything_in(path) for path in sources] == before
    with closing(Store.open(tmp_path / "all")) as store:
        assert len(bank_of(store)) == 80
    assert (merged[0].entries, merged[0].duplicates, merged[0].whole) == (80, 20, 3)
    found = snapshot.verify(tmp_path / "all")
    assert found.findings == ()
    assert found.bytes == bytes_on_disk(tmp_path / "all")


def test_merging_again_changes_nothing(tmp_path: Path) -> None:
    sources = workers(tmp_path)
    snapshot.merge(sources, tmp_path / "all")
    before = everything_in(tmp_path / "all")
    for again in (sources, sources[:1], [tmp_path / "all"]):
        assert snapshot.merge(again, tmp_path / "all")[0].entries == 0
        assert everything_in(tmp_path / "all") == before


def test_a_merge_into_a_store_is_a_commit_like_any_other(tmp_path: Path) -> None:
    sources = workers(tmp_path)
    target = made(tmp_path / "target", range(5, 12), range(75, 100), index=True)
    with closing(Store.open(target)) as reader, closing(Store.open(target)) as writer:
        bank = bank_of(reader)
        put(bank_of(writer), [110])
        assert snapshot.merge(sources, target)[0].entries == 68
        writer.commit()
        assert (bank.find(keys_of(range(5))) < 0).all()
        reader.reload()
        assert (bank.find(keys_of([*range(100), 110])) >= 0).all()
        assert len(bank) == 101
    assert contents(target) == expected([*range(100), 110])
    assert snapshot.verify(target).whole


def test_the_same_store_twice_is_merged_once(store: Path, tmp_path: Path) -> None:
    snapshot.save(store, tmp_path / "snap")
    merged = snapshot.merge([store, tmp_path / "snap", store], tmp_path / "all")
    assert (merged[0].entries, merged[0].whole, merged[0].rewritten) == (60, 3, 0)
    assert contents(tmp_path / "all") == expected(range(60))
    assert files_of(tmp_path / "all", "faiss")[0].read_bytes() == files_of(store, "faiss")[0].read_bytes()


def test_of_two_copies_a_merge_takes_the_one_that_is_whole(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", range(10)), made(tmp_path / "other", range(5, 15))
    damage_row(one, 7)
    damage_row(other, 9)
    for target, sources in (("a", [one, other]), ("b", [other, one])):
        snapshot.merge(sources, tmp_path / target)
        assert contents(tmp_path / target) == expected(range(15))
    snapshot.merge([other], one)  # into a store whose own copy is damaged
    assert contents(one) == expected(range(15))
    assert snapshot.merge([other], one)[0].entries == 0


def test_namespaces_of_different_models_are_not_merged_under_one_name(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", range(5)), made(tmp_path / "other", range(5), model="x")
    before = everything_in(tmp_path)
    for target in (tmp_path / "all", one):
        with pytest.raises(ModelMismatch, match=r"(?s)/models/m.*/models/x.*digest"):
            snapshot.merge([one, other], target)
    assert everything_in(tmp_path) == before
    with closing(Store.open(other)) as store:
        bank_of(store, "second", "x")
        put(bank_of(store, "second"), [3])
        store.commit()
    with closing(Store.open(tmp_path / "third", create=True)) as store:
        put(bank_of(store, "second", "x", "float16"), [4])
        store.commit()
    with pytest.raises(ModelMismatch, match=r"float32.*float16"):
        snapshot.merge([other, tmp_path / "third"], tmp_path / "all")


def test_where_a_model_was_loaded_from_does_not_keep_stores_apart(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", range(5)), made(tmp_path / "other", range(3, 8))
    with closing(Store.open(other)) as store:
        store.declare("default", {"digest": "m", "name": "elsewhere"}, {"tau": 0.9})
    snapshot.merge([one, other], tmp_path / "all")
    assert contents(tmp_path / "all") == expected(range(8))


def test_a_damaged_source_file_stops_a_merge_before_anything_changes(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", range(10)), made(tmp_path / "other", range(5, 15))
    target = made(tmp_path / "target", range(2))
    flip(files_of(other, "var")[0], 3)
    before = everything_in(tmp_path)
    for into in (target, tmp_path / "all"):
        with pytest.raises(SnapshotDamaged, match=r"\.var.*llmcache repair"):
            snapshot.merge([one, other], into)
    assert everything_in(tmp_path) == before


# -- diff ---------------------------------------------------------------------------------------------------


def test_differences_are_named_by_key(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one", range(10)), made(tmp_path / "other", range(5, 15))
    with closing(Store.open(other)) as store:
        store.declare("default", {"digest": "m", "name": "/models/m"}, {"tau": 0.9})
        bank = bank_of(store)
        bank.put(
            keys_of([6]), values_of([99]), tokens=[np.zeros(1, np.int32)], sources=["x"], features=values_of([6]),
            cost=np.ones(1, np.float32),
        )  # fmt: skip
        store.commit()
    (found,) = snapshot.diff(one, other)

    def names(numbers: Sequence[int]) -> tuple[str, ...]:
        return tuple(sorted(keys_of([number]).tobytes().hex() for number in numbers))

    assert found.only_a == names(range(5))
    assert found.only_b == names(range(10, 15))
    assert found.changed == names([6])
    assert found.same == 4
    assert found.settings == (("setting tau", None, 0.9),)


def test_a_store_does_not_differ_from_its_snapshot(store: Path, tmp_path: Path) -> None:
    snapshot.save(store, tmp_path / "snap")
    (found,) = snapshot.diff(store, tmp_path / "snap")
    assert (found.same, found.only_a, found.only_b, found.changed, found.settings) == (60, (), (), (), ())


# -- damage, verify, repair ---------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def damage_row(path: Path, number: int) -> None:
    """Flip a byte of the stored activations of this entry."""
    for row_file, seg in zip(files_of(path, "row"), files_of(path, "seg"), strict=True):
        records = np.frombuffer(row_file.read_bytes()[64:], ROW)
        for record in records[(records["key"] == keys_of([number])).all(axis=1)]:
            flip(seg, int(record["offset"]) + 9)


def without(numbers: Sequence[int], *, text: bool = True, tokens: bool = True, near: bool = True) -> dict[int, bytes]:
    """Return `expected` with lost texts, tokens or fingerprints."""
    values = values_of(numbers)
    return {
        number: values[i].tobytes()
        + repr(([number] if tokens else [], f"document {number}" if tokens else "", text, near)).encode()
        for i, number in enumerate(numbers)
    }


FIRST, SECOND, REST = range(30), range(30, 45), range(45, 60)
AFTER: dict[str, dict[int, bytes]] = {
    "seg": expected([n for n in range(60) if n != 30]),
    "row": expected([*FIRST, *REST]),
    "key": {**expected([*FIRST, *REST]), **without(SECOND, text=False)},
    "var": {**expected([*FIRST, *REST]), **without(SECOND, tokens=False)},
    "fp": {**expected([*FIRST, *REST]), **without(SECOND, near=False)},
    "faiss": expected(range(60)),
    "proj": expected(range(60)),
}
HOW: dict[str, Callable[[Path], Any]] = {
    "flipped": lambda file: flip(file, 5 if file.suffix == ".seg" else file.stat().st_size // 2),
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "missing": lambda file: file.unlink(),
    "a link": lambda file: os.symlink(file.rename(file.parent.parent / "moved"), file),
    "a folder": lambda file: os.mkdir(shutil.move(file, file.parent.parent / "moved") and file),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", AFTER)
def test_damage_is_named_and_after_a_repair_all_the_rest_is_there(store: Path, kind: str, how: str) -> None:
    files = files_of(store, kind)
    file = files[min(1, len(files) - 1)]
    HOW[how](file)
    found = snapshot.verify(store)
    assert [one.file for one in found.findings if one.damage] == [str(file.relative_to(store))]
    assert not found.whole
    after = AFTER[kind]
    if kind == "seg" and how in {"truncated", "longer"}:
        after = expected(range(60))  # the last row's bytes are all there: what is cut off is padding
    elif kind == "seg" and how != "flipped":
        after = expected([*FIRST, *REST])
    before = everything_in(store)
    planned = snapshot.repair(store, dry_run=True)
    assert everything_in(store) == before
    done = snapshot.repair(store)
    assert done.set_aside == planned.set_aside
    assert done.lost == planned.lost == 60 - len(after)
    assert snapshot.verify(store).whole
    assert contents(store) == after
    again = everything_in(store)
    assert snapshot.repair(store).set_aside == ()
    assert everything_in(store) == again


@pytest.mark.parametrize("kind", ["seg", "row", "key", "var", "fp"])
def test_swapped_files_are_named_and_set_aside(tmp_path: Path, kind: str) -> None:
    store = made(tmp_path / "store", range(10), range(10, 20), range(20, 30))
    one, other, _ = files_of(store, kind)
    one.rename(store / "x")
    other.rename(one)
    (store / "x").rename(other)
    found = snapshot.verify(store)
    assert {one.file for one in found.findings if one.damage} == {str(f.relative_to(store)) for f in (one, other)}
    snapshot.repair(store)
    assert snapshot.verify(store).whole
    assert set(contents(store)) == set(range(20, 30) if kind in ("seg", "row") else range(30))
    assert {n: data for n, data in contents(store).items() if n >= 20} == expected(range(20, 30))


def test_damaged_rows_are_left_out_and_the_rest_of_their_segment_stays(store: Path) -> None:
    for number in (3, 29, 31):
        damage_row(store, number)
    lost = [one.lost for one in snapshot.verify(store).findings]
    assert lost == ["2 of 30 entries of default/layer", "1 of 15 entries of default/layer"]
    done = snapshot.repair(store)
    assert (done.lost, done.rewritten) == (3, 2)
    assert contents(store) == expected([n for n in range(60) if n not in (3, 29, 31)])
    assert len(os.listdir(store / "quarantine")) == 12


def test_a_damaged_newest_manifest_loses_nothing_after_a_repair(store: Path) -> None:
    for change in ("flip", "cut"):
        with closing(Store.open(store)) as opened:
            start = 70 if change == "flip" else 90
            put(bank_of(opened), range(start, start + 5))
            name = generation_name(opened.commit().generation)
        if change == "flip":  # in the checksum: what it says can still be read
            flip(store / name, (store / name).stat().st_size - 5)
        else:
            os.truncate(store / name, 300)
        with closing(Store.open(store)) as opened:
            assert generation_name(opened.manifest.generation) != name
        found = snapshot.verify(store)
        assert [one.file for one in found.findings if one.damage] == [name]
        assert "what was stored since generation" in found.findings[0].lost
        done = snapshot.repair(store)
        assert (done.adopted, done.lost) == (1, 0)
        assert snapshot.verify(store).whole
    assert contents(store) == expected([*range(60), *range(70, 75), *range(90, 95)])


def test_with_all_manifests_damaged_rows_come_back_when_one_still_says_whose_they_are(store: Path) -> None:
    names = sorted(name for name in os.listdir(store) if name.startswith("m-"))
    for name in names:
        flip(store / name, (store / name).stat().st_size - 5)
    with pytest.raises(SnapshotDamaged):
        Store.open(store)
    assert {one.file for one in snapshot.verify(store).findings if one.damage} == set(names)
    done = snapshot.repair(store)
    assert done.generation == len(names) + 1
    assert snapshot.verify(store).whole
    assert contents(store) == expected(range(60))


def test_without_any_readable_manifest_a_repair_refuses_and_says_why(store: Path) -> None:
    for name in os.listdir(store):
        if name.startswith("m-"):
            os.truncate(store / name, 100)
    before = everything_in(store)
    with pytest.raises(SnapshotDamaged, match="the model of its entries is unknown"):
        snapshot.repair(store)
    assert everything_in(store) == before


def test_swapped_manifests_do_not_pass_for_each_other(store: Path) -> None:
    names = sorted(name for name in os.listdir(store) if name.startswith("m-"))
    shutil.copy(store / names[1], store / names[-1])
    assert [one.file for one in snapshot.verify(store).findings if one.damage] == [names[-1]]
    snapshot.repair(store)
    assert contents(store) == expected(range(60))


def test_a_manifest_with_the_last_number_does_not_block_the_store(store: Path) -> None:
    (store / generation_name(LAST)).write_bytes(b"x")
    with closing(Store.open(store)) as opened:
        put(bank_of(opened), [70])
        with pytest.raises(LLMCacheError, match="llmcache repair"):
            opened.commit()
    snapshot.repair(store)
    made(store, range(70, 72))
    assert contents(store) == expected([*range(60), 70, 71])


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"magic": "other", "format": 1}'])
def test_a_damaged_format_file_is_written_anew(store: Path, content: bytes | None) -> None:
    (store / "FORMAT").unlink()
    if content is not None:
        (store / "FORMAT").write_bytes(content)
    assert [one.file for one in snapshot.verify(store).findings if one.damage] == ["FORMAT"]
    snapshot.repair(store)
    assert snapshot.verify(store).whole
    assert contents(store) == expected(range(60))


def test_a_store_of_a_later_format_is_left_alone(store: Path) -> None:
    (store / "FORMAT").write_text(json.dumps({"magic": "llmcache", "format": 2}))
    before = everything_in(store)
    for call in (snapshot.verify, snapshot.repair):
        with pytest.raises(FormatTooNew):
            call(store)
    assert everything_in(store) == before


def test_files_that_nothing_names_are_told_and_set_aside_once_they_are_old(store: Path) -> None:
    orphans = ["idx/" + "1" * 32 + ".faiss", "seg/" + "0" * 32 + ".seg", "seg/note.txt"]
    for name in [*orphans, "note.txt", "t-" + "2" * 32 + "-7"]:
        (store / name).write_bytes(b"x" * 10)
    found = snapshot.verify(store)
    assert found.whole
    assert {one.file for one in found.findings} == {*orphans, "note.txt", "t-" + "2" * 32 + "-7"}
    assert snapshot.repair(store).set_aside == ()
    assert snapshot.repair(store, grace=0).set_aside == tuple(orphans)
    assert (store / "note.txt").exists()
    assert contents(store) == expected(range(60))


def test_a_name_that_leads_nowhere_is_told_and_is_no_damage(tmp_path: Path) -> None:
    store = made(tmp_path / "store", range(5))
    with closing(Store.open(store)) as opened:
        bank = bank_of(opened)
        bank.alias(keys_of([50]), keys_of([3]))
        opened.commit()
    first = files_of(store, "row")[0]
    first.unlink()
    snapshot.repair(store)
    found = snapshot.verify(store)
    assert found.whole
    assert [one.what for one in found.findings if one.file.startswith("seg/")] == ["1 of its names lead to no row"]


# -- calls that fail ----------------------------------------------------------------------------------------

CALLS = (
    "create", "write", "sync", "sync_folder", "link", "link_from", "replace", "set_aside", "move_to", "open", "read_at",
    "names", "map", "read",
)  # fmt: skip


class Faults:
    """Makes the n-th call of a Folder fail, or all from then on; counts calls with -1."""

    def __init__(self, patch: pytest.MonkeyPatch, code: int, at: int, forever: bool) -> None:
        self.code, self.at, self.forever, self.count = code, at, forever, 0
        for name in CALLS:
            patch.setattr(Folder, name, self._wrapped(getattr(Folder, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if self.at >= 0 and (number == self.at or (self.forever and number > self.at)):
                raise OSError(self.code, os.strerror(self.code))
            return real(*args)

        return call


def test_a_full_disk_is_said_as_such(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Faults(patch, errno.ENOSPC, 30, True)
        with pytest.raises(StoreFull, match="free some space"):
            snapshot.save(store, tmp_path / "snap", copy=True)
    assert os.listdir(tmp_path) == ["store"]


# -- kills --------------------------------------------------------------------------------------------------


def _work_until_killed(job: str, sources: list[Path], target: Path) -> None:
    for number in range(10_000):
        if job == "save":
            snapshot.save(sources[0], target / f"s{number:05d}", copy=number % 2 == 0)
        else:
            snapshot.merge([sources[number % len(sources)]], target)


@pytest.mark.parametrize("job", ["save", "merge"])
def test_a_kill_at_any_moment_leaves_whole_folders_only(tmp_path: Path, job: str) -> None:
    sources = [
        made(tmp_path / f"w{n}", *(range(n * 10 + k * 3, n * 10 + k * 3 + 4) for k in range(3))) for n in range(9)
    ]
    before = [everything_in(one) for one in sources]
    moments = random.Random(7)
    for trial in range(4):
        target = tmp_path / f"target{trial}"
        target.mkdir()
        child: Any = SPAWN.Process(target=_work_until_killed, args=(job, sources, target))
        child.start()
        deadline = time.monotonic() + 60
        while not os.listdir(target) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        child.kill()
        child.join(60)
        assert child.exitcode == -9
        assert [everything_in(one) for one in sources] == before
        if job == "merge" and (target / "FORMAT").exists():
            assert snapshot.verify(target).whole
            snapshot.merge(sources, target)
            assert set(contents(target)) == set().union(*(contents(one) for one in sources))
            continue
        for name in os.listdir(target):
            if not name.startswith("."):
                assert snapshot.verify(target / name).whole
                assert contents(target / name) == contents(sources[0])
        left = [name for name in os.listdir(target) if name.startswith(".")]
        for name in left:  # the next save of the same name removes what the killed one left
            snapshot.save(sources[0], target / name[1:].rpartition("-")[0])
        assert not [name for name in os.listdir(target) if name.startswith(".")]


# -- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def llmcache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmcache", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        assert isinstance(left.value.code, int)
        return left.value.code, *capsys.readouterr()

    return command


def test_the_commands_do_what_the_functions_do(
    llmcache: Callable[..., tuple[int, str, str]], store: Path, tmp_path: Path
) -> None:
    code, out, _ = llmcache("snapshot", "save", store, tmp_path / "snap", "--json")
    assert (code, json.loads(out)["entries"]) == (0, 60)
    code, out, _ = llmcache("snapshot", "load", tmp_path / "snap", tmp_path / "again")
    assert (code, "60" in out) == (0, True)
    assert contents(tmp_path / "again") == expected(range(60))
    other = made(tmp_path / "other", range(50, 70))
    code, out, _ = llmcache("snapshot", "merge", store, other, "--into", tmp_path / "all", "--dry-run", "--json")
    assert (code, json.loads(out)["banks"][0]["entries"], (tmp_path / "all").exists()) == (0, 70, False)
    assert llmcache("snapshot", "merge", store, other, "--into", tmp_path / "all")[0] == 0
    assert contents(tmp_path / "all") == expected(range(70))
    code, out, _ = llmcache("snapshot", "diff", store, tmp_path / "all", "--json")
    assert (code, len(json.loads(out)["banks"][0]["only_b"])) == (0, 10)
    assert llmcache("snapshot", "diff", store, tmp_path / "all")[0] == 0
    assert llmcache("snapshot", "verify", store)[0] == 0


def test_verify_ends_with_1_when_there_is_damage_and_repair_names_what_it_moves(
    llmcache: Callable[..., tuple[int, str, str]], store: Path
) -> None:
    damage_row(store, 3)
    code, out, _ = llmcache("snapshot", "verify", store)
    assert code == 1
    assert "rows 3 do not agree with their checksums; lost: 1 of 30 entries" in out
    code, out, _ = llmcache("snapshot", "verify", store, "--json")
    assert (code, json.loads(out)["whole"], len(json.loads(out)["findings"])) == (1, False, 1)
    before = everything_in(store)
    assert "to quarantine: seg/" in llmcache("repair", store, "--dry-run")[1]
    assert everything_in(store) == before
    code, out, _ = llmcache("repair", store, "--json")
    assert (code, json.loads(out)["lost"]) == (0, 1)
    assert llmcache("snapshot", "verify", store)[0] == 0


def test_errors_are_one_line(llmcache: Callable[..., tuple[int, str, str]], store: Path, tmp_path: Path) -> None:
    for arguments in (
        ("snapshot", "save", tmp_path / "none", tmp_path / "x"),
        ("snapshot", "save", store, store),
        ("snapshot", "load", tmp_path / "none", tmp_path / "x"),
        ("snapshot", "merge", store, tmp_path / "none", "--into", tmp_path / "x"),
        ("snapshot", "diff", store, tmp_path / "none"),
        ("snapshot", "verify", tmp_path / "none"),
        ("repair", tmp_path / "none"),
    ):
        code, out, err = llmcache(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1), arguments
        assert err.startswith("llmcache: ")
