"""Manifests as dataclasses: the content of one generation of a store.

The highest generation that parses and verifies is the store. `docs/format.md` describes the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmcache.indexes.errors import SnapshotDamaged


@dataclass(frozen=True, slots=True)
class FileFacts:
    """File that a manifest names. size: bytes. sha256: hexadecimal, None where rows have their own checksums (.seg)."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """Sealed segment. rows and aliases are counts; payload is the sum of the activations' bytes.

    dead: number of evicted rows. alive: file of the bitmap of the other rows, None if no row was evicted.
    writer: id of the writer that sealed it, "" if unknown.
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
        """Number of rows that were not evicted."""
        return self.rows - self.dead

    @property
    def all_files(self) -> tuple[FileFacts, ...]:
        """Files of the segment, with its bitmap if it has one."""
        return (*self.files, self.alive) if self.alive else self.files

    def file(self, kind: str) -> FileFacts:
        """Return the segment's file with this extension. SnapshotDamaged when there is none."""
        for facts in self.files:
            if facts.name.endswith("." + kind):
                return facts
        raise SnapshotDamaged(f"segment {self.id} has no .{kind} file in the manifest")


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """Derived FAISS file. It has `count` vectors: the rows of `segments`, in that order."""

    kind: str
    dim: int
    count: int
    segments: tuple[str, ...]
    file: FileFacts


@dataclass(frozen=True, slots=True)
class BankFacts:
    """Bank of one layer. dtype: of stored activations. rank: 1 for [width], 2 for [tokens, width]."""

    dtype: str
    width: int
    rank: int
    feature_width: int
    segments: tuple[SegmentFacts, ...] = ()
    projection: FileFacts | None = None
    index: IndexFacts | None = None

    @property
    def all_files(self) -> tuple[FileFacts, ...]:
        """All files that this bank names."""
        derived = (self.projection, self.index and self.index.file)
        return (*(file for segment in self.segments for file in segment.all_files), *(file for file in derived if file))


@dataclass(frozen=True, slots=True)
class NamespaceFacts:
    """Entries of one model. identity and config: identify the model and its settings for the code above.

    secret_check: distinguishes the secret that went into the keys from a wrong one; "" if there is no secret.
    """

    identity: Mapping[str, Any]
    config: Mapping[str, Any]
    banks: Mapping[str, BankFacts] = field(default_factory=dict)
    secret_check: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Manifest of one generation of a store. created: seconds since the epoch. skipped: damaged generations."""

    generation: int = 0
    parent: int = 0
    created: float = 0.0
    writer: str = ""
    skipped: tuple[int, ...] = ()
    namespaces: Mapping[str, NamespaceFacts] = field(default_factory=dict)

    @property
    def files(self) -> frozenset[str]:
        """Names of all files in this manifest."""
        banks = (bank for space in self.namespaces.values() for bank in space.banks.values())
        return frozenset(file.name for bank in banks for file in bank.all_files)

    def with_bank(self, namespace: str, bank: str, facts: BankFacts) -> Manifest:
        """Return the manifest with the facts of one bank replaced."""
        old = self.namespaces[namespace]
        new = replace(old, banks={**old.banks, bank: facts})
        return replace(self, namespaces={**self.namespaces, namespace: new})
