"""Tests of push and pull with files, memory and an HTTP server: interrupted, truncated and altered transfers."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from llmcache import snapshot
from llmcache.errors import ConfigError, LLMCacheError, SnapshotDamaged, SnapshotNotFound, UntrustedSnapshot
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.maintenance import remote
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from tests.conftest import Command

KEY = b"k" * 32


def put(path: Path, first: int, rows: int, key: bytes | None = None) -> None:
    """Add a segment of rows whose keys and values contain their numbers."""
    with closing(Store.open(path, create=True, key=key)) as store:
        if store.namespace("default") is None:
            store.declare("default", {"model": "m"}, {})
        bank = store.bank("default", "output", lambda: BankFacts("float32", 64, 1, 4), NearChoice())
        numbers = np.arange(first, first + rows)
        keys = np.stack([numbers, numbers], 1).astype(np.uint64)
        bank.put(
            keys,
            np.repeat(numbers[:, None], 64, 1).astype(np.float32),
            tokens=[np.full(3, n, np.int32) for n in numbers],
            sources=[f"d{n}" for n in numbers],
            features=np.ones((rows, 4), np.float32),
            cost=np.ones(rows, np.float32),
        )
        bank.alias(keys + np.uint64(1000), keys)
        store.commit()


def values(path: Path, rows: int, key: bytes | None = None) -> list[float]:
    """Return the first number of each row, read by key."""
    with closing(Store.open(path, key=key)) as store:
        space = store.manifest.namespaces["default"]
        bank = store.bank("default", "output", lambda: space.banks["output"], NearChoice())
        numbers = np.arange(rows, dtype=np.uint64)
        found = bank.find(np.stack([numbers, numbers], 1))
        assert (found >= 0).all()
        reading = bank.read(found)
        assert reading.intact.all()
        return [float(one) for one in np.asarray(reading.values)[:, 0]]


@pytest.fixture
def filled(store: Path) -> Path:
    put(store, 0, 20)
    put(store, 20, 20)
    return store


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://bucket/store"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A folder, and a URL where the standard library's HTTP server serves it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            return

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def contents(path: Path) -> dict[str, bytes]:
    kept = ("m-", "seg", "idx", "FORMAT")
    return {
        str(one.relative_to(path)): one.read_bytes()
        for one in path.rglob("*")
        if one.is_file() and str(one.relative_to(path)).startswith(kept)
    }


# -- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "memory", "path"])
def test_a_store_goes_to_a_url_and_comes_back_whole(filled: Path, tmp_path: Path, memory: str, kind: str) -> None:
    url = {"file": f"file://{tmp_path}/far/away", "memory": memory, "path": str(tmp_path / "far" / "away")}[kind]
    pushed = snapshot.push(filled, url)
    assert (pushed.generation, pushed.entries, pushed.files, pushed.sent) == (3, 40, 10, 10)
    pulled = snapshot.pull(url, tmp_path / "back")
    assert (pulled.generation, pulled.entries, pulled.sent, pulled.sent_bytes) == (3, 40, 10, pushed.bytes)
    assert values(tmp_path / "back", 40) == list(range(40))
    assert snapshot.verify(tmp_path / "back").whole
    newest = contents(filled)
    assert contents(tmp_path / "back") == {name: newest[name] for name in contents(tmp_path / "back")}
    assert (tmp_path / "back" / "seg").stat().st_mode & 0o077 == 0


def test_a_night_later_only_what_is_new_goes_over(filled: Path, tmp_path: Path, memory: str) -> None:
    snapshot.push(filled, memory)
    snapshot.pull(memory, tmp_path / "back")
    put(filled, 40, 5)
    assert snapshot.push(filled, memory, dry_run=True).sent == 5
    assert snapshot.pull(memory, tmp_path / "back").generation == 3
    assert snapshot.push(filled, memory).sent == 5
    assert snapshot.push(filled, memory).sent == 0
    dry = snapshot.pull(memory, tmp_path / "back", dry_run=True)
    assert (dry.sent, dry.generation, dry.dry_run) == (5, 4, True)
    assert len(values(tmp_path / "back", 40)) == 40
    assert snapshot.pull(memory, tmp_path / "back").sent == 5
    assert values(tmp_path / "back", 45) == list(range(45))


def test_a_store_is_pulled_from_a_web_server(filled: Path, tmp_path: Path, served: tuple[str, Path]) -> None:
    pytest.importorskip("aiohttp", reason="install the extra 'remote' for http")
    url, folder = served
    snapshot.push(filled, f"file://{folder}/store")
    pulled = snapshot.pull(f"{url}/store", tmp_path / "back")
    assert (pulled.entries, pulled.sent) == (40, 10)
    assert values(tmp_path / "back", 40) == list(range(40))
    victim = next((folder / "store" / "seg").glob("*.seg"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert snapshot.pull(f"{url}/store", tmp_path / "back").sent == 0
    with pytest.raises(SnapshotDamaged, match=r"\.seg has .* bytes where"):
        snapshot.pull(f"{url}/store", tmp_path / "again")
    with pytest.raises(SnapshotNotFound, match="there is no store at"):
        snapshot.pull(f"{url}/nothing", tmp_path / "none")


def test_a_signed_store_stays_signed_and_asks_for_its_key(tmp_path: Path, memory: str) -> None:
    put(tmp_path / "signed", 0, 10, KEY)
    snapshot.push(tmp_path / "signed", memory, key=KEY)
    with pytest.raises(UntrustedSnapshot, match="none of its 1 manifests is signed"):
        snapshot.pull(memory, tmp_path / "other", key=b"x" * 32)
    snapshot.pull(memory, tmp_path / "back", key=KEY)
    with closing(Store.open(tmp_path / "back", key=KEY)) as store:
        assert store.trust == "signed"
    assert values(tmp_path / "back", 10, KEY) == list(range(10))
    put(tmp_path / "plain", 0, 10)
    fsspec.filesystem("memory").store.clear()
    snapshot.push(tmp_path / "plain", memory)
    with pytest.raises(UntrustedSnapshot):
        snapshot.pull(memory, tmp_path / "strange", key=KEY)


# -- broken off -----------------------------------------------------------------------------------------------------


class Cut(Exception):
    """Interruption of the network."""


@pytest.mark.parametrize("after", [0, 1, 4, 9, 10, 11])
def test_a_push_that_breaks_off_is_not_seen_and_goes_on(
    filled: Path, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    real, count = remote.Remote.write, 0

    def write(self: remote.Remote, name: str, parts: Callable[[], Iterator[Any]]) -> None:
        nonlocal count
        if count == after:

            def broken() -> Iterator[Any]:
                part = next(iter(parts()))
                yield bytes(part)[: len(part) // 2]
                raise Cut("gone")

            real(self, name, broken)
        count += 1
        real(self, name, parts)

    with monkeypatch.context() as patched:
        patched.setattr(remote.Remote, "write", write)
        with pytest.raises(LLMCacheError, match="gone; the files sent so far stay there"):
            snapshot.push(filled, memory)
    with pytest.raises((SnapshotNotFound, SnapshotDamaged)):
        snapshot.pull(memory, tmp_path / "early")
    assert not (tmp_path / "early" / "FORMAT").exists()
    assert snapshot.push(filled, memory).sent == max(0, 10 - after)
    snapshot.pull(memory, tmp_path / "back")
    assert values(tmp_path / "back", 40) == list(range(40))


@pytest.mark.parametrize("after", [1, 5, 9])
def test_a_pull_that_breaks_off_leaves_no_store_and_goes_on(
    filled: Path, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    snapshot.push(filled, memory)
    real, count = remote.Remote.chunks, 0

    def chunks(self: remote.Remote, name: str) -> Iterator[bytes]:
        nonlocal count
        for part in real(self, name):
            if name.startswith(("seg", "idx")):
                count += 1
                if count > after:
                    yield part[: len(part) // 2]
                    raise LLMCacheError("gone")
            yield part

    back = tmp_path / "back"
    with monkeypatch.context() as patched:
        patched.setattr(remote.Remote, "chunks", chunks)
        with pytest.raises(LLMCacheError, match="gone"):
            snapshot.pull(memory, back)
    assert sorted(one.name for one in back.iterdir() if one.is_file()) == []
    with pytest.raises(SnapshotNotFound):
        Store.open(back)
    assert snapshot.pull(memory, back).sent == 10 - after
    assert values(back, 40) == list(range(40))


# -- what is not what it should be ---------------------------------------------------------------------------------


def shorter(data: bytes) -> bytes:
    return data[:-1]


def longer(data: bytes) -> bytes:
    return data + b"x"


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("change", [shorter, longer, flipped, None], ids=["shorter", "longer", "flipped", "missing"])
@pytest.mark.parametrize("kind", ["seg", "row", "key", "var", "fp"])
def test_a_file_that_is_not_whole_is_never_taken_and_a_push_repairs_it(
    filled: Path, tmp_path: Path, change: Callable[[bytes], bytes] | None, kind: str
) -> None:
    far = tmp_path / "far"
    snapshot.push(filled, f"file://{far}")
    victim = sorted((far / "seg").glob(f"*.{kind}"))[0]
    before = victim.read_bytes()
    if change is None:
        victim.unlink()
    else:
        victim.write_bytes(change(before))
    with pytest.raises(SnapshotDamaged, match=f"{victim.name}.*; push the store there again"):
        snapshot.pull(f"file://{far}", tmp_path / "back")
    assert not list((tmp_path / "back").glob("m-*"))
    assert not list((tmp_path / "back").glob("t-*"))
    assert snapshot.push(filled, f"file://{far}").sent == 1
    assert victim.read_bytes() == before
    snapshot.pull(f"file://{far}", tmp_path / "back")
    assert values(tmp_path / "back", 40) == list(range(40))


def test_sizes_only_reads_nothing_back(filled: Path, tmp_path: Path) -> None:
    far = tmp_path / "far"
    snapshot.push(filled, f"file://{far}")
    victim = sorted((far / "seg").glob("*.seg"))[0]
    victim.write_bytes(flipped(victim.read_bytes()))
    assert snapshot.push(filled, f"file://{far}", sizes_only=True).sent == 0
    assert snapshot.push(filled, f"file://{far}").sent == 1


def test_a_damaged_manifest_at_the_url_gives_the_generation_before(filled: Path, tmp_path: Path) -> None:
    far = tmp_path / "far"
    snapshot.push(filled, f"file://{far}")
    put(filled, 40, 5)
    snapshot.push(filled, f"file://{far}")
    newest = sorted(far.glob("m-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-20])
    assert snapshot.pull(f"file://{far}", tmp_path / "back").entries == 40
    sorted(far.glob("m-*"))[0].write_bytes(b"nothing")
    with pytest.raises(SnapshotDamaged, match="none of its 2 manifests is intact"):
        snapshot.pull(f"file://{far}", tmp_path / "other")
    (far / "FORMAT").unlink()
    with pytest.raises(SnapshotDamaged, match="no FORMAT file; push"):
        snapshot.pull(f"file://{far}", tmp_path / "other")


def test_a_damaged_store_is_not_pushed(filled: Path, memory: str, tmp_path: Path) -> None:
    victim = sorted((filled / "seg").glob("*.seg"))[0]
    victim.write_bytes(flipped(victim.read_bytes()))
    with pytest.raises(SnapshotDamaged, match=r"does not match its checksum; .*snapshot verify"):
        snapshot.push(filled, memory)
    with pytest.raises(SnapshotNotFound):
        snapshot.pull(memory, tmp_path / "back")


def test_damage_in_a_pulled_store_is_loaded_again(filled: Path, memory: str, tmp_path: Path) -> None:
    snapshot.push(filled, memory)
    back = tmp_path / "back"
    snapshot.pull(memory, back)
    victim = sorted((back / "seg").glob("*.seg"))[0]
    victim.write_bytes(flipped(victim.read_bytes()))
    sorted((back / "seg").glob("*.fp"))[1].unlink()
    assert snapshot.pull(memory, back).sent == 2
    assert snapshot.verify(back).whole


# -- another store -------------------------------------------------------------------------------------------------


def test_another_store_is_neither_pushed_over_nor_pulled_over(filled: Path, tmp_path: Path, memory: str) -> None:
    snapshot.push(filled, memory)
    other = tmp_path / "other"
    for first in (0, 3, 6):
        put(other, first, 3)
    for refused, advice in (
        (functools.partial(snapshot.push, other, memory), "push to another URL"),
        (functools.partial(snapshot.pull, memory, other), "pull to a new folder and"),
    ):
        with pytest.raises(LLMCacheError, match=f"another store, or .*later commits of its own; {advice}"):
            refused()
    twin = tmp_path / "twin"
    for first in (0, 3):
        put(twin, first, 3)
    with pytest.raises(LLMCacheError, match="generation 3, this is generation 3"):
        snapshot.push(twin, memory)
    assert snapshot.pull(memory, tmp_path / "back").entries == 40


def test_what_was_stored_since_a_pull_is_not_lost_to_the_next(filled: Path, tmp_path: Path, memory: str) -> None:
    snapshot.push(filled, memory)
    back = tmp_path / "back"
    snapshot.pull(memory, back)
    put(back, 100, 3)  # generation 4 here
    with pytest.raises(LLMCacheError, match="later commits of its own"):
        snapshot.pull(memory, back)
    put(filled, 40, 5)
    put(filled, 45, 5)
    snapshot.push(filled, memory)  # generation 5 there
    with pytest.raises(LLMCacheError, match="later commits of its own"):
        snapshot.pull(memory, back)
    snapshot.pull(memory, tmp_path / "fresh")
    snapshot.merge([tmp_path / "fresh"], back)
    assert values(back, 50) == list(range(50))


def test_a_store_whose_old_manifests_were_collected_goes_on(filled: Path, tmp_path: Path, memory: str) -> None:
    snapshot.push(filled, memory)
    put(filled, 40, 5)
    for old in sorted(filled.glob("m-*"))[:-1]:
        old.unlink()
    assert snapshot.push(filled, memory).sent == 5


def test_a_url_or_a_folder_with_something_else_is_left_alone(filled: Path, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    (far / "thesis.txt").write_text("mine")
    with pytest.raises(LLMCacheError, match=r"is not a store and not empty \(it holds 'thesis.txt'\)"):
        snapshot.push(filled, f"file://{far}")
    with pytest.raises(LLMCacheError, match="is not a store and not empty"):
        snapshot.pull(f"file://{far}", tmp_path / "back")
    snapshot.push(filled, f"file://{tmp_path}/good")
    with pytest.raises(SnapshotNotFound, match="is not a store and not empty"):
        snapshot.pull(f"file://{tmp_path}/good", far)
    with pytest.raises(LLMCacheError, match="is a file"):
        snapshot.pull(f"file://{tmp_path}/good", far / "thesis.txt")
    assert [one.name for one in far.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("url", "said"), [("s3://bucket/store", "s3fs"), ("nothing://x", "nothing"), ("sftp://host/x", "paramiko")]
)
def test_a_scheme_without_its_library_is_named(filled: Path, tmp_path: Path, url: str, said: str) -> None:
    try:
        fsspec.get_filesystem_class(url.partition(":")[0])
    except (ImportError, ValueError):
        with pytest.raises(ConfigError, match=said):
            snapshot.push(filled, url)
        with pytest.raises(ConfigError, match=said):
            snapshot.pull(url, tmp_path / "back")
    else:
        pytest.skip(f"the library for {url} is installed")
    assert not (tmp_path / "back").exists()


# -- the commands ------------------------------------------------------------------------------------------------


def test_the_commands_push_and_pull_and_say_what_went_over(llmcache: Command, filled: Path, tmp_path: Path) -> None:
    url, back = f"file://{tmp_path}/far", tmp_path / "back"
    dry = json.loads(llmcache("snapshot", "push", filled, url, "--dry-run", "--json").out)
    assert (dry["sent"], dry["dry_run"], (tmp_path / "far").exists()) == (10, True, False)
    assert "files transferred" in llmcache("snapshot", "push", filled, url).out
    assert "files to transfer" in llmcache("snapshot", "pull", url, back, "--dry-run").out
    assert not back.exists()
    done = json.loads(llmcache("snapshot", "pull", url, back, "--json").out)
    assert (done["sent"], done["entries"]) == (10, 40)
    assert json.loads(llmcache("snapshot", "pull", url, back, "--json").out)["sent"] == 0
    assert values(back, 40) == list(range(40))
    for arguments, code in (
        (["push", filled, "nothing://x"], 2),
        (["pull", f"file://{tmp_path}/nowhere", tmp_path / "none"], 1),
        (["push", tmp_path / "nowhere", url], 1),
    ):
        failed = llmcache("snapshot", *arguments)
        assert (failed.code, failed.err.count("\n"), failed.out) == (code, 1, "")


def test_a_signed_store_is_carried_with_its_key_file(llmcache: Command, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    put(tmp_path / "signed", 0, 10, KEY)
    url = f"file://{tmp_path}/far"
    with_key = ["--key-file", tmp_path / "key"]
    assert llmcache("snapshot", "push", tmp_path / "signed", url, *with_key).code == 0
    assert llmcache("snapshot", "pull", url, tmp_path / "back", *with_key).code == 0
    shutil.rmtree(tmp_path / "back")
    (tmp_path / "key").write_bytes(b"x" * 32)
    assert llmcache("snapshot", "pull", url, tmp_path / "back", *with_key).code == 1
