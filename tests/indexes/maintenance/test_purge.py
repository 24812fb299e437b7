"""Tests of purge: no byte of a purged entry remains, and other entries are unchanged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.generations import generation_name
from llmcache.indexes.errors import ConfigError, StoreFenced, UntrustedSnapshot
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.maintenance.purge import (
    Doomed,
    Purged,
    among,
    purge,
)
from llmcache.indexes.maintenance.sign import sign
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

WIDTH, FEATURES = 24, 16
KEY = b"k" * 32
CHOICE = NearChoice(index="flat", projection="none")
EVERY = list(range(12))


def keys_of(numbers: Sequence[int]) -> Keys:
    first = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def texts_of(numbers: Sequence[int]) -> Keys:
    return keys_of(numbers)[:, ::-1].copy()


def values_of(numbers: Sequence[int], width: int = WIDTH) -> NDArray[np.float32]:
    rows = [np.random.default_rng([number, width]).standard_normal(width) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, width)


def tokens_of(number: int) -> NDArray[np.int32]:
    return np.random.default_rng([number, 3]).integers(1000, 1 << 30, 6).astype(np.int32)


def source_of(number: int) -> str:
    return f"the document with the name {number:04d}"


def traces_of(number: int) -> dict[str, bytes]:
    """Return byte strings that reveal an entry, in all forms in which files may contain it."""
    values, features = values_of([number])[0], values_of([number], FEATURES)[0]
    projected = features.astype(np.float16).astype(np.float64)
    return {
        "float32": values[:4].tobytes(),
        "float16": values[:8].astype(np.float16).tobytes(),
        "tokens": tokens_of(number).tobytes(),
        "source": source_of(number).encode(),
        "features": features[:8].astype(np.float16).tobytes(),
        "fingerprint": (projected / np.linalg.norm(projected))[:4].astype(np.float32).tobytes(),
        "key": keys_of([number]).tobytes(),
        "text key": texts_of([number]).tobytes(),
    }


def found_in(path: Path, number: int) -> dict[str, list[str]]:
    """Return the files that contain a trace, by trace."""
    found: dict[str, list[str]] = {}
    for file in path.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        for name, trace in traces_of(number).items():
            if trace in data:
                found.setdefault(name, []).append(file.name)
    return found


def bank_of(store: Store, namespace: str = "default", dtype: str = "float32") -> Bank:
    if store.namespace(namespace) is None:
        store.declare(namespace, {"model": "m"}, {})
    return store.bank(namespace, "output", lambda: BankFacts(dtype, WIDTH, 1, FEATURES), CHOICE)


def put(store: Store, numbers: Sequence[int], **where: Any) -> None:
    bank = bank_of(store, **where)
    bank.put(
        keys_of(numbers),
        values_of(numbers),
        tokens=[tokens_of(number) for number in numbers],
        sources=[source_of(number) for number in numbers],
        features=values_of(numbers, FEATURES),
        cost=np.arange(len(numbers), dtype=np.float32),
    )
    bank.alias(texts_of(numbers), keys_of(numbers))


@contextmanager
def opened(path: Path, **asked: Any) -> Iterator[Store]:
    store = Store.open(path, **asked)
    try:
        yield store
    finally:
        store.close()


def filled(path: Path, numbers: Sequence[int], key: bytes | None = None, **where: Any) -> str:
    """Store some entries with an index over them. Returns the writer."""
    with opened(path, create=True, trust="own", key=key) as store:
        put(store, numbers, **where)
        store.commit()
        bank_of(store, **where).near.rebuild()
        store.commit()
        store.write_counters({"documents": 1})
        return store.writer


def held(store: Store, numbers: Sequence[int], **where: Any) -> set[int]:
    """Return which of these exist, after checking that text, tokens and neighbours find them."""
    bank = bank_of(store, **where)
    rows = bank.find(keys_of(numbers))
    assert rows.tolist() == bank.find_text(texts_of(numbers)).tolist()
    present = np.asarray(numbers)[rows >= 0].tolist()
    reading = bank.read(rows[rows >= 0])
    assert reading.intact.all()
    expected = values_of(present).astype(bank.facts.dtype).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(reading.values), expected)
    for number, row in zip(present, rows[rows >= 0].tolist(), strict=True):
        np.testing.assert_array_equal(bank.tokens(row), tokens_of(number))
        assert bank.source(row) == source_of(number)
        near, similarity = bank.nearest(values_of([number], FEATURES), 1)
        assert bank.key(int(near[0, 0])) == bank.key(row)
        np.testing.assert_allclose(similarity, 1, atol=1e-6)
    return set(present)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


# -- what goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("by", ["key", "text", "writer", "namespace"])
def test_no_byte_of_what_was_purged_is_left(path: Path, by: str, dtype: str) -> None:
    filled(path, EVERY[:5], dtype=dtype)
    writer = filled(path, EVERY[5:], dtype=dtype)
    filled(path, [50, 51], namespace="other", dtype=dtype)
    forms = {"key", "text key", "tokens", "source", "features", "fingerprint", dtype}
    assert set(found_in(path, 7)) == forms
    doomed, gone = {
        "key": (Doomed(keys=keys_of([7])), {7}),
        "text": (Doomed(keys=texts_of([7])), {7}),
        "writer": (Doomed(writer=writer), set(EVERY[5:])),
        "namespace": (Doomed(namespace="default"), set(EVERY)),
    }[by]
    before = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with opened(path) as store:
        done = purge(store, doomed)
    for number in gone:
        assert found_in(path, number) == {}
    after = {file: file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != "lock"}
    assert done.rows == len(gone)
    assert done.aliases == len(gone)
    (manifest,) = path.glob("m-*.json")
    assert before - sum(after.values()) == done.bytes - done.written - manifest.stat().st_size
    assert (path / "stat" / f"{writer}.json").exists() == (by != "writer")
    with opened(path) as store:
        assert held(store, [50, 51], namespace="other") == {50, 51}
        assert ("default" in store.manifest.namespaces) == (by != "namespace")
        if by != "namespace":
            assert held(store, EVERY) == set(EVERY) - gone


def test_what_a_commit_that_never_ended_left_behind_goes_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, EVERY)
    with monkeypatch.context() as broken, opened(path) as store:
        put(store, [20])
        broken.setattr(Folder, "link", lambda *_: (_ for _ in ()).throw(OSError(5, "killed here")))
        with pytest.raises(StoreFenced):
            store.commit()
    (path / "quarantine").mkdir(mode=0o700)
    shutil.copy(next(path.glob("seg/*.seg")), path / "quarantine" / f"{'a' * 32}.seg")
    (path / "seg" / f"{'b' * 32}-{'c' * 32}.alive").write_bytes(traces_of(20)["source"])
    assert set(found_in(path, 20)) >= {"float32", "tokens", "source"}
    with opened(path) as store:
        assert purge(store, Doomed(keys=keys_of([20]))).rows == 0
    assert found_in(path, 20) == {}
    assert list((path / "quarantine").iterdir()) == []
    with opened(path) as store:
        assert held(store, [*EVERY, 20]) == set(EVERY)


def test_a_newer_copy_of_an_entry_goes_with_the_older(path: Path) -> None:
    for _ in range(3):
        with opened(path, create=True) as store:
            put(store, [1, 2])
            store.commit()
    with opened(path) as store:
        assert purge(store, Doomed(keys=keys_of([1]))).rows == 3
    assert found_in(path, 1) == {}
    with opened(path) as store:
        assert held(store, [1, 2]) == {2}


def test_a_text_in_another_segment_leads_to_its_row_and_goes_with_it(path: Path) -> None:
    filled(path, [1, 2])
    with opened(path) as store:
        bank_of(store).alias(texts_of([70]), keys_of([1]))  # another spelling, stored later
        store.commit()
    with opened(path) as store:
        done = purge(store, Doomed(keys=texts_of([70])))
        assert (done.rows, done.aliases) == (1, 2)
    assert found_in(path, 1) == {}
    assert found_in(path, 70) == {}
    with opened(path) as store:
        assert held(store, [1, 2]) == {2}


def test_a_segment_that_cannot_be_read_goes_since_it_could_hold_the_entry(path: Path) -> None:
    filled(path, EVERY[:5])
    filled(path, EVERY[5:])
    with opened(path) as store:
        damaged = store.manifest.namespaces["default"].banks["output"].segments[0]
    records = path / damaged.file("row").name
    records.write_bytes(b"?" + records.read_bytes()[1:])
    with opened(path) as store:
        done = purge(store, Doomed(keys=keys_of([7])))
    assert (done.rows, done.damaged) == (1, 5)
    assert not records.exists()
    with opened(path) as store:
        assert held(store, EVERY) == set(EVERY[5:]) - {7}


def test_rows_that_fail_their_checksum_are_not_copied(path: Path) -> None:
    filled(path, EVERY)
    (segment,) = path.glob("seg/*.seg")
    with segment.open("r+b") as file:
        file.write(b"\x55")  # in row 0
    with opened(path) as store:
        done = purge(store, Doomed(keys=keys_of([7])))
    assert (done.rows, done.damaged) == (1, 1)
    with opened(path) as store:
        assert held(store, EVERY) == set(EVERY) - {0, 7}


def test_only_the_namespace_asked_for_is_searched(path: Path) -> None:
    filled(path, [1, 2], namespace="a")
    filled(path, [1, 2], namespace="b")
    with opened(path) as store:
        assert purge(store, Doomed(namespace="a", keys=keys_of([1]))).rows == 1
    with opened(path) as store:
        assert held(store, [1, 2], namespace="a") == {2}
        assert held(store, [1, 2], namespace="b") == {1, 2}


def test_rows_keep_their_age_cost_and_writer(path: Path) -> None:
    writer = filled(path, EVERY)

    def records() -> tuple[Any, str]:
        with opened(path) as store:
            bank = bank_of(store)
            (piece,) = bank.pieces
            (facts,) = bank.facts.segments
            return piece.rows.copy(), facts.writer  # type: ignore[union-attr]  # it is sealed

    before, _ = records()
    with opened(path) as store:
        purge(store, Doomed(keys=keys_of([3])))
    after, said = records()
    kept = np.array(EVERY) != 3
    for name in ("key", "checksum", "nbytes", "tokens", "created", "scale", "cost", "source", "flags"):
        np.testing.assert_array_equal(after[name], before[name][kept])
    assert said == writer


def test_rows_of_different_lengths_are_copied_as_they_were(path: Path) -> None:
    def states(number: int) -> NDArray[np.float32]:
        return np.random.default_rng(number).standard_normal((1 + number % 4, WIDTH)).astype(np.float32)

    with opened(path, create=True) as store:
        store.declare("default", {}, {})
        bank = store.bank("default", "layer", lambda: BankFacts("float32", WIDTH, 2, FEATURES), CHOICE)
        bank.put(
            keys_of(EVERY),
            [states(number) for number in EVERY],
            tokens=[tokens_of(number) for number in EVERY],
            sources=[source_of(number) for number in EVERY],
            features=values_of(EVERY, FEATURES),
            cost=np.ones(len(EVERY), np.float32),
        )
        store.commit()
    with opened(path) as store:
        assert purge(store, Doomed(keys=keys_of([0, 5, 11]))).rows == 3
    with opened(path) as store:
        bank = store.bank("default", "layer", lambda: BankFacts("float32", WIDTH, 2, FEATURES), CHOICE)
        rows = bank.find(keys_of(EVERY))
        assert (rows >= 0).tolist() == [number not in {0, 5, 11} for number in EVERY]
        for number in set(EVERY) - {0, 5, 11}:
            (value,) = bank.read(rows[number : number + 1]).values
            np.testing.assert_array_equal(value, states(number))
            np.testing.assert_array_equal(bank.tokens(int(rows[number])), tokens_of(number))


# -- around it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "doomed",
    [Doomed(keys=keys_of([7])), Doomed(namespace="default"), Doomed(writer="w")],
    ids=["key", "space", "writer"],
)
def test_a_dry_run_says_what_would_go_and_changes_nothing(path: Path, doomed: Doomed) -> None:
    writer = filled(path, EVERY)
    doomed = Doomed(writer=writer) if doomed.writer else doomed
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    superseded = max(path.glob("m-*.json")).stat().st_size
    with opened(path) as store:
        said = purge(store, doomed, dry_run=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    with opened(path) as store:
        done = purge(store, doomed)
    assert (said.rows, said.aliases, said.segments) == (done.rows, done.aliases, done.segments)
    assert (said.bytes + superseded, said.files + 1) == (done.bytes, done.files)  # the newest manifest goes as well


def test_a_key_that_is_not_there_takes_nothing_but_old_generations(path: Path) -> None:
    filled(path, EVERY)
    with opened(path) as store:
        done = purge(store, Doomed(keys=keys_of([99])))
    assert (done.rows, done.segments, done.written) == (0, 0, 0)
    with opened(path) as store:
        assert held(store, EVERY) == set(EVERY)


@pytest.mark.parametrize("doomed", [{}, {"writer": ""}])
def test_a_purge_of_nothing_in_particular_is_refused(doomed: Any) -> None:
    with pytest.raises(ConfigError, match="say what to purge"):
        Doomed(**doomed)


def test_a_namespace_that_is_not_there_is_refused(path: Path) -> None:
    filled(path, [1])
    with opened(path) as store, pytest.raises(ConfigError, match="no namespace 'x'; it has default"):
        purge(store, Doomed(namespace="x"))


def test_files_that_are_not_the_stores_own_are_left(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(path, [1])
    (path / "seg" / "notes.txt").write_text("mine")
    with opened(path) as store:
        purge(store, Doomed(keys=keys_of([1])))
    assert (path / "seg" / "notes.txt").read_text() == "mine"
    assert "seg/notes.txt" in caplog.text


def test_a_store_of_others_is_not_purged(path: Path) -> None:
    filled(path, [1])
    with (
        opened(path, trust="untrusted", allow_untrusted=True) as store,
        pytest.raises(StoreFenced, match="not trusted"),
    ):
        purge(store, Doomed(keys=keys_of([1])))


def test_a_writer_that_commits_meanwhile_does_not_bring_an_entry_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, EVERY)
    change = Store.publish
    between = [lambda: filled(path, [7, 30])]

    def changing(store: Store, delta: Any, **asked: Any) -> Any:
        if between and store.manifest.generation > 3:
            between.pop()()
        return change(store, delta, **asked)

    monkeypatch.setattr(Store, "publish", changing)
    with opened(path) as store:
        assert purge(store, Doomed(keys=keys_of([7]))).rows == 2
    assert not between
    assert found_in(path, 7) == {}
    with opened(path) as store:
        assert held(store, [*EVERY, 30]) == {*EVERY, 30} - {7}


def test_an_index_that_was_in_memory_during_a_purge_is_not_written_afterwards(path: Path) -> None:
    filled(path, EVERY)
    with opened(path) as live:
        live_bank = bank_of(live)
        live_bank.near.rebuild()
        with opened(path) as store:
            purge(store, Doomed(keys=keys_of([7])))
        put(live, [30])
        live.commit()
        live_bank.near.rebuild()
        live.commit()
    assert set(found_in(path, 7)) == set()
    with opened(path) as store:
        assert held(store, [*EVERY, 30]) == {*EVERY, 30} - {7}


def test_keys_are_compared_whole() -> None:
    keys = np.array([[1, 2], [1, 3], [2, 2], [0, 0]], np.uint64)
    assert among(keys, np.array([[1, 3], [2, 1]], np.uint64)).tolist() == [False, True, False, False]
    assert among(keys, keys).all()
    assert not among(keys, keys[:0]).any()
    assert among(keys[:0], keys).tolist() == []


# -- signed -------------------------------------------------------------------------------------------------


def test_a_signed_store_stays_signed_through_a_purge(path: Path) -> None:
    filled(path, EVERY, key=KEY)
    with opened(path) as store, pytest.raises(StoreFenced, match="signed"):
        purge(store, Doomed(keys=keys_of([7])))
    with opened(path, key=KEY) as store:
        purge(store, Doomed(keys=keys_of([7])))
    assert found_in(path, 7) == {}
    with opened(path, trust="signed", key=KEY) as store:
        assert held(store, EVERY) == set(EVERY) - {7}
    assert len(list(path.glob("m-*.sig"))) == len(list(path.glob("m-*.json"))) == 1


def test_a_store_that_was_written_without_a_key_can_be_signed_whole(path: Path) -> None:
    filled(path, EVERY[:5])
    filled(path, EVERY[5:8], key=KEY)
    with opened(path, trust="own", key=KEY) as store:
        assert sign(store, dry_run=True).segments == 1
    with opened(path, trust="signed", key=KEY) as store:
        assert len(bank_of(store)) == 3
    with opened(path, trust="own", key=KEY) as store:
        assert (sign(store).segments, sign(store).segments) == (1, 0)
    path.chmod(0o777)
    with opened(path, trust="signed", key=KEY) as store:
        assert held(store, EVERY) == set(EVERY[:8])
    with pytest.raises(UntrustedSnapshot):
        Store.open(path, trust="own", key=KEY)


def test_the_figures_of_a_purge_are_numbers_for_scripts(path: Path) -> None:
    assert Purged(rows=1).as_dict() == {
        "rows": 1, "aliases": 0, "damaged": 0, "segments": 0, "files": 0, "bytes": 0, "written": 0,
        "calibrations": 0, "unfinished": 0,
    }  # fmt: skip
    assert os.path.basename(generation_name(3)) == "m-000000000003.json"
