"""Purges over all ways to store and to name documents: no file contains a byte of them afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcache.indexes.errors import Busy, ConfigError
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.maintenance.chains import block_source
from llmcache.indexes.maintenance.compact import compact
from llmcache.indexes.maintenance.merge import merge
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.maintenance.snapshot import save
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.stats import unfinished
from llmcache.indexes.stats.runs import write_journal
from llmcache.indexes.store import Store

WIDTH, FEATURES, BLOCK = 16, 8, 4
EVERY = range(12)
SECRET = 7  # the document that goes
CHOICE = NearChoice(index="flat", projection="none")
ROLES = ("output", "head-00", "layer-0", "layer-1", "distilled-")


def key(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()[:16]


def keys(*several: bytes) -> Keys:
    return np.frombuffer(b"".join(several), np.uint64).reshape(-1, 2).copy()


def numbers(*seed: object, shape: tuple[int, ...] = (WIDTH,)) -> NDArray[np.float32]:
    drawn = np.random.default_rng(int.from_bytes(key(*seed)[:8], "little")).standard_normal(shape)
    return drawn.astype(np.float32)


def tokens(number: int) -> NDArray[np.int32]:
    """Return the token ids of a document. Documents of equal parity share the first block; the others are unique."""
    first = np.arange(4, dtype=np.int32) + 100 + number % 2
    return np.concatenate([first, np.random.default_rng([number, 5]).integers(1000, 1 << 29, 7).astype(np.int32)])


def name(number: int) -> str:
    return f"case {number:03d} of the archive/page"


def blocks(number: int) -> list[tuple[bytes, bytes, NDArray[np.int32]]]:
    """Return key, previous key, and tokens of each block of a document."""
    found, before, ids = [], b"", tokens(number)
    for at in range(0, len(ids), BLOCK):
        own = key("block", before, ids[at : at + BLOCK].tobytes())
        found.append((own, before, ids[at : at + BLOCK]))
        before = own
    return found


def traces(number: int, dtype: str) -> dict[str, bytes]:
    """Return byte strings that reveal a document, in all forms that files may contain, except its shared block."""
    found = {"id": name(number).encode(), "tokens": tokens(number)[4:].tobytes(), "last block": blocks(number)[-1][0]}
    for role in ROLES:
        found[f"key {role}"], found[f"text {role}"] = key("row", role, number), key("text", role, number)
        values = numbers("value", role, number, shape=(WIDTH,) if "layer" not in role else (len(tokens(number)), WIDTH))
        flat = values.reshape(-1)[:8]
        for form in ("<f4", "<f2"):
            found[f"{form} {role}"] = flat.astype(form).tobytes()
        bits = flat.view(np.uint32)  # rounded to the nearest, halves to even
        found[f"bfloat16 {role}"] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
        scale = np.abs(values).max(axis=-1, keepdims=True) / 127
        found[f"int8 {role}"] = np.rint(values / scale).astype(np.int8).reshape(-1)[:WIDTH].tobytes()
    features = numbers("features", number, shape=(FEATURES,))
    found["features"] = features.astype(np.float16).tobytes()
    found["landmark"] = features.astype(np.float16).astype(np.float32).tobytes()
    found["states of blocks"] = numbers("states", blocks(number)[1][0], shape=(BLOCK, WIDTH))[0, :8].tobytes()
    found["key of a block"] = blocks(number)[1][0]
    return found


def found_in(paths: Sequence[Path], number: int, dtype: str) -> dict[str, list[str]]:
    hits: dict[str, list[str]] = {}
    for file in (file for path in paths for file in path.rglob("*") if file.is_file()):
        data = file.read_bytes()
        for kind, trace in traces(number, dtype).items():
            if trace in data:
                hits.setdefault(kind, []).append(f"{file.parent.name}/{file.name[-8:]}")
    return hits


def bank(store: Store, role: str, dtype: str) -> Any:
    facts = {
        "layer-0": BankFacts(dtype, WIDTH, 2, FEATURES), "layer-1": BankFacts(dtype, WIDTH, 2, FEATURES),
        "prefix": BankFacts("float32", WIDTH, 2, 0), "fitted": BankFacts("float32", 1, 2, 0),
    }.get(role, BankFacts(dtype, WIDTH, 1, 0 if role.startswith("distilled-") else FEATURES))  # fmt: skip
    return store.bank("default", role, lambda: facts, CHOICE)


def fitted_key() -> bytes:
    return key("fitted")


def fill(store: Store, some: Sequence[int], dtype: str, roles: Sequence[str]) -> None:
    """Put documents as caches do: outputs and heads with ids and texts, states with token ids only."""
    distilled = f"distilled-{fitted_key().hex()[:16]}"
    for role in roles:
        place = bank(store, distilled if role == "distilled-" else role, dtype)
        if role == "prefix":
            rows = list({one[0]: one for number in some for one in blocks(number)}.values())
            place.put(
                keys(*(own for own, _, _ in rows)),
                [numbers("states", own, shape=(len(ids), WIDTH)) for own, _, ids in rows],
                tokens=[ids for _, _, ids in rows], sources=[block_source(before) for _, before, _ in rows],
                features=np.zeros((len(rows), 0), np.float32), cost=np.ones(len(rows), np.float32),
            )  # fmt: skip
            continue
        states, derived = role.startswith("layer"), role == "distilled-"
        own = keys(*(key("row", "output" if derived else role, number) for number in some))
        values = [
            numbers("value", role, number, shape=(len(tokens(number)), WIDTH) if states else (WIDTH,))
            for number in some
        ]
        place.put(
            own, values if states else np.stack(values),
            tokens=[tokens(number)[: 0 if derived else None] for number in some],
            sources=["" if states else name(number) for number in some],
            features=np.stack([numbers("features", number, shape=(FEATURES,)) for number in some])[
                :, : 0 if derived else None
            ],
            cost=np.ones(len(some), np.float32),
        )  # fmt: skip
        if not states and not derived:
            place.alias(keys(*(key("text", role, number) for number in some)), own)


def calibrate(store: Store, some: Sequence[int]) -> None:
    """Store landmarks in fitted arrays, as a calibration does, and the setting that names them."""
    landmarks = np.concatenate([numbers("features", one, shape=(FEATURES,)).astype(np.float16) for one in some])
    old = bank(store, "fitted", "float32")
    for own, extra in ((key("an older calibration"), 1.0), (fitted_key(), 0.0)):
        old.put(
            keys(own), [np.append(landmarks.astype(np.float32), extra)[:, None]], tokens=[np.zeros(0, np.int32)],
            sources=["calibration"], features=np.zeros((1, 0), np.float32), cost=np.zeros(1, np.float32),
        )  # fmt: skip
    setting = {
        "threshold": 1.0,
        "until": int(store.folder.now()) + 5,
        "fitted": {"key": fitted_key().hex(), "shapes": {}},
    }
    store.declare("default", {"model": "m"}, {"calibration": setting})


def unfinished_run(store: Store, folder: Path, number: int) -> Path:
    """Make an interrupted run with results of a document, registered with the store, and a killed writer's files."""
    run = folder / "out.unfinished"
    run.mkdir(mode=0o700)
    (run / "journal.json").write_text(json.dumps({"facts": {}}))
    (run / "rows.jsonl").write_text(json.dumps([name(number), "miss"]))
    (run / "vectors.f32").write_bytes(numbers("value", "output", number).tobytes())
    (run / "lock").touch()
    (folder / "out.npy.partial").write_bytes(numbers("value", "output", number).tobytes())
    unfinished.note(store.folder, unfinished.Run(run, "default"))
    return run


def stored(path: Path, dtype: str, roles: Sequence[str], calibrated: bool) -> None:
    store = Store.open(path, create=True)
    store.declare("default", {"model": "m"}, {})
    half = len(EVERY) // 2
    for some in (EVERY[:half], EVERY[half:]):
        fill(store, list(some), dtype, roles)
        store.commit()
    bank(store, "output", dtype).near.rebuild()
    bank(store, "output", dtype).read(np.arange(len(EVERY)))
    if calibrated:
        calibrate(store, list(EVERY))
    store.commit()
    write_journal(
        store.folder, store.writer,
        [
            {"day": "2026-11-30", "begin": 1, "end": 2, "namespace": "default", "corpus": one, "model": "m", "runs": 1}
            for one in (name(SECRET), name(3))
        ],
    )  # fmt: skip
    store.close()


def named(how: str) -> Doomed:
    text = keys(*(key("text", "output", SECRET) for _ in range(1)), key("text", "no entry"))
    return {
        "text": Doomed("default", keys=text, texts=1),
        "key": Doomed(keys=keys(key("row", "output", SECRET))),
        "id": Doomed("default", ids=[name(SECRET)]),
        "source": Doomed("default", sources=[f"case {SECRET:03d} of"]),
        "tokens": Doomed("default", tokens=[tokens(SECRET)]),
    }[how]


def check_others(path: Path, dtype: str, roles: Sequence[str]) -> None:
    """Check that all other documents are found by key, by text and as neighbours, with unchanged values."""
    store = Store.open(path)
    others = [number for number in EVERY if number != SECRET]
    for role in roles:
        if role == "distilled-":
            continue
        place = bank(store, role, dtype)
        if role == "prefix":
            wanted = {own: ids for number in others for own, _, ids in blocks(number)}
            rows = place.find(keys(*wanted))
            assert (rows >= 0).all(), "blocks that another document goes through stay"
            for own, value in zip(wanted, place.read(rows).values, strict=True):
                np.testing.assert_array_equal(value, numbers("states", own, shape=(len(wanted[own]), WIDTH)))
            continue
        rows = place.find(keys(*(key("row", role, number) for number in others)))
        assert (rows >= 0).all()
        assert place.find(keys(key("row", role, SECRET))).tolist() == [-1]
        reading = place.read(rows)
        assert reading.intact.all()
        for number, value, row in zip(others, reading.values, rows.tolist(), strict=True):
            shape = (len(tokens(number)), WIDTH) if role.startswith("layer") else (WIDTH,)
            np.testing.assert_allclose(value, numbers("value", role, number, shape=shape), atol=0.05)
            np.testing.assert_array_equal(place.tokens(row), tokens(number))
        if role in {"output", "head-00"}:
            texts = place.find_text(keys(*(key("text", role, number) for number in others)))
            assert texts.tolist() == rows.tolist()
            near, _ = place.nearest(np.stack([numbers("features", one, shape=(FEATURES,)) for one in others]), 1)
            assert near[:, 0].tolist() == rows.tolist()
    store.close()


WAYS = {
    "outputs": ("output",),
    "one layer": ("output", "layer-1"),
    "all layers": ("output", "layer-0", "layer-1"),
    "beginnings": ("output", "prefix"),
    "heads": ("output", "head-00", "layer-0"),
    "calibrated": ("output", "head-00", "layer-0", "prefix", "distilled-"),
}
DTYPES = {"outputs": "int8", "one layer": "bfloat16", "all layers": "float32", "heads": "float16"}


@pytest.mark.parametrize("how", ["text", "key", "id", "source", "tokens"])
@pytest.mark.parametrize("before", ["as stored", "compacted", "snapshot", "merged", "pending"])
@pytest.mark.parametrize("way", WAYS)
def test_no_byte_of_a_purged_document_is_left_and_all_others_are_served(
    tmp_path: Path, way: str, before: str, how: str
) -> None:
    path, dtype, roles = tmp_path / "store", DTYPES.get(way, "float32"), WAYS[way]
    stored(path, dtype, roles, way == "calibrated")
    if before in {"snapshot", "merged"}:
        made = tmp_path / "other"
        if before == "snapshot":
            save(path, made)
        else:
            merge([path], made)
        shutil.rmtree(path)
        path = made
    store = Store.open(path)
    run = unfinished_run(store, tmp_path, SECRET)
    if before == "compacted":
        compact(store, small=True)
    elif before == "pending":
        fill(store, [SECRET], dtype, roles)
    seen = set(found_in([path, tmp_path], SECRET, dtype))
    form = {"float32": "<f4", "float16": "<f2"}.get(dtype, dtype)
    expected = {"id", "key output", "text output", "tokens", "features"}
    expected |= {f"{kind} {role}" for kind in ("key", form) for role in roles if role not in {"prefix", "distilled-"}}
    expected |= {"states of blocks", "key of a block"} if "prefix" in roles else set()
    expected |= {"landmark", f"{form} distilled-"} if way == "calibrated" else set()
    assert seen >= expected, "what is looked for is there before"
    done = purge(store, named(how))
    store.close()
    assert found_in([path, tmp_path], SECRET, dtype) == {}
    assert (done.calibrations, done.unfinished) == (int(way == "calibrated"), 1)
    assert not run.exists()
    check_others(path, dtype, roles)
    store = Store.open(path)
    assert "calibration" not in store.manifest.namespaces["default"].config
    assert not any(name.startswith("distilled-") for name in store.manifest.namespaces["default"].banks)
    store.close()
    save(path, tmp_path / "after")
    assert found_in([tmp_path], SECRET, dtype) == {}


def test_a_dry_run_counts_the_same_and_leaves_all(tmp_path: Path) -> None:
    stored(tmp_path / "store", "float32", WAYS["calibrated"], calibrated=True)
    store = Store.open(tmp_path / "store")
    run = unfinished_run(store, tmp_path, SECRET)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    said = purge(store, named("id"), dry_run=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert run.exists()
    done = purge(store, named("id"))
    store.close()
    for count in ("rows", "aliases", "segments", "calibrations", "unfinished"):
        assert getattr(said, count) == getattr(done, count), count


def test_a_calibration_made_before_a_document_was_put_stays(tmp_path: Path) -> None:
    path = tmp_path / "store"
    stored(path, "float32", ("output", "distilled-"), calibrated=True)
    store = Store.open(path)
    config = store.manifest.namespaces["default"].config["calibration"]
    store.declare("default", {"model": "m"}, {"calibration": {**config, "until": 1000}})
    done = purge(store, named("id"))
    assert done.calibrations == 0
    rows = bank(store, "fitted", "float32").find(keys(fitted_key(), key("an older calibration")))
    assert (rows >= 0).tolist() == [True, False], "numbers that no calibration uses go"
    store.close()


def test_a_document_that_nobody_finds_takes_calibrations_that_it_may_be_in(tmp_path: Path) -> None:
    stored(tmp_path / "store", "float32", ("output", "distilled-"), calibrated=True)
    store = Store.open(tmp_path / "store")
    assert purge(store, Doomed("default", ids=["was evicted long ago"])).calibrations == 1
    store.close()


@pytest.mark.parametrize("chunk", ["", "#0-120", "#120-250"])
def test_the_chunks_of_a_document_go_by_its_id_and_those_of_others_stay(tmp_path: Path, chunk: str) -> None:
    store = Store.open(tmp_path / "store", create=True)
    store.declare("default", {"model": "m"}, {})
    place = bank(store, "output", "float32")
    names = [f"a{chunk}", "a#x", "ab#0-12", "b#a#0-3", f"{'é' * 600}#0-17"]
    place.put(
        keys(*map(key, names)), np.stack([numbers(one) for one in names]), tokens=[tokens(i) for i in range(5)],
        sources=names, features=np.zeros((5, FEATURES), np.float32), cost=np.ones(5, np.float32),
    )  # fmt: skip
    store.commit()
    assert purge(store, Doomed("default", ids=["a"])).rows == 1
    left = bank(store, "output", "float32")
    assert (left.find(keys(*map(key, names))) >= 0).tolist() == [False, True, True, True, True]
    assert purge(store, Doomed("default", ids=["é" * 600])).rows == 1
    assert purge(store, Doomed("default", sources=["b#", "ab"])).rows == 2
    store.close()


def test_blocks_stored_without_their_chain_go_by_their_tokens(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    store.declare("default", {"model": "m"}, {})
    place = bank(store, "prefix", "float32")
    rows = list({one[0]: one for number in EVERY for one in blocks(number)}.values())
    place.put(
        keys(*(own for own, _, _ in rows)), [numbers("states", own, shape=(len(ids), WIDTH)) for own, _, ids in rows],
        tokens=[ids for _, _, ids in rows], sources=[""] * len(rows), features=np.zeros((len(rows), 0), np.float32),
        cost=np.ones(len(rows), np.float32),
    )  # fmt: skip
    store.commit()
    assert purge(store, named("tokens")).rows == 3, "its own two blocks, and the one that it shares"
    store.close()
    assert found_in([tmp_path], SECRET, "float32") == {}


def test_what_continues_a_document_goes_with_it(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    store.declare("default", {"model": "m"}, {})
    fill(store, list(EVERY), "float32", ["prefix"])
    prompt = tokens(SECRET)[:6]  # ends inside the second block of the document, which goes on from there
    store.commit()
    purge(store, Doomed("default", tokens=[prompt]))
    left = bank(store, "prefix", "float32")
    assert (left.find(keys(*(own for own, _, _ in blocks(SECRET)))) >= 0).tolist() == [True, False, False]
    store.close()


def test_a_run_at_work_stops_a_purge_before_anything_is_removed(tmp_path: Path) -> None:
    stored(tmp_path / "store", "float32", ("output",), calibrated=False)
    store = Store.open(tmp_path / "store")
    run = unfinished_run(store, tmp_path, SECRET)
    import fcntl

    with (run / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="is active; stop it"):
            purge(store, named("id"))
    assert "id" in found_in([tmp_path / "store"], SECRET, "float32")
    with pytest.raises(ConfigError, match="is not an unfinished run"):
        purge(store, Doomed("default", ids=["x"], unfinished=[tmp_path / "notes.txt"]))
    (tmp_path / "notes.unfinished").mkdir()
    (tmp_path / "notes.unfinished" / "mine.txt").write_text("kept")
    assert purge(store, Doomed("default", ids=[name(SECRET)], unfinished=[tmp_path / "notes.npy"])).unfinished == 2
    assert (tmp_path / "notes.unfinished" / "mine.txt").read_text() == "kept"
    store.close()


@pytest.mark.parametrize("given", [{"ids": [""]}, {"sources": [""]}])
def test_an_empty_name_is_refused_since_it_would_be_every_document(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        Doomed("default", **given)
