"""Stored answers of decoders: generated token ids, and log-likelihoods of tokens, by prompt and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.banks.audits import Evidence
from llmcache.banks.counters import Counters
from llmcache.banks.reader import BankReader
from llmcache.indexes.format.manifest import BankFacts
from llmcache.model.keys import Seed, token_keys

ANSWERS, LIKELIHOODS = "answers", "likelihoods"
"""Names of the banks."""
FACTS = BankFacts("float32", 1, 2, 0)
"""Facts of both banks: a row is a list of numbers, float32 [numbers, 1]. Token ids are exact below 16,777,216."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer. ids: int64 [tokens]. likelihoods: log-likelihood of each token in nats, float32 [tokens].

    finished: True if the answer ended with an end token.
    """

    ids: NDArray[np.int64]
    likelihoods: Floats32
    finished: bool


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """Answers of one prompt, read from a row of the bank."""

    answers: list[Answered]
    row: int


class AnswerBank:
    """Bank of answers. A row is found by its token ids and settings, and its token ids are compared."""

    def __init__(
        self,
        reader: BankReader,
        seed: Callable[[str], Seed],
        put: Callable[..., Any],
        counters: Counters,
        evidence: Evidence,
    ) -> None:
        """reader: of the bank. seed: returns the seed of the keys for the name of the settings.

        put: stores entries, see `BankWriter.put`. counters: of the cache, which get the seconds that hits save.
        evidence: that entries of the bank are the model's.
        """
        self.bank, self.evidence = reader.bank, evidence
        self._reader, self._seed, self._put, self._counters = reader, seed, put, counters

    def numbers(self, name: str, rows: Sequence[Sequence[int]]) -> tuple[list[Floats32 | None], NDArray[np.int64]]:
        """Return the numbers stored for rows of token ids, and the rows of the bank, int64 [n]; None and -1 if missing.

        name: of the settings.
        """
        tokens = [np.asarray(row, np.int32) for row in rows]
        found = self._reader.lookup(self._keys(name, tokens), tokens)
        places = np.flatnonzero(found >= 0)
        numbers: list[Floats32 | None] = [None] * len(rows)
        if len(places):
            values, intact = self._reader.load(found[places])
            for place, value, good in zip(places.tolist(), values, intact.tolist(), strict=True):
                if good:
                    numbers[place] = np.asarray(value).reshape(-1)
                else:
                    found[place] = -1
            self._counters.saved_seconds += self.bank.cost(found[found >= 0])
        return numbers, found

    def find(self, name: str, rows: Sequence[Sequence[int]], vocabulary: int) -> list[StoredAnswers | None]:
        """Return the answers stored for prompts; None where there are none, or where the numbers are no answers."""
        numbers, found = self.numbers(name, rows)
        answers = (None if each is None else unpacked(each, vocabulary) for each in numbers)
        return [
            None if each is None else StoredAnswers(each, row)
            for each, row in zip(answers, found.tolist(), strict=True)
        ]

    def put(
        self,
        name: str,
        rows: Sequence[Sequence[int]],
        numbers: Sequence[Any],
        seconds: float,
    ) -> None:
        """Store numbers for rows of token ids. seconds: of the model, for all rows."""
        tokens = [np.asarray(row, np.int32) for row in rows]
        keys = self._keys(name, tokens)
        self._put(
            self.bank, keys, [np.asarray(each, np.float32).reshape(-1, 1) for each in numbers],
            tokens=tokens, sources=[""] * len(rows), features=np.zeros((len(rows), 0), np.float32),
            cost=np.full(len(rows), seconds / max(1, len(rows)), np.float32),
        )  # fmt: skip
        self.evidence.computed(keys)

    def sample(self, name: str) -> list[tuple[NDArray[np.int32], Floats32, int]]:
        """Return a few entries of these settings to audit before new ones are stored: token ids, numbers and row."""
        if not self.evidence.open:
            return []
        rows = self.evidence.sample(self._seed(name).digest())
        if not len(rows):
            return []
        tokens = self.bank.tokens_of(rows)
        own = np.flatnonzero((self._keys(name, tokens) == self.bank.keys(rows)).all(axis=1))
        own = own[self.evidence.spread(np.ones(len(own), np.bool_), lambda: np.arange(len(own)))]
        if not len(own):
            return []
        reading = self.bank.read(rows[own], count=False)
        found = zip(own.tolist(), reading.values, reading.intact.tolist(), strict=True)
        return [(tokens[i], np.asarray(value).reshape(-1), int(rows[i])) for i, value, intact in found if intact]

    def _keys(self, name: str, tokens: Sequence[NDArray[np.int32]]) -> NDArray[np.uint64]:
        return token_keys(self._seed(name), [row.tobytes() for row in tokens]).view(np.uint64)


def packed(answers: Sequence[Answered]) -> Floats32:
    """Return the answers of one prompt as numbers: for each whether it has finished, its length, its ids and its
    log-likelihoods."""
    parts = [np.concatenate([[each.finished, len(each.ids)], each.ids, each.likelihoods]) for each in answers]
    return np.concatenate(parts).astype(np.float32)


def unpacked(numbers: Floats32, vocabulary: int) -> list[Answered] | None:
    """Return the answers of one prompt; None for numbers that are no answers, which only a forged store has.

    vocabulary: number of token ids of the model.
    """
    if not len(numbers) or not np.isfinite(numbers).all():
        return None
    answers, at = list[Answered](), 0
    while at < len(numbers):
        done, length = numbers[at : at + 2].tolist() if at + 2 <= len(numbers) else (0.0, -1.0)
        if length < 0 or at + 2 + 2 * length > len(numbers):
            return None
        middle, end = at + 2 + int(length), at + 2 + 2 * int(length)
        ids, likelihoods = numbers[at + 2 : middle].astype(np.int64), numbers[middle:end]
        if not ((ids >= 0) & (ids < vocabulary)).all() or not (likelihoods <= 0).all():
            return None
        answers.append(Answered(ids, likelihoods, bool(done)))
        at = end
    return answers
