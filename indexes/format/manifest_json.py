"""Serialisation of manifests: canonical JSON with a checksum, and a strict parser."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict
from typing import Any

from llmcache.indexes.errors import FormatTooNew, SnapshotDamaged
from llmcache.indexes.format.codec import DTYPES
from llmcache.indexes.format.manifest import BankFacts, FileFacts, IndexFacts, Manifest, NamespaceFacts, SegmentFacts

FORMAT = 2
"""Format version of manifests. 2: .row files may have marks after the records; readers of 1 take them for damaged."""
MAX_BYTES = 16 << 20
_FILE = re.compile(r"(seg|idx)/[0-9a-f]{32}(-[0-9a-f]{32})?\.(seg|row|var|fp|key|faiss|proj|alive)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WIDEST = 1 << 20  # numbers in one activation or feature vector
_MOST_PARTS, _MOST_COMMAS = 1 << 18, 1 << 20  # a genuine manifest of 16 MiB has half of these


def to_bytes(manifest: Manifest) -> bytes:
    """Serialise a manifest as canonical JSON, followed by a line with the sha256 of the JSON."""
    body = json.dumps(
        {"format": FORMAT, **asdict(manifest)},
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
        ensure_ascii=True,
    ).encode()
    return body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def from_bytes(data: bytes, name: str) -> Manifest:
    """Parse and check the manifest `name`. SnapshotDamaged when it is invalid, FormatTooNew for a later format."""
    body, line, digest = data[:-73], data[-73:-65], data[-65:-1]
    found = hashlib.sha256(body).hexdigest().encode()
    if len(data) > MAX_BYTES or line != b"\nsha256:" or digest != found or data[-1:] != b"\n":
        raise SnapshotDamaged(f"{name} does not match its checksum")
    try:
        return _manifest(strict_json(body))
    except (TypeError, ValueError, KeyError, RecursionError, AttributeError, OverflowError) as error:
        raise SnapshotDamaged(f"{name} is not a manifest: {type(error).__name__}: {error}") from None


def salvage(data: bytes) -> Manifest | None:
    """Parse a damaged manifest without its checksum. Returns None if that fails; nothing in the result is certain."""
    try:
        return _manifest(strict_json(data.partition(b"\nsha256:")[0]))
    except (TypeError, ValueError, KeyError, RecursionError, AttributeError, OverflowError, SnapshotDamaged):
        return None


def strict_json(body: bytes) -> Any:
    """Parse JSON strictly. ValueError for repeated keys, NaN and infinity; RecursionError for deep nesting."""

    if body.count(b"{") + body.count(b"[") > _MOST_PARTS or body.count(b",") > _MOST_COMMAS:
        raise ValueError("it has too many parts")  # parsed values can take a hundred times the memory of their text

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
        raise ValueError(f"{value} is over the limit of {_WIDEST} numbers in a vector")
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
    files = tuple(_file(file) for file in _list(raw["files"]))
    if len({file.name for file in files}) != len(files):
        raise ValueError("a segment names a file twice")
    rows, dead, alive = _count(raw["rows"]), _count(raw.get("dead", 0)), raw.get("alive")
    if dead > rows or (alive is None) != (dead == 0):
        raise ValueError(f"{dead} of {rows} rows are dead, and the bitmap is {'absent' if alive is None else 'there'}")
    bitmap = None if alive is None else _file(alive)
    counts = rows, _count(raw["aliases"]), _count(raw["payload"])
    return SegmentFacts(_text(raw["id"]), *counts, files, dead, bitmap, _text(raw.get("writer", "")))


def _index(raw: dict[str, Any]) -> IndexFacts:
    covered = tuple(_text(name) for name in _list(raw["segments"]))
    return IndexFacts(_text(raw["kind"]), _count(raw["dim"]), _count(raw["count"]), covered, _file(raw["file"]))


def _bank(raw: dict[str, Any]) -> BankFacts:
    if raw["dtype"] not in DTYPES or raw["rank"] not in (1, 2):
        raise ValueError(f"no bank has dtype {raw['dtype']!r:.80} and rank {raw['rank']!r:.80}")
    segments = tuple(_segment(segment) for segment in _list(raw["segments"]))
    if len({segment.id for segment in segments}) != len(segments):
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
        skipped=tuple(_count(generation) for generation in _list(raw["skipped"])),
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
