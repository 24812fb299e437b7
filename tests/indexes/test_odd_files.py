"""Entries of a wrong type in place of a store's files or folders: maintenance reports them in little memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcache.indexes.errors import LLMCacheError
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.diff import diff
from llmcache.indexes.maintenance.evict import evict
from llmcache.indexes.maintenance.gc import gc
from llmcache.indexes.maintenance.merge import merge
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.maintenance.repair import repair
from llmcache.indexes.maintenance.snapshot import load, save
from llmcache.indexes.maintenance.verify import verify
from llmcache.indexes.store import Store
from tests.damage import files_of, signed, with_checksum_of
from tests.operations import FEATURES, Ledger, bank_of, commit, found_in, keys_of, put, values_of

SIZE = 200 << 30  # of sparse files: far more than the memory of the machine
_LIMIT = 600 << 20  # bytes of address space that may be used beside what the program has


def make(path: Path) -> None:
    store = Store.open(path, create=True)
    for numbers in (range(600), range(600, 620)):
        commit(store, Ledger(), numbers)
        bank_of(store).nearest(values_of([1])[:, :FEATURES], 1)
        store.commit()
    store.write_counters({"hits": 1})
    gc(store)
    store.close()


# -- what may be in a place ----------------------------------------------------------------------------------

Odd = Callable[[Path], None]


def _gone(place: Path) -> None:
    shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()


def a_file(place: Path) -> None:
    place.write_bytes(b"a file")


def a_folder(place: Path) -> None:
    place.mkdir()
    (place / "inside").write_bytes(b"x")


def a_link_to_nothing(place: Path) -> None:
    place.symlink_to("/nowhere/at/all")


def a_link_to_itself(place: Path) -> None:
    place.symlink_to(place)


def a_link_to_a_folder(place: Path) -> None:
    place.symlink_to(place.parent)


def a_link_to_a_device(place: Path) -> None:
    place.symlink_to("/dev/zero")


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


def a_socket(place: Path) -> None:
    here = os.getcwd()
    os.chdir(place.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(place.name)
    finally:
        os.chdir(here)


def a_sparse_file(place: Path) -> None:
    with open(place, "wb") as file:
        file.truncate(SIZE)


def nothing(place: Path) -> None:
    """Remove the file."""


ODD: tuple[Odd, ...] = (
    a_file, a_folder, a_link_to_nothing, a_link_to_itself, a_link_to_a_folder, a_link_to_a_device, a_pipe, a_socket,
    a_sparse_file, nothing,
)  # fmt: skip
PLACES = (
    "seg", "idx", "stat", "quarantine", "lock", "FORMAT", "m", "seg/row", "seg/seg", "seg/key", "seg/var", "seg/fp",
    "idx/faiss", "idx/proj", "stat/json", "beside",
)  # fmt: skip
STRANGE = ("\udcff\udc80", "new\nline", "\x1b[31mred", "ß" * 100, "-rf", "a" * 255, " ", "%s%n", "t-", "m-1.json")


def place_in(path: Path, name: str, chance: random.Random) -> Path:
    """Return where to put the odd entry: a folder, the newest manifest, a file of one kind, or an unknown name."""
    if name == "m":
        return max(path.glob("m-*.json"))
    sub, _, kind = name.partition("/")
    if name == "beside":
        return path / chance.choice(("", "seg", "idx", "stat")) / chance.choice(STRANGE)
    return chance.choice(sorted((path / sub).glob(f"*.{kind}"))) if kind else path / name


# -- what is done to such a store ------------------------------------------------------------------------------


def every_command(path: Path) -> list[str]:
    """Run all commands. Returns errors other than LLMCacheError, by command."""
    beside = path.with_name("beside")
    commands: dict[str, Callable[[], object]] = {
        "verify": lambda: json.dumps([(one.file, one.what) for one in verify(path).findings]).encode("utf-8"),
        "repair, dry": lambda: repair(path, dry_run=True, grace=0),
        "read": lambda: _read(path),
        "evict, dry": lambda: _with(path, lambda store: evict(store, 1000, dry_run=True)),
        "gc, dry": lambda: _with(path, lambda store: gc(store, 0, dry_run=True)),
        "save": lambda: save(path, path.with_name("saved")),
        "load": lambda: load(path, path.with_name("loaded")),
        "merge from": lambda: merge([path], path.with_name("merged")),
        "merge into": lambda: merge([beside], path),
        "diff": lambda: diff(path, beside),
        "compact": lambda: _with(path, lambda store: compact(store, duplicates=True, small=True)),
        "gc": lambda: _with(path, lambda store: gc(store, 0)),
        "purge": lambda: _with(path, lambda store: purge(store, Doomed(keys=keys_of([3])))),
        "evict": lambda: _with(path, lambda store: evict(store, 60_000)),
        "write": lambda: _with(path, lambda store: commit(store, Ledger(), range(700, 710))),
        "repair": lambda: repair(path, grace=0),
        "verify again": lambda: verify(path),
    }
    failures = []
    for name, command in commands.items():
        try:
            command()
        except LLMCacheError as error:
            if not str(error).isprintable() and "\n" in str(error):
                failures.append(f"{name}: more than one line: {error}")
        except BaseException as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    return failures


def _with(path: Path, act: Callable[[Store], object]) -> None:
    store = Store.open(path)
    try:
        act(store)
    finally:
        store.close()


def _read(path: Path) -> None:
    for reading in ("auto", "pread"):
        store = Store.open(path, reading=reading)
        found_in(store, range(0, 620, 7), tokens=False)
        bank_of(store).nearest(values_of([1])[:, :FEATURES], 3)
        store.close()


def in_little_memory(path: Path, prepare: str) -> None:
    """Run every command in a process with limited memory and time."""
    code = (
        "import logging, resource, sys; from pathlib import Path; from tests.indexes import test_odd_files as odd\n"
        "logging.disable(logging.CRITICAL); path = Path(sys.argv[1]); odd.every_command(path.with_name('warm'))\n"
        f"odd.limit()\n{prepare}\n"
        "failures = odd.every_command(path); sys.stdout.write('\\n'.join(failures)); sys.exit(bool(failures))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-1500:]}"


def limit() -> None:
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, ((int(used.split()[1]) << 10) + _LIMIT,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "store"
    make(path)
    return path


def copied(template: Path, tmp_path: Path, name: str = "store") -> Path:
    shutil.copytree(template, tmp_path / name)
    (tmp_path / name).chmod(0o700)
    for beside in ("beside", "warm"):
        if not (tmp_path / beside).exists():
            store = Store.open(tmp_path / beside, create=True)
            put(store, range(900, 910))
            store.commit()
            store.close()
    return tmp_path / name


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("odd", [one for one in ODD if one is not a_sparse_file], ids=lambda one: one.__name__)
def test_whatever_has_the_place_of_a_file_is_a_line_in_a_report_or_one_error(
    template: Path, tmp_path: Path, name: str, odd: Odd
) -> None:
    path = copied(template, tmp_path)
    place = place_in(path, name, random.Random(f"{name} {odd.__name__}"))
    if os.path.lexists(place):
        _gone(place)
    odd(place)
    assert every_command(path) == []


@pytest.mark.parametrize("name", ["seg", "idx", "stat", "lock"])
@pytest.mark.parametrize("odd", [a_file, a_pipe, a_socket], ids=lambda one: one.__name__)
def test_what_has_the_place_of_a_folder_is_seen_and_set_aside_and_the_store_is_used_again(
    template: Path, tmp_path: Path, name: str, odd: Odd
) -> None:
    path = copied(template, tmp_path)
    if (path / name).exists():
        _gone(path / name)
    if name == "lock" and odd is a_file:
        (path / name).mkdir()
    else:
        odd(path / name)
    assert name in [one.file for one in verify(path).findings if one.damage]
    assert name in repair(path, dry_run=True).set_aside
    assert name in repair(path).set_aside
    assert verify(path).whole
    _with(path, lambda store: commit(store, Ledger(), range(700, 710)))
    _with(path, lambda store: gc(store, 0))
    assert verify(path).whole
    store = Store.open(path)
    assert found_in(store, range(700)) == (set() if name == "seg" else set(range(620)))
    store.close()


def test_a_linked_folder_is_not_given_up_by_a_repair(template: Path, tmp_path: Path) -> None:
    path = copied(template, tmp_path)
    (path / "seg").rename(tmp_path / "elsewhere")
    (path / "seg").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LLMCacheError, match="put the folder itself in its place"):
        repair(path)
    (path / "seg").unlink()
    (tmp_path / "elsewhere").rename(path / "seg")
    assert verify(path).whole


@pytest.mark.parametrize("name", [one for one in PLACES if one not in {"seg", "idx", "stat", "quarantine"}])
def test_a_sparse_file_in_any_place_takes_neither_memory_nor_time(template: Path, tmp_path: Path, name: str) -> None:
    path = copied(template, tmp_path)
    place = place_in(path, name, random.Random(name))
    if name.startswith("seg/") and name != "seg/row":  # the right beginning, and then nothing for long
        with open(place, "r+b") as file:
            file.truncate(SIZE)
    else:
        if os.path.lexists(place):
            _gone(place)
        a_sparse_file(place)
    in_little_memory(path, "")


@pytest.mark.parametrize("rows", [1 << 20, 1 << 31, 1 << 40, (1 << 53) - 1])
@pytest.mark.parametrize("field", ["rows", "aliases", "payload", "count", "dead"])
def test_a_manifest_that_tells_of_far_more_rows_than_there_are_takes_no_memory(
    template: Path, tmp_path: Path, rows: int, field: str
) -> None:
    path = copied(template, tmp_path)
    newest = max(path.glob("m-*.json"))
    facts = json.loads(newest.read_bytes()[:-73])
    bank = facts["namespaces"]["default"]["banks"]["layer"]
    if field == "count":
        bank["index"]["count"] = rows
    elif field == "dead":
        segment = bank["segments"][0]
        name = f"seg/{segment['id']}-{'a' * 32}.alive"
        (path / name).write_bytes(bytes(75))
        segment |= {"rows": rows, "dead": rows - 1, "alive": {"name": name, "size": 75, "sha256": "0" * 64}}
    else:
        bank["segments"][0][field] = rows
    body = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    newest.write_bytes(signed(body))
    if field == "dead":
        newest.write_bytes(with_checksum_of(newest.read_bytes(), name, bytes(75)))
    in_little_memory(path, "")


@pytest.mark.parametrize("sub", ["", "seg", "idx", "stat", "quarantine"])
def test_names_of_odd_bytes_are_printed_as_escapes_and_set_aside(
    template: Path, tmp_path: Path, sub: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(template, tmp_path)
    (path / "quarantine").mkdir()
    for name in STRANGE:
        (path / sub / name).write_bytes(b"x")
    assert every_command(path) == []
    for one in verify(path).findings:
        assert one.file.isprintable()
        one.file.encode("utf-8")


def test_files_that_are_not_the_stores_own_do_not_count_against_its_budget(template: Path, tmp_path: Path) -> None:
    path = copied(template, tmp_path)
    for name in ("notes.tar", "seg/core.1234", "idx/x.faiss.bak", "stat/nohup.out"):
        a_sparse_file(path / name)
    store = Store.open(path)
    done = evict(store, 100 << 20)
    assert (done.rows, done.segments) == (0, 0)
    assert done.bytes_after < 10 << 20
    store.close()
    assert (path / "notes.tar").exists()
    assert (path / "seg" / "core.1234").exists()


def test_files_of_a_template_are_whole(template: Path) -> None:
    assert verify(template).whole
    assert len(files_of(template)) > 10
