"""Tests of segments: sealed rows are read back, and damage is detected."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.files.folder import Folder, Reading
from llmcache.indexes.files.names import SUBFOLDERS
from llmcache.indexes.format.manifest import SegmentFacts
from llmcache.indexes.format.rows import (
    ALIAS,
    ROW,
    STRONG,
    Keys,
    agree,
    checksum,
    digests,
)
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.format.segment_writer import PendingRows, seal

ID = "0123456789abcdef" * 2
KINDS = ("seg", "row", "key", "var", "fp")
SOURCES = ["a.txt", "", "grüße/日本語.pdf", "x", "line\nbreak", "nul\0byte", "emoji 🙂"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    opened = Folder(tmp_path / "store", create=True)
    yield opened
    opened.close()


def entries(n: int, lengths: Sequence[int] | None = None, *, seed: int = 0, feature_width: int = 4) -> PendingRows:
    """Return rows of random bytes. lengths: in bytes, 100 each by default."""
    random = np.random.default_rng(seed)
    lengths = [100] * n if lengths is None else lengths
    return PendingRows(
        keys=random.integers(0, 1 << 64, (n, 2), np.uint64),
        payload=[random.integers(0, 256, size, np.uint8) for size in lengths],
        scale=random.random(n).astype(np.float32),
        cost=random.random(n).astype(np.float32),
        tokens=[random.integers(0, 30_000, i % 5, np.int32) for i in range(n)],
        sources=[SOURCES[i % len(SOURCES)] for i in range(n)],
        features=random.standard_normal((n, feature_width)).astype(np.float16),
    )


def aliases_of(keys: Keys, seed: int = 1) -> NDArray[Any]:
    found = np.zeros(len(keys), ALIAS)
    found["text"] = np.random.default_rng(seed).integers(0, 1 << 64, (len(keys), 2), np.uint64)
    found["row"] = keys
    return found


def sealed(folder: Folder, batches: Sequence[PendingRows], *, id: str = ID, feature_width: int = 4) -> SegmentFacts:
    keys = np.concatenate([batch.keys for batch in batches]) if batches else np.zeros((0, 2), np.uint64)
    return seal(folder, id, batches, aliases_of(keys[::2]), feature_width)


def every(segment: Segment) -> NDArray[np.int64]:
    return np.arange(len(segment))


def intact(segment: Segment) -> list[bool]:
    found = segment.intact(every(segment), segment.payload(every(segment)))
    assert found.dtype == np.bool_
    return [bool(one) for one in found]


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def file_of(folder: Folder, kind: str) -> Path:
    return folder.path / "seg" / f"{ID}.{kind}"


def assert_same(segment: Segment, batches: Sequence[PendingRows]) -> None:
    """Check all fields of all rows."""
    assert len(segment) == sum(map(len, batches))
    assert all(intact(segment))
    stored = segment.payload(every(segment))
    row = 0
    features = segment.features()
    assert features.dtype == np.float16
    for batch in batches:
        for i in range(len(batch)):
            record = segment.rows[row]
            assert record["key"].tobytes() == batch.keys[i].tobytes()
            assert stored[row].tobytes() == batch.payload[i].tobytes()
            assert segment.payload(np.array([row]))[0].tobytes() == batch.payload[i].tobytes()
            assert record["scale"] == batch.scale[i]
            assert record["cost"] == batch.cost[i]
            assert segment.tokens(row).tolist() == batch.tokens[i].tolist()
            assert segment.tokens(row).dtype == np.int32
            assert segment.source(row) == batch.sources[i]
            assert features[row].tobytes() == batch.features[i].tobytes()
            row += 1


# -- round trips --------------------------------------------------------------------------------------------


def test_rows_of_equal_length_come_back_as_they_were(folder: Folder) -> None:
    batches = [entries(7), entries(1, seed=1), entries(5, seed=2)]
    segment = Segment.open(folder, sealed(folder, batches))
    assert_same(segment, batches)
    payload = segment.payload(np.array([12, 0, 3, 3]))
    assert isinstance(payload, np.ndarray)
    assert payload.shape == (4, 100)
    whole = [part for batch in batches for part in batch.payload]
    assert payload.tobytes() == b"".join(whole[i].tobytes() for i in (12, 0, 3, 3))


def test_rows_of_unequal_length_come_back_as_they_were(folder: Folder) -> None:
    width = 6
    batches = [
        entries(4, [4 * width * tokens for tokens in (3, 1, 17, 11)]),
        entries(3, [4 * width * tokens for tokens in (5, 0, 2)], seed=1),
    ]
    segment = Segment.open(folder, sealed(folder, batches))
    assert_same(segment, batches)
    payload = segment.payload(np.array([6, 2]))
    assert [part.nbytes for part in payload] == [48, 408]
    assert payload[1].view("<f4").reshape(-1, width).shape == (17, width)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 4096])
def test_rows_of_any_length_come_back_as_they_were(folder: Folder, size: int) -> None:
    batches = [entries(3, [size] * 3)]
    assert_same(Segment.open(folder, sealed(folder, batches)), batches)


def test_rows_without_any_bytes_come_back_as_they_were(folder: Folder) -> None:
    batches = [entries(3, [0, 0, 0])]
    assert_same(Segment.open(folder, sealed(folder, batches)), batches)


def test_a_copy_of_equal_rows_can_be_changed_without_changing_the_store(folder: Folder) -> None:
    segment = Segment.open(folder, sealed(folder, [entries(3)]))
    payload = segment.payload(every(segment))
    assert isinstance(payload, np.ndarray)
    payload[:] = 0
    assert all(intact(segment))


def test_the_facts_say_what_is_in_the_files(folder: Folder) -> None:
    facts = sealed(folder, [entries(4, [10, 20, 30, 40]), entries(1, seed=1)])
    assert facts.id == ID
    assert (facts.rows, facts.aliases, facts.payload) == (5, 3, 200)
    assert [one.name for one in facts.files] == [f"seg/{ID}.{kind}" for kind in KINDS]
    for one in facts.files:
        content = (folder.path / one.name).read_bytes()
        assert one.size == len(content)
        assert one.sha256 == (None if one.name.endswith(".seg") else hashlib.sha256(content).hexdigest())


def test_the_files_are_laid_out_as_the_format_says(folder: Folder) -> None:
    batch = entries(3, [100, 64, 7])
    facts = sealed(folder, [batch])
    content = {kind: file_of(folder, kind).read_bytes() for kind in KINDS}
    magic, record, feature_width, rows, pitch, reserved = struct.unpack("<8sIIQQ32s", content["row"][:64])
    assert (magic, record, feature_width, rows, pitch, reserved) == (b"LLMCROW1", 72, 4, 3, 0, bytes(32))
    start = 0
    for i in range(3):
        fields = struct.unpack("<16s16sQQIIIffHH", content["row"][64 + i * record : 64 + (i + 1) * record])
        key, digest, offset, var, nbytes, tokens, created, scale, cost, source, flags = fields
        assert key == batch.keys[i].tobytes()
        assert offset % 64 == 0
        assert offset == (0, 128, 192)[i]
        assert content["seg"][offset : offset + nbytes] == batch.payload[i].tobytes()
        size = nbytes.to_bytes(8, "little")
        covered = key + size + struct.pack("<f", scale) + batch.payload[i].tobytes()
        assert digest == xxhash.xxh3_128(covered).digest()
        assert var == start
        assert content["var"][var : var + 4 * tokens] == batch.tokens[i].astype("<i4").tobytes()
        assert content["var"][var + 4 * tokens :][:source].decode() == batch.sources[i]
        start += 4 * tokens + source
        assert (scale, cost, flags) == (batch.scale[i], batch.cost[i], 0)
        assert created > 1_600_000_000
    assert len(content["var"]) == start
    assert len(content["seg"]) == 256
    assert content["fp"] == batch.features.tobytes()
    aliases = aliases_of(batch.keys[::2])
    assert content["key"] == b"".join(one["text"].tobytes() + one["row"].tobytes() for one in aliases)
    assert facts.aliases == 2


def test_equally_long_rows_follow_each_other_at_the_pitch_of_the_header(folder: Folder) -> None:
    sealed(folder, [entries(3)])
    content = file_of(folder, "row").read_bytes()
    assert struct.unpack("<Q", content[24:32]) == (128,)
    assert file_of(folder, "seg").stat().st_size == 3 * 128


def test_a_segment_may_hold_names_only(folder: Folder) -> None:
    aliases = aliases_of(entries(5).keys)
    facts = seal(folder, ID, [], aliases, 4)
    segment = Segment.open(folder, facts)
    assert (len(segment), facts.rows, facts.aliases, facts.payload) == (0, 0, 5, 0)
    assert segment.aliases.tobytes() == aliases.tobytes()
    assert segment.features().shape == (0, 4)
    assert len(segment.payload(every(segment))) == 0
    assert intact(segment) == []


def test_a_segment_may_hold_no_names(folder: Folder) -> None:
    batch = entries(2)
    segment = Segment.open(folder, seal(folder, ID, [batch], np.zeros(0, ALIAS), 4))
    assert len(segment.aliases) == 0
    assert_same(segment, [batch])


def test_rows_may_have_no_features(folder: Folder) -> None:
    batch = entries(3, feature_width=0)
    segment = Segment.open(folder, seal(folder, ID, [batch], np.zeros(0, ALIAS), 0))
    assert segment.features().shape == (3, 0)
    assert_same(segment, [batch])


def test_features_need_not_lie_side_by_side(folder: Folder) -> None:
    batch = entries(5)
    turned = replace(batch, features=np.asfortranarray(batch.features))
    segment = Segment.open(folder, sealed(folder, [turned]))
    assert segment.features().tolist() == batch.features.tolist()


def test_names_lead_to_the_keys_of_their_rows(folder: Folder) -> None:
    batch = entries(6)
    segment = Segment.open(folder, sealed(folder, [batch]))
    assert segment.aliases["row"].tolist() == batch.keys[::2].tolist()
    assert segment.aliases["text"].tolist() == aliases_of(batch.keys[::2])["text"].tolist()


def test_a_source_that_is_no_proper_text_or_too_long_is_kept_as_far_as_it_can_be(folder: Folder) -> None:
    sources = ["a\ud800b", "\udfff", "x" * 5000, "é" * 513, "🙂" * 2000, "y" * 1023 + "é"]
    batch = replace(entries(6), sources=sources)
    segment = Segment.open(folder, sealed(folder, [batch]))
    found = [segment.source(i) for i in range(6)]
    assert found[0][0] == "a"
    assert found[0][-1] == "b"
    assert 1 <= len(found[1]) <= 3
    assert found[2] == "x" * 1024
    assert found[3] == "é" * 512
    assert found[4] == "🙂" * 256
    assert found[5][:1023] == "y" * 1023
    assert all(len(one.encode("utf-8", "surrogatepass")) <= 1028 for one in found)
    assert [segment.tokens(i).tolist() for i in range(6)] == [ids.tolist() for ids in batch.tokens]


def test_tokens_of_another_integer_type_are_stored_as_int32(folder: Folder) -> None:
    tokens = [np.array([1, 2, 30_000], np.int64), np.array([], np.int64)]
    batch = replace(entries(2), tokens=tokens)  # type: ignore[arg-type]
    segment = Segment.open(folder, sealed(folder, [batch]))
    assert [segment.tokens(i).tolist() for i in range(2)] == [[1, 2, 30_000], []]


def test_a_long_segment_is_written_whole(folder: Folder) -> None:
    batches = [entries(20, [1 << 20] * 20), entries(3, [1 << 20] * 3, seed=1)]
    segment = Segment.open(folder, sealed(folder, batches))
    assert_same(segment, batches)


def test_files_are_for_their_owner_only(folder: Folder) -> None:
    sealed(folder, [entries(2)])
    for kind in KINDS:
        assert stat.S_IMODE(file_of(folder, kind).stat().st_mode) == 0o600
    for sub in SUBFOLDERS:
        assert stat.S_IMODE((folder.path / sub).stat().st_mode) == 0o700


def test_a_segment_can_be_read_after_its_files_were_removed(folder: Folder) -> None:
    batches = [entries(3)]
    segment = Segment.open(folder, sealed(folder, batches))
    segment.features()
    segment.tokens(0)
    for kind in KINDS:
        file_of(folder, kind).unlink()
    assert_same(segment, batches)


# -- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["row", "key"])
def test_any_flipped_byte_in_rows_or_names_is_seen_when_the_segment_is_opened(folder: Folder, kind: str) -> None:
    facts = sealed(folder, [entries(3)])
    path = file_of(folder, kind)
    for at in range(path.stat().st_size):
        flip(path, at, at % 8)
        with pytest.raises(SnapshotDamaged, match=rf"\.{kind} has sha256"):
            Segment.open(folder, facts)
        flip(path, at, at % 8)
    assert all(intact(Segment.open(folder, facts)))


@pytest.mark.parametrize("lengths", [[40, 40, 40], [40, 64, 7]])
def test_a_flipped_byte_in_the_activations_is_one_rows_loss_and_nothing_else(
    folder: Folder, lengths: list[int]
) -> None:
    segment = Segment.open(folder, sealed(folder, [entries(3, lengths)]))
    path = file_of(folder, "seg")
    assert path.stat().st_size == 192
    for at in range(192):
        flip(path, at, at % 8)
        row, inside = divmod(at, 64)
        expected = [True, True, True]
        expected[row] = inside >= lengths[row]  # what fills a row up to 64 bytes is nobody's
        assert intact(segment) == expected, at
        flip(path, at, at % 8)
    assert intact(segment) == [True, True, True]


@pytest.mark.parametrize("kind", ["var", "fp"])
def test_a_flipped_byte_in_tokens_or_features_is_seen_when_they_are_first_used(folder: Folder, kind: str) -> None:
    batch = entries(4)
    facts = sealed(folder, [batch])
    path = file_of(folder, kind)
    for at in range(path.stat().st_size):
        flip(path, at, at % 8)
        segment = Segment.open(folder, facts)
        assert all(intact(segment))
        if kind == "var":
            assert segment.features().tobytes() == batch.features.tobytes()
            for use in (segment.tokens, segment.source):
                with pytest.raises(SnapshotDamaged, match=r"\.var has sha256"):
                    use(1)
        else:
            assert segment.tokens(1).tolist() == batch.tokens[1].tolist()
            with pytest.raises(SnapshotDamaged, match=r"\.fp has sha256"):
                segment.features()
        flip(path, at, at % 8)


@pytest.mark.parametrize("lengths", [[100, 100], [100, 128]])
def test_the_right_bytes_in_the_wrong_row_do_not_pass(folder: Folder, lengths: list[int]) -> None:
    segment = Segment.open(folder, sealed(folder, [entries(2, lengths)]))
    path = file_of(folder, "seg")
    content = path.read_bytes()
    assert intact(segment) == [True, True]
    path.write_bytes(content[128:] + content[:128])
    assert intact(segment) == [False, False]
    path.write_bytes(content[:128] * 2)
    assert intact(segment) == [True, False]


def test_equal_bytes_under_another_key_or_of_another_length_have_another_checksum() -> None:
    keys = entries(2).keys
    bytes_ = np.arange(32, dtype=np.uint8)
    one = checksum(keys[0], bytes_)
    assert len(one) == 16
    assert one == checksum(keys[0].copy(), bytes_.copy())
    assert one != checksum(keys[1], bytes_)
    assert one != checksum(keys[0][::-1].copy(), bytes_)
    zeros = np.zeros(16, np.uint8)
    assert checksum(keys[0], zeros) != checksum(keys[0], zeros[:8])
    assert checksum(keys[0], zeros, 0.5) != checksum(keys[0], zeros)


def test_right_bytes_with_another_scale_are_not_intact(folder: Folder) -> None:
    segment = Segment.open(folder, sealed(folder, [entries(3, [32] * 3)]))
    assert intact(segment) == [True] * 3
    segment.rows = segment.rows.copy()
    segment.rows["scale"][1] *= 2
    assert intact(segment) == [True, False, True]


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("nbytes", [0, 1, 100, 4096, 4097, 70_000])
def test_checksums_of_rows_in_one_block_are_those_of_each_row_alone(nbytes: int, strong: bool) -> None:
    random = np.random.default_rng(nbytes)
    block, records = random.integers(0, 256, (9, nbytes), np.uint8), np.zeros(9, ROW)
    records["key"], records["nbytes"] = random.integers(0, 1 << 64, (9, 2), np.uint64), nbytes
    records["scale"], records["flags"] = random.random(9), STRONG * strong
    alone = [checksum(one["key"], part, one["scale"], strong=strong) for one, part in zip(records, block, strict=True)]
    assert digests(records, block) == digests(records, list(block)) == alone
    records["checksum"] = np.frombuffer(b"".join(alone), np.uint8).reshape(-1, 16)
    assert agree(records, block) == [True] * 9
    records["checksum"][4, 7] ^= 1
    records["nbytes"][6] += 1
    assert agree(records, block) == [place not in (4, 6) for place in range(9)]
    assert agree(records[:0], block[:0]) == []


def test_rows_of_both_kinds_of_checksums_are_told_apart() -> None:
    block, records = np.arange(80, dtype=np.uint8).reshape(4, 20), np.zeros(4, ROW)
    records["nbytes"], records["scale"], records["flags"] = 20, 1, [0, STRONG, STRONG, 0]
    assert digests(records, block) == [
        checksum(one["key"], part, strong=bool(one["flags"])) for one, part in zip(records, block, strict=True)
    ]


@pytest.mark.parametrize("nbytes", [64, 100, 300_000])
@pytest.mark.parametrize("reading", ["mmap", "pread"])
def test_rows_are_copied_to_where_they_are_wanted(tmp_path: Path, nbytes: int, reading: Reading) -> None:
    folder = Folder(tmp_path / "store", create=True, reading=reading)
    batch = entries(5, [nbytes] * 5)
    segment = Segment.open(folder, sealed(folder, [batch]))
    numbers = np.array([3, 0, 1, 1, 4])
    whole = np.zeros((5, nbytes), np.uint8)
    places = [np.zeros(nbytes, np.uint8) for _ in range(5)]
    assert segment.fetch(numbers, whole) == [True] * 5
    assert segment.fetch(numbers, places) == [True] * 5
    for i, number in enumerate(numbers.tolist()):
        assert whole[i].tobytes() == places[i].tobytes() == batch.payload[number].tobytes()
    folder.close()


def test_a_file_that_became_shorter_is_rows_of_zeros_that_are_not_intact(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "store", create=True, reading="pread")
    segment = Segment.open(folder, sealed(folder, [entries(4, [128] * 4)]))
    os.truncate(tmp_path / "store" / segment.facts.file("seg").name, 200)
    found = np.full((4, 128), 7, np.uint8)
    assert segment.fetch(np.arange(4), found) == [True, False, False, False]
    assert not found[2:].any()
    folder.close()


def test_another_row_count_of_payload_is_not_intact(folder: Folder) -> None:
    segment = Segment.open(folder, sealed(folder, [entries(2, [10, 20])]))
    payload = segment.payload(every(segment))
    shorter = [payload[0][:-1], payload[1]]
    assert segment.intact(every(segment), shorter).tolist() == [False, True]


def provoked(segment_facts: SegmentFacts, folder: Folder) -> None:
    """Open the segment and read all its files."""
    segment = Segment.open(folder, segment_facts)
    segment.features()
    segment.tokens(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", [-64, -1, 1, 64])
def test_a_file_of_another_size_is_damage(folder: Folder, kind: str, by: int) -> None:
    facts = sealed(folder, [entries(4, [128] * 4)])
    path = file_of(folder, kind)
    os.truncate(path, max(0, path.stat().st_size + by))
    with pytest.raises(SnapshotDamaged, match=rf"\.{kind}"):
        provoked(facts, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_or_missing_file_is_damage(folder: Folder, kind: str) -> None:
    facts = sealed(folder, [entries(4)])
    os.truncate(file_of(folder, kind), 0)
    with pytest.raises(SnapshotDamaged, match=rf"\.{kind}"):
        provoked(facts, folder)
    file_of(folder, kind).unlink()
    with pytest.raises(SnapshotDamaged, match=rf"\.{kind} is missing"):
        provoked(facts, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["symlink", "dangling", "fifo", "folder"])
def test_a_file_replaced_by_something_else_is_damage_and_nobody_waits_for_it(
    folder: Folder, kind: str, by: str
) -> None:
    facts = sealed(folder, [entries(4)])
    path, other = file_of(folder, kind), folder.path.parent / "other"
    path.rename(other)
    if by == "symlink":
        path.symlink_to(other)
    elif by == "dangling":
        path.symlink_to(folder.path / "nowhere")
    elif by == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(SnapshotDamaged, match=rf"\.{kind}"):
        provoked(facts, folder)


def test_a_segment_whose_folder_is_gone_is_damage(folder: Folder) -> None:
    facts = sealed(folder, [entries(2)])
    (folder.path / "seg").rename(folder.path / "was seg")
    fresh = Folder(folder.path)
    with pytest.raises(SnapshotDamaged):
        Segment.open(fresh, facts)
    fresh.close()


def test_a_file_of_another_segment_is_damage(folder: Folder) -> None:
    facts = sealed(folder, [entries(3)])
    other = "f" * 32
    sealed(folder, [entries(3, seed=9)], id=other)
    for kind in ("row", "key", "var", "fp"):
        mine, theirs = file_of(folder, kind), folder.path / "seg" / f"{other}.{kind}"
        kept = mine.read_bytes()
        mine.write_bytes(theirs.read_bytes())
        with pytest.raises(SnapshotDamaged, match=rf"\.{kind}"):
            provoked(facts, folder)
        mine.write_bytes(kept)
    mine, theirs = file_of(folder, "seg"), folder.path / "seg" / f"{other}.seg"
    mine.write_bytes(theirs.read_bytes())
    assert intact(Segment.open(folder, facts)) == [False, False, False]


def resigned(folder: Folder, facts: SegmentFacts, kind: str, content: bytes) -> SegmentFacts:
    """Return facts that fit this content, as an attacker who can write manifests would."""
    file_of(folder, kind).write_bytes(content)
    new = replace(facts.file(kind), size=len(content), sha256=hashlib.sha256(content).hexdigest())
    return replace(facts, files=tuple(new if one.name == new.name else one for one in facts.files))


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (0, b"LLMCROW2"),
        (8, struct.pack("<I", 71)),
        (16, struct.pack("<Q", 2)),
        (16, struct.pack("<Q", 1 << 63)),
        (24, struct.pack("<Q", 64)),
        (24, struct.pack("<Q", 1 << 40)),
    ],
)
def test_a_header_that_does_not_fit_is_damage_even_if_its_sha256_does(folder: Folder, at: int, new: bytes) -> None:
    facts = sealed(folder, [entries(3)])
    content = file_of(folder, "row").read_bytes()
    with pytest.raises(SnapshotDamaged):
        Segment.open(folder, resigned(folder, facts, "row", content[:at] + new + content[at + len(new) :]))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 64 + 72])
def test_too_few_rows_are_damage_even_if_their_sha256_fits(folder: Folder, size: int) -> None:
    facts = sealed(folder, [entries(3)])
    content = file_of(folder, "row").read_bytes()[:size]
    with pytest.raises(SnapshotDamaged):
        Segment.open(folder, resigned(folder, facts, "row", content))


def test_counts_that_differ_from_the_files_are_damage(folder: Folder) -> None:
    facts = sealed(folder, [entries(3)])
    for wrong in (
        replace(facts, rows=2),
        replace(facts, rows=4),
        replace(facts, aliases=1),
        replace(facts, aliases=3),
    ):
        with pytest.raises(SnapshotDamaged):
            Segment.open(folder, wrong)


def test_a_row_that_points_outside_its_file_is_not_intact_even_if_its_sha256_fits(folder: Folder) -> None:
    facts = sealed(folder, [entries(3, [100, 50, 70])])
    content = bytearray(file_of(folder, "row").read_bytes())
    record = (len(content) - 64) // 3
    for i, offset in enumerate((1 << 63, 192, (1 << 64) - 1)):  # outside, over the end, negative as a signed number
        content[64 + i * record + 32 : 64 + i * record + 40] = struct.pack("<Q", offset)
    segment = Segment.open(folder, resigned(folder, facts, "row", bytes(content)))
    assert intact(segment) == [False, False, False]


# -- writes that fail ---------------------------------------------------------------------------------------


class Faults:
    """Makes the n-th call that changes a file fail; counts all calls with -1."""

    CALLS = ("create", "write", "sync", "sync_folder")

    def __init__(self, patch: pytest.MonkeyPatch, code: int, at: int) -> None:
        self.code, self.at = code, at
        self.calls: list[str] = []
        for name in self.CALLS:
            patch.setattr(Folder, name, self._wrapped(name, getattr(Folder, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self.at:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_write_that_fails_anywhere_leaves_no_file_of_the_segment(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    earlier = sealed(folder, [entries(3, seed=5)], id="e" * 32)
    batches = [entries(3), entries(2, seed=1)]
    with monkeypatch.context() as patch:
        calls = Faults(patch, code, -1).calls
        sealed(folder, batches, id="d" * 32)
    assert len(calls) >= 16
    before = sorted(folder.names("seg"))
    for at in range(len(calls)):
        with monkeypatch.context() as patch:
            Faults(patch, code, at)
            with pytest.raises(OSError, match=os.strerror(code)) as caught:
                sealed(folder, batches)
        assert caught.value.errno == code
        assert sorted(folder.names("seg")) == before
    assert_same(Segment.open(folder, sealed(folder, batches)), batches)
    assert_same(Segment.open(folder, earlier), [entries(3, seed=5)])


def test_a_disk_that_fills_up_within_a_write_leaves_no_file_of_the_segment(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.pwrite, [700]

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "no space")
        done = real(descriptor, data[: room[0]], offset)
        room[0] -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="no space"):
            sealed(folder, [entries(5)])
    assert folder.names("seg") == []


def test_every_file_is_synced_and_then_the_folder(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        calls = Faults(patch, errno.EIO, -1).calls
        sealed(folder, [entries(3)])
    assert calls.count("create") == calls.count("sync") == 5
    assert calls[-1] == "sync_folder"
    order = [name for name in calls if name != "write"]
    assert order == ["create", "sync"] * 5 + ["sync_folder"]


def test_a_segment_never_writes_over_another(folder: Folder) -> None:
    facts = sealed(folder, [entries(3)])
    with pytest.raises(FileExistsError):
        sealed(folder, [entries(4, seed=2)])
    assert_same(Segment.open(folder, facts), [entries(3)])
