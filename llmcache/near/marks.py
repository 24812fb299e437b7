"""Marks stored with an entry: its scope for near reuse, and the digests of its fields for the guard.

The scope is a digest of everything in the entry's exact key except the document: identity of the model, role, prompt,
and whatever else `Executor` puts into its keys. The guard compares the field digests, which are computed from the
original text when the entry is stored. The text itself is not stored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b, sha256

import numpy as np
from numpy.typing import NDArray

from llmcache.document import Text, as_text
from llmcache.indexes.format.marks import Marks, kinds_of, unmarked
from llmcache.model.keys import Seed
from llmcache.near.guard.rules import KINDS, RULES_VERSION, FieldGuard

_PATTERN = KINDS.index("pattern")
_PER_TOKEN = 16  # most characters per token of ordinary words; bounds the part of a long text that is read
_LONG_WORD = re.compile(r"\S{65}")  # may be a single token of any length


def scope_of(seed: Seed) -> int:
    """Return the 64-bit digest of everything in a key except its document; never 0. seed: from `keys.key_seed`."""
    return int.from_bytes(seed.digest()[:8], "little") or 1


class FieldDigests:
    """Field digests of texts and entries for one bank, by the current guard rules and the user's pattern.

    Entries without digests, or with digests of other rules, get digests that equal no others, so the guard refuses
    them.
    """

    def __init__(self, secret: bytes = b"", tokens: Callable[[], int | None] = lambda: None) -> None:
        """Create digests without a pattern.

        secret: of the namespace, keys the digests; b"" for none.
        tokens: returns the number of tokens of a text that the model reads; None for all.
        """
        self._secret, self._tokens = secret, tokens
        self._default_guard, self._pattern_guard, self._pattern_number = FieldGuard(), FieldGuard(), 0
        self._pattern = ""

    @property
    def pattern(self) -> str:
        """The user's regular expression for own fields, "" for none. Setting an invalid one raises ConfigError.

        Entries keep the digests of the pattern that was set when they were stored.
        """
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: str) -> None:
        self._pattern_guard = FieldGuard(pattern=pattern)
        self._pattern = pattern
        self._pattern_number = int.from_bytes(sha256(pattern.encode()).digest()[:4], "little") | 1 if pattern else 0

    def __call__(self, texts: Sequence[Text]) -> NDArray[np.uint64]:
        """Return the field digests of original texts or pairs without their prompt, uint64 [n, kinds]."""
        limit, read_parts = self._tokens(), [as_text(text) for text in texts]
        if limit is not None:
            read_parts = [part_read(text, limit) for text in read_parts]
        digests = self._default_guard.digests(read_parts)
        digests[:, _PATTERN] = self._pattern_guard.digests(read_parts)[:, _PATTERN] if self._pattern else 0
        return self._keyed(digests)

    def marks(self, scope: int, texts: Sequence[str]) -> Marks:
        """Return the marks of entries with these texts, [n]."""
        marks = unmarked(len(texts), len(KINDS))
        marks["scope"], marks["rules"], marks["pattern"] = scope, RULES_VERSION, self._pattern_number
        marks["fields"] = self(texts)
        return marks

    def unread(self, marks: Marks) -> NDArray[np.bool_]:
        """Return a mask of the entries without digests of the current rules, which pass no guard; bool [n]."""
        return np.asarray((marks["rules"] != RULES_VERSION) | (kinds_of(marks) != len(KINDS)), np.bool_)

    def of(self, marks: Marks) -> NDArray[np.uint64]:
        """Return the field digests of entries, uint64 [n, kinds], comparable with those of texts and other entries."""
        unread = self.unread(marks)
        digests = np.zeros((len(marks), len(KINDS)), np.uint64)
        if not unread.all():
            digests[~unread] = marks["fields"][~unread]
        other_pattern = marks["pattern"] != self._pattern_number
        if not self._pattern:
            digests[:, _PATTERN] = self._keyed(np.zeros((1, 1), np.uint64))[0, 0]
            other_pattern = np.zeros(len(marks), np.bool_)
        if unread.any() or other_pattern.any():
            # consecutive numbers times an odd constant are distinct; a random start makes them new in every call
            start = np.frombuffer(os.urandom(8), np.uint64)
            unique = (np.arange(len(marks), dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
            digests[unread] = unique[unread, None]
            digests[other_pattern, _PATTERN] = unique[other_pattern]
        return digests

    def _keyed(self, digests: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Hash digests with the secret of the namespace, so that field values cannot be guessed without the secret."""
        if not self._secret:
            return digests
        values, places = np.unique(digests, return_inverse=True)
        key = sha256(b"llmcache fields 1" + self._secret).digest()
        hashed = b"".join(blake2b(value.tobytes(), key=key, digest_size=8).digest() for value in values)
        return np.frombuffer(hashed, np.uint64)[places.reshape(digests.shape)]


def part_read(text: str, tokens: int) -> str:
    """Return a prefix of a text that contains everything a model reads. tokens: most tokens that the model reads."""
    if len(text) <= _PER_TOKEN * tokens:
        return text
    text = " ".join(text.split())  # white space takes no tokens
    prefix = text[: _PER_TOKEN * tokens]
    return text if _LONG_WORD.search(prefix) else prefix
