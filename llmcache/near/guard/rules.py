"""The field guard: two texts whose numbers, dates, identifiers, quotations or negations differ are not the same.

Near neighbours can be one figure apart: another model number, another date, a "not". To a fingerprint that is little,
to the reader it is everything. The guard reads the fields of each text once (`llmcache.near.guard.fields`); a near
hit is refused when those of the two texts differ. A calibrated hit is made of several neighbours: its source is the
first that has the same fields, among those that count at least half as much as the nearest. Fields are compared in a
canonical form and in their order ("from 3 to 5" is not "from 5 to 3"), so texts with the same fields form classes,
and a digest per kind, stored beside an entry, is all a look-up needs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.near.guard.fields import (
    KINDS,
    NO_FIELDS,
    Fields,
    fields,
)

__all__ = ["KINDS", "RULES_VERSION", "FieldGuard", "Fields", "differs", "digests", "fields", "refused", "unlike"]

RULES_VERSION: int = 2  # part of every digest: digests made by other rules never match these


class FieldGuard:
    """Which fields two texts have to share. kinds: those that count, of `KINDS`. pattern: a regular expression for the
    user's own fields, "" for none.

    ConfigError: another kind, or a pattern that is none.
    """

    def __init__(self, kinds: Collection[str] = KINDS, pattern: str = "") -> None:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ConfigError(f"the guard knows {', '.join(KINDS)}, got {', '.join(unknown)}")
        try:
            self._pattern = re.compile(pattern) if pattern else None
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None
        self._kinds = tuple(kinds)

    def digests(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """The fields of each text, uint64 [n, kinds], for `unequal`."""
        return digests(texts, self._pattern)

    def unequal(self, ones: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int8]:
        """Per pair of digests the place in `KINDS` of the first kind that differs, -1 where none does; int8 [n]."""
        return refused(ones, others, self._kinds)

    def sharing(
        self, mine: NDArray[np.uint64], theirs: NDArray[np.uint64], eligible: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """For each document the first eligible neighbour with the same fields: its place, int64 [n], 0 where there is
        none; and int8 [n], -1 where there is one, else the kind in which it differs from the first neighbour.

        mine: digests [n, kinds]; theirs: [n, k, kinds]; eligible: [n, k].
        """
        n, k, _ = theirs.shape
        unequal = self.unequal(np.repeat(mine, k, axis=0), theirs.reshape(n * k, -1)).reshape(n, k)
        same = (unequal < 0) & eligible
        return same.argmax(axis=1), np.where(same.any(axis=1), np.int8(-1), unequal[:, 0])


def differs(one: str, other: str, pattern: re.Pattern[str] | None = None, kinds: Collection[str] = KINDS) -> str | None:
    """The first kind of field in which two texts differ; None when they differ in none.

    pattern: the user's own fields. kinds: those that count, of `KINDS`.
    """
    return unlike(fields(one, pattern), fields(other, pattern), kinds)


def unlike(one: Fields, other: Fields, kinds: Collection[str] = KINDS) -> str | None:
    """The first kind in which these fields differ; None when they are the same."""
    if one == other:
        return None
    return next((kind for kind, a, b in zip(KINDS, one, other, strict=True) if a != b and kind in kinds), None)


def digests(texts: Sequence[str], pattern: re.Pattern[str] | None = None) -> NDArray[np.uint64]:
    """The fields of each text as numbers to store and compare: uint64 [n, kinds], one column per kind of `KINDS`.

    Two texts have the same row exactly when `differs` finds nothing (but for one chance in 2^64 per kind).
    """
    empty = _empty(pattern)
    rows = np.tile(empty, (len(texts), 1))
    for row, text in enumerate(texts):
        read = fields(text, pattern)
        if read is NO_FIELDS:
            continue
        for column, values in enumerate(read):
            if values:
                rows[row, column] = _digest(int(empty[column]), values)
    return rows


def refused(ones: NDArray[np.uint64], others: NDArray[np.uint64], kinds: Collection[str] = KINDS) -> NDArray[np.int8]:
    """Pairs of rows of `digests`: the place in `KINDS` of the first kind that differs, -1 where none does.

    ones, others: uint64 [n, kinds]. kinds: those that count. Returns int8 [n].
    """
    unequal = (ones != others) & np.array([kind in kinds for kind in KINDS])
    return np.where(unequal.any(axis=1), unequal.argmax(axis=1), -1).astype(np.int8)


def _empty(pattern: re.Pattern[str] | None) -> NDArray[np.uint64]:
    rules = (str(RULES_VERSION), pattern.pattern if pattern else "", str(pattern.flags) if pattern else "")
    return np.array([_digest(place, rules) for place in range(len(KINDS))], np.uint64)


def _digest(seed: int, values: tuple[str, ...]) -> int:
    state = blake2b(seed.to_bytes(8, "little"), digest_size=8)
    for value in values:
        data = value.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(state.digest(), "little")
