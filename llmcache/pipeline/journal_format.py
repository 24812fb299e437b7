"""Records of a journal: checkpoints, and rows of vectors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

FORMAT = 2
"""Version of the format of journals."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Progress of a run at a point where results and store agree.

    place: number of records of the corpus that were read. digest: digest of these records. rows: number of valid rows.
    text_bytes: valid bytes of rows.jsonl. exact, near, misses: number of rows by tier.
    prefix: number of rows whose tier is "prefix"; None outside of language-model jobs.
    vectors: number of valid vectors; None where every row has one.
    open_rows, open_digest: of a part after `place` that is answered batch by batch, the number of rows that are
    complete, and the digest of the records up to the end of that part; None and "" between parts.
    writer, committed: writer of the store that commits the entries of this checkpoint, and the number of segments it
    had committed before. sure: True if the commit is known to have succeeded.
    vectors_check, text_check: checksums of the valid part of vectors.f32 and rows.jsonl, xxh3-128 in hexadecimal.
    """

    place: int = 0
    digest: str = ""
    rows: int = 0
    text_bytes: int = 0
    exact: int = 0
    near: int = 0
    misses: int = 0
    writer: str = ""
    committed: int = 0
    sure: bool = True
    vectors_check: str = xxhash.xxh3_128(b"").hexdigest()
    text_check: str = xxhash.xxh3_128(b"").hexdigest()
    vectors: int | None = None
    prefix: int | None = None
    open_rows: int | None = None
    open_digest: str = ""

    @property
    def tiers(self) -> dict[str, int]:
        """Number of rows by tier."""
        return {"exact": self.exact, "near": self.near, "miss": self.misses, "prefix": self.prefix or 0}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, without those of later versions that have no value."""
        later = ("vectors", "prefix", "open_rows", "open_digest")
        return {name: value for name, value in asdict(self).items() if name not in later or value not in (None, "")}


@dataclass(frozen=True, slots=True)
class JournalRow:
    """Result read from a journal, with the fields of a Result. output: float32 [width], or [vectors, width]."""

    id: str
    output: NDArray[np.float32]
    tier: str
    layer: str | None
    source: str | None
    similarity: float | None
    consensus: float | None
    audited: bool
