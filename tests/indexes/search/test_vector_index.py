"""Tests of all index kinds against exact answers from NumPy, and with damaged bytes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, FaissMissing, SnapshotDamaged
from llmcache.indexes.search import vector_index as subject
from llmcache.indexes.search.index_kinds import KINDS
from llmcache.indexes.search.vector_index import VectorIndex, choose_kind

faiss: Any = pytest.importorskip("faiss")

FAISS_KINDS = [kind for kind in KINDS if not kind.startswith("torch")]
CPU_KINDS = [kind for kind in KINDS if kind != "cagra"]
TRAINED = [kind for kind in CPU_KINDS if "ivf" in kind]
GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
Answer = tuple[NDArray[np.int64], NDArray[np.float32]]


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def clustered(n: int, width: int, clusters: int, seed: int, noise: float = 0.5) -> NDArray[np.float32]:
    """Return unit vectors around random centres, which do not depend on the seed."""
    centres = unit(np.random.default_rng(99).standard_normal((clusters, width)))
    random = np.random.default_rng(seed)
    spread = random.standard_normal((n, width)) * (noise / width**0.5)
    return unit(centres[random.integers(0, clusters, n)] + spread)


def near(vectors: NDArray[np.float32], n: int, seed: int = 7) -> NDArray[np.float32]:
    """Return noisy copies of some of these vectors."""
    random = np.random.default_rng(seed)
    chosen = vectors[random.choice(len(vectors), n, replace=False)]
    return unit(chosen + random.standard_normal(chosen.shape) * (0.2 / chosen.shape[1] ** 0.5))


def signs(vectors: NDArray[np.float32], bits: int = 128) -> NDArray[np.uint8]:
    directions = np.random.default_rng(5).standard_normal((vectors.shape[1], bits))
    return np.packbits(vectors @ directions > 0, axis=1)


def for_kind(kind: str, vectors: NDArray[np.float32]) -> NDArray[Any]:
    return signs(vectors) if kind.startswith("binary-") else vectors


def every_similarity(queries: NDArray[Any], stored: NDArray[Any]) -> NDArray[np.float64]:
    """Return the exact similarity of each pair, [queries, stored]."""
    if queries.dtype == np.uint8:
        differing = np.unpackbits(queries[:, None] ^ stored[None], axis=2).sum(axis=2)
        return np.asarray(np.cos(np.pi * differing / (8 * stored.shape[1])), np.float64)
    return queries.astype(np.float64) @ stored.astype(np.float64).T


def cagra_on_cpu(vectors: NDArray[np.float32]) -> VectorIndex:
    """Return a cagra index as it is after deserialisation on a machine without a GPU."""
    index = faiss.IndexHNSWCagra(vectors.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    index.base_level_only = True
    return VectorIndex(index, "cagra", False)


@cache
def stored() -> NDArray[np.float32]:
    return clustered(2000, 32, 60, seed=1)


@cache
def built(kind: str) -> VectorIndex:
    """Return a shared index, which tests must not add to."""
    return cagra_on_cpu(stored()) if kind == "cagra" else VectorIndex.build(for_kind(kind, stored()), kind=kind)


def reopened(index: VectorIndex) -> VectorIndex:
    return VectorIndex.from_bytes(index.to_bytes(), kind=index.kind, dim=index.dim, count=len(index))


def assert_same(one: Answer, other: Answer, *, rounding: float = 0.0) -> None:
    """Check for the same rows in the same order. rounding: largest difference of similarities."""
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], rtol=0, atol=rounding)


def rounding_of(kind: str) -> float:
    """By how much similarities of the same vectors may differ: builds of FAISS sum those of a CAGRA graph otherwise."""
    return 1e-6 if kind == "cagra" else 0.0


def slack(kind: str) -> float:
    """Return the largest error of a reported similarity."""
    return {"ivf-sq8": 6e-3, "ivf-fp16": 2e-4, "ivf-pq": 2e-4, "torch-fp16": 2e-4}.get(kind, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
class IndexContract:
    """Tests that every kind of index must pass."""

    def test_reported_similarities_are_those_of_numpy(self, kind: str) -> None:
        queries = for_kind(kind, near(stored(), 200))
        ids, similarity = built(kind).nearest(queries, 3)
        exact = every_similarity(queries, for_kind(kind, stored()))
        assert (ids >= 0).all()
        expected = np.take_along_axis(exact, ids, axis=1)
        np.testing.assert_allclose(similarity, expected, atol=slack(kind))

    def test_the_nearest_is_the_nearest_of_numpy(self, kind: str) -> None:
        queries = for_kind(kind, near(stored(), 200))
        ids, _ = built(kind).nearest(queries, 1)
        exact = every_similarity(queries, for_kind(kind, stored()))
        found = np.take_along_axis(exact, ids, axis=1)[:, 0]
        assert (found >= exact.max(axis=1) - 1e-6).mean() >= 0.99

    def test_answers_have_their_dtypes_and_order(self, kind: str) -> None:
        ids, similarity = built(kind).nearest(for_kind(kind, near(stored(), 20)), 5)
        assert (ids.dtype.name, similarity.dtype.name) == ("int64", "float32")
        assert ids.shape == similarity.shape == (20, 5)
        assert (np.diff(similarity, axis=1) <= 0).all()
        assert all(len(set(row)) == 5 for row in ids.tolist())
        assert similarity.max() <= 1

    def test_a_stored_vector_has_similarity_one_to_itself(self, kind: str) -> None:
        _, similarity = built(kind).nearest(for_kind(kind, stored()[:100]), 1)
        assert similarity.max() <= 1
        np.testing.assert_allclose(similarity, 1, atol=slack(kind))

    def test_it_knows_its_size_and_kind(self, kind: str) -> None:
        index = built(kind)
        binary = kind.startswith("binary-")
        assert (len(index), index.kind, index.dim, index.binary) == (
            2000,
            kind,
            128 if binary else 32,
            binary,
        )

    def test_no_queries_get_no_answers(self, kind: str) -> None:
        ids, similarity = built(kind).nearest(for_kind(kind, stored()[:5])[:0], 4)
        assert ids.shape == similarity.shape == (0, 4)

    def test_more_neighbours_than_vectors_are_filled_up_with_none(self, kind: str) -> None:
        ids, similarity = built(kind).nearest(for_kind(kind, stored()[:2]), 2100)
        assert (ids[:, 2000:] == -1).all()
        assert ((ids == -1) == np.isneginf(similarity)).all()
        assert not np.isnan(similarity).any()

    def test_answers_survive_the_bytes(self, kind: str) -> None:
        index = built(kind)
        queries = for_kind(kind, near(stored(), 100))
        again = reopened(index)
        assert (len(again), again.kind, again.dim, again.binary) == (2000, kind, index.dim, index.binary)
        assert_same(again.nearest(queries, 5), index.nearest(queries, 5), rounding=rounding_of(kind))

    def test_bytes_of_every_sort_are_read(self, kind: str) -> None:
        data, queries = built(kind).to_bytes(), for_kind(kind, stored()[:10])
        answers = [
            VectorIndex.from_bytes(form, kind=kind, dim=built(kind).dim, count=2000).nearest(queries, 2)
            for form in (bytes(data), memoryview(bytes(data)), np.frombuffer(data, np.uint8))
        ]
        assert_same(answers[0], answers[1])
        assert_same(answers[0], answers[2])

    def test_another_size_width_or_kind_than_expected_is_damage(self, kind: str) -> None:
        data, dim = built(kind).to_bytes(), built(kind).dim
        for count in (0, 1999, 2001):
            with pytest.raises(SnapshotDamaged, match="2000"):
                VectorIndex.from_bytes(data, kind=kind, dim=dim, count=count)
        with pytest.raises(SnapshotDamaged, match=str(dim)):
            VectorIndex.from_bytes(data, kind=kind, dim=dim + 8, count=2000)
        for other in set(KINDS) - {kind}:
            with pytest.raises(SnapshotDamaged, match=r"expected (b'.*found b'|codes of)"):
                VectorIndex.from_bytes(data, kind=other, dim=dim, count=2000)

    def test_a_truncated_index_is_damaged(self, kind: str) -> None:
        data, dim = bytes(built(kind).to_bytes()), built(kind).dim
        lengths = {0, 3, 4, 40, len(data) - 1, *np.linspace(5, len(data) - 2, 20).astype(int).tolist()}
        for length in lengths:
            with pytest.raises(SnapshotDamaged):
                VectorIndex.from_bytes(data[:length], kind=kind, dim=dim, count=2000)

    def test_vectors_of_another_shape_or_type_are_refused(self, kind: str) -> None:
        good = for_kind(kind, stored()[:4])
        other = stored()[:4] if good.dtype == np.uint8 else signs(stored()[:4])
        for wrong in (good[0], good[:, :-1], other, good.astype(np.int32), np.zeros((2, 0), good.dtype)):
            with pytest.raises(ValueError, match=r"takes|holds"):
                built(kind).nearest(wrong, 1)

    def test_no_neighbours_cannot_be_asked_for(self, kind: str) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            built(kind).nearest(for_kind(kind, stored()[:1]), 0)


class TestEveryKind(IndexContract):
    pass


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_added_vectors_are_found_under_the_next_numbers(kind: str) -> None:
    rows = for_kind(kind, stored())
    index = VectorIndex.build(rows[:1500], kind=kind)
    index.add(rows[1500:])
    index.add(rows[:0])
    assert len(index) == 2000
    for opened in (index, reopened(index)):
        ids, similarity = opened.nearest(rows[1500:], 1)
        np.testing.assert_allclose(similarity, 1, atol=slack(kind))
        assert (ids[:, 0] == np.arange(1500, 2000)).mean() > 0.98  # sign bits may tie


@pytest.mark.parametrize("kind", TRAINED)
def test_too_few_vectors_to_train_say_how_many_are_needed(kind: str) -> None:
    with pytest.raises(ConfigError, match="at least 640 vectors to train on, got 639"):
        VectorIndex.build(for_kind(kind, stored()[:639]), kind=kind)
    assert len(VectorIndex.build(for_kind(kind, stored()[:640]), kind=kind)) == 640


@pytest.mark.parametrize("kind", [kind for kind in CPU_KINDS if kind not in TRAINED])
def test_an_empty_index_answers_none_and_can_be_filled(kind: str) -> None:
    rows = for_kind(kind, stored())
    index = reopened(VectorIndex.build(rows[:0], kind=kind))
    ids, similarity = index.nearest(rows[:3], 2)
    assert (ids == -1).all()
    assert np.isneginf(similarity).all()
    index.add(rows[:10])
    assert index.nearest(rows[:10], 1)[0][:, 0].tolist() == list(range(10))


@pytest.mark.parametrize("width", [1, 3, 7, 17, 33])
def test_odd_widths_can_be_quantised(width: int) -> None:
    rows = unit(np.random.default_rng(0).standard_normal((700, width)))
    for kind in ("ivf-pq", "ivf-sq8"):
        _, similarity = reopened(VectorIndex.build(rows, kind=kind)).nearest(rows, 1)
        np.testing.assert_allclose(similarity, 1, atol=2 * slack(kind))


def test_the_kind_follows_from_the_number_of_vectors() -> None:
    sizes = (0, 19_999, 20_000, 99_999, 100_000, 1_000_000)
    assert [choose_kind(n) for n in sizes] == ["flat", "flat", "ivf-flat", "ivf-flat", "ivf-pq", "ivf-pq"]
    assert choose_kind(100_000, binary=True) == "binary-flat"
    assert choose_kind(1_000_000, binary=True) == "binary-ivf"
    assert VectorIndex.build(stored()).kind == "flat"
    assert VectorIndex.build(signs(stored())).kind == "binary-flat"


def test_a_zero_vector_is_near_nothing() -> None:
    index = VectorIndex.build(np.zeros((3, 8), np.float32))
    assert (index.nearest(np.eye(8, dtype=np.float32), 1)[1] == 0).all()
    assert (index.nearest(np.zeros((1, 8), np.float32), 1)[1] == 0).all()


def test_vectors_are_copied_and_left_as_they_were() -> None:
    rows = stored().copy()
    index = VectorIndex.build(rows, kind="flat")
    np.testing.assert_array_equal(rows, stored())
    rows[:] = 0
    assert index.nearest(stored()[:1], 1)[1][0, 0] == pytest.approx(1, abs=1e-6)


def test_other_floats_and_layouts_are_converted() -> None:
    index, queries = built("flat"), near(stored(), 10)
    expected = index.nearest(queries, 3)
    assert_same(index.nearest(np.asfortranarray(queries), 3), expected)
    assert_same(index.nearest(queries.astype(np.float64), 3), expected)
    np.testing.assert_array_equal(index.nearest(queries.astype(np.float16), 1)[0], expected[0][:, :1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_refused_by_their_row(value: float) -> None:
    rows = stored().copy()
    rows[123, 4] = value
    index = VectorIndex.build(stored()[:5])
    for use in (VectorIndex.build, index.add, lambda rows: index.nearest(rows, 1)):
        with pytest.raises(ValueError, match="row 123 "):
            use(rows)
    assert len(index) == 5


def test_the_same_seed_builds_the_same_index() -> None:
    rows = stored()
    one, same, other = (bytes(VectorIndex.build(rows, kind="ivf-flat", seed=s).to_bytes()) for s in (4, 4, 5))
    assert one == same
    assert one != other


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-pq", "hnsw"])
def test_recall_is_99_percent_on_twenty_thousand_clustered_vectors(kind: str) -> None:
    rows = clustered(20_000, 64, 400, seed=2)
    queries = np.concatenate([near(rows, 500), clustered(500, 64, 400, seed=3)])
    expected = (queries @ rows.T).max(axis=1)
    ids, _ = VectorIndex.build(rows, kind=kind).nearest(queries, 1)
    similarity = (queries * rows[ids[:, 0]]).sum(axis=1)
    assert (similarity >= expected - 1e-6).mean() >= 0.99


@pytest.mark.parametrize("kind", ["binary-ivf", "binary-hnsw"])
def test_recall_is_99_percent_on_twenty_thousand_codes(kind: str) -> None:
    rows = signs(clustered(20_000, 64, 400, seed=2))
    queries = signs(near(clustered(20_000, 64, 400, seed=2), 500))
    _, expected = VectorIndex.build(rows, kind="binary-flat").nearest(queries, 1)
    _, similarity = VectorIndex.build(rows, kind=kind).nearest(queries, 1)
    assert (similarity == expected).mean() >= 0.99


def test_eight_bits_lose_no_more_similarity_than_they_promise() -> None:
    rows, fresh = clustered(20_000, 64, 400, seed=2), clustered(500, 64, 9, seed=3)
    index = VectorIndex.build(rows, kind="ivf-sq8")
    index.add(unit(fresh - 0.2))  # unlike what it was trained on
    rows = np.concatenate([rows, unit(fresh - 0.2)])
    for queries in (clustered(500, 64, 400, seed=3), rows[-500:]):
        ids, similarity = index.nearest(queries, 1)
        exact = queries @ rows.T
        found = np.take_along_axis(exact, ids, axis=1)[:, 0]
        assert np.quantile(exact.max(axis=1) - found, 0.99) < 0.005
        assert np.abs(found - similarity[:, 0]).max() < slack("ivf-sq8")


def test_an_unknown_kind_or_device_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match="choose one of: auto, flat, ivf-flat"):
        VectorIndex.build(stored(), kind="annoy")
    with pytest.raises(ConfigError, match="'cpu' or 'cuda', got 'mps'"):
        VectorIndex.build(stored(), device="mps")
    with pytest.raises(ConfigError, match="choose one of"):
        VectorIndex.from_bytes(b"", kind="annoy", dim=1, count=1)


@pytest.mark.skipif(GPU, reason="FAISS sees a GPU")
def test_a_gpu_that_is_not_there_names_the_extra_to_install() -> None:
    for kind in FAISS_KINDS:
        with pytest.raises(ConfigError, match=r"llmcache\[gpu\]"):
            VectorIndex.build(for_kind(kind, stored()), kind=kind, device="cuda")
        with pytest.raises(ConfigError, match=r"llmcache\[gpu\]"):
            VectorIndex.from_bytes(b"", kind=kind, dim=32, count=2000, device="cuda")
    with pytest.raises(ConfigError, match=r"llmcache\[gpu\]"):
        VectorIndex.build(stored(), kind="cagra")
    with pytest.raises(ConfigError, match="only on a GPU"):
        built("cagra").add(stored()[:1])


def test_faiss_is_imported_when_it_is_first_needed() -> None:
    code = (
        "import sys, llmcache.indexes.search.vector_index; sys.exit('faiss' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *rest: Any) -> Any:
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'faiss'", name="faiss")
        return real(name, *rest)

    real = __import__
    monkeypatch.setattr("builtins.__import__", absent)
    with pytest.raises(FaissMissing, match=r"llmcache\[cpu\]"):
        VectorIndex.build(stored())


def test_faiss_keeps_its_settings() -> None:
    def settings() -> list[int]:
        return [
            faiss.omp_get_max_threads(),
            faiss.get_deserialization_loop_limit(),
            faiss.get_deserialization_vector_byte_limit(),
        ]

    before = settings()
    reopened(VectorIndex.build(stored(), kind="ivf-flat")).nearest(stored()[:5], 1)
    with pytest.raises(SnapshotDamaged):
        VectorIndex.from_bytes(built("flat").to_bytes()[:100], kind="flat", dim=32, count=2000)
    assert settings() == before


def with_ids(change: Callable[[NDArray[np.int64]], None]) -> bytes:
    """Return the bytes of an ivf-flat index with changed ids in one list."""
    index = built("ivf-flat")
    data = bytearray(index.to_bytes())
    lists = index._index.invlists
    ids = faiss.rev_swig_ptr(lists.get_ids(0), lists.list_size(0)).copy()
    at = data.find(ids.tobytes())
    change(ids)
    data[at : at + ids.nbytes] = ids.tobytes()
    return bytes(data)


@pytest.mark.parametrize("value", [2000, -1, 2**62])
def test_an_id_out_of_range_is_damage(value: int) -> None:
    def change(ids: NDArray[np.int64]) -> None:
        ids[0] = value

    with pytest.raises(SnapshotDamaged, match="expected ids from 0 to 1999"):
        VectorIndex.from_bytes(with_ids(change), kind="ivf-flat", dim=32, count=2000)


def test_an_id_that_is_there_twice_is_damage() -> None:
    def change(ids: NDArray[np.int64]) -> None:
        ids[0] = ids[1]

    with pytest.raises(SnapshotDamaged, match="1 of 2000 missing"):
        VectorIndex.from_bytes(with_ids(change), kind="ivf-flat", dim=32, count=2000)


def test_another_metric_is_damage() -> None:
    index = faiss.IndexFlatL2(32)
    index.add(stored())
    data = bytearray(faiss.serialize_index(index))
    data[:4] = b"IxFI"
    with pytest.raises(SnapshotDamaged, match="metric"):
        VectorIndex.from_bytes(bytes(data), kind="flat", dim=32, count=2000)


def test_an_index_that_answers_nonsense_is_not_believed() -> None:
    class Nonsense:
        d, ntotal = 2, 4

        def search(self, queries: Any, k: int, params: Any = None) -> tuple[Any, Any]:
            ids = np.array([[0, 4, 2**40, -7]])
            return np.array([[np.nan, 0.9, 0.8, -3.4e38]], np.float32), ids

    ids, similarity = VectorIndex(Nonsense(), "flat", False).nearest(np.ones((1, 2), np.float32), 4)
    assert (ids == -1).all()
    assert np.isneginf(similarity).all()


def outcome(data: bytes, kind: str) -> str:
    """Load damaged bytes in a child process with little memory and time, and return the outcome."""
    child = os.fork()
    if child == 0:
        verdict = 4
        try:
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(20)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            verdict = judged(data, kind)
        finally:
            os._exit(verdict)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return ("same", "damaged", "other", "unsound", "error")[os.WEXITSTATUS(status)]


def judged(data: bytes, kind: str) -> int:
    queries = for_kind(kind, stored()[:64])
    try:
        index = VectorIndex.from_bytes(data, kind=kind, dim=built(kind).dim, count=2000)
    except SnapshotDamaged:
        return 1
    ids, similarity = index.nearest(queries, 5)
    if ids.min() < -1 or ids.max() >= 2000 or np.isnan(similarity).any():
        return 3
    expected = expected_answer(kind)
    return 0 if np.array_equal(ids, expected[0]) and np.array_equal(similarity, expected[1]) else 2


@cache
def expected_answer(kind: str) -> Answer:
    return built(kind).nearest(for_kind(kind, stored()[:64]), 5)


def damaged(data: bytes, how: str, random: np.random.Generator) -> bytes:
    broken = bytearray(data)
    if how == "bit":
        at = random.integers(len(data))
        broken[at] ^= 1 << int(random.integers(8))
    elif how == "header bit":
        at = random.integers(300)
        broken[at] ^= 1 << int(random.integers(8))
    else:
        size = int(random.choice([4, 8]))
        at = random.integers(len(data) - 8)
        value = int(random.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**40, 2**62])) % 2 ** (8 * size)
        broken[at : at + size] = value.to_bytes(size, "little")
    return bytes(broken)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("how", ["bit", "header bit", "extreme value"])
@pytest.mark.parametrize("kind", FAISS_KINDS)  # FAISS is C++; what torch does with a matrix ends in no crash
def test_damaged_bytes_never_crash_and_never_give_an_id_out_of_range(kind: str, how: str) -> None:
    # Other answers are possible: a flipped bit in a vector is another vector. That is for the checksum.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # a forked child has none of the parent's threads
    try:
        data = bytes(built(kind).to_bytes())
        expected_answer(kind)
        random = np.random.default_rng(len(kind) * 10 + len(how))
        outcomes = Counter(outcome(damaged(data, how, random), kind) for _ in range(40))
    finally:
        faiss.omp_set_num_threads(threads)
    assert set(outcomes) <= {"same", "damaged", "other"}, outcomes


def test_a_damaged_count_of_entry_points_is_not_used() -> None:
    data = bytearray(built("cagra").to_bytes())
    assert data[39:43] == b"\0\x01\0\0"  # two flags and the low half of 32
    data[42:44] = b"\0\0"
    again = VectorIndex.from_bytes(bytes(data), kind="cagra", dim=32, count=2000)
    found, expected = again.nearest(stored()[:9], 3), built("cagra").nearest(stored()[:9], 3)
    assert_same(found, expected, rounding=rounding_of("cagra"))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device, or no FAISS build for one")
class TestOnGpu:
    @pytest.mark.parametrize("kind", ["flat", "ivf-flat", "ivf-sq8"])
    def test_a_gpu_answers_like_the_cpu(self, kind: str) -> None:
        on_gpu = VectorIndex.build(stored(), kind=kind, device="cuda")
        on_gpu.add(stored()[:3])
        queries = near(stored(), 200)
        again = VectorIndex.from_bytes(on_gpu.to_bytes(), kind=kind, dim=32, count=2003)
        back = VectorIndex.from_bytes(again.to_bytes(), kind=kind, dim=32, count=2003, device="cuda")
        expected = again.nearest(queries, 3)
        for index in (on_gpu, back):
            np.testing.assert_allclose(index.nearest(queries, 3)[1], expected[1], atol=2e-3)

    @pytest.mark.skipif(not hasattr(faiss, "GpuIndexCagra"), reason="this FAISS build has no cuVS")
    def test_a_cagra_index_grows_and_is_searched_on_either_device(self) -> None:
        on_gpu = VectorIndex.build(stored()[:1500], kind="cagra", device="cuda")
        on_gpu.add(stored()[1500:])
        on_cpu = reopened(on_gpu)
        for index in (on_gpu, on_cpu):
            ids, similarity = index.nearest(stored(), 1)
            assert (ids[:, 0] == np.arange(2000)).mean() > 0.99
            assert similarity.mean() > 0.99
        assert on_gpu.nearest(stored()[:5], 100)[0].shape == (5, 100)

    def test_kinds_without_a_gpu_version_stay_on_the_cpu_and_say_so_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        subject._warn_cpu_only_once.cache_clear()
        for _ in range(2):
            VectorIndex.build(stored(), kind="hnsw", device="cuda")
        assert [record.message for record in caplog.records if "hnsw" in record.message] == [
            "indexes of kind hnsw stay on the CPU: FAISS does not support them on a GPU"
        ]
