"""Hostile stores: made by hand to hurt. Each is opened in a child process with 2 GiB of address space and 20 seconds.

Whatever is in them, a store ends in the error named here, or it opens and what was tampered with is a miss: no other
exception, no signal, no hang, no wrong value, no file outside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import faiss
import numpy as np
import numpy.ma  # numpy would import these two on first use, which runs code
import numpy.random
import pytest
from numpy.typing import NDArray

from llmcache.indexes.errors import LLMCacheError
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import (
    ALIAS,
    HEADER,
    ROW,
    Keys,
)
from llmcache.indexes.maintenance.purge import Doomed, purge
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

WIDTH, FEATURES = 24, 16
EVERY, FIRST = list(range(12)), 6  # entries; of these, in the first segment, which is the one tampered with
CHOICE = NearChoice(index="flat", projection="none")
ALL, OTHERS = len(EVERY), len(EVERY) - FIRST
DAMAGED, UNTRUSTED = "SnapshotDamaged", "UntrustedSnapshot"
FORKS = multiprocessing.get_context("forkserver")


def keys_of(numbers: list[int]) -> Keys:
    first = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([first, first ^ np.uint64(0x5555)], axis=1)


def texts_of(numbers: list[int]) -> Keys:
    return keys_of(numbers)[:, ::-1].copy()


def values_of(numbers: list[int], width: int = WIDTH) -> NDArray[np.float32]:
    rows = [np.random.default_rng([number, width]).standard_normal(width) for number in numbers]
    return np.array(rows, np.float32).reshape(-1, width)


def facts() -> BankFacts:
    return BankFacts("float32", WIDTH, 1, FEATURES)


def filled(path: Path) -> None:
    for numbers in (EVERY[:FIRST], EVERY[FIRST:]):
        store = Store.open(path, create=True)
        if store.namespace("default") is None:
            store.declare("default", {"model": "m"}, {})
        bank = store.bank("default", "output", facts, CHOICE)
        bank.put(
            keys_of(numbers),
            values_of(numbers),
            tokens=[np.array([number, 1], np.int32) for number in numbers],
            sources=[str(number) for number in numbers],
            features=values_of(numbers, FEATURES),
            cost=np.ones(len(numbers), np.float32),
        )
        bank.alias(texts_of(numbers), keys_of(numbers))
        store.commit()
        bank.near.rebuild()
        store.commit()
        store.write_counters({"documents": 1})
        store.close()
    for old in sorted(path.glob("m-*.json"))[:-1]:  # nothing to fall back to
        old.unlink()


# -- in the child -------------------------------------------------------------------------------------------


def look(path: Path, **asked: Any) -> tuple[str, int]:
    """Return the error of opening, or "", and the number of entries served. AssertionError for wrong values."""
    try:
        store = Store.open(path, **asked)
    except LLMCacheError as error:
        return type(error).__name__, 0
    assert (len(store.counters()) < 10, len(store.manifest.namespaces) < 10_000) == (True, True)
    if store.namespace("default") is None or "output" not in store.manifest.namespaces["default"].banks:
        return "", 0
    bank = store.bank("default", "output", facts, CHOICE)
    rows = bank.find(keys_of(EVERY))
    texts = bank.find_text(texts_of(EVERY))
    assert ((texts == -1) | (texts == rows)).all()
    held = np.flatnonzero(rows >= 0)
    reading = bank.read(rows[held])
    good = held[reading.intact]
    expected = values_of(EVERY)
    assert not len(good) or np.array_equal(np.asarray(reading.values)[reading.intact], expected[good])
    tokens = [bank.tokens(int(rows[i])).tolist() for i in good]
    good = np.array([i for i, found in zip(good, tokens, strict=True) if found in ([], [i, 1])])  # others do not match
    assert all(bank.source(int(rows[i])) in {"", str(i)} for i in good)
    assert isinstance(bank.cost(rows[held]), float)
    near, similarity = bank.nearest(values_of(EVERY, FEATURES), 3)
    assert ((near >= -1) & (near < len(bank))).all()
    assert (similarity[near >= 0] <= 1.0001).all()
    store.close()
    return "", len(good)


def forbid(put: Callable[[object, str, object], object]) -> None:
    """Make everything raise that can execute code from data. Modules must be imported before."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("something was about to be executed")

    for module, names in (
        ("pickle", ("load", "loads", "_load", "_loads", "Unpickler", "_Unpickler")),
        ("marshal", ("load", "loads")),
        ("shelve", ("open",)),
        ("numpy", ("load",)),
        ("torch", ("load",)),
        ("torch.jit", ("load",)),
        ("builtins", ("eval", "exec")),
    ):
        for name in names if module in sys.modules else ():
            put(sys.modules[module], name, refuse)


def child(path: Path, answer: Connection) -> None:
    """Open the store as its owner and as another user."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forbid(setattr)
    try:
        found = look(path), look(path, trust="untrusted", allow_untrusted=True)
        answer.send((found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10))
    except BaseException as error:
        answer.send(f"{type(error).__name__}: {error}")
        raise


def looked_at(path: Path) -> tuple[tuple[str, int], tuple[str, int]]:
    here, there = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=child, args=(path, there))
    process.start()
    there.close()
    assert here.poll(20), "it hangs"
    try:
        found = here.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the process ended with {process.exitcode}")
    process.join(20)
    assert not isinstance(found, str), found
    assert process.exitcode == 0
    assert found[1] < 192, f"it took {found[1]} MiB"
    seen: tuple[tuple[str, int], tuple[str, int]] = found[0]
    return seen


# -- by hand ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A change to a store, and the result for its owner and for others: an error, or entries served."""

    change: Callable[[Path], object]
    owner: str | int
    stranger: str | int


def manifest_of(path: Path) -> Path:
    (found,) = path.glob("m-*.json")
    return found


def raw(path: Path, body: bytes) -> None:
    """Write a manifest with a valid checksum line."""
    manifest_of(path).write_bytes(body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n")


def document(path: Path) -> Any:
    return json.loads(manifest_of(path).read_bytes().split(b"\n")[0])


def bank_in(manifest: Any) -> Any:
    return manifest["namespaces"]["default"]["banks"]["output"]


def said(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Write a manifest with changed content."""

    def apply(path: Path) -> None:
        manifest = document(path)
        change(manifest)
        raw(path, json.dumps(manifest, sort_keys=True).encode())

    return apply


def in_bank(**values: Any) -> Callable[[Path], None]:
    return said(lambda manifest: bank_in(manifest).update(values))


def in_segment(**values: Any) -> Callable[[Path], None]:
    return said(lambda manifest: bank_in(manifest)["segments"][0].update(values))


def in_file(kind: str, **values: Any) -> Callable[[Path], None]:
    def change(manifest: Any) -> None:
        next(one for one in files_in(manifest) if one["name"].endswith(kind)).update(values)

    return said(change)


def files_in(manifest: Any) -> list[Any]:
    bank = bank_in(manifest)
    return [*bank["segments"][0]["files"], bank["index"]["file"], bank["projection"]]


def file_of(path: Path, kind: str) -> Path:
    if kind == "FORMAT":
        return path / "FORMAT"
    if kind == "json":
        return manifest_of(path)
    if kind == "stat":
        return next(iter(path.glob("stat/*.json")))
    return path / str(next(one["name"] for one in files_in(document(path)) if one["name"].endswith(kind)))


def holding(kind: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Write a file with other bytes, and a manifest with their checksum."""

    def apply(path: Path) -> None:
        file = file_of(path, kind)
        data = change(file.read_bytes())
        file.write_bytes(data)
        sha256 = None if kind == ".seg" else hashlib.sha256(data).hexdigest()
        in_file(kind, size=len(data), sha256=sha256)(path)

    return apply


def records(**columns: Any) -> Callable[[Path], None]:
    """Write changed records of rows."""

    def change(data: bytes) -> bytes:
        rows = np.frombuffer(data[HEADER.itemsize :], ROW).copy()
        for name, value in columns.items():
            rows[name] = value(rows[name]) if callable(value) else value
        return data[: HEADER.itemsize] + rows.tobytes()

    return holding(".row", change)


def header(**fields: Any) -> Callable[[Path], None]:
    def change(data: bytes) -> bytes:
        found = np.frombuffer(data[: HEADER.itemsize], HEADER).copy()
        for name, value in fields.items():
            found[name] = value
        return found.tobytes() + data[HEADER.itemsize :]

    return holding(".row", change)


def both(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        for change in changes:
            change(path)

    return apply


def patched(at: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:at] + data + old[at + len(data) :]


def instead(make: Callable[[Path], object]) -> Callable[[str], Callable[[Path], None]]:
    """Put something that is not a plain file in place of one."""

    def of_kind(kind: str) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            file = file_of(path, kind)
            kept = path.parent / "elsewhere"
            file.rename(kept)
            make(file)

        return apply

    return of_kind


def a_socket(file: Path) -> None:
    before = Path.cwd()
    os.chdir(file.parent)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(file.name)
    finally:
        os.chdir(before)
    file.chmod(0o600)


def beside(file: Path) -> Path:
    """Return the folder that contains the store."""
    return next(one.parent for one in file.parents if one.name == "store")


INSTEAD = {
    "a link to the same bytes": instead(lambda file: file.symlink_to(beside(file) / "elsewhere")),
    "a link to a device": instead(lambda file: file.symlink_to("/dev/zero")),
    "a pipe": instead(lambda file: os.mkfifo(file, 0o600)),
    "a socket": instead(a_socket),
    "a folder": instead(lambda file: file.mkdir(mode=0o700)),
}
if os.geteuid() == 0:
    INSTEAD["a device"] = instead(lambda file: os.mknod(file, stat.S_IFCHR | 0o600, os.makedev(1, 5)))

# kind of file: what is left of the store when it cannot be had
WITHOUT: dict[str, str | int] = {
    "FORMAT": DAMAGED, "json": DAMAGED, "stat": ALL, ".seg": OTHERS, ".row": OTHERS, ".key": OTHERS, ".var": ALL,
    ".fp": ALL, ".proj": ALL, ".faiss": ALL,
}  # fmt: skip

HEX = "0123456789abcdef" * 2
NAMES = [
    "../x", "../../etc/passwd", "/etc/passwd", "seg/../FORMAT", "seg/../../x.seg", f"seg//{HEX}.seg",
    f"./seg/{HEX}.seg",
    f"seg/{HEX}.seg\0", f"seg/{HEX}.seg\n", f"seg/{HEX.upper()}.seg", f"SEG/{HEX}.seg", f"seg/{HEX}.SEG", "seg/CON.seg",
    "seg/aux.seg", f"seg\\{HEX}.seg", f"stat/{HEX}.json", "FORMAT", "m-000000000001.json", f"seg/{HEX}.pkl", "",
    ".", "seg/",
    f"seg/{HEX}.seg/x", f"seg/{HEX[:-1]}\u0660.seg", f"seg/{HEX}{HEX}.seg", "x" * 5000,
]  # fmt: skip

NUMBERS = {
    "a negative": -1, "a huge": 1 << 53, "an endless": 10**400, "a broken": 1.5, "a true": True, "a text": "6",
    "no": None, "a list for a": [6],
}  # fmt: skip


def big_index(data: bytes) -> bytes:
    """Write a flat index whose header claims 2^40 vectors."""
    return patched(4 + 4, (1 << 40).to_bytes(8, "little"))(data)


def other_index(recipe: str) -> bytes:
    index = faiss.index_factory(FEATURES, recipe, faiss.METRIC_INNER_PRODUCT)
    vectors = np.random.default_rng(0).standard_normal((700, FEATURES)).astype(np.float32)
    index.train(vectors)
    index.add(vectors)
    return np.asarray(faiss.serialize_index(index)).tobytes()


def crooked_ids(_: bytes) -> bytes:
    """Write an IVF index of 12 vectors, one of which has the id 2^40."""
    index = faiss.index_factory(FEATURES, "IVF1,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(values_of(list(range(64)), FEATURES))
    index.add_with_ids(values_of(EVERY, FEATURES), np.array([*EVERY[:-1], 1 << 40]))
    return np.asarray(faiss.serialize_index(index)).tobytes()


def in_index(**values: Any) -> Callable[[Path], None]:
    return said(lambda manifest: bank_in(manifest)["index"].update(values))


def many_manifests(path: Path) -> None:
    data = manifest_of(path).read_bytes()
    for generation in range(100_000, 101_000):
        (path / f"m-{generation:012d}.json").write_bytes(data[:-3])


def first_halves_alike(path: Path) -> None:
    """Write a hundred thousand rows whose keys share their first half with a key that is looked up."""
    count = 100_000
    rows = np.zeros(count, ROW)
    rows["key"][:, 0] = keys_of([3])[0, 0]
    rows["key"][:, 1] = np.arange(count)
    rows["nbytes"] = 4 * WIDTH
    top = np.frombuffer(file_of(path, ".row").read_bytes()[: HEADER.itemsize], HEADER).copy()
    top["rows"] = count
    file_of(path, ".seg").write_bytes(b"")
    os.truncate(file_of(path, ".seg"), 128 * count)
    in_file(".seg", size=128 * count)(path)
    holding(".row", lambda _: top.tobytes() + rows.tobytes())(path)
    in_segment(rows=count, payload=4 * WIDTH * count)(path)


def spaces(count: int, name: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        one = b'{"banks":{},"config":{},"identity":{}}'
        body = b",".join(b'"%s%d":%s' % (name.encode(), i, one) for i in range(count))
        manifest = document(path)
        manifest["namespaces"] = "HERE"
        raw(path, json.dumps(manifest).encode().replace(b'"HERE"', b"{" + body + b"}"))

    return apply


def without_folders(path: Path) -> None:
    for sub in ("seg", "idx", "stat"):
        shutil.rmtree(path / sub)


def hard_links(path: Path) -> None:
    for file in path.rglob("seg/*"):
        os.link(file, path.parent / file.name)


CASES: dict[str, Case] = {
    # names
    **{f"a file named {name[:40]!r}": Case(in_file(".seg", name=name), DAMAGED, DAMAGED) for name in NAMES},
    # other things than files
    **{
        f"{what} in place of {kind}": Case(make(kind), left, left)
        for what, make in INSTEAD.items()
        for kind, left in WITHOUT.items()
    },
    **{
        f"{sub} is a link": Case(
            lambda path, sub=sub: [  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                (path / sub).rename(path.parent / sub), (path / sub).symlink_to(path.parent / sub)
            ],
            UNTRUSTED,
            left,
        )
        for sub, left in (("seg", 0), ("idx", ALL), ("stat", ALL))
    },
    # numbers
    **{f"{what} count of rows": Case(in_segment(rows=value), DAMAGED, DAMAGED) for what, value in NUMBERS.items()},
    **{f"{what} width": Case(in_bank(width=value), DAMAGED, DAMAGED) for what, value in NUMBERS.items()},
    **{f"{what} size": Case(in_file(".row", size=value), DAMAGED, DAMAGED) for what, value in NUMBERS.items()},
    "a width of a million": Case(in_bank(width=1 << 20), 0, 0),
    "a width of a billion": Case(in_bank(width=1 << 30), DAMAGED, DAMAGED),
    "a feature width of a million": Case(in_bank(feature_width=1 << 20), 0, 0),
    "a width of nothing": Case(in_bank(width=0), 0, 0),
    "rank 3": Case(in_bank(rank=3), DAMAGED, DAMAGED),
    "rank 2 for rows of rank 1": Case(in_bank(width=7, rank=2), 0, 0),
    "a dtype of objects": Case(in_bank(dtype="object"), DAMAGED, DAMAGED),
    "a dtype that is a list": Case(in_bank(dtype=["float32"]), DAMAGED, DAMAGED),
    "another dtype of other width": Case(in_bank(dtype="int8"), 0, 0),
    "another count of rows": Case(in_segment(rows=5), OTHERS, OTHERS),
    "a quadrillion rows": Case(in_segment(rows=10**15), OTHERS, OTHERS),
    "a quadrillion aliases": Case(in_segment(aliases=10**15), OTHERS, OTHERS),
    "another sum of payload": Case(in_segment(payload=1), OTHERS, OTHERS),
    "a size of 8 PiB for .seg": Case(in_file(".seg", size=1 << 52), OTHERS, OTHERS),
    "another sha256": Case(in_file(".row", sha256="0" * 64), OTHERS, OTHERS),
    "no sha256 for .row": Case(in_file(".row", sha256=None), OTHERS, OTHERS),
    "a sha256 that is none": Case(in_file(".row", sha256="xyz"), DAMAGED, DAMAGED),
    # the manifest's form
    "a generation that is not its own": Case(said(lambda m: m.update(generation=7)), DAMAGED, DAMAGED),
    "a later format": Case(said(lambda m: m.update(format=3)), "FormatTooNew", "FormatTooNew"),
    "a format that is a text": Case(said(lambda m: m.update(format="1")), DAMAGED, DAMAGED),
    "namespaces that are a list": Case(said(lambda m: m.update(namespaces=[])), DAMAGED, DAMAGED),
    "banks that are a list": Case(said(lambda m: m["namespaces"]["default"].update(banks=[1])), DAMAGED, DAMAGED),
    "a time that is a list": Case(said(lambda m: m.update(created=[])), DAMAGED, DAMAGED),
    "no namespaces": Case(said(lambda m: m.update(namespaces={})), 0, 0),
    "segments that are none": Case(in_bank(segments=None), DAMAGED, DAMAGED),
    "a key twice": Case(
        lambda path: raw(path, json.dumps(document(path)).encode()[:-1] + b',"format":1}'), DAMAGED, DAMAGED
    ),
    **{
        f"{number} as a time": Case(
            lambda path, number=number: raw(  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                path, json.dumps({**document(path), "created": "HERE"}).encode().replace(b'"HERE"', number.encode())
            ),
            DAMAGED,
            DAMAGED,
        )
        for number in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000)
    },
    "lists in lists": Case(lambda path: raw(path, b"[" * 100_000 + b"]" * 100_000), DAMAGED, DAMAGED),
    "mappings in mappings": Case(lambda path: raw(path, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), DAMAGED, DAMAGED),
    "five million lists": Case(lambda path: raw(path, b"[" + b"[]," * 5_000_000 + b"1]"), DAMAGED, DAMAGED),
    "eight million numbers": Case(lambda path: raw(path, b"[" + b"1," * 8_000_000 + b"1]"), DAMAGED, DAMAGED),
    "17 MiB": Case(lambda path: raw(path, b'{"a":"' + b"x" * (17 << 20) + b'"}'), DAMAGED, DAMAGED),
    "a manifest of nothing": Case(lambda path: manifest_of(path).write_bytes(b""), DAMAGED, DAMAGED),
    "a manifest without its line": Case(lambda path: manifest_of(path).write_bytes(b"{}"), DAMAGED, DAMAGED),
    "a million namespaces": Case(spaces(1_000_000, "n"), DAMAGED, DAMAGED),
    "as many namespaces as 16 MiB hold": Case(spaces(330_000, ""), DAMAGED, DAMAGED),
    "a namespace that commands a terminal": Case(spaces(1, "\\u001b[2J"), 0, 0),
    "a namespace of 2,000 letters": Case(spaces(1, "n" * 2000), DAMAGED, DAMAGED),
    "a thousand broken manifests on top": Case(many_manifests, DAMAGED, DAMAGED),
    # .row and .key
    "another magic": Case(header(magic=b"LLMCROW9"), OTHERS, OTHERS),
    "records of no bytes": Case(header(record=0), OTHERS, OTHERS),
    "a header of 2^60 rows": Case(header(rows=1 << 60), OTHERS, OTHERS),
    "a pitch that is not so": Case(header(pitch=64), OTHERS, OTHERS),
    "a pitch of 2^60": Case(header(pitch=1 << 60), OTHERS, OTHERS),
    "a pitch of nothing": Case(header(pitch=0), ALL, ALL),
    "features of 4 billion": Case(header(feature_width=(1 << 32) - 1), OTHERS, OTHERS),
    "half a header": Case(holding(".row", lambda data: data[:30]), OTHERS, OTHERS),
    "half a record": Case(holding(".row", lambda data: data[:-30]), OTHERS, OTHERS),
    "rows on top of each other": Case(both(header(pitch=0), records(offset=0)), OTHERS + 1, OTHERS + 1),
    "rows beyond the end": Case(both(header(pitch=0), records(offset=1 << 40)), OTHERS, OTHERS),
    "rows at the end of all numbers": Case(both(header(pitch=0), records(offset=2**64 - 1)), OTHERS, OTHERS),
    "rows of 4 GiB": Case(both(header(pitch=0), records(nbytes=2**32 - 1)), OTHERS, OTHERS),
    "rows of 4 GiB that add up": Case(
        both(header(pitch=0), records(nbytes=2**32 - 1), in_segment(payload=FIRST * (2**32 - 1))), OTHERS, OTHERS
    ),
    "rows of nothing": Case(both(header(pitch=0), records(nbytes=0), in_segment(payload=0)), OTHERS, OTHERS),
    "4 billion tokens": Case(records(tokens=2**32 - 1), ALL, ALL),
    "tokens beyond the end": Case(records(var=1 << 50), ALL, ALL),
    "tokens at the end of all numbers": Case(records(var=2**64 - 4), ALL, ALL),
    "tokens that end in the middle of one": Case(records(var=lambda var: var + 1, tokens=12), ALL - 1, ALL - 1),
    "sources beyond the end": Case(records(source=65535), ALL, ALL),
    "one key for all rows": Case(records(key=keys_of([3])[0]), OTHERS, OTHERS),
    "keys that share their first half": Case(first_halves_alike, OTHERS, OTHERS),
    "a checksum of another kind": Case(records(flags=1), OTHERS, OTHERS),
    "unknown flags": Case(records(flags=0xFFFE), ALL, ALL),
    "scales that are no numbers": Case(records(scale=np.nan), OTHERS, OTHERS),
    "costs that are no numbers": Case(records(cost=np.nan), ALL, ALL),
    "rows from the year 2106": Case(records(created=2**32 - 1), ALL, ALL),
    "aliases to nowhere": Case(holding(".key", lambda data: b"\x07" * len(data)), ALL, ALL),
    "half an alias": Case(holding(".key", lambda data: data[:-5]), OTHERS, OTHERS),
    "a hundred thousand aliases": Case(
        both(holding(".key", lambda _: bytes(100_000 * ALIAS.itemsize)), in_segment(aliases=100_000)), ALL, ALL
    ),
    # .seg, .var and .fp
    "an empty .seg": Case(holding(".seg", lambda _: b""), OTHERS, OTHERS),
    "a .seg of zeros": Case(holding(".seg", lambda data: bytes(len(data))), OTHERS, OTHERS),
    "an empty .var": Case(holding(".var", lambda _: b""), ALL, ALL),
    "an empty .fp": Case(holding(".fp", lambda _: b""), ALL, ALL),
    "an odd .fp": Case(holding(".fp", lambda data: data[:-1]), ALL, ALL),
    "features that are no numbers": Case(holding(".fp", lambda data: b"\xff\x7e" * (len(data) // 2)), ALL, ALL),
    "features without end": Case(
        both(holding(".fp", lambda data: b"\x00\x7c" * (len(data) // 2)), in_bank(index=None)), ALL, ALL
    ),
    # .proj
    "a projection of 2^32 by 2^32": Case(holding(".proj", patched(12, b"\xff" * 8)), ALL, ALL),
    "a projection of another width": Case(holding(".proj", patched(12, (8).to_bytes(4, "little") * 2)), ALL, ALL),
    "a projection of an unknown kind": Case(holding(".proj", patched(10, b"\xff\xff")), ALL, ALL),
    "a projection of a later version": Case(holding(".proj", patched(8, b"\xff\xff")), ALL, ALL),
    "an empty projection": Case(holding(".proj", lambda _: b""), ALL, ALL),
    # .faiss, with a correct sha256
    "an empty index": Case(holding(".faiss", lambda _: b""), ALL, ALL),
    "half an index": Case(holding(".faiss", lambda data: data[: len(data) // 2]), ALL, ALL),
    "an index with one byte more": Case(holding(".faiss", lambda data: data + b"\0"), ALL, ALL),
    "an index of 2^40 vectors": Case(holding(".faiss", big_index), ALL, ALL),
    "an index with 2^31 components": Case(holding(".faiss", patched(4, b"\xff\xff\xff\x7f")), ALL, ALL),
    "a graph for a flat index": Case(holding(".faiss", lambda _: other_index("HNSW16")), ALL, ALL),
    "a graph that says so": Case(
        both(holding(".faiss", lambda _: other_index("HNSW16")), in_index(kind="hnsw", count=12)), ALL, ALL
    ),
    "ids out of range": Case(both(holding(".faiss", crooked_ids), in_index(kind="ivf-flat")), ALL, ALL),
    "random bytes behind the magic": Case(
        holding(".faiss", lambda data: data[:4] + np.random.default_rng(1).bytes(len(data))), ALL, ALL
    ),
    "an index of an unknown kind": Case(in_index(kind="pickle"), ALL, ALL),
    "an index of bits over numbers": Case(in_index(kind="binary-flat"), ALL, ALL),
    "an index of another width": Case(in_index(dim=8), ALL, ALL),
    "an index of 2^50 vectors": Case(in_index(count=1 << 50), ALL, ALL),
    "an index over segments that are not there": Case(in_index(segments=[HEX]), ALL, ALL),
    "an index over one segment twice": Case(
        said(lambda m: bank_in(m)["index"].update(segments=[bank_in(m)["segments"][0]["id"]] * 2)), ALL, ALL
    ),
    "an index over one segment only": Case(
        said(lambda m: bank_in(m)["index"].update(segments=[bank_in(m)["segments"][0]["id"]])), ALL, ALL
    ),
    "an index that is the projection": Case(
        said(lambda m: bank_in(m)["index"].update(file=bank_in(m)["projection"])), ALL, ALL
    ),
    # FORMAT, counters, what is missing
    "a FORMAT of 1 MiB": Case(lambda path: (path / "FORMAT").write_bytes(b" " * (1 << 20)), DAMAGED, DAMAGED),
    "a FORMAT of lists": Case(lambda path: (path / "FORMAT").write_bytes(b"[" * 4000), DAMAGED, DAMAGED),
    "a FORMAT of another program": Case(
        lambda path: (path / "FORMAT").write_text('{"magic":"other","format":1}'), DAMAGED, DAMAGED
    ),
    "a FORMAT from the future": Case(
        lambda path: (path / "FORMAT").write_text('{"magic":"llmcache","format":99}'), "FormatTooNew", "FormatTooNew"
    ),
    "no FORMAT": Case(lambda path: (path / "FORMAT").unlink(), "SnapshotNotFound", "SnapshotNotFound"),
    "counters in lists in lists": Case(lambda path: file_of(path, "stat").write_bytes(b"[" * 90_000), ALL, ALL),
    "counters of 2 MiB": Case(lambda path: file_of(path, "stat").write_bytes(b" " * (2 << 20)), ALL, ALL),
    "counters without end": Case(lambda path: file_of(path, "stat").write_bytes(b'{"a":1e999,"b":NaN}'), ALL, ALL),
    "no sub-folders": Case(without_folders, 0, 0),
    "a signature of 1 MiB": Case(
        lambda path: (path / "m-000000000005.sig").write_bytes(b"x" * (1 << 20)), ALL, ALL
    ),
    "hard links": Case(hard_links, ALL, ALL),
    "files for everybody to write": Case(lambda path: file_of(path, ".row").chmod(0o666), UNTRUSTED, ALL),
}  # fmt: skip


def twice(path: Path) -> None:
    segments = bank_in(document(path))["segments"]
    in_bank(segments=[*segments, segments[0]])(path)


def many_segments(path: Path) -> None:
    """Write a manifest with as many segments as fit, all of them missing."""
    one = bank_in(document(path))["segments"][0]
    text = json.dumps(one)
    in_bank(segments=[json.loads(text.replace(one["id"], f"{i:032x}")) for i in range(5000)])(path)


def one_file_in_all_roles(path: Path) -> None:
    name = file_of(path, ".seg").relative_to(path)
    for kind in (".row", ".key", ".var", ".fp"):
        in_file(kind, name=str(name))(path)


CASES["a segment twice"] = Case(twice, DAMAGED, DAMAGED)
CASES["five thousand segments that are not there"] = Case(many_segments, 0, 0)
CASES["one file in all roles"] = Case(one_file_in_all_roles, DAMAGED, DAMAGED)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    FORKS.set_forkserver_preload(["faiss", "numpy.ma", "numpy.random", "pytest", "llmcache.indexes.maintenance.purge"])
    path = tmp_path_factory.mktemp("template") / "store"
    filled(path)
    assert looked_at(path) == (("", ALL), ("", ALL))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_store_is_refused_or_its_entries_are_misses(template: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "store"
    shutil.copytree(template, path)
    before = {one.name for one in tmp_path.iterdir()}
    case = CASES[name]
    case.change(path)
    made = {one.name for one in tmp_path.iterdir()}
    expected = tuple((one, 0) if isinstance(one, str) else ("", one) for one in (case.owner, case.stranger))
    assert looked_at(path) == expected
    assert {one.name for one in tmp_path.iterdir()} == made
    assert before <= made


def test_there_are_as_many_hostile_stores_as_promised() -> None:
    assert len(CASES) >= 60


# -- nothing is executed ------------------------------------------------------------------------------------

KINDS = [
    ("flat", "pca", 16), ("flat", "none", 16), ("ivf-flat", "pca", 16), ("ivf-sq8", "pca", 16), ("ivf-pq", "pca", 16),
    ("hnsw", "pca", 16), ("binary-flat", "simhash", 64), ("binary-ivf", "simhash", 64), ("binary-hnsw", "simhash", 64),
]  # fmt: skip
ROWS = 800


@pytest.mark.parametrize(("index", "projection", "dim"), KINDS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_nothing_of_a_store_of_any_kind_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str, projection: str, dim: int, dtype: str
) -> None:
    choice, empty, key = NearChoice(index, projection, dim), BankFacts(dtype, WIDTH, 1, FEATURES), b"k" * 32
    keys, features = keys_of(list(range(ROWS))), values_of(list(range(ROWS)), FEATURES)
    path = tmp_path / "store"
    store = Store.open(path, create=True, key=key)
    store.declare("default", {}, {})
    bank = store.bank("default", "output", lambda: empty, choice)
    bank.put(
        keys,
        values_of(list(range(ROWS))),
        tokens=[np.array([i], np.int32) for i in range(ROWS)],
        sources=[str(i) for i in range(ROWS)],
        features=features,
        cost=np.ones(ROWS, np.float32),
    )
    store.commit()
    bank.near.rebuild()
    store.commit()
    store.write_counters({"documents": 1})
    store.close()
    wanted: list[dict[str, Any]] = [{}, {"key": key}, {"trust": "untrusted", "allow_untrusted": True}]
    with monkeypatch.context() as patch:
        forbid(patch.setattr)
        for asked in wanted:
            store = Store.open(path, **asked)
            assert store.counters() == {"documents": 1}
            bank = store.bank("default", "output", lambda: empty, choice)
            assert bank.read(bank.find(keys)).intact.all()
            assert (bank.tokens(3).tolist(), bank.source(3)) == ([3], "3")
            near, _ = bank.nearest(features[:50], 1)
            assert (near[:, 0] == np.arange(50)).mean() > 0.8
            store.close()
        store = Store.open(path, key=key)
        assert purge(store, Doomed(keys=keys[5:6])).rows == 1
        store.close()


def test_the_cache_executes_nothing_of_its_store(model: Any, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcache import LLMCache

    texts = [f"text {i}" for i in range(20)]
    with LLMCache.open(store, model, tau=0.9) as cache:
        expected = cache.encode(texts)
        cache.rebuild()
        cache.encode("a first near match: text 1!")  # what is imported on first use
    with monkeypatch.context() as patch:
        forbid(patch.setattr)
        with LLMCache.open(store, model, tau=0.9) as cache:
            np.testing.assert_array_equal(cache.encode(texts), expected)
            assert [one.tier for one in cache.run(["TEXT 1"])] == ["exact"]
            cache.encode(["something new"])


def test_what_is_forbidden_would_have_been_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        forbid(patch.setattr)
        with pytest.raises(AssertionError, match="about to be executed"):
            pickle.loads(b"N.")  # noqa: S301  # it is the test's subject
        with pytest.raises(AssertionError, match="about to be executed"):
            np.load("x")
        with pytest.raises(AssertionError, match="about to be executed"):
            eval("1")  # noqa: S307  # it is the test's subject
