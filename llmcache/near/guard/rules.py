"""The field guard: refuse a near hit when the numbers, dates, identifiers, quotations or negations of two texts differ.

Near neighbours can differ by one model number, one date, or a "not". Their fingerprints are then almost equal, but the
texts mean different things. The guard reads the fields of each text once (`llmcache.near.guard.fields`) and refuses a
near hit when the fields differ. A calibrated hit blends several neighbours. Its source is the first one with the same
fields, among those with at least half the weight of the nearest. Fields are compared in a canonical form and in order
("from 3 to 5" is not "from 5 to 3"). Texts with the same fields therefore form classes, and a look-up only needs one
digest per kind, stored with the entry.
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

RULES_VERSION: int = 3
"""Version of the rules. It is part of every digest, so digests of other rules never match."""


class FieldGuard:
    """Rule for the fields that two texts have to share.

    kinds: kinds of fields that are compared, of `KINDS`. pattern: regular expression for the user's own fields, "" for
    none. ConfigError when a kind is unknown or the pattern is invalid.
    """

    def __init__(self, kinds: Collection[str] = KINDS, pattern: str = "") -> None:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ConfigError(f"the kinds of the guard are {', '.join(KINDS)}, got {', '.join(unknown)}")
        try:
            self._pattern = re.compile(pattern) if pattern else None
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a regular expression: {error}; correct the pattern") from None
        self._kinds = tuple(kinds)

    def digests(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """Return the field digests of texts, uint64 [n, kinds], for `unequal`."""
        return digests(texts, self._pattern)

    def unequal(self, ones: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int8]:
        """Compare pairs of digests [n, kinds].

        Returns the index in `KINDS` of the first kind that differs, or -1, int8 [n].
        """
        return refused(ones, others, self._kinds)

    def sharing(
        self, mine: NDArray[np.uint64], theirs: NDArray[np.uint64], eligible: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Find, for each document, the first eligible neighbour with the same fields.

        mine: digests of the documents, [n, kinds]. theirs: of their neighbours, [n, k, kinds]. eligible: bool [n, k].
        Returns the position of that neighbour, int64 [n], 0 if there is none; and -1 if there is one, else the kind in
        which the first neighbour differs, int8 [n].
        """
        n, k, _ = theirs.shape
        unequal = self.unequal(np.repeat(mine, k, axis=0), theirs.reshape(n * k, -1)).reshape(n, k)
        same = (unequal < 0) & eligible
        return same.argmax(axis=1), np.where(same.any(axis=1), np.int8(-1), unequal[:, 0])


def differs(one: str, other: str, pattern: re.Pattern[str] | None = None, kinds: Collection[str] = KINDS) -> str | None:
    """Return the first kind of field in which two texts differ, or None.

    pattern: matches the user's own fields. kinds: kinds that are compared, of `KINDS`.
    """
    return unlike(fields(one, pattern), fields(other, pattern), kinds)


def unlike(one: Fields, other: Fields, kinds: Collection[str] = KINDS) -> str | None:
    """Return the first kind in which two sets of fields differ, or None. kinds: kinds that are compared."""
    if one == other:
        return None
    return next((kind for kind, a, b in zip(KINDS, one, other, strict=True) if a != b and kind in kinds), None)


def digests(texts: Sequence[str], pattern: re.Pattern[str] | None = None) -> NDArray[np.uint64]:
    """Return the field digests of texts, uint64 [n, kinds], one column per kind of `KINDS`.

    Two rows are equal exactly when `differs` returns None, up to a collision with probability 2^-64 per kind.
    """
    empty = _empty(pattern)
    rows = np.tile(empty, (len(texts), 1))
    for row, text in enumerate(texts):
        text_fields = fields(text, pattern)
        if text_fields is NO_FIELDS:
            continue
        for column, values in enumerate(text_fields):
            if values:
                rows[row, column] = _digest(int(empty[column]), values)
    return rows


def refused(ones: NDArray[np.uint64], others: NDArray[np.uint64], kinds: Collection[str] = KINDS) -> NDArray[np.int8]:
    """Compare pairs of rows of `digests`.

    ones, others: uint64 [n, kinds]. kinds: kinds that are compared.
    Returns the index in `KINDS` of the first kind that differs, or -1, int8 [n].
    """
    unequal = (ones != others) & np.array([kind in kinds for kind in KINDS])
    return np.where(unequal.any(axis=1), unequal.argmax(axis=1), -1).astype(np.int8)


def _empty(pattern: re.Pattern[str] | None) -> NDArray[np.uint64]:
    """Return the digests of a text without fields, [kinds]; they depend on the rules and the pattern."""
    rules = (str(RULES_VERSION), pattern.pattern if pattern else "", str(pattern.flags) if pattern else "")
    return np.array([_digest(place, rules) for place in range(len(KINDS))], np.uint64)


def _digest(seed: int, values: tuple[str, ...]) -> int:
    state = blake2b(seed.to_bytes(8, "little"), digest_size=8)
    for value in values:
        data = value.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(state.digest(), "little")
