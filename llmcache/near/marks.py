"""Marks stored with an entry: near scope and digests of the guard's fields.

The scope is a digest over everything that the entry's exact key has but the document: the model's identity, role,
prompt, and whatever else `Execution` puts into its keys. The field digests are what the guard compares, taken from the
original text when the entry is stored; the text itself is not kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b, sha256

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.marks import Marks, kinds_of, unmarked
from llmcache.model.keys import Seed
from llmcache.near.guard.rules import KINDS, RULES_VERSION, FieldGuard

_PATTERN = KINDS.index("pattern")
_PER_TOKEN = 16  # characters of ordinary words in a token, at most; of longer texts only so much is read
_LONG_WORD = re.compile(r"\S{65}")  # may be one token, whatever its length


def scope_of(seed: Seed) -> int:
    """The 64 bits that stand for everything in a key but its document; never 0. seed: of `keys.key_seed`."""
    return int.from_bytes(seed.digest()[:8], "little") or 1


class FieldDigests:
    """Digests of the fields of texts for one bank: of the rules in force, of the user's pattern, under a secret.

    Entries whose digests come from other rules, or from none, get digests that are equal to no others, so that no guard
    lets them through.
    """

    def __init__(self, secret: bytes = b"", tokens: Callable[[], int | None] = lambda: None) -> None:
        """secret: of the namespace, b"" for none. tokens: how many of a text the model reads; None: all."""
        self._secret, self._tokens = secret, tokens
        self._plain, self._own, self._number = FieldGuard(), FieldGuard(), 0
        self._pattern = ""

    @property
    def pattern(self) -> str:
        """The user's regular expression for fields of their own, "" for none. ConfigError when it is set to none such.

        Entries keep the digests of the pattern that was set when they were stored.
        """
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: str) -> None:
        self._own = FieldGuard(pattern=pattern)
        self._pattern = pattern
        self._number = int.from_bytes(sha256(pattern.encode()).digest()[:4], "little") | 1 if pattern else 0

    def __call__(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """Digests of the fields of original texts, without their prompt, uint64 [n, kinds]."""
        limit = self._tokens()
        read = texts if limit is None else [part_read(text, limit) for text in texts]
        found = self._plain.digests(read)
        found[:, _PATTERN] = self._own.digests(read)[:, _PATTERN] if self._pattern else 0
        return self._keyed(found)

    def marks(self, scope: int, texts: Sequence[str]) -> Marks:
        """Marks of entries that are made of these texts, [n]."""
        marks = unmarked(len(texts), len(KINDS))
        marks["scope"], marks["rules"], marks["pattern"] = scope, RULES_VERSION, self._number
        marks["fields"] = self(texts)
        return marks

    def unread(self, marks: Marks) -> NDArray[np.bool_]:
        """Mask of the entries without digests of the current guard rules, which therefore pass no guard; bool [n]."""
        return np.asarray((marks["rules"] != RULES_VERSION) | (kinds_of(marks) != len(KINDS)), np.bool_)

    def of(self, marks: Marks) -> NDArray[np.uint64]:
        """Digests of the fields of entries, uint64 [n, kinds], to compare with those of texts or of each other."""
        lost = self.unread(marks)
        found = np.zeros((len(marks), len(KINDS)), np.uint64)
        if not lost.all():
            found[~lost] = marks["fields"][~lost]
        other = marks["pattern"] != self._number
        if not self._pattern:
            found[:, _PATTERN] = self._keyed(np.zeros((1, 1), np.uint64))[0, 0]
            other = np.zeros(len(marks), np.bool_)
        if lost.any() or other.any():
            # by place, times an odd number: no two are equal, and another start in every call
            start = np.frombuffer(os.urandom(8), np.uint64)
            own = (np.arange(len(marks), dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
            found[lost] = own[lost, None]
            found[other, _PATTERN] = own[other]
        return found

    def _keyed(self, digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The digests under the secret of the namespace, so that nobody without it can try values out."""
        if not self._secret:
            return digests
        values, place = np.unique(digests, return_inverse=True)
        key = sha256(b"llmcache fields 1" + self._secret).digest()
        hashed = b"".join(blake2b(value.tobytes(), key=key, digest_size=8).digest() for value in values)
        keyed = np.frombuffer(hashed, np.uint64)
        return keyed[place.reshape(digests.shape)]


def part_read(text: str, tokens: int) -> str:
    """The beginning of a text that holds all that a model sees which reads so many tokens."""
    if len(text) <= _PER_TOKEN * tokens:
        return text
    text = " ".join(text.split())  # white space makes no tokens
    part = text[: _PER_TOKEN * tokens]
    return text if _LONG_WORD.search(part) else part
