from __future__ import annotations

import fcntl
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from llmcache.errors import ConfigError, CorpusError
from llmcache.pipeline.writers import CHUNK_ROWS, result_writer

ENDINGS = [".parquet", ".npy", ".jsonl"]
WIDTH = 5


@dataclass
class Answer:
    id: str
    output: NDArray[np.float32] | NDArray[np.float16]
    tier: str = "miss"
    layer: str | None = None
    source: str | None = None
    similarity: float | None = None
    consensus: float | None = None
    audited: bool = False


def answers(count: int, width: int = WIDTH) -> list[Answer]:
    outputs = np.random.default_rng(3).standard_normal((count, width)).astype(np.float32)
    found = [Answer(f"dé{i}\u2028", outputs[i]) for i in range(count)]
    for i in range(1, count, 3):
        found[i] = Answer(f"d{i}", outputs[i], "near", "output", "dé0\u2028", 0.984375, 0.5, i % 2 == 0)
    return found


def rows_of(path: Path) -> list[dict[str, object]]:
    """Read a result file back, in the same form for all formats."""
    if path.suffix == ".parquet":
        found: list[dict[str, object]] = pq.read_table(path).to_pylist()
        return found
    beside = path if path.suffix == ".jsonl" else path.with_name(path.name + ".jsonl")
    rows = [json.loads(line) for line in beside.read_text("utf-8").split("\n") if line]
    if path.suffix == ".npy":
        vectors = np.load(path, mmap_mode="r")
        assert (vectors.dtype, len(vectors)) == (np.float32, len(rows))
        rows = [row | {"output": vector.tolist()} for row, vector in zip(rows, vectors, strict=True)]
    return rows


def expected(found: list[Answer]) -> list[dict[str, object]]:
    return [vars(one) | {"output": one.output.astype(np.float32).tolist()} for one in found]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("count", [0, 1, CHUNK_ROWS, CHUNK_ROWS + 3])
def test_results_are_read_back_as_they_were_written(tmp_path: Path, ending: str, count: int) -> None:
    path, found = tmp_path / f"out{ending}", answers(count)
    with result_writer(path, width=WIDTH) as writer:
        writer.write(iter(found[:2]))
        writer.write(found[2:])
    assert writer.rows == count
    assert rows_of(path) == expected(found)
    assert names(tmp_path) == {path.name} | ({"out.npy.jsonl"} if ending == ".npy" else set())


def test_parquet_has_the_columns_promised(tmp_path: Path) -> None:
    with result_writer(str(tmp_path / "out.parquet"), width=WIDTH) as writer:
        writer.write(answers(CHUNK_ROWS + 1))
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert {field.name: str(field.type) for field in file.schema_arrow} == {
        "id": "string",
        "output": f"fixed_size_list<element: float>[{WIDTH}]",
        "tier": "string",
        "layer": "string",
        "source": "string",
        "similarity": "float",
        "consensus": "float",
        "audited": "bool",
    }
    assert file.metadata.num_row_groups == 2
    columns = [file.metadata.row_group(0).column(i) for i in range(6)]
    packed = {column.path_in_schema for column in columns if column.has_dictionary_page}
    assert packed == {"tier", "layer"}


@pytest.mark.parametrize("count", [0, 7])
def test_vectors_can_be_mapped_from_the_file(tmp_path: Path, count: int) -> None:
    found = answers(count)
    with result_writer(tmp_path / "out.npy", width=WIDTH) as writer:
        writer.write(found)
    vectors = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert isinstance(vectors, np.memmap)
    assert vectors.shape == (count, WIDTH)
    np.testing.assert_array_equal(vectors, np.array([one.output for one in found]).reshape(count, WIDTH))


@pytest.mark.parametrize("ending", ENDINGS)
def test_half_precision_is_written_as_float32(tmp_path: Path, ending: str) -> None:
    found = [Answer("a", np.array([0.1, -65504, 6e-8, 0, 1], np.float16))]
    with result_writer(tmp_path / f"out{ending}", width=WIDTH) as writer:
        writer.write(found)
    assert rows_of(tmp_path / f"out{ending}") == expected(found)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_output_may_change_after_it_was_taken(tmp_path: Path, ending: str) -> None:
    shared = np.zeros(WIDTH, np.float32)

    def reusing() -> Iterator[Answer]:
        for i in range(3):
            shared[:] = i
            yield Answer(str(i), shared)

    with result_writer(tmp_path / f"out{ending}", width=WIDTH) as writer:
        writer.write(reusing())
    assert [row["output"] for row in rows_of(tmp_path / f"out{ending}")] == [[float(i)] * WIDTH for i in range(3)]


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    with result_writer(tmp_path / "out.jsonl", width=3) as writer:
        writer.write([Answer("a", np.array([np.nan, 1, -np.inf], np.float32), similarity=float("nan"))])
    (row,) = rows_of(tmp_path / "out.jsonl")
    assert (row["output"], row["similarity"]) == ([None, 1.0, None], None)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("after", [0, 2, CHUNK_ROWS + 2])
def test_an_exception_leaves_the_older_result_untouched(tmp_path: Path, ending: str, after: int) -> None:
    path = tmp_path / f"out{ending}"
    with result_writer(path, width=WIDTH) as writer:
        writer.write(answers(4))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def failing() -> Iterator[Answer]:
        yield from answers(after)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), result_writer(path, width=WIDTH) as writer:
        writer.write(failing())
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_ends_in_one_line_and_leaves_the_older_result(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    with result_writer(path, width=WIDTH) as writer:
        writer.write(answers(4))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond this size fails like on a full disk
    try:
        with pytest.raises(CorpusError) as refused, result_writer(path, width=WIDTH) as writer:
            writer.write(answers(3 * CHUNK_ROWS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(refused.value).startswith(f"{path} cannot be written (")
    assert "\n" not in str(refused.value)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_an_error_of_the_results_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    def failing() -> Iterator[Answer]:
        yield from answers(1)
        raise OSError("the model's own")

    with (
        pytest.raises(OSError, match="the model's own"),
        result_writer(tmp_path / "o.npy", width=WIDTH) as writer,
    ):
        writer.write(failing())
    assert names(tmp_path) == set()


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "out.npy.partial").write_bytes(b"x" * 10_000)
    with result_writer(tmp_path / "out.npy", width=WIDTH) as writer:
        writer.write(answers(2))
    assert rows_of(tmp_path / "out.npy") == expected(answers(2))


@pytest.mark.parametrize("ending", ENDINGS)
def test_two_writers_of_one_result_do_not_mix(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    with result_writer(path, width=WIDTH) as writer:
        writer.write(answers(3))
        with pytest.raises(CorpusError, match="another run is writing"), result_writer(path, width=WIDTH):
            pass
    assert rows_of(path) == expected(answers(3))


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with result_writer(tmp_path / "out.jsonl", width=WIDTH) as writer:
        writer.write(answers(2))
    assert rows_of(tmp_path / "out.jsonl") == expected(answers(2))


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "far" / "real.jsonl")
    with result_writer(tmp_path / "out.jsonl", width=WIDTH) as writer:
        writer.write(answers(2))
    assert (tmp_path / "out.jsonl").is_symlink()
    assert rows_of(tmp_path / "far" / "real.jsonl") == expected(answers(2))


@pytest.mark.parametrize("name", ["out.csv", "out", "out.npz", "out.parquet.gz"])
def test_another_ending_is_refused_with_the_three(tmp_path: Path, name: str) -> None:
    refused = pytest.raises(ConfigError, match=r"\.parquet, \.npy or \.jsonl")
    with refused, result_writer(tmp_path / name, width=WIDTH):
        pass
    assert names(tmp_path) == set()


def test_a_width_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"), result_writer(tmp_path / "out.npy", width=0):
        pass


@pytest.mark.parametrize("shape", [(4,), (1,), (1, 5), ()])
def test_an_output_of_another_width_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    wrong = Answer("odd", np.zeros(shape, np.float32))
    refused = pytest.raises(ConfigError, match=r"'odd' has shape \[.*opened for \[5\]")
    with refused, result_writer(tmp_path / "out.npy", width=WIDTH) as writer:
        writer.write([*answers(1), wrong])
    assert names(tmp_path) == set()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_target_that_cannot_be_written_is_named_at_once(tmp_path: Path, ending: str) -> None:
    for path, said in (
        (tmp_path / "none" / f"o{ending}", "make it first"),
        (tmp_path / f"x{ending}", "is a folder"),
    ):
        (tmp_path / f"x{ending}").mkdir(exist_ok=True)
        with pytest.raises(CorpusError, match=said), result_writer(path, width=WIDTH):
            pass
    assert names(tmp_path) == {f"x{ending}"}
