"""Marks: what decides which near matches a row may answer, stored with the row.

A mark is a record of fixed width: the scope of the row, which is a digest over everything in its exact key but the
document, and digests of the fields of its original text with the version of the rules that made them. docs/format.md
has the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged

Marks: TypeAlias = NDArray[Any]  # records of `mark_type`, [n]

UNKNOWN = 0
"""The scope of a row that was stored without one. It answers no near match."""
MOST_KINDS = 64  # kinds of fields in one mark, at most
_FIXED = 16  # bytes of a mark before the digests of its fields


def mark_type(kinds: int) -> np.dtype[Any]:
    """The record of a mark with so many kinds of fields: scope, version of the rules, digest of the user's pattern (0:
    none), and one digest per kind.
    """
    return np.dtype([("scope", "<u8"), ("rules", "<u4"), ("pattern", "<u4"), ("fields", "<u8", (kinds,))])


def kinds_in(nbytes: int, name: str) -> int:
    """The number of kinds in marks of so many bytes. SnapshotDamaged: no mark is that long; `name` is the file."""
    kinds, rest = divmod(nbytes - _FIXED, 8)
    if rest or not 0 <= kinds <= MOST_KINDS:
        raise SnapshotDamaged(f"{name} says that its marks take {nbytes} bytes each, which no mark does")
    return kinds


def unmarked(n: int, kinds: int = 0) -> Marks:
    """Marks of n rows of which nothing is known."""
    return np.zeros(n, mark_type(kinds))


def scoped(n: int, scope: int) -> Marks:
    """Marks of n rows of one scope, without digests of fields."""
    marks = unmarked(n)
    marks["scope"] = scope
    return marks


def joined(parts: Sequence[tuple[int, Marks | None]]) -> Marks | None:
    """Marks of rows on end, of parts (number of rows, their marks or None); None where no part has any.

    Parts may know different numbers of kinds: the missing digests are 0.
    """
    known = [marks for _, marks in parts if marks is not None]
    if not known:
        return None
    kinds = max(kinds_of(marks) for marks in known)
    whole = unmarked(sum(n for n, _ in parts), kinds)
    first = 0
    for n, marks in parts:
        if marks is not None:
            put_marks(whole, slice(first, first + n), marks)
        first += n
    return whole


def put_marks(into: Marks, places: Any, marks: Marks) -> None:
    """Copy marks to places of other marks, which know at least as many kinds."""
    for name in ("scope", "rules", "pattern"):
        into[name][places] = marks[name]
    into["fields"][places, : kinds_of(marks)] = marks["fields"]


def kinds_of(marks: Marks) -> int:
    """The number of kinds of fields that these marks have."""
    return int(marks.dtype["fields"].shape[0])
