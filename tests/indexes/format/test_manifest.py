"""Tests of manifests: damaged or hostile ones never parse, and commits are never lost to other commits."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcache.indexes.commits import publish as publishing
from llmcache.indexes.commits.generations import generation_name, generations, newest
from llmcache.indexes.commits.publish import commit, fenced
from llmcache.indexes.errors import (
    CommitConflict,
    FormatTooNew,
    LLMCacheError,
    SnapshotDamaged,
    SnapshotNotFound,
    StoreFenced,
    StoreFull,
)
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.files.names import SUBFOLDERS
from llmcache.indexes.format.manifest import (
    BankFacts,
    FileFacts,
    IndexFacts,
    Manifest,
    NamespaceFacts,
    SegmentFacts,
)
from llmcache.indexes.format.manifest_json import MAX_BYTES, from_bytes, to_bytes

ID = "0123456789abcdef" * 2
SHA = hashlib.sha256(b"x").hexdigest()
KINDS = ("seg", "row", "key", "var", "fp")


def full_manifest() -> Manifest:
    """Return a manifest with all fields set."""
    files = tuple(FileFacts(f"seg/{ID}.{kind}", 640, None if kind == "seg" else SHA) for kind in KINDS)
    index = IndexFacts("flat", 128, 10, (ID,), FileFacts(f"idx/{ID}.faiss", 99, SHA))
    bank = BankFacts(
        "float16",
        384,
        1,
        384,
        (SegmentFacts(ID, 10, 12, 7680, files),),
        FileFacts(f"idx/{ID}.proj", 7, SHA),
        index,
    )
    empty = BankFacts("int8", 4, 2, 8)
    space = NamespaceFacts(
        {"name": "modèle \ud800", "layers": 6}, {"tau": None, "list": [1, 0.5]}, {"output": bank, "x": empty}
    )
    return Manifest(7, 6, 1700000000.125, "w" * 32, (3, 5), {"default": space, "": NamespaceFacts({}, {})})


def signed(body: bytes) -> bytes:
    """Append a valid checksum line, so that only the parser can refuse the content."""
    return body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def plain() -> Any:
    """Return the JSON of `full_manifest`, parsed by the standard library."""
    return json.loads(to_bytes(full_manifest())[:-73])


def changed(path: tuple[str | int, ...], raw: str) -> bytes:
    """Return the manifest with the value at `path` replaced by this JSON text, and a valid checksum."""
    document = plain()
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    assert path[-1] in inner if isinstance(inner, dict) else len(inner) > 0
    inner[path[-1]] = "@@here@@"
    return signed(json.dumps(document).replace('"@@here@@"', raw).encode())


BANK = ("namespaces", "default", "banks", "output")
SEGMENT = (*BANK, "segments", 0)
COUNTS = [
    ("format",),
    ("generation",),
    ("parent",),
    ("skipped", 0),
    *((*BANK, name) for name in ("width", "rank", "feature_width")),
    *((*SEGMENT, name) for name in ("rows", "aliases", "payload")),
    (*SEGMENT, "files", 0, "size"),
    (*BANK, "index", "dim"),
    (*BANK, "index", "count"),
    (*BANK, "index", "file", "size"),
    (*BANK, "projection", "size"),
]
NAMES = [(*SEGMENT, "files", 1, "name"), (*BANK, "index", "file", "name"), (*BANK, "projection", "name")]
TEXTS = [
    ("writer",),
    (*BANK, "dtype"),
    (*SEGMENT, "id"),
    (*BANK, "index", "kind"),
    (*BANK, "index", "segments", 0),
]
MAPPINGS = [
    ("namespaces",),
    ("namespaces", "default"),
    ("namespaces", "default", "identity"),
    ("namespaces", "default", "config"),
    ("namespaces", "default", "banks"),
    BANK,
    SEGMENT,
    (*SEGMENT, "files", 0),
]
LISTS = [("skipped",), (*BANK, "segments"), (*SEGMENT, "files"), (*BANK, "index", "segments")]
OPTIONAL = [(*BANK, "projection"), (*BANK, "index")]


def refused(data: bytes) -> None:
    with pytest.raises(SnapshotDamaged) as caught:
        from_bytes(data, "m-x.json")
    assert not isinstance(caught.value, FormatTooNew)
    assert "m-x.json" in str(caught.value)


# -- bytes --------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was() -> None:
    for one in (Manifest(), full_manifest()):
        assert from_bytes(to_bytes(one), "m") == one


def test_equal_manifests_have_equal_bytes() -> None:
    one, other = full_manifest(), full_manifest()
    turned = replace(other, namespaces=dict(reversed(list(other.namespaces.items()))))
    assert to_bytes(one) == to_bytes(turned)


def test_the_bytes_are_json_and_a_line_with_its_sha256() -> None:
    body, line = to_bytes(full_manifest()).decode("ascii").splitlines()
    assert line == "sha256:" + hashlib.sha256(body.encode()).hexdigest()
    document = json.loads(body)
    assert document["format"] == 2
    assert document["generation"] == 7
    assert document["namespaces"]["default"]["banks"]["output"]["segments"][0]["rows"] == 10


def test_every_flipped_bit_is_seen() -> None:
    data = to_bytes(full_manifest())
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(SnapshotDamaged) as caught:
                from_bytes(bytes(flipped), "m")
            assert type(caught.value) is SnapshotDamaged, (at, bit)


def test_a_manifest_cut_short_anywhere_is_seen() -> None:
    data = to_bytes(full_manifest())
    for end in range(len(data)):
        refused(data[:end])


def test_anything_after_the_end_of_a_manifest_is_seen() -> None:
    data = to_bytes(full_manifest())
    for more in (b"\n", b" ", b"\0", b"x", data):
        refused(data + more)


def test_a_manifest_over_the_limit_is_refused_unread() -> None:
    body = to_bytes(full_manifest())[:-73]
    data = signed(body + b" " * MAX_BYTES)
    assert len(data) > MAX_BYTES
    refused(data)
    with pytest.raises(SnapshotDamaged):
        from_bytes(signed(b" " * (MAX_BYTES + 1)), "m")


# -- the parser, alone: every one of these has a checksum that is right ------------------------------------------


def test_the_helper_that_signs_makes_manifests_that_parse() -> None:
    assert from_bytes(signed(json.dumps(plain()).encode()), "m") == full_manifest()
    assert from_bytes(changed(("generation",), "8"), "m").generation == 8


@pytest.mark.parametrize("path", COUNTS, ids=lambda path: path[-1])
@pytest.mark.parametrize(
    "raw",
    [
        "-1",
        "1.0",
        "0.5",
        "1e3",
        "9007199254740992",
        "1e400",
        "true",
        '"1"',
        "null",
        "[]",
        "{}",
        "9" * 400,
        "-0.0",
    ],
)
def test_a_count_that_is_no_count_is_refused(path: tuple[str | int, ...], raw: str) -> None:
    refused(changed(path, raw))


@pytest.mark.parametrize("raw", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
@pytest.mark.parametrize("path", [("created",), ("namespaces", "default", "config", "tau")])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(path: tuple[str | int, ...], raw: str) -> None:
    refused(changed(path, raw))


@pytest.mark.parametrize("raw", ['"NaN"', '"1"', "null", "[]", "1" + "0" * 400, '"inf"'])
def test_a_time_that_is_no_time_is_refused(raw: str) -> None:
    refused(changed(("created",), raw))


@pytest.mark.parametrize("path", NAMES, ids=lambda path: path[-2])
@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "seg/../../x",
        "seg/../FORMAT",
        "",
        "seg",
        "seg/",
        "FORMAT",
        f"seg/{ID}",
        f"seg/{ID}.exe",
        f"seg/{ID}.row\0",
        f"seg/{ID}.row\n",
        f"\nseg/{ID}.row",
        f"seg/{ID.upper()}.row",
        f"SEG/{ID}.row",
        f"seg/{ID[1:]}.row",
        f"seg/{ID}0.row",
        f"./seg/{ID}.row",
        f"seg//{ID}.row",
        f"/seg/{ID}.row",
        f"stat/{ID}.json",
        f"seg\\{ID}.row",
        f"seg/{chr(0x660) * 32}.row",
        f"seg/{ID}.row/../../../x",
    ],
)
def test_a_name_that_is_not_a_stores_own_is_refused(path: tuple[str | int, ...], name: str) -> None:
    refused(changed(path, json.dumps(name)))


@pytest.mark.parametrize("raw", ["1", "null", "[]", "{}", "true"])
@pytest.mark.parametrize("path", NAMES, ids=lambda path: path[-2])
def test_a_name_that_is_no_text_is_refused(path: tuple[str | int, ...], raw: str) -> None:
    refused(changed(path, raw))


@pytest.mark.parametrize("sha", ["", SHA[:-1], SHA + "0", SHA.upper(), SHA + "\n", "g" * 64, 1, 0, [], {}, True, False])
def test_a_sha256_that_is_none_is_refused(sha: object) -> None:
    refused(changed((*SEGMENT, "files", 1, "sha256"), json.dumps(sha)))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path[-1])
@pytest.mark.parametrize("raw", ["1", "null", "[]", "{}", "true", '"' + "x" * 5000 + '"'])
def test_a_text_that_is_none_or_endless_is_refused(path: tuple[str | int, ...], raw: str) -> None:
    refused(changed(path, raw))


@pytest.mark.parametrize("path", MAPPINGS, ids=lambda path: path[-1])
@pytest.mark.parametrize("raw", ["1", "null", "[]", '""', "true", '"ab"', "[[]]", '["ab"]', '[["a",1]]'])
def test_what_should_be_a_mapping_and_is_not_is_refused(path: tuple[str | int, ...], raw: str) -> None:
    refused(changed(path, raw))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path[-1])
@pytest.mark.parametrize("raw", ["1", "null", "{}", '""', "true", '"ab"', '{"a":1}', "[[]]", "[null]"])
def test_what_should_be_a_list_and_is_not_is_refused(path: tuple[str | int, ...], raw: str) -> None:
    refused(changed(path, raw))


@pytest.mark.parametrize("path", OPTIONAL, ids=lambda path: path[-1])
@pytest.mark.parametrize("raw", ["0", "false", '""', "[]", "{}", "1", '"x"', "[1]"])
def test_what_may_be_absent_is_null_or_whole(path: tuple[str | int, ...], raw: str) -> None:
    refused(changed(path, raw))
    bank = from_bytes(changed(path, "null"), "m").namespaces["default"].banks["output"]
    assert getattr(bank, str(path[-1])) is None


def test_a_dtype_or_rank_that_no_bank_has_is_refused() -> None:
    refused(changed((*BANK, "dtype"), '"float64"'))
    refused(changed((*BANK, "dtype"), '"object"'))
    refused(changed((*BANK, "rank"), "0"))
    refused(changed((*BANK, "rank"), "3"))


def every_mapping(inner: Any) -> Iterator[dict[str, Any]]:
    if isinstance(inner, dict):
        yield inner
    for one in inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ():
        yield from every_mapping(one)


def test_a_missing_field_is_refused_wherever_it_is_missing() -> None:
    free = {"name", "layers", "tau", "list", "default", "", "output", "x"}  # what is named by users
    free |= {"dead", "alive"}  # what stores from before there were evictions lack
    taken = 0
    for at, original in enumerate(every_mapping(plain())):
        for field in set(original) - (free if "size" not in original else {""}):
            if field in {"secret_check", "dead", "alive"} or (
                field == "writer" and "aliases" in original
            ):  # older stores lack these
                continue
            document = plain()
            del list(every_mapping(document))[at][field]
            refused(signed(json.dumps(document).encode()))
            taken += 1
    assert taken > 50


def test_a_key_given_twice_is_refused_wherever_it_is_given() -> None:
    for at, _ in enumerate(every_mapping(plain())):
        document = plain()
        inner = list(every_mapping(document))[at]
        for field in list(inner):
            again = copy.deepcopy(document)
            twin = list(every_mapping(again))[at]
            twin["@@twice@@"] = twin[field]
            body = json.dumps(again).replace('"@@twice@@"', json.dumps(field)).encode()
            refused(signed(body))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"format":' * 50_000,
        b'{"format":1,"generation":' + b"9" * 10_000 + b"}",
        b"\xef\xbb\xbf{}",
        b'{"format":1}{"format":1}',
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_manifest_at_all_is_refused(body: bytes) -> None:
    refused(signed(body))


def test_deep_nesting_inside_a_whole_manifest_is_refused() -> None:
    refused(changed(("namespaces", "default", "identity", "name"), "[" * 100_000 + "]" * 100_000))
    refused(changed(("namespaces", "default", "config", "tau"), '{"a":' * 100_000 + "1" + "}" * 100_000))


@pytest.mark.parametrize("number", [3, 4, 1 << 40])
def test_a_newer_format_asks_for_an_upgrade(number: int) -> None:
    with pytest.raises(FormatTooNew, match=r"pip install -U llmcache"):
        from_bytes(changed(("format",), str(number)), "m")


def test_a_newer_format_asks_for_an_upgrade_even_where_nothing_else_is_known() -> None:
    with pytest.raises(FormatTooNew):
        from_bytes(signed(b'{"format": 3, "all else": "is different"}'), "m")


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 1 << 70),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([f"seg/{ID}.row", "../x", SHA, ID, "1e400"]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_manifest_changed_anywhere_is_refused_or_can_be_written_again(data: st.DataObject) -> None:
    document = plain()
    inner: Any = document
    while True:
        step: Any = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if not inner[step] or not isinstance(inner[step], dict | list) or data.draw(st.integers(0, 6)) == 0:
            break
        inner = inner[step]
    inner[step] = data.draw(values)
    try:
        parsed = from_bytes(signed(json.dumps(document).encode()), "m")
    except SnapshotDamaged:
        return
    assert from_bytes(to_bytes(parsed), "m") == parsed
    for space in parsed.namespaces.values():
        for bank in space.banks.values():
            assert bank.projection is None or isinstance(bank.projection, FileFacts)
            assert bank.index is None or isinstance(bank.index, IndexFacts)


def test_a_segment_without_the_file_that_is_asked_for_says_which() -> None:
    segment = full_manifest().namespaces["default"].banks["output"].segments[0]
    assert [segment.file(kind).name for kind in KINDS] == [f"seg/{ID}.{kind}" for kind in KINDS]
    with pytest.raises(SnapshotDamaged, match=r"no \.row file"):
        replace(segment, files=segment.files[:1]).file("row")


def test_replacing_a_bank_leaves_the_old_manifest_as_it_was() -> None:
    old = full_manifest()
    new = old.with_bank("default", "output", BankFacts("int8", 1, 1, 1))
    assert old == full_manifest()
    assert new.namespaces["default"].banks["output"].dtype == "int8"
    assert new.namespaces["default"].banks["x"] == old.namespaces["default"].banks["x"]
    assert new.namespaces["default"].identity == old.namespaces["default"].identity
    assert new.namespaces[""] == old.namespaces[""]


# -- generations --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    opened = Folder(tmp_path / "store", create=True)
    yield opened
    opened.close()


def adding(name: str) -> Callable[[Manifest], Manifest]:
    def change(base: Manifest) -> Manifest:
        return replace(base, namespaces={**base.namespaces, name: NamespaceFacts({"by": name}, {})})

    return change


def present(folder: Folder) -> set[str]:
    return set(newest(folder, generations(folder))[0].namespaces)


def only_manifests(folder: Folder) -> bool:
    return not [name for name in folder.names() if name not in SUBFOLDERS and not name.startswith("m-")]


def flip(path: Path, at: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_generations_grow_by_one_and_the_newest_is_the_store(folder: Folder) -> None:
    for n in range(1, 13):
        made = commit(folder, "w", adding(f"n{n}"))
        assert made.generation == n
        assert made.parent == n - 1
        assert made.writer == "w"
        assert generations(folder) == list(range(n, 0, -1))
        assert newest(folder, generations(folder)) == (made, [])
    assert present(folder) == {f"n{n}" for n in range(1, 13)}
    assert only_manifests(folder)


def test_the_newest_of_twelve_digits_is_compared_as_a_number(folder: Folder) -> None:
    (folder.path / generation_name(99)).write_bytes(to_bytes(Manifest(99)))
    assert commit(folder, "w", adding("a")).generation == 100
    assert generations(folder) == [100, 99]


def test_an_older_generation_is_never_changed_by_a_commit(folder: Folder) -> None:
    commit(folder, "w", adding("a"))
    before = (folder.path / generation_name(1)).read_bytes()
    commit(folder, "w", adding("b"))
    assert (folder.path / generation_name(1)).read_bytes() == before
    assert set(from_bytes(before, "m").namespaces) == {"a"}


def test_names_that_only_look_like_manifests_are_passed_over(folder: Folder) -> None:
    commit(folder, "w", adding("a"))
    for name in (
        "m-2.json",
        "m-00000000000x.json",
        "m-000000000002.json.bak",
        "xm-000000000002.json",
        "m-.json",
    ):
        (folder.path / name).write_bytes(b"junk")
    assert generations(folder) == [1]


def test_a_folder_without_manifests_is_no_store(folder: Folder) -> None:
    with pytest.raises(SnapshotNotFound, match="llmcache build"):
        newest(folder, [])


def test_a_loser_of_the_race_rebases_on_the_winner(folder: Folder) -> None:
    commit(folder, "w", adding("start"))
    bases: list[set[str]] = []

    def change(base: Manifest) -> Manifest:
        bases.append(set(base.namespaces))
        if len(bases) == 1:
            commit(folder, "rival", adding("theirs"))
        return adding("mine")(base)

    made = commit(folder, "me", change)
    assert bases == [{"start"}, {"start", "theirs"}]
    assert made.generation == 3
    assert made.parent == 2
    assert present(folder) == {"start", "theirs", "mine"}
    assert only_manifests(folder)


def test_a_commit_between_looking_and_choosing_a_number_is_not_lost(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Folder.names
    looks: list[int] = []

    def names(self: Folder, sub: str = "") -> list[str]:
        found = real(self, sub)
        looks.append(len(found))
        if len(looks) == 1:
            commit(folder, "rival", adding("theirs"))
        return found

    commit(folder, "w", adding("start"))
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "names", names)
        made = commit(folder, "me", adding("mine"))
    assert made.generation == 3
    assert present(folder) == {"start", "theirs", "mine"}


def test_a_commit_that_always_loses_gives_up_and_says_so(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_ROUNDS", 4)
    rounds: list[int] = []

    def change(base: Manifest) -> Manifest:
        rounds.append(base.generation)
        commit(folder, "rival", adding(f"theirs {len(rounds)}"))
        return adding("mine")(base)

    with pytest.raises(CommitConflict, match="commit again"):
        commit(folder, "me", change)
    assert rounds == [0, 1, 2, 3]
    assert present(folder) == {f"theirs {n}" for n in (1, 2, 3, 4)}
    assert only_manifests(folder)


def _commit_many(path: Path, writer: str, count: int) -> None:
    folder = Folder(path)
    for i in range(count):
        made = commit(folder, writer, adding(f"{writer}-{i}"))
        assert f"{writer}-{i}" in made.namespaces
    folder.close()


def test_processes_that_commit_at_once_lose_nothing(folder: Folder) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_commit_many, args=(folder.path, f"w{n}", 10)) for n in range(4)]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)
    assert [one.exitcode for one in writers] == [0, 0, 0, 0]
    assert present(folder) == {f"w{n}-{i}" for n in range(4) for i in range(10)}
    assert generations(folder) == list(range(40, 0, -1))
    sizes = []
    for generation in range(1, 41):
        name = generation_name(generation)
        sizes.append(len(from_bytes(folder.read(name, 1 << 20), name).namespaces))
    assert sizes == list(range(1, 41))
    assert only_manifests(folder)


def test_threads_that_commit_at_once_lose_nothing(folder: Folder) -> None:
    writers = [threading.Thread(target=_commit_many, args=(folder.path, f"t{n}", 5)) for n in range(6)]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)
    assert present(folder) == {f"t{n}-{i}" for n in range(6) for i in range(5)}


def test_a_damaged_newest_manifest_opens_the_one_before_and_is_recorded(folder: Folder) -> None:
    for n in range(1, 5):
        commit(folder, "w", adding(f"n{n}"))
    flip(folder.path / generation_name(4))
    os.truncate(folder.path / generation_name(3), 50)
    found, damaged = newest(folder, generations(folder))
    assert found.generation == 2
    assert damaged == [4, 3]
    made = commit(folder, "w", adding("after"))
    assert made.generation == 5
    assert made.parent == 2
    assert made.skipped == (3, 4)
    assert present(folder) == {"n1", "n2", "after"}
    assert commit(folder, "w", adding("later")).skipped == (3, 4)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "empty", "too large"])
def test_a_newest_manifest_that_is_no_plain_manifest_is_passed_over(folder: Folder, kind: str) -> None:
    commit(folder, "w", adding("a"))
    place = folder.path / generation_name(2)
    if kind == "symlink":
        outside = folder.path.parent / "outside"
        outside.write_bytes(to_bytes(adding("foreign")(Manifest(2))))
        place.symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.touch()
        os.truncate(place, 0 if kind == "empty" else 1 << 40)
    found, damaged = newest(folder, generations(folder))
    assert set(found.namespaces) == {"a"}
    assert damaged == [2]


def test_a_store_whose_manifests_are_all_damaged_is_refused(folder: Folder) -> None:
    for name in ("a", "b"):
        commit(folder, "w", adding(name))
    for generation in (1, 2):
        flip(folder.path / generation_name(generation))
    with pytest.raises(SnapshotDamaged, match=r"none of its 2 manifests.*m-000000000002\.json"):
        newest(folder, generations(folder))
    with pytest.raises(SnapshotDamaged):
        commit(folder, "w", adding("c"))
    assert generations(folder) == [2, 1]


def test_a_newer_format_is_not_passed_over_for_an_older_manifest(folder: Folder) -> None:
    commit(folder, "w", adding("a"))
    (folder.path / generation_name(2)).write_bytes(signed(b'{"format": 3}'))
    (folder.path / generation_name(3)).write_bytes(b"damaged")
    with pytest.raises(FormatTooNew):
        newest(folder, generations(folder))
    with pytest.raises(FormatTooNew):
        commit(folder, "w", adding("b"))
    assert generations(folder) == [3, 2, 1]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM])
def test_a_manifest_that_cannot_be_read_just_now_is_not_undone_by_a_commit(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    commit(folder, "w", adding("a"))
    commit(folder, "w", adding("b"))
    real = Folder.read
    failures = [OSError(code, os.strerror(code))]

    def read(self: Folder, name: str, limit: int) -> bytes:
        if failures and name == generation_name(2):
            raise failures.pop()
        return real(self, name, limit)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", read)
        try:
            commit(folder, "w", adding("c"))
        except (OSError, LLMCacheError):
            assert present(folder) == {"a", "b"}
        else:
            assert present(folder) == {"a", "b", "c"}


def test_what_could_not_be_read_back_is_not_published(folder: Folder) -> None:
    commit(folder, "w", adding("a"))
    unreadable: list[Manifest] = [
        adding("x" * 2000)(Manifest()),
        Manifest(namespaces={"x": NamespaceFacts({1: "a", "1": "b"}, {})}),  # type: ignore[dict-item]
        Manifest(namespaces={"x": NamespaceFacts({"n": float("inf")}, {})}),
        Manifest(namespaces={"x": NamespaceFacts({}, {}, {"layer": BankFacts("int8", -1, 1, 1)})}),
    ]
    for bad in unreadable:

        def change(base: Manifest, bad: Manifest = bad) -> Manifest:
            return replace(base, namespaces={**base.namespaces, **bad.namespaces})

        with pytest.raises((LLMCacheError, ValueError, TypeError)):
            commit(folder, "w", change)
        assert newest(folder, generations(folder))[1] == []
        assert present(folder) == {"a"}
        assert only_manifests(folder)


def test_a_change_that_fails_leaves_nothing_behind(folder: Folder) -> None:
    commit(folder, "w", adding("a"))

    def change(base: Manifest) -> Manifest:
        raise KeyError("the namespace is gone")

    with pytest.raises(KeyError):
        commit(folder, "w", change)
    assert generations(folder) == [1]
    assert only_manifests(folder)


# -- writes that fail ---------------------------------------------------------------------------------------


class Faults:
    """Makes the n-th call that changes a file fail, and with `forever` all later ones."""

    CALLS = ("create", "write", "sync", "link", "sync_folder")

    def __init__(self, patch: pytest.MonkeyPatch, code: int, at: int, *, forever: bool = False) -> None:
        self.code, self.at, self.forever = code, at, forever
        self.calls: list[str] = []
        for name in self.CALLS:
            patch.setattr(Folder, name, self._wrapped(name, getattr(Folder, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            now = len(self.calls) - 1
            if now == self.at or (self.forever and now > self.at >= 0):
                raise OSError(self.code, os.strerror(self.code))
            return real(*args)

        return call


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EIO, StoreFenced),
        (errno.EROFS, StoreFenced),
    ],
)
def test_a_write_that_fails_anywhere_in_a_commit_undoes_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], forever: bool
) -> None:
    with monkeypatch.context() as patch:
        calls = Faults(patch, code, -1).calls
        commit(folder, "w", adding("first"))
    assert len(calls) >= 5
    expected = {"first"}
    for at, name in enumerate(list(calls)):
        with monkeypatch.context() as patch:
            Faults(patch, code, at, forever=forever)
            with pytest.raises(StoreFenced) as caught:
                commit(folder, f"w{at}", adding(f"n{at}"))
        assert type(caught.value) is kind
        assert os.strerror(code) in str(caught.value)
        found, damaged = newest(folder, generations(folder))
        assert damaged == []
        # once the name is given, the generation is there, whole; only whether it outlives a power cut is not known
        expected |= {f"n{at}"} if name == "sync_folder" else set()
        assert set(found.namespaces) == expected
        assert only_manifests(folder)
        assert commit(folder, "other", adding(f"after {at}")).generation == found.generation + 1
        expected |= {f"after {at}"}
    assert present(folder) == expected


def test_a_manifest_is_linked_only_when_it_is_durable_and_acknowledged_only_when_its_name_is(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        calls = Faults(patch, errno.EIO, -1).calls
        commit(folder, "w", adding("a"))
    assert calls == ["create", "write", "sync", "link", "sync_folder"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_to_free_space(code: int) -> None:
    error = fenced(OSError(code, "x"))
    assert isinstance(error, StoreFull)
    assert "free some space" in str(error)
    assert os.strerror(code) in str(error)


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES])
def test_any_other_failed_write_says_to_open_the_store_again(code: int) -> None:
    error = fenced(OSError(code, "x"))
    assert type(error) is StoreFenced
    assert "open the store again" in str(error)


def test_a_manifest_that_grew_over_the_limit_is_not_published(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(folder, "w", adding("a"))
    monkeypatch.setattr(publishing, "MAX_BYTES", 2000)
    with pytest.raises(LLMCacheError, match="over the limit"):
        commit(folder, "w", lambda base: replace(base, namespaces={"x": NamespaceFacts({"t": "y" * 3000}, {})}))
    assert present(folder) == {"a"}
    assert only_manifests(folder)
