"""Cached digests of tensors: a damaged, misplaced, linked or forged file is not used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import xxhash

from llmcache.model import digests
from llmcache.model.digests import (
    ModelFiles,
    canonical,
    remembered_digests,
    tensor_digests,
)

FILES = ModelFiles((("model.safetensors", 10, 1, 1, 1, 1),))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return two tensors that differ between seeds only in their middle."""
    made = {name: torch.arange(300, dtype=torch.float32) for name in ("a", "b")}
    for one in made.values():
        one[100:200] += seed
    return made


def checksums(some: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: xxhash.xxh3_128_digest(one.numpy().tobytes()) for name, one in some.items()}


def right(some: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the sha256 of the bytes, computed independently."""
    return {name: hashlib.sha256(one.numpy().tobytes()).hexdigest() for name, one in some.items()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    some = tensors()
    assert remembered_digests(some, FILES, checksums(some)) == right(some)
    (file,) = (tmp_path / "cache" / "llmcache" / "digests").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    return file


def test_what_is_remembered_is_not_hashed_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "tensor_digests", lambda *_: pytest.fail("hashed again"))
    some = tensors()
    assert remembered_digests(some, FILES, checksums(some)) == right(some)


def asked(place: Path) -> None:
    for seed in (0, 1):
        some = tensors(seed)
        assert remembered_digests(some, FILES, checksums(some)) == right(some) == tensor_digests(some)


def test_a_changed_byte_at_any_place_and_a_cut_at_any_length_are_recomputed(place: Path) -> None:
    whole = place.read_bytes()
    for at in range(len(whole)):
        for content in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:at]):
            place.write_bytes(content)
            some = tensors()
            assert remembered_digests(some, FILES, checksums(some)) == right(some)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"[" * 100_000, b'{"check":1}', b'{"check":"x","tensors":' + b"9" * 5000 + b"}", b"\xff\xfe"],
)
def test_what_is_no_file_of_digests_is_recomputed(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    asked(place)


@pytest.mark.parametrize("digest", [5, [], None, "5", "x" * 64, "A" * 64, {"a": 1}])
def test_a_digest_that_cannot_be_one_is_recomputed_even_with_a_right_check(place: Path, digest: object) -> None:
    raw = json.loads(place.read_bytes())
    raw["tensors"]["a"][1] = digest
    raw["check"] = digests._check(place.stem, raw["tensors"])
    place.write_bytes(canonical(raw))
    asked(place)


def test_a_file_of_other_tensors_in_its_place_is_recomputed(place: Path) -> None:
    other = {name: one + 7 for name, one in tensors(1).items()}
    remembered_digests(other, FILES, checksums(other))
    (moved,) = (one for one in place.parent.iterdir() if one != place)
    for source, target in ((moved, place), (place, moved)):
        shutil.copy(source, target)
        some = tensors()
        assert remembered_digests(some, FILES, checksums(some)) == right(some)
        assert remembered_digests(other, FILES, checksums(other)) == right(other)


def test_tensors_that_differ_in_their_middle_alone_have_digests_of_their_own(place: Path) -> None:
    assert right(tensors(0)) != right(tensors(1))
    for _ in range(2):
        asked(place)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_not_read(place: Path, tmp_path: Path, kind: str) -> None:
    kept = tmp_path / "kept.json"
    shutil.move(place, kept)
    if kind == "link":
        place.symlink_to(kept)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    before = kept.read_bytes()
    asked(place)
    assert kept.read_bytes() == before
