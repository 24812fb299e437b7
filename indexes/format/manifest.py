"""Manifests: what a store holds, one per generation, as plain facts.

The highest generation that parses and verifies *is* the store. `docs/format.md` has the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmcache.indexes.errors import SnapshotDamaged


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
