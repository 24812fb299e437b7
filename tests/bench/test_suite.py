"""The benchmark suite: contenders that give what the model gives, records that last, rivals that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmcache.bench.competitors import baselines as own
from llmcache.bench.competitors import others
from llmcache.bench.competitors.names import (
    ALONE,
    ASIDE,
    ONCE,
    OURS,
    SORTED,
)
from llmcache.bench.harness.drawing import Bars
from llmcache.bench.harness.files import write
from llmcache.bench.harness.recording import moment, notes, run
from llmcache.bench.harness.recording import others as others_busy
from llmcache.bench.harness.rounds import (
    WARM,
    Contender,
    Opened,
    Task,
    rounds,
    times,
)
from llmcache.bench.harness.suite import (
    Benchmark,
    Record,
    Sizes,
    Target,
    benchmarks,
    chosen,
)
from llmcache.bench.harness.turns import Row, spread
from llmcache.bench.harness.workloads import STREAMS, WORKLOADS, read
from llmcache.errors import ConfigError, LLMCacheError
from tests.conftest import DATA, Command

BASE = Contender(ALONE, own.alone)
EXACT = [
    Contender(SORTED, own.by_tokens),
    Contender(ONCE, own.once_per_call),
    Contender(OURS, own.ours()),
    *others.EXACT_RIVALS,
    others.CUT_LAYER,
]
NEAR = [others.SEMHASH_FIRST, *own.near(0.9)]


def installed(one: Contender) -> Contender:
    if one.missing:
        pytest.skip(one.missing)
    return one


def last(found: Iterator[list[Row]]) -> dict[str, Row]:
    *_, rows = found
    return {row["name"]: row for row in rows}


# -- workloads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_read_up_to_its_limit(name: str) -> None:
    if not (DATA / WORKLOADS[name].path).exists():
        pytest.skip(f"{WORKLOADS[name].path} is not in {DATA}")
    found = read(DATA, name, 50)
    assert len(found) == 50
    assert all(text.strip() for text in found)
    assert found == read(DATA, name, 50)


def test_a_workload_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no cls-banking77/test\.csv"):
        read(tmp_path, "banking77")
    (tmp_path / "cls-sst2").mkdir()
    (tmp_path / "cls-sst2" / "train.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no text"):
        read(tmp_path, "sst2")


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_is_given_by_its_seed(kind: str) -> None:
    drawn = STREAMS[kind]
    places = drawn(100, 1000, 3)
    assert places.shape == (1000,)
    assert places.min() >= 0
    assert places.max() < 100
    assert np.array_equal(places, drawn(100, 1000, 3))
    assert not np.array_equal(places, drawn(100, 1000, 4))


def test_streams_repeat_as_they_say() -> None:
    often = np.sort(np.bincount(STREAMS["zipf"](100, 100_000, 0)))[::-1] / 100_000
    harmonic = 1 / np.arange(1, 101)
    assert np.allclose(often[:5], (harmonic / harmonic.sum())[:5], rtol=0.1)
    even = np.bincount(STREAMS["uniform"](100, 100_000, 0)) / 100_000
    assert np.allclose(even, 0.01, rtol=0.2)
    moved = STREAMS["drifting"](100, 10_000, 0)
    assert moved[:100].max() < 12
    assert moved[-100:].min() >= 88


# -- contenders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", EXACT, ids=lambda one: one.name)
@pytest.mark.parametrize("known", [0, 6, 12])
def test_an_exact_contender_gives_what_the_model_gives(
    one: Contender, known: int, model: SentenceTransformer, queries: list[str], tmp_path: Path
) -> None:
    texts = queries[:12]
    task = Task(model, texts[:known], [[*texts, texts[3]], texts[:2]])
    opened: Any = installed(one).opened
    if known:
        with opened(task, tmp_path) as open_:
            open_.answer(task.known)
            open_.commit()
    with opened(task, tmp_path) as open_:
        found = [np.asarray(open_.answer(call)) for call in task.calls]
        open_.commit()
        computed = open_.computed()
    assert found[0].shape == (13, 384)
    for vectors, call in zip(found, task.calls, strict=True):
        assert np.abs(vectors - model.encode(list(call))).max() < 1e-5
    if one.name not in (SORTED, ONCE):  # these remember nothing
        assert computed == 12 - known


@pytest.mark.parametrize("one", NEAR, ids=lambda one: one.name)
def test_a_near_contender_gives_a_neighbours_vector_and_computes_less(
    one: Contender, model: SentenceTransformer, tmp_path: Path
) -> None:
    texts = ["Where is my new card?", "When does the shop open?", "where is my new card ?", "Where is my new card??"]
    task = Task(model, [], [texts[:2], texts[2:]] if one is not others.SEMHASH_FIRST else [texts])
    opened: Any = installed(one).opened
    with opened(task, tmp_path) as open_:
        found = np.concatenate([np.asarray(open_.answer(call)) for call in task.calls])
        assert open_.computed() == 2
    assert np.abs(found[[0, 1, 2, 3]] - model.encode(texts[:2])[[0, 1, 0, 0]]).max() < 1e-5


def test_gptcache_may_install_nothing(model: SentenceTransformer, tmp_path: Path) -> None:
    installed(others.EXACT_RIVALS[-1])
    with others.in_gptcache(Task(model, [], []), tmp_path):
        from gptcache.utils import _check_library

        with pytest.raises(LLMCacheError, match="a benchmark installs nothing"):
            _check_library("a_library_that_nobody_has")
    assert subprocess.run(["true"], check=False).returncode == 0


# -- rounds -----------------------------------------------------------------------------------------------------


def test_a_rival_that_is_not_installed_is_named_and_left_out(model: SentenceTransformer, queries: list[str]) -> None:
    absent = Contender("another cache", own.alone, package="a_cache_that_nobody_has")
    found = last(rounds(Task(model, [], [queries[:4]]), [BASE, absent, *others.ABSENT], 1))
    assert found["another cache"] == {
        "name": "another cache",
        "skipped": "not installed: a_cache_that_nobody_has; install llmcache[rivals]",
    }
    assert "no package of it is on the registry" in found["vCache"]["skipped"]
    assert found[ALONE]["ratio"] == 1
    with pytest.raises(ConfigError, match="is the base of the comparison"):
        next(rounds(Task(model, [], [queries[:4]]), [absent, BASE], 1))


def test_rows_have_each_repeat_and_ratios_to_the_same_rounds_base(
    model: SentenceTransformer, queries: list[str]
) -> None:
    texts = queries[:6]
    found = last(rounds(Task(model, texts, [texts]), [BASE, Contender(OURS, own.ours())], 3))
    base, mine = found[ALONE], found[OURS]
    assert len(base["seconds"]) == len(mine["seconds"]) == 3
    ratios = [a / b for a, b in zip(base["seconds"], mine["seconds"], strict=True)]
    assert mine["ratios"] == pytest.approx(ratios)
    assert mine["ratio"] == pytest.approx(np.median(ratios))
    assert mine["per_second"] == pytest.approx(6 / np.median(mine["seconds"]))
    assert (mine["quickest"], mine["slowest"]) == (min(mine["seconds"]), max(mine["seconds"]))
    assert (base["computed"], mine["computed"]) == (6, 0)
    assert mine["difference"] < 1e-5
    assert times(list(found.values()), OURS, ALONE) == pytest.approx(mine["ratio"])


def test_a_wrong_answer_shows_in_the_difference(model: SentenceTransformer, queries: list[str]) -> None:
    @contextmanager
    def zeros(_: Task, __: Path) -> Iterator[Opened]:
        yield Opened(lambda texts: np.full((len(texts), 384), 0.5, np.float32), lambda: 0)

    found = last(rounds(Task(model, [], [queries[:3]]), [BASE, Contender("wrong", zeros)], 1))
    expected = np.abs(model.encode(queries[:3]) - 0.5).max()
    assert found["wrong"]["difference"] == pytest.approx(expected)
    assert found["wrong"]["mean_1_minus_cosine"] > 0.5


def test_a_contender_with_a_share_is_asked_that_many_texts(model: SentenceTransformer, queries: list[str]) -> None:
    asked: list[str] = []

    @contextmanager
    def slow(task: Task, _: Path) -> Iterator[Opened]:
        def answer(texts: Sequence[str]) -> Any:
            asked.extend(texts)
            return task.model.encode(list(texts))

        yield Opened(answer, lambda: 0)

    calls = [queries[:4], queries[4:8]]
    found = last(rounds(Task(model, queries[2:8], calls), [BASE, Contender("slow", slow, share=5)], 1))
    assert found["slow"]["documents"] == 5
    assert found[ALONE]["documents"] == 8
    assert asked == queries[2:5] + queries[:5] * 2  # known, then a round to warm up and one that counts
    assert found["slow"]["ratio"] == pytest.approx((found[ALONE]["seconds"][0] / 8) / (found["slow"]["seconds"][0] / 5))


def test_what_keeps_nothing_is_asked_only_within_the_time(model: SentenceTransformer, queries: list[str]) -> None:
    asked: dict[str, list[str]] = {"keeps": [], "forgets": []}

    def named(name: str) -> Contender:
        @contextmanager
        def opened(task: Task, _: Path) -> Iterator[Opened]:
            def answer(texts: Sequence[str]) -> Any:
                asked[name].extend(texts)
                return task.model.encode(list(texts))

            yield Opened(
                answer,
                lambda: len(asked[name]),
                noted=lambda: {"asked": len(asked[name]), "name": name, "on": True, "share": 0.5},
            )

        return Contender(name, opened, keeps=name == "keeps")

    known, before, call = queries[:2], queries[2:5], queries[5:7]
    task = Task(model, known, [call], before=[before[:2], before[2:]])
    found = last(rounds(task, [BASE, named("keeps"), named("forgets")], 1))
    assert asked == {"keeps": [*known, *before[:2], *call, *before, *call], "forgets": call * 2}
    assert (found["keeps"]["computed"], found["forgets"]["computed"]) == (2, 2)
    assert found["keeps"]["noted"] == {"asked": 2, "name": "keeps", "on": True, "share": 0.5}
    assert "noted" not in found[ALONE]


@pytest.mark.parametrize("known", [0, WARM + 8])
def test_new_texts_are_few_in_the_round_that_warms_up(known: int, model: SentenceTransformer) -> None:
    texts, asked = [f"text {i}" for i in range(WARM + 8)], list[int]()

    @contextmanager
    def opened(task: Task, _: Path) -> Iterator[Opened]:
        def answer(texts: Sequence[str]) -> Any:
            asked.append(len(texts))
            return np.ones((len(texts), 384), np.float32)

        yield Opened(answer, lambda: 0)

    next(rounds(Task(model, texts[:known], [texts]), [Contender("quick", opened)], 1))
    assert asked[-1] == WARM + 8
    assert (asked[0], WARM in asked) == ((WARM, True) if not known else (WARM + 8, False))


def test_one_repeat_has_no_spread() -> None:
    assert spread([2.0])["slowest_of_quickest"] is None
    assert spread([2.0, 5.0, 4.0]) == {"median": 4.0, "quickest": 2.0, "slowest": 5.0, "slowest_of_quickest": 2.5}


def test_a_target_says_whether_it_was_met() -> None:
    rows = [{"name": "a", "ratios": [1.0, 1.0, 1.0]}, {"name": "b", "ratios": [4.0, 2.0, 3.0]}]
    assert Target("b", "a", 3).found(rows) == {
        "contender": "b", "base": "a", "at_least": 3, "found": 3.0, "met": True,
    }  # fmt: skip
    assert not Target("a", "b", 3).found(rows)["met"]
    missing = Target("b", "c", 3).found([*rows, {"name": "c", "skipped": "not installed"}])
    assert missing["found"] is missing["met"] is None


# -- records ----------------------------------------------------------------------------------------------------


def rows_of(seconds: Sequence[float]) -> list[Row]:
    return [{"name": "a", "documents": 2, "per_second": 2 / seconds[0], **spread(seconds)}]


def quick(name: str, needs: tuple[str, ...] = (), *, stopped_after: int | None = None) -> Benchmark:
    """Two rounds that take no time; Ctrl-C comes after so many."""

    def measured(_: Sizes) -> Iterator[Record]:
        for round_ in (1, 2):
            yield {"rounds": round_, "rows": rows_of([1.0] * round_)}
            if round_ == stopped_after:
                raise KeyboardInterrupt

    return Benchmark(name, "two rounds", needs, measured, Bars("rows", ("name",), "per_second", "texts per second"))


@pytest.fixture
def sizes(tmp_path: Path, model: SentenceTransformer) -> Sizes:
    return Sizes(tmp_path, repeats=2, model=lambda: model)


def test_what_is_done_is_kept_when_a_run_is_stopped(tmp_path: Path, sizes: Sizes) -> None:
    out = tmp_path / "results"
    both = [quick("first"), quick("second", stopped_after=1), quick("third")]
    with pytest.raises(KeyboardInterrupt):
        list(run(both, sizes, out, "command"))
    assert {path.name for path in out.iterdir()} == {"first.json", "first.png", "second.partial.json"}
    assert json.loads((out / "second.partial.json").read_bytes())["rounds"] == 1
    before = (out / "first.json").read_bytes()
    found = [record for _, record in run([quick("first"), quick("second"), quick("third")], sizes, out, "command")]
    assert [("kept" in record, record["rounds"]) for record in found] == [(True, 2), (False, 2), (False, 2)]
    assert (out / "first.json").read_bytes() == before
    assert {path.suffix for path in out.iterdir()} == {".json", ".png"}
    assert not list(out.glob("*.partial*"))


def test_a_record_is_measured_anew_on_request_and_never_mixed(tmp_path: Path, sizes: Sizes) -> None:
    list(run([quick("one")], sizes, tmp_path, "before"))
    with pytest.raises(
        ConfigError, match=r"--repeats 2, --limit None and --seed 0; give these, another --out, or --again"
    ):
        list(run([quick("one")], replace(sizes, limit=5), tmp_path, "after"))
    ((_, record),) = run([quick("one")], replace(sizes, limit=5), tmp_path, "after", again=True)
    assert json.loads((tmp_path / "one.json").read_bytes()) == record
    assert (record["command"], record["limit"]) == ("after", 5)
    (tmp_path / "one.json").write_text("{")
    with pytest.raises(ConfigError, match="is no record of a benchmark"):
        list(run([quick("one")], sizes, tmp_path, "after"))


def test_missing_data_and_failures_leave_the_others_alone(tmp_path: Path, sizes: Sizes) -> None:
    def fails(_: Sizes) -> Iterator[Record]:
        raise LLMCacheError("the disk is full")
        yield {}

    chosen_ = [quick("far", ("cls-nowhere/test.csv",)), Benchmark("fails", "", (), fails, None), quick("near")]
    far, failing, near = (record for _, record in run(chosen_, sizes, tmp_path / "out", ""))
    assert far == {"benchmark": "far", "skipped": f"{tmp_path} has no cls-nowhere/test.csv"}
    assert failing == {"benchmark": "fails", "failed": "the disk is full"}
    assert near["rounds"] == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"near.json", "near.png"}


def test_a_noisy_machine_is_reported() -> None:
    quiet = {
        "load": [0.1, 1.0], "processors": 2, "processors_of_others": 0.02, "repeats": 3, "rows": rows_of([1.0, 1.1]),
    }  # fmt: skip
    assert notes(quiet) == []
    noisy = notes({**quiet, "load": [3.1, 4.0], "processors_of_others": 1.3, "rows": rows_of([1.0, 2.0]), "repeats": 1})
    assert noisy == [
        "other processes kept 1.3 of 2 processors busy; the load average was 3.1 before and 4.0 after",
        "one repeat: nothing is known of the spread",
        "a: the slowest repeat took 2.00 times the quickest",
    ]


def test_work_of_other_processes_is_told_from_ones_own() -> None:
    before = moment()
    while moment()[2] - before[2] < 0.3:
        pass
    own = moment()
    assert own[2] - before[2] >= 0.3
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1)
        found = others_busy(own, moment())
    finally:
        other.kill()
        other.wait()
    assert found > 0.2  # a whole processor, or what other tests leave of it


def test_a_record_is_whole_or_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"x": np.float32(0.5), "y": np.int64(3)})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"x": 0.5, "y": 3}
    with pytest.raises(TypeError, match="no JSON"):
        write(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"x": 0.5, "y": 3}


def test_bars_have_the_spread_of_their_rows() -> None:
    row = {"name": "a", "documents": 10, "per_second": 4.0, "quickest": 2.0, "slowest": 5.0}
    bars = Bars("rows", ("name",), "per_second", "texts per second")
    assert bars.of({"rows": [row, {"name": "b", "skipped": "not installed"}]}) == [("a", 4.0, 2.0, 5.0)]


def test_names_and_patterns_choose_benchmarks() -> None:
    assert [one.name for one in chosen(["hit-*"])] == ["hit-banking77", "hit-squad"]
    assert [one.name for one in chosen(["store", "miss-squad"])] == ["miss-squad", "store"]
    assert len(chosen(["all"])) == len(benchmarks())
    with pytest.raises(ConfigError, match="no benchmark is called 'hits'"):
        chosen(["store", "hits"])


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def data() -> Path:
    if not (DATA / "cls-banking77" / "test.csv").exists():
        pytest.skip(f"BANKING77 is not in {DATA}")
    return DATA


def test_the_command_measures_names_what_is_missing_and_goes_on(llmcache: Command, data: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "results"
    folder.mkdir()
    (folder / "cls-banking77").symlink_to(data / "cls-banking77")
    arguments = ("--data", folder, "--out", out, "--repeats", 1, "--limit", 8)
    done = llmcache("bench", "run", "hit-*", *arguments)
    assert done.code == 1
    assert "hit-squad: not measured" in done.out
    assert "has no qa-squad2-dev" in done.out
    assert "one repeat" in done.out
    assert "vCache: not installed" in done.out
    assert "round 1 of 1" in done.err
    record = json.loads((out / "hit-banking77.json").read_bytes())
    rows = {row["name"]: row for row in record["rows"]}
    assert rows[OURS]["computed"] == 0
    assert rows[OURS]["difference"] < 1e-5
    assert len(record["load"]) == 2
    assert record["commit"]
    assert record["command"].startswith("llmcache bench run hit-*")
    assert [target["at_least"] for target in record["targets"]] == [200, 10, 3, 3]
    assert (out / "hit-banking77.png").read_bytes().startswith(b"\x89PNG")
    again = llmcache("bench", "run", "hit-banking77", *arguments)
    assert (again.code, "recorded already" in again.out) == (0, True)


def test_near_reuse_that_went_off_is_recorded_with_the_reason(llmcache: Command, tmp_path: Path) -> None:
    if not (DATA / "cls-sst2" / "train.txt").exists():
        pytest.skip(f"SST-2 is not in {DATA}")
    done = llmcache("bench", "run", "off-sst2", "--data", DATA, "--out", tmp_path, "--repeats", 1, "--limit", 12)
    assert done.code == 0
    record = json.loads((tmp_path / "off-sst2.json").read_bytes())
    assert (record["known"], record["before"], record["texts"]) == (192, 12, 12)
    row = {one["name"]: one for one in record["rows"]}[ASIDE]
    assert row["noted"]["off"]
    assert (row["noted"]["asked"], row["noted"]["near"]) == (12, 0)
    assert row["noted"]["looked_up"] <= 12
    assert row["computed"] == 12
    assert row["difference"] < 1e-5
    assert [(one["base"], one["at_least"]) for one in record["targets"]] == [(ALONE, 0.99), (SORTED, 0.99)]
    assert row["noted"]["off"] in done.out


def test_the_list_says_what_cannot_be_run(llmcache: Command, tmp_path: Path) -> None:
    done = llmcache("bench", "list", "--data", tmp_path, "--json")
    found = {one["name"]: one for one in json.loads(done.out)["benchmarks"]}
    assert found["store"]["missing"] is None
    assert "has no pair-qqp" in found["rivals-qqp"]["missing"]
    assert "vCache" in json.loads(done.out)["rivals_left_out"]
    assert "hit-squad" in llmcache("bench", "list").out


def test_a_command_line_that_makes_no_sense_is_one_line(llmcache: Command, tmp_path: Path) -> None:
    for names, folder, said in (("hits", tmp_path, "bench list"), ("store", tmp_path / "no", "is no folder")):
        done = llmcache("bench", "run", names, "--data", folder, "--out", tmp_path)
        assert done.code == 2
        assert said in done.err
        assert done.err.count("\n") == 1


def test_a_linked_benchmark_leaves_a_record_of_its_own_shape(llmcache: Command, data: Path, tmp_path: Path) -> None:
    done = llmcache("bench", "run", "encode-banking77", "--data", data, "--out", tmp_path, "--limit", 16, "--json")
    record = json.loads(done.out)
    assert done.code == 0
    assert {row["name"] for row in record["rows"]} >= {"model alone", "all miss", "all hit"}
    assert (tmp_path / "encode-banking77.png").exists()
