"""Manifests: one checksummed JSON file per generation, published by put-if-absent.

The highest generation that parses and verifies *is* the store. `docs/format.md` has the fields.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llmcache.indexes.codec import DTYPES
from llmcache.indexes.errors import (
    CommitConflict,
    FormatTooNew,
    LLMCacheError,
    SnapshotDamaged,
    SnapshotNotFound,
    StoreFenced,
    StoreFull,
    UntrustedSnapshot,
)
from llmcache.indexes.files import write_whole
from llmcache.indexes.io import Folder
from llmcache.indexes.signatures import announce, is_signed, signature_name, signatures

FORMAT = 1
MAX_BYTES = 16 << 20
LAST = 10**12 - 1
"""The highest generation that a manifest's name can say."""
_NAME = re.compile(r"m-(\d{12})\.json")
_FILE = re.compile(r"(seg|idx)/[0-9a-f]{32}(-[0-9a-f]{32})?\.(seg|row|var|fp|key|faiss|proj|alive)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROUNDS = 200
_WIDEST = 1 << 20  # numbers in one activation or feature vector
_MOST_PARTS, _MOST_COMMAS = 1 << 18, 1 << 20  # a manifest of 16 MiB that we wrote has half of these
_MOST_DAMAGED = 256  # manifests that are tried before giving up


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file that a manifest names. sha256 is None where rows carry their own checksums (.seg)."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """A sealed segment. rows and aliases are counts; payload is the sum of the activations' bytes.

    dead: how many of the rows were evicted; `alive` is the bitmap of those that were not, None when all are there.
    writer: who sealed it; "" where that is not known.
    """

    id: str
    rows: int
    aliases: int
    payload: int
    files: tuple[FileFacts, ...]
    dead: int = 0
    alive: FileFacts | None = None
    writer: str = ""

    @property
    def live(self) -> int:
        """Rows that were not evicted."""
        return self.rows - self.dead

    @property
    def all_files(self) -> tuple[FileFacts, ...]:
        """What the segment occupies on the disk: its files, and its bitmap where it has one."""
        return (*self.files, self.alive) if self.alive else self.files

    def file(self, kind: str) -> FileFacts:
        """The segment's file with this ending."""
        for facts in self.files:
            if facts.name.endswith("." + kind):
                return facts
        raise SnapshotDamaged(f"segment {self.id} has no .{kind} file in the manifest")


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """A derived FAISS file. It covers the rows of `segments`, in that order."""

    kind: str
    dim: int
    count: int
    segments: tuple[str, ...]
    file: FileFacts


@dataclass(frozen=True, slots=True)
class BankFacts:
    """One layer's bank. dtype is how activations are stored, rank 1 is [width], rank 2 is [tokens, width]."""

    dtype: str
    width: int
    rank: int
    feature_width: int
    segments: tuple[SegmentFacts, ...] = ()
    projection: FileFacts | None = None
    index: IndexFacts | None = None

    @property
    def all_files(self) -> tuple[FileFacts, ...]:
        """Every file that this bank names."""
        derived = (self.projection, self.index and self.index.file)
        return (*(file for one in self.segments for file in one.all_files), *(file for file in derived if file))


@dataclass(frozen=True, slots=True)
class NamespaceFacts:
    """What one model has stored. identity and config are what the layer above needs to tell whose entries these are.

    secret_check: what tells the secret that went into the keys from a wrong one; "" where there is no secret.
    """

    identity: Mapping[str, Any]
    config: Mapping[str, Any]
    banks: Mapping[str, BankFacts] = field(default_factory=dict)
    secret_check: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One generation of a store."""

    generation: int = 0
    parent: int = 0
    created: float = 0.0
    writer: str = ""
    skipped: tuple[int, ...] = ()
    namespaces: Mapping[str, NamespaceFacts] = field(default_factory=dict)

    @property
    def files(self) -> frozenset[str]:
        """Names of every file that this manifest names."""
        banks = (bank for space in self.namespaces.values() for bank in space.banks.values())
        return frozenset(file.name for bank in banks for file in bank.all_files)

    def with_bank(self, namespace: str, bank: str, facts: BankFacts) -> Manifest:
        """The same manifest with one bank's facts replaced."""
        old = self.namespaces[namespace]
        new = replace(old, banks={**old.banks, bank: facts})
        return replace(self, namespaces={**self.namespaces, namespace: new})


# -- bytes --------------------------------------------------------------------------------------------------


def to_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON, then one line with the sha256 of everything before it."""
    body = json.dumps(
        {"format": FORMAT, **asdict(manifest)},
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
        ensure_ascii=True,
    ).encode()
    return body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def from_bytes(data: bytes, name: str) -> Manifest:
    """Parse and check one manifest; SnapshotDamaged says what is wrong with `name`, FormatTooNew asks to upgrade."""
    body, line, digest = data[:-73], data[-73:-65], data[-65:-1]
    found = hashlib.sha256(body).hexdigest().encode()
    if len(data) > MAX_BYTES or line != b"\nsha256:" or digest != found or data[-1:] != b"\n":
        raise SnapshotDamaged(f"{name} does not agree with its own checksum")
    try:
        return _manifest(strict_json(body))
    except (TypeError, ValueError, KeyError, RecursionError, AttributeError, OverflowError) as error:
        raise SnapshotDamaged(f"{name} is not a manifest: {type(error).__name__}: {error}") from None


def salvage(data: bytes) -> Manifest | None:
    """What a damaged manifest still says, when its JSON can be read; nothing of it is certain."""
    try:
        return _manifest(strict_json(data.partition(b"\nsha256:")[0]))
    except (TypeError, ValueError, KeyError, RecursionError, AttributeError, OverflowError, SnapshotDamaged):
        return None


def strict_json(body: bytes) -> Any:
    """json.loads that refuses repeated keys, NaN and infinity. Deep nesting is a RecursionError."""

    if body.count(b"{") + body.count(b"[") > _MOST_PARTS or body.count(b",") > _MOST_COMMAS:
        raise ValueError("it has too many parts")  # parsed, some bytes of text can be hundreds in memory

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is given twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else float(refuse(number))

    return json.loads(body, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r} is not a count")
    return value


def _width(value: Any) -> int:
    if _count(value) > _WIDEST:
        raise ValueError(f"no model gives vectors of {value} numbers")
    return int(value)


def _time(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r:.80} is not a time")
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 1024:
        raise ValueError(f"{value!r:.80} is not a short text")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{value!r:.80} is not a list")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{value!r:.80} is not a mapping")
    return value


def _file(raw: dict[str, Any]) -> FileFacts:
    facts = FileFacts(_text(raw["name"]), _count(raw["size"]), raw["sha256"])
    if not _FILE.fullmatch(facts.name):
        raise ValueError(f"{facts.name!r} is not a name inside a store")
    if facts.sha256 is not None and not _SHA256.fullmatch(_text(facts.sha256)):
        raise ValueError(f"{facts.name} has no valid sha256")
    return facts


def _segment(raw: dict[str, Any]) -> SegmentFacts:
    files = tuple(_file(one) for one in _list(raw["files"]))
    if len({file.name for file in files}) != len(files):
        raise ValueError("a segment names a file twice")
    rows, dead, alive = _count(raw["rows"]), _count(raw.get("dead", 0)), raw.get("alive")
    if dead > rows or (alive is None) != (dead == 0):
        raise ValueError(f"{dead} of {rows} rows are dead, and the bitmap is {'absent' if alive is None else 'there'}")
    bitmap = None if alive is None else _file(alive)
    counts = rows, _count(raw["aliases"]), _count(raw["payload"])
    return SegmentFacts(_text(raw["id"]), *counts, files, dead, bitmap, _text(raw.get("writer", "")))


def _index(raw: dict[str, Any]) -> IndexFacts:
    covered = tuple(_text(one) for one in _list(raw["segments"]))
    return IndexFacts(_text(raw["kind"]), _count(raw["dim"]), _count(raw["count"]), covered, _file(raw["file"]))


def _bank(raw: dict[str, Any]) -> BankFacts:
    if raw["dtype"] not in DTYPES or raw["rank"] not in (1, 2):
        raise ValueError(f"no bank has dtype {raw['dtype']!r:.80} and rank {raw['rank']!r:.80}")
    segments = tuple(_segment(one) for one in _list(raw["segments"]))
    if len({one.id for one in segments}) != len(segments):
        raise ValueError("a bank names a segment twice")
    return BankFacts(
        dtype=_text(raw["dtype"]),
        width=_width(raw["width"]),
        rank=_count(raw["rank"]),
        feature_width=_width(raw["feature_width"]),
        segments=segments,
        projection=None if raw["projection"] is None else _file(raw["projection"]),
        index=None if raw["index"] is None else _index(raw["index"]),
    )


def _manifest(raw: dict[str, Any]) -> Manifest:
    if _count(raw["format"]) > FORMAT:
        raise FormatTooNew(
            f"the store has format {raw['format']}, this LLMCache reads up to {FORMAT}; "
            "upgrade: pip install -U llmcache"
        )
    return Manifest(
        generation=_count(raw["generation"]),
        parent=_count(raw["parent"]),
        created=_time(raw["created"]),
        writer=_text(raw["writer"]),
        skipped=tuple(_count(one) for one in _list(raw["skipped"])),
        namespaces={
            _text(name): NamespaceFacts(
                _mapping(space["identity"]),
                _mapping(space["config"]),
                {_text(layer): _bank(bank) for layer, bank in space["banks"].items()},
                _text(space.get("secret_check", "")),
            )
            for name, space in raw["namespaces"].items()
        },
    )


# -- generations --------------------------------------------------------------------------------------------


class Republished(CommitConflict):
    """A commit was linked, is not part of the store, and its files are not to be named again."""


def generation_name(generation: int) -> str:
    return f"m-{generation:012d}.json"


def generations(folder: Folder) -> list[int]:
    """Generations that one listing shows, newest first."""
    return sorted((int(match[1]) for name in folder.names() if (match := _NAME.fullmatch(name))), reverse=True)


def newest(folder: Folder, listed: list[int], key: bytes | None = None) -> tuple[Manifest, list[int]]:
    """The newest manifest of a listing that verifies, and the generations above it that do not.

    key: count only what is signed with it. UntrustedSnapshot when nothing is.
    SnapshotNotFound when the listing is empty, SnapshotDamaged when none of it verifies. A manifest of a newer
    format is never passed over for an older one: that would undo what the newer program wrote.
    """
    damaged: list[int] = []
    unsigned = 0
    for generation in listed[:_MOST_DAMAGED]:
        name = generation_name(generation)
        try:
            data = folder.read(name, MAX_BYTES)
            if key is not None and not is_signed(folder, generation, data, key):
                unsigned += 1
                raise SnapshotDamaged(f"{name} is not signed with the key given")
            found = from_bytes(data, name)
            if found.generation != generation:  # it would undo what came since
                raise SnapshotDamaged(f"{name} holds generation {found.generation}: an older file was copied over it")
            return found, damaged
        except FormatTooNew:
            raise
        except (FileNotFoundError, SnapshotDamaged):
            damaged.append(generation)
    if unsigned:
        raise UntrustedSnapshot(
            f"{folder.path}: none of its {unsigned} manifests is signed with the key given; ask its owner for the key, "
            "or let the owner open and commit it with trust='own' and this key"
        )
    if damaged:
        raise SnapshotDamaged(
            f"{folder.path}: none of its {len(damaged)} manifests is whole; the newest is "
            f"{generation_name(damaged[0])}: restore it from a copy, or start a new store"
        )
    raise SnapshotNotFound(f"{folder.path} holds no manifest, so it is not a store; make one with `llmcache build`")


def commit(
    folder: Folder,
    writer: str,
    change: Callable[[Manifest], Manifest],
    *,
    key: bytes | None = None,
    signed_base: bool = False,
    salvaged: Manifest | None = None,
    once: bool = False,
) -> Manifest:
    """Publish `change(newest manifest)` as the next generation and return it once it is durable.

    The change is applied again to the new base whenever another writer was faster, so it must be a pure delta, and
    applied to a manifest that has it already it must give an equal one.
    Base and number come from one directory listing: two listings would lose the update of a writer in between.
    key: sign the manifest with it. signed_base: go on from manifests signed with it only, so that a stranger's changes
    never get our signature; where the owner alone can write, an unsigned base is fine.
    salvaged: what to change where no manifest is whole; without it that is SnapshotDamaged.
    once: the change names files of its own, which no second manifest may name anew: Republished where one would.
    StoreFenced or StoreFull when a write fails; what was committed before is untouched.

    Old manifests are removed (`maintenance.gc`), so that a number can become free again. A writer that listed
    generation 10, was stopped, and woke up when 20 was the newest and 11 had been collected, would link its 11
    without an error: durable, acknowledged, and read by nobody. So the listing is looked at once more after the
    link. Collecting never removes the newest manifest, hence: when nothing higher is listed, nothing higher was
    there when the number was taken, so it was not taken before, and the base was the newest. When something higher
    is listed, either somebody built on this commit in the meantime, and the change is part of the newest manifest
    already; or the number was a used one, and the change is published again on top of the newest. Nothing needs to
    tell the two apart, since changes are idempotent, and a manifest that lost is just an old one to everybody else.

    Just an old one: whoever collects may remove at once the files that it names and the newest does not. So files
    that were named by a manifest which lost must not be named by another one; the writer makes them anew (`once`).
    """
    linked = False
    for _ in range(_ROUNDS):
        listed = generations(folder)
        try:
            base, damaged = newest(folder, listed, key if signed_base else None) if listed else (Manifest(), [])
        except SnapshotDamaged:
            if generations(folder)[:1] != listed[:1]:  # all of them were collected since they were listed
                continue
            if salvaged is None:
                raise
            base, damaged = salvaged, listed
        if key is None and base.generation in signatures(folder).values():
            raise StoreFenced(f"{folder.path} is signed, and this would not be; open it with its key to store anything")
        generation = (listed[0] if listed else 0) + 1
        if generation > LAST:
            raise StoreFenced(f"{folder.path}: there is no number after {generation_name(LAST)}; run `llmcache repair`")
        changed = change(base)
        if linked and changed == base:
            return base
        if linked and once:
            raise Republished(
                f"{generation_name(base.generation)} and others were there before; what this names may be gone"
            )
        new = replace(
            changed,
            generation=generation,
            parent=base.generation,
            created=round(folder.now(), 3),
            writer=writer,
            skipped=tuple(sorted({*base.skipped, *damaged})),
        )
        if _publish(folder, f"t-{writer}-{generation}", to_bytes(new), generation, key):
            linked = True
            if _highest(folder) == generation:
                return new
            continue
        time.sleep(random.uniform(0, 0.02))  # two losers of one round should not meet again in the next
    raise CommitConflict(f"{folder.path}: other writers won {_ROUNDS} rounds in a row; commit again")


def _highest(folder: Folder) -> int:
    try:
        return generations(folder)[0]
    except OSError as error:  # the commit may count or not; this writer cannot know
        raise fenced(error) from error


def _publish(folder: Folder, temporary: str, data: bytes, generation: int, key: bytes | None) -> bool:
    name = generation_name(generation)
    if len(data) > MAX_BYTES:
        raise LLMCacheError(f"a manifest of {len(data):,} bytes is over the limit; compact the store")
    try:
        from_bytes(data, name)
    except SnapshotDamaged as error:
        raise LLMCacheError(f"not committed, since it could not be read back: {error}") from error
    try:
        announced = announce(folder, generation, data, key) if key is not None else None
        write_whole(folder, temporary, [data])
        try:
            folder.link(temporary, name)
        except (FileExistsError, FileNotFoundError):  # the latter: collected, since this process slept for so long
            if announced:
                folder.remove(announced)
            return False
        finally:
            folder.remove(temporary)
        if announced:
            folder.replace(announced, signature_name(generation))
        folder.sync_folder("")
    except OSError as error:
        raise fenced(error) from error
    return True


@contextmanager
def fencing() -> Iterator[None]:
    """Turns what a disk says inside the block into the error for it, `fenced`."""
    try:
        yield
    except OSError as error:
        raise fenced(error) from error


def fenced(error: OSError) -> StoreFenced:
    """The error for a write that failed. Never retried: after a failed fsync the kernel may call the next a success."""
    reason = f"writing to the store failed ({os.strerror(error.errno or 0)}); what was committed before is safe"
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StoreFull(f"{reason}; free some space and open the store again")
    return StoreFenced(f"{reason}; open the store again")
