"""Marks: records that decide which near matches a row may answer, stored with each row.

A mark has a fixed width. It contains the scope of the row, which is a digest over everything in its exact key except
the document; digests of the fields of its original text; and the version of the rules that extracted these fields.
docs/format.md describes the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import SnapshotDamaged

Marks: TypeAlias = NDArray[Any]  # records of `mark_type`, [n]

UNKNOWN = 0
"""Scope of a row that was stored without one. Such a row answers no near match."""
MOST_KINDS = 64  # maximum kinds of fields in one mark
_FIXED = 16  # bytes of a mark before the digests of its fields


def mark_type(kinds: int) -> np.dtype[Any]:
    """Return the dtype of marks with this number of kinds of fields.

    It has the scope, the version of the rules, a digest of the user's pattern (0: none), and one digest per kind.
    """
    return np.dtype([("scope", "<u8"), ("rules", "<u4"), ("pattern", "<u4"), ("fields", "<u8", (kinds,))])


def kinds_in(nbytes: int, name: str) -> int:
    """Return the number of kinds in marks of `nbytes` each. SnapshotDamaged, with the file `name`, for other sizes."""
    kinds, rest = divmod(nbytes - _FIXED, 8)
    if rest or not 0 <= kinds <= MOST_KINDS:
        raise SnapshotDamaged(f"{name} claims marks of {nbytes} bytes each, and no mark has that size")
    return kinds


def unmarked(n: int, kinds: int = 0) -> Marks:
    """Return n marks with unknown scope and no fields."""
    return np.zeros(n, mark_type(kinds))


def scoped(n: int, scope: int) -> Marks:
    """Return n marks of one scope, without fields."""
    marks = unmarked(n)
    marks["scope"] = scope
    return marks


def joined(parts: Sequence[tuple[int, Marks | None]]) -> Marks | None:
    """Concatenate marks. parts: number of rows, and their marks or None. Returns None if no part has marks.

    Parts may have different numbers of kinds: missing digests are 0.
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
    """Copy marks to `places` in `into`, which has at least as many kinds."""
    for name in ("scope", "rules", "pattern"):
        into[name][places] = marks[name]
    into["fields"][places, : kinds_of(marks)] = marks["fields"]


def kinds_of(marks: Marks) -> int:
    """Return the number of kinds of fields in these marks."""
    return int(marks.dtype["fields"].shape[0])
