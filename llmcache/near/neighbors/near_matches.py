"""Result of a near look-up for a batch of documents, with the gate that decided on each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.indexes.format.rows import Rows

TAKEN, LOW, GUARDED, ALONE, QUARANTINED = 0, 1, 2, 3, 4
GATES = (
    "taken",
    "the score is below the threshold",
    "the guard",
    "there is no neighbour",
    "the entry is in quarantine: its last audit found too large a drift",
)
"""Texts of the gate numbers: the reason for the decision on a near match."""


@dataclass(frozen=True, slots=True)
class NearMatches:
    """Near matches of n documents.

    results: corrected outputs, float32 [n, out]; a tensor when the entries are on a device.
    rows: row of the source entry, int64 [n]: the best match, or the first further neighbour with the same fields
        where those of the best match differ.
    similarity: of the source, float32 [n].
    consensus: mean cosine of the runner-up outputs to the nearest output, float32 [n].
    score: of the gate, float64 [n].
    gate: number of the deciding gate, int8 [n], an index into `GATES`.
    kinds: kind of field in which the guard found a difference, or None, for each document.
    closest: similarity of the best match, float32 [n].
    """

    results: Floats32 | torch.Tensor = field(repr=False)
    rows: Rows
    similarity: Floats32
    consensus: Floats32
    score: NDArray[np.float64]
    gate: NDArray[np.int8]
    kinds: list[str | None] = field(repr=False)
    closest: Floats32 = field(repr=False)

    def given(self, chosen: NDArray[np.bool_]) -> Floats32 | torch.Tensor:
        """Return the results of the chosen documents, on the device where they are. chosen: bool [n]."""
        if isinstance(self.results, np.ndarray):
            return np.asarray(self.results[chosen], np.float32)
        return self.results[torch.from_numpy(np.flatnonzero(chosen)).to(self.results.device)]

    def on_host(self, chosen: NDArray[np.bool_]) -> Floats32:
        """Return the results of the chosen documents as an array. chosen: bool [n]."""
        results = self.given(chosen)
        return results if isinstance(results, np.ndarray) else results.cpu().numpy()


def no_neighbours(n: int, width: int) -> NearMatches:
    """Return empty near matches for n documents, used when no entry can answer. width: of the outputs."""
    similarity = np.full(n, -np.inf, np.float32)
    return NearMatches(
        np.zeros((n, width), np.float32), np.full(n, -1), similarity, np.zeros(n, np.float32), np.full(n, -np.inf),
        np.full(n, ALONE, np.int8), [None] * n, similarity,
    )  # fmt: skip
