"""Journals with damage and links: a run gives the same results or one error, and writes nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmcache.encoding.results import Result
from llmcache.errors import CorpusError, LLMCacheError
from llmcache.pipeline.journal import (
    Checkpoint,
    Journal,
    beside,
    discard,
)
from llmcache.pipeline.writers import result_writer

WIDTH = 3
FACTS = {"model": "m", "batch_size": 2}
MANY = os.environ.get("LLMCACHE_NIGHTLY")
NAMES = ("journal.json", "vectors.f32", "rows.jsonl")


def result(number: int) -> Result:
    return Result(f"d{number}", np.full(WIDTH, number + 0.5, np.float32), "exact", "output", f"s{number}", 1.0)


def begun(out: Path, rows: int = 4, first: int = 0) -> None:
    """Make a run that was stopped after its second checkpoint, with further rows."""
    journal, lock = Journal.open(out, FACTS, WIDTH, resume=True)
    with lock:
        for at in range(0, rows, 2):
            journal.add(result(first + number) for number in (at, at + 1))
            journal.checkpoint(journal.here(at + 2, "digest"))
            if at:
                journal.commit_done()
        journal.add([result(99)])
        journal.close()


def finished(out: Path, rows: int = 4) -> bytes:
    """Resume the run, add a row and write the result file. Returns its bytes."""
    journal, lock = Journal.open(out, FACTS, WIDTH, resume=True)
    with lock:
        try:
            journal.back_to(journal.checkpoints[-1])
            journal.add(result(number) for number in range(journal.checkpoints[-1].rows, rows + 1))
            with result_writer(out, width=WIDTH) as writer:
                writer.write(journal.results())
        except BaseException:
            journal.close()
            raise
        journal.remove()
    return out.read_bytes()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    begun(tmp_path / "out.jsonl")
    return tmp_path / "out.jsonl"


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    (tmp_path / "whole").mkdir()
    begun(tmp_path / "whole" / "out.jsonl")
    return finished(tmp_path / "whole" / "out.jsonl")


def each(out: Path, expected: bytes, name: str, damaged: list[bytes]) -> tuple[int, int]:
    """Resume with each content of one file. Returns how often the result was the same, and how often it was refused."""
    folder, kept = beside(out), out.with_name("kept")
    shutil.copytree(folder, kept)
    same = refused = 0
    for content in damaged:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        (folder / name).write_bytes(content)
        out.unlink(missing_ok=True)
        found, said = b"", ""
        try:
            found = finished(out)
        except LLMCacheError as error:
            said = str(error)
        if said:
            assert "emove" in said, "it says what to do"
            assert "\n" not in said
            assert not out.exists()
            assert not out.with_name(f"{out.name}.partial").exists()
            refused += 1
        else:
            assert found == expected, f"{name} was damaged, and the result is another one"
            same += 1
    return same, refused


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [0x01, 0x80, 0xFF])
def test_a_changed_byte_at_any_place_gives_the_same_result_or_one_error(
    out: Path, expected: bytes, name: str, bits: int
) -> None:
    whole = (beside(out) / name).read_bytes()
    places = range(0, len(whole), 1 if MANY or name != "journal.json" else 9)
    changed = [whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :] for at in places]
    same, refused = each(out, expected, name, changed)
    assert refused > 0
    assert same + refused == len(changed)
    if name == "journal.json":
        assert same == 0
    else:  # rows after the checkpoint are ignored
        assert same == sum(at >= len(whole) * 4 // 5 for at in places) or name == "rows.jsonl"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_or_grown_gives_the_same_result_or_one_error(out: Path, expected: bytes, name: str) -> None:
    whole = (beside(out) / name).read_bytes()
    cut = [whole[:at] for at in range(0, len(whole), 1 if MANY or name != "journal.json" else 7)]
    grown = [whole + one for one in (b"\0", b"\n", whole, b"[1]\n")]
    zeroed = [whole[:at] + bytes(len(whole[at : at + 16])) + whole[at + 16 :] for at in range(0, len(whole), 16)]
    same, refused = each(out, expected, name, [*cut, *grown, *zeroed])
    assert refused >= len(cut) // 2
    if name == "journal.json":
        assert same == 0


def test_files_of_other_runs_and_of_each_other_are_refused(out: Path, expected: bytes) -> None:
    other = out.with_name("other.jsonl")
    begun(other, first=50)
    mine = {name: (beside(out) / name).read_bytes() for name in NAMES}
    for name in NAMES:
        others = [(beside(other) / one).read_bytes() for one in NAMES] + [mine[one] for one in NAMES if one != name]
        shutil.rmtree(out.with_name("kept"), ignore_errors=True)
        same, refused = each(out, expected, name, others)
        assert (same, refused) == (0, len(others)), name
        shutil.copytree(out.with_name("kept"), beside(out), dirs_exist_ok=True)


@pytest.mark.parametrize("seed", range(20))
def test_values_of_the_journal_that_nobody_wrote_are_refused(out: Path, expected: bytes, seed: int) -> None:
    chance = random.Random(seed)
    content: Any = json.loads((beside(out) / "journal.json").read_bytes())
    point = chance.choice(content["checkpoints"])
    point[chance.choice(list(point))] = chance.choice([-1, 2**63, 10**30, None, "x", 1.5, [], 1e308, {}])
    assert each(out, expected, "journal.json", [json.dumps(content).encode()]) == (0, 1)


def test_rows_damaged_while_the_run_is_at_work_give_no_result(out: Path) -> None:
    for name in ("vectors.f32", "rows.jsonl"):
        target = out.with_name(f"{name}.jsonl")
        begun(target)
        journal, lock = Journal.open(target, FACTS, WIDTH, resume=True)
        with lock:
            journal.back_to(journal.checkpoints[-1])
            content = bytearray((beside(target) / name).read_bytes())
            content[3] ^= 1
            (beside(target) / name).write_bytes(content)
            with pytest.raises(CorpusError, match="damaged"), result_writer(target, width=WIDTH) as writer:
                writer.write(journal.results())
            journal.close()
        assert not target.exists()


def test_all_files_are_the_users_alone_until_the_result_is_whole(out: Path) -> None:
    before = os.umask(0o002)
    try:
        for path in beside(out).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
        assert stat.S_IMODE(beside(out).stat().st_mode) == 0o700
        with result_writer(out, width=WIDTH) as writer:
            writer.write([result(1)])
            assert stat.S_IMODE(out.with_name("out.jsonl.partial").stat().st_mode) == 0o600
        assert stat.S_IMODE(out.stat().st_mode) == 0o664, "as the umask says"
    finally:
        os.umask(before)


def linked(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(victim)


def piped(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("name", [*NAMES, "lock", "journal.json.partial"])
@pytest.mark.parametrize("plant", [linked, piped])
def test_a_link_or_pipe_in_the_folder_of_a_run_is_not_followed(
    out: Path, expected: bytes, name: str, plant: Callable[[Path, Path], None]
) -> None:
    victim = out.with_name("victim")
    victim.write_bytes(b"precious" * 1000)
    plant(beside(out) / name, victim)
    if name == "journal.json.partial":  # it is replaced
        assert finished(out) == expected
    else:
        with pytest.raises(CorpusError, match=r"nothing was read or written there|cannot be read as the journal"):
            finished(out)
    assert victim.read_bytes() == b"precious" * 1000


@pytest.mark.parametrize("plant", [linked, piped])
def test_a_link_in_the_place_of_a_partial_result_or_of_the_folder_is_refused(
    tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for ending in ("npy.partial", "npy.jsonl.partial"):
        plant(tmp_path / f"r.{ending}", victim)
        with (
            pytest.raises(CorpusError, match="nothing was read or written"),
            result_writer(tmp_path / "r.npy", width=WIDTH) as writer,
        ):
            writer.write([result(1)])
        os.unlink(tmp_path / f"r.{ending}")
        assert not (tmp_path / "r.npy").exists()
    (tmp_path / "elsewhere").mkdir()
    plant(tmp_path / "r.unfinished", tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match=r"symbolic link|no folder"):
        Journal.open(tmp_path / "r.npy", FACTS, WIDTH, resume=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert victim.read_bytes() == b"precious"


def test_a_discarded_run_takes_nothing_that_is_not_its_own(out: Path) -> None:
    (beside(out) / "notes.txt").write_text("mine")
    discard(out)
    assert [path.name for path in beside(out).iterdir()] == ["notes.txt"]
    discard(out)


def test_a_new_checkpoint_has_the_checksums_of_no_rows() -> None:
    assert Checkpoint().vectors_check == Checkpoint().text_check != ""
