"""Result of a near look-up for a batch of documents, with the gate that decided on each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

TAKEN, LOW, GUARDED, ALONE, QUARANTINED = 0, 1, 2, 3, 4
GATES = (
    "taken",
    "the score is below the threshold",
    "the guard",
    "there is no neighbour",
    "the entry is in quarantine: its last audit found too large a drift",
)
"""What decided on a near match, by number."""


@dataclass(frozen=True, slots=True)
class NearMatches:
    """What near reuse has for some documents. results: float32 [n, out], corrected, an array, or a tensor where that is
    looked up on a device. rows: int64 [n], of the source: the best match, or the first of the others that has the
    fields which that one lacks.

    similarity, consensus, score: float [n]; consensus is the mean cosine of the runners-up's outputs to the nearest
    one, the score is that of the gate. gate: int8 [n], a place in `GATES`.
    kinds: per document the kind of field that the guard found to differ, or None. closest: float32 [n], similarity of
    the best match.
    """

    results: NDArray[np.float32] | torch.Tensor = field(repr=False)
    rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    consensus: NDArray[np.float32]
    score: NDArray[np.float64]
    gate: NDArray[np.int8]
    kinds: list[str | None] = field(repr=False)
    closest: NDArray[np.float32] = field(repr=False)

    def given(self, chosen: NDArray[np.bool_]) -> NDArray[np.float32] | torch.Tensor:
        """The results of some of the documents, where they are."""
        if isinstance(self.results, np.ndarray):
            return np.asarray(self.results[chosen], np.float32)
        return self.results[torch.from_numpy(np.flatnonzero(chosen)).to(self.results.device)]

    def on_host(self, chosen: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The same as an array."""
        given = self.given(chosen)
        return given if isinstance(given, np.ndarray) else given.cpu().numpy()


def no_neighbours(n: int, width: int) -> NearMatches:
    """Empty near matches for n documents, used when no entry can answer."""
    apart = np.full(n, -np.inf, np.float32)
    return NearMatches(
        np.zeros((n, width), np.float32), np.full(n, -1), apart, np.zeros(n, np.float32), np.full(n, -np.inf),
        np.full(n, ALONE, np.int8), [None] * n, apart,
    )  # fmt: skip
