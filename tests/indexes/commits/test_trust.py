"""Tests of trust: how the level of a store is determined, and what is read from an untrusted store."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.indexes import store as stores
from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.generations import generation_name, generations, newest
from llmcache.indexes.commits.signatures import (
    is_signed,
    secret_from_file,
    secret_from_variable,
    signature_name,
)
from llmcache.indexes.errors import ConfigError, StoreFenced, UntrustedSnapshot
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.manifest_json import from_bytes, to_bytes
from llmcache.indexes.format.rows import (
    HEADER,
    ROW,
    Keys,
    checksum,
)
from llmcache.indexes.search import vector_index as vectors
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.search.faiss_bytes import deserialised
from llmcache.indexes.store import Store

WIDTH, FEATURES = 8, 16
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
CHOICE = NearChoice(index="flat", projection="none")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")


def keys_of(numbers: Sequence[int]) -> Keys:
    first = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def texts_of(numbers: Sequence[int]) -> Keys:
    return keys_of(numbers)[:, ::-1].copy()


def values_of(numbers: Sequence[int], width: int = WIDTH) -> NDArray[np.float32]:
    rows = [np.random.default_rng([number, width]).standard_normal(width) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, width)


def bank_of(store: Store) -> Bank:
    if store.namespace("default") is None:
        store.declare("default", {"model": "m"}, {})
    return store.bank("default", "output", lambda: BankFacts("float32", WIDTH, 1, FEATURES), CHOICE)


def put(store: Store, numbers: Sequence[int]) -> None:
    bank = bank_of(store)
    bank.put(
        keys_of(numbers),
        values_of(numbers),
        tokens=[np.array([number, 1], np.int32) for number in numbers],
        sources=[str(number) for number in numbers],
        features=values_of(numbers, FEATURES),
        cost=np.ones(len(numbers), np.float32),
    )
    bank.alias(texts_of(numbers), keys_of(numbers))


def held(store: Store, numbers: Sequence[int]) -> set[int]:
    bank = bank_of(store)
    rows = bank.find(keys_of(numbers))
    reading = bank.read(rows[rows >= 0])
    present = np.asarray(numbers)[rows >= 0][reading.intact]
    np.testing.assert_array_equal(np.asarray(reading.values)[reading.intact], values_of(present.tolist()))
    return set(present.tolist())


@contextmanager
def opened(path: Path, **asked: Any) -> Iterator[Store]:
    store = Store.open(path, **asked)
    try:
        yield store
    finally:
        store.close()


def filled(path: Path, numbers: Sequence[int] = (1, 2, 3), **asked: Any) -> Path:
    with opened(path, create=True, **asked) as store:
        put(store, numbers)
        bank_of(store).near.rebuild()
        store.commit()
        store.write_counters({"documents": 1})
    return path


def signed_line(path: Path, generation: int) -> bytes:
    return path.joinpath(signature_name(generation)).read_bytes()


def newest_of(path: Path) -> int:
    folder = Folder(path)
    found = generations(folder)[0]
    folder.close()
    return found


# -- rights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("key", [None, KEY])
def test_every_file_a_store_ever_makes_is_the_owners_alone(
    tmp_path: Path, umask: int, key: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    close = Folder.close_file

    def closing(folder: Folder, descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        close(folder, descriptor)

    monkeypatch.setattr(Folder, "close_file", closing)
    before = os.umask(umask)
    try:
        path = filled(tmp_path / "store", key=key)
        filled(path, [4, 5], key=key)
    finally:
        os.umask(before)
    assert len(modes) > 15  # temporary ones too
    assert set(modes) == {0o600}
    kept = [path, *path.rglob("*")]
    assert {stat.S_IMODE(one.stat().st_mode) for one in kept if one.is_file()} == {0o600}
    assert {stat.S_IMODE(one.stat().st_mode) for one in kept if one.is_dir()} == {0o700}
    endings = {".seg", ".row", ".key", ".var", ".fp", ".proj", ".faiss", ".json"} | ({".sig"} if key else set())
    assert {one.suffix for one in kept if one.is_file()} - {""} == endings


def test_an_empty_folder_that_becomes_a_store_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir()
    path.chmod(0o777)
    filled(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", "seg", "idx", "stat", "FORMAT", "m-*.json", "seg/*.seg", "idx/*.faiss", "stat/*"])
@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_a_store_that_others_may_write_is_refused_with_the_command_that_helps(
    tmp_path: Path, name: str, bit: int
) -> None:
    path = filled(tmp_path / "store")
    exposed = next(iter(path.glob(name))) if name else path
    exposed.chmod(exposed.stat().st_mode | bit)
    with pytest.raises(UntrustedSnapshot, match=r"written by other users.*chmod -R go-w"):
        Store.open(path)
    with pytest.raises(UntrustedSnapshot, match="written by other users"):
        Store.open(path, trust="own")
    exposed.chmod(exposed.stat().st_mode & ~bit)
    with opened(path) as store:
        assert (store.trust, held(store, [1, 2, 3, 4])) == ("own", {1, 2, 3})


def test_a_store_that_others_may_read_is_still_ones_own(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    for one in [path, *path.rglob("*")]:
        one.chmod(0o755 if one.is_dir() else 0o644)
    with opened(path, trust="own") as store:
        assert held(store, [1]) == {1}


@as_root
@pytest.mark.parametrize("name", ["", "seg", "FORMAT", "m-*.json", "seg/*.row"])
def test_a_store_with_another_users_files_is_refused(tmp_path: Path, name: str) -> None:
    path = filled(tmp_path / "store")
    foreign = next(iter(path.glob(name))) if name else path
    os.chown(foreign, 12345, 12345)
    with pytest.raises(UntrustedSnapshot, match="belongs to user id 12345"):
        Store.open(path)


def test_hard_links_of_ones_own_files_are_fine(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    shutil.copytree(path, tmp_path / "snapshot", copy_function=os.link)
    for where in (path, tmp_path / "snapshot"):
        with opened(where, trust="own") as store:
            assert held(store, [1, 2]) == {1, 2}


# -- untrusted ----------------------------------------------------------------------------------------------


def test_nothing_of_an_untrusted_store_reaches_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "store", range(20))
    read: list[str] = []

    def recorded(data: Any, kind: str) -> Any:
        read.append(kind)
        return deserialised(data, kind)

    monkeypatch.setattr(vectors, "deserialised", recorded)
    with opened(path) as store:
        own, _ = bank_of(store).nearest(values_of([7], FEATURES), 1)
    assert read == ["flat"]
    with opened(path, trust="untrusted", allow_untrusted=True) as store:
        rebuilt, similarity = bank_of(store).nearest(values_of([7], FEATURES), 1)
    assert read == ["flat"]
    assert own.tolist() == rebuilt.tolist() == [[7]]
    np.testing.assert_allclose(similarity, 1, atol=1e-6)


def test_an_untrusted_stores_texts_lead_nowhere_until_their_tokens_were_compared(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    with opened(path) as store:
        assert (bank_of(store).find_text(texts_of([1, 2])) >= 0).all()
    with opened(path, trust="untrusted", allow_untrusted=True) as store:
        bank = bank_of(store)
        assert bank.find_text(texts_of([1, 2])).tolist() == [-1, -1]
        assert (bank.find(keys_of([1, 2])) >= 0).all()
        assert bank.tokens(int(bank.find(keys_of([2]))[0])).tolist() == [2, 1]
        bank.alias(texts_of([1]), keys_of([1]))
        assert (bank.find_text(texts_of([1, 2])) >= 0).tolist() == [True, False]


def test_nothing_is_written_to_an_untrusted_store(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    before = {one: one.stat().st_mtime_ns for one in path.rglob("*")}
    with opened(path, trust="untrusted", allow_untrusted=True) as store:
        assert not store.writable
        put(store, [9])
        assert held(store, [1, 9]) == {1, 9}
        for write in (store.commit, lambda: store.declare("x", {}, {}), lambda: store.publish(lambda base: base)):
            with pytest.raises(StoreFenced, match="not trusted"):
                write()
    assert {one: one.stat().st_mtime_ns for one in path.rglob("*")} == before


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_no_model_gives_are_misses_in_an_untrusted_store(tmp_path: Path, number: float) -> None:
    path = tmp_path / "store"
    with opened(path, create=True) as store:
        put(store, [1, 2])
        pending = bank_of(store).pieces.pending[0]
        pending.payload[0].view(np.float32)[3] = number
        store.commit()
    with opened(path, trust="untrusted", allow_untrusted=True) as store:
        reading = bank_of(store).read(bank_of(store).find(keys_of([1, 2])))
        assert reading.intact.tolist() == [False, True]
        np.testing.assert_array_equal(np.asarray(reading.values)[0], np.zeros(WIDTH))
        assert bank_of(store).find(keys_of([1])).tolist() == [-1]


def test_what_was_checked_in_an_untrusted_store_cannot_change_afterwards(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    with opened(path, trust="untrusted", allow_untrusted=True) as store:
        bank = bank_of(store)
        assert bank.tokens(0).tolist() == [1, 1]
        for one in path.rglob("seg/*"):
            if one.suffix in {".row", ".var", ".key"}:
                with one.open("r+b") as file:
                    file.write(b"\xff" * one.stat().st_size)
        assert bank.tokens(0).tolist() == [1, 1]
        assert held(store, [1, 2, 3]) == {1, 2, 3}


def test_an_untrusted_store_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    with pytest.raises(UntrustedSnapshot, match=r"opened as untrusted.*allow_untrusted=True \(--allow-untrusted\)"):
        Store.open(path, trust="untrusted")
    path.chmod(0o777)
    with opened(path, allow_untrusted=True) as store:
        assert (store.trust, held(store, [1, 2])) == ("untrusted", {1, 2})


@pytest.mark.parametrize(
    "asked",
    [{"trust": "mine"}, {"trust": "signed"}, {"key": b"short"}, {"key": "text" * 8}, {"trust": "own", "key": b""}],
)
def test_a_level_of_trust_that_cannot_be_had_is_refused(tmp_path: Path, asked: Any) -> None:
    with pytest.raises(ConfigError):
        Store.open(filled(tmp_path / "store"), **asked)


# -- signatures ---------------------------------------------------------------------------------------------


def test_a_signature_is_the_hmac_of_the_manifests_bytes(tmp_path: Path) -> None:
    path = filled(tmp_path / "store", key=KEY)
    for generation in range(1, newest_of(path) + 1):
        manifest = path.joinpath(generation_name(generation)).read_bytes()
        wanted = hmac.digest(KEY, manifest, hashlib.sha256).hex().encode()
        assert signed_line(path, generation) == b"hmac-sha256:" + wanted + b"\n"
    assert sorted(one.name for one in path.glob("m-*.sig")) == sorted(
        map(signature_name, range(1, newest_of(path) + 1))
    )


def test_a_signed_store_is_trusted_wherever_it_lies(tmp_path: Path) -> None:
    path = filled(tmp_path / "store", range(30), key=KEY)
    path.chmod(0o777)
    for asked in ({"key": KEY}, {"key": KEY, "trust": "signed"}):
        with opened(path, **asked) as store:
            assert (store.trust, held(store, range(40))) == ("signed", set(range(30)))
            assert bank_of(store).nearest(values_of([7], FEATURES), 1)[0].tolist() == [[7]]
    with pytest.raises(UntrustedSnapshot):
        Store.open(path)


@pytest.mark.parametrize("key", [OTHER_KEY, KEY + b"k"])
def test_another_key_is_refused(tmp_path: Path, key: bytes) -> None:
    path = filled(tmp_path / "store", key=KEY)
    for trust in ("auto", "signed"):
        with pytest.raises(UntrustedSnapshot, match="none of its 3 manifests is signed with the key given"):
            Store.open(path, key=key, trust=trust)
    with opened(path, key=key, allow_untrusted=True) as store:
        assert (store.trust, held(store, [1])) == ("untrusted", {1})


def test_an_unsigned_store_is_signed_only_if_its_owner_says_that_it_is_his(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    with pytest.raises(UntrustedSnapshot):
        Store.open(path, key=KEY)
    filled(path, [7, 8], trust="own", key=KEY)
    with opened(path, trust="signed", key=KEY) as store:
        assert held(store, [7, 8]) == {7, 8}


def test_rows_that_were_written_without_a_key_are_misses_in_a_signed_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "store")
    filled(path, [7, 8], trust="own", key=KEY)
    with caplog.at_level(logging.WARNING, "llmcache"), opened(path, key=KEY) as store:
        assert held(store, [1, 2, 3, 7, 8]) == {7, 8}  # their xxh3 could be forged by whoever writes the .seg file
    assert "written without a key" in caplog.text
    with opened(path, trust="own", key=KEY) as store:
        assert held(store, [1, 2, 3, 7, 8]) == {1, 2, 3, 7, 8}


def test_activations_that_were_replaced_with_matching_xxh3_checksums_are_misses(tmp_path: Path) -> None:
    path = filled(tmp_path / "store", key=KEY)
    (segment,) = path.glob("seg/*.seg")
    (records,) = path.glob("seg/*.row")
    rows = np.frombuffer(records.read_bytes()[HEADER.itemsize :], ROW)
    payload = np.frombuffer(segment.read_bytes()[: 4 * WIDTH], np.uint8)
    assert rows["checksum"][0].tobytes() == checksum(rows["key"][0], payload, strong=True)
    assert rows["checksum"][0].tobytes() != checksum(rows["key"][0], payload)
    head = rows["key"][0].tobytes() + (4 * WIDTH).to_bytes(8, "little") + np.float32(1).tobytes()
    wanted = hashlib.sha256(head + payload.tobytes())
    assert rows["checksum"][0].tobytes() == wanted.digest()[:16]
    with segment.open("r+b") as file:
        file.write(b"\x01")
    with opened(path, key=KEY) as store:
        assert held(store, [1, 2, 3]) == {2, 3}


def test_a_changed_manifest_is_not_signed_any_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(tmp_path / "store", key=KEY)
    name = path / generation_name(newest_of(path))
    manifest = from_bytes(name.read_bytes(), name.name)
    name.write_bytes(to_bytes(manifest).replace(b'"segments":[', b'"segments": ['))  # then its own checksum is wrong
    with caplog.at_level(logging.WARNING, "llmcache"), opened(path, key=KEY) as store:
        assert store.manifest.generation == newest_of(path) - 1
    assert "damaged or not signed" in caplog.text


def test_an_unsigned_generation_on_top_is_passed_over_and_never_signed_by_others(tmp_path: Path) -> None:
    path = filled(tmp_path / "store", key=KEY)
    last = newest_of(path)
    folder = Folder(path)
    planted, _ = newest(folder, generations(folder))
    folder.close()
    forged = to_bytes(type(planted)(last + 1, last, 0.0, "stranger", (), {}))
    path.joinpath(generation_name(last + 1)).write_bytes(forged)
    with opened(path, key=KEY) as store:
        assert store.manifest.generation == last
        put(store, [9])
        store.commit()
    with opened(path, key=KEY) as store:
        assert held(store, [1, 2, 3, 9]) == {1, 2, 3, 9}
        assert last + 1 in store.manifest.skipped


def test_an_old_signed_manifest_under_a_new_number_is_not_believed(tmp_path: Path) -> None:
    path = filled(tmp_path / "store", key=KEY)
    last = newest_of(path)
    for name in (generation_name, signature_name):
        shutil.copy(path / name(1), path / name(last + 1))
    with opened(path, key=KEY) as store:
        assert store.manifest.generation == last
        assert held(store, [1, 2, 3]) == {1, 2, 3}


def test_a_reader_can_refuse_what_is_older_than_what_he_saw(tmp_path: Path) -> None:
    path = filled(tmp_path / "store", key=KEY)
    last = newest_of(path)
    with opened(path, key=KEY, min_generation=last) as store:
        assert store.manifest.generation == last
    path.joinpath(generation_name(last)).unlink()
    for asked in ({"key": KEY}, {}, {"trust": "untrusted", "allow_untrusted": True}):
        with pytest.raises(UntrustedSnapshot, match=f"at generation {last - 1}, at least {last} was asked for"):
            Store.open(path, min_generation=last, **asked)


def test_who_has_no_key_reads_a_signed_store_of_his_own_and_stores_nothing(tmp_path: Path) -> None:
    path = filled(tmp_path / "store", key=KEY)
    last = newest_of(path)
    with opened(path) as store:
        assert (store.trust, store.writable, held(store, [1])) == ("own", False, {1})
        with pytest.raises(StoreFenced, match="signed"):
            store.declare("other", {}, {})
    assert newest_of(path) == last


def test_a_store_that_was_signed_meanwhile_is_not_unsigned_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "store")
    with opened(path) as late:
        filled(path, [4], trust="own", key=KEY)
        put(late, [5])
        with pytest.raises(StoreFenced, match="signed"):
            late.commit()
        assert not late.writable


def test_at_every_call_of_a_commit_the_newest_manifest_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "store", key=KEY)
    seen: list[int] = []

    def look() -> None:
        folder = Folder(path)
        listed = generations(folder)
        data = folder.read(generation_name(listed[0]), 1 << 24)
        assert is_signed(folder, listed[0], data, KEY)
        seen.append(listed[0])
        folder.close()

    for name in ("create", "write", "sync", "close_file", "sync_folder", "link", "replace", "remove"):
        original = getattr(Folder, name)

        def wrapped(folder: Folder, *arguments: Any, original: Any = original) -> Any:
            look()
            try:
                return original(folder, *arguments)
            finally:
                look()

        monkeypatch.setattr(Folder, name, wrapped)
    before = newest_of(path)
    with opened(path, key=KEY) as store:
        put(store, [9])
        store.commit()
    assert {before, before + 1} <= set(seen)
    assert len(seen) > 50


@pytest.mark.parametrize("name", ["create", "write", "sync", "close_file", "sync_folder", "link", "replace", "remove"])
def test_a_signed_commit_that_fails_at_any_call_leaves_a_store_that_opens_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = filled(tmp_path / "template", key=KEY)
    for at in range(100):
        where = tmp_path / str(at)
        shutil.copytree(path, where)
        calls, failed = 0, False
        original = getattr(Folder, name)

        def failing(folder: Folder, *arguments: Any, original: Any = original, at: int = at) -> Any:
            nonlocal calls, failed
            calls += 1
            if calls == at + 1:
                failed = True
                raise OSError(5, "broken")
            return original(folder, *arguments)

        with monkeypatch.context() as broken, opened(where, key=KEY) as store:
            broken.setattr(Folder, name, failing)
            put(store, [9])
            try:
                store.commit()
            except (StoreFenced, OSError):
                assert failed
        with opened(where, key=KEY) as store:
            assert store.trust == "signed"
            assert {1, 2, 3} <= held(store, [1, 2, 3, 9])
            put(store, [10])
            store.commit()
        with opened(where, key=KEY) as store:
            assert {1, 2, 3, 10} <= held(store, [1, 2, 3, 9, 10])
        shutil.rmtree(where)
        if not failed:
            assert at > 0
            break
    else:
        pytest.fail("the fault moved through 100 calls")


def test_signing_writers_that_race_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "store", key=KEY)
    link = Folder.link
    raced: list[str] = []

    def slow(folder: Folder, name: str, new: str) -> None:
        if new.startswith("m-") and not raced:
            raced.append(new)
            filled(path, [50], key=KEY)  # somebody else takes the number between our signature and our manifest
        link(folder, name, new)

    monkeypatch.setattr(Folder, "link", slow)
    filled(path, [40], key=KEY)
    assert raced
    with opened(path, key=KEY) as store:
        assert held(store, [1, 2, 3, 40, 50]) == {1, 2, 3, 40, 50}
    assert all(len(one.name) == len(signature_name(1)) for one in path.glob("m-*.sig"))  # the loser cleaned up


# -- keys ---------------------------------------------------------------------------------------------------


def test_a_key_in_a_file_and_in_a_variable_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "0123456789abcdef" * 4
    (tmp_path / "key").write_text(text + "\n")
    monkeypatch.setenv("TEAM_KEY", text)
    assert secret_from_file(tmp_path / "key", "the key") == secret_from_variable("TEAM_KEY", "the key") == text.encode()


def test_a_key_of_random_bytes_keeps_each_of_them(tmp_path: Path) -> None:
    data = bytes(range(224, 256))[:-1] + b"\n"
    (tmp_path / "key").write_bytes(data)
    assert secret_from_file(tmp_path / "key", "the key") == data


def test_a_key_that_is_short_or_missing_or_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 31 + b"\n")
    (tmp_path / "long").write_bytes(b"x" * 5000)
    for name, said in (("short", "at least 32 bytes, got 31"), ("long", "right file"), ("none", "No such file")):
        with pytest.raises(ConfigError, match=said):
            secret_from_file(tmp_path / name, "the key")
    with pytest.raises(ConfigError, match="not set"):
        secret_from_variable("LLMCACHE_TEST_NO_SUCH_VARIABLE", "the key")


def test_the_rights_of_a_store_are_looked_at_before_its_index_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "store")
    path.chmod(0o777)
    monkeypatch.setattr(stores, "Bank", None)
    with pytest.raises(UntrustedSnapshot):
        Store.open(path)
