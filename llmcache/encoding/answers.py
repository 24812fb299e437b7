"""What a batch of documents finds in a bank: exact by text, exact by tokens, near, or nothing.

Everything is arrays over the batch; no object per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank

if TYPE_CHECKING:
    from torch import Tensor

MISS, EXACT, NEAR = 0, 1, 2
TIERS = ("miss", "exact", "near")
"""Names of the tiers, by number."""


@dataclass(slots=True)
class Answers:
    """What is known about the documents of one call; every array has one place per document.

    outputs: float32 [n, width]. tier: int8. similarity: float32, 1 for exact, NaN for a miss. row: int64, the bank row
    that served it, -1 for a miss. twin: int64, for a repeat inside the call the place of its first occurrence, else -1.
    consensus: float32, mean cosine of the runners-up's outputs to the nearest one; NaN but for calibrated near hits.
    audited: bool, computed although a neighbour's output could have been given, to see how far that would have been.
    layer: int64, the layer whose state was reused, -1 where it was the output, or nothing; entry: its key by place.
    """

    outputs: NDArray[np.float32]
    tier: NDArray[np.int8]
    similarity: NDArray[np.float32]
    consensus: NDArray[np.float32]
    row: NDArray[np.int64]
    duplicate_of: NDArray[np.int64]
    layer: NDArray[np.int64]
    audited: NDArray[np.bool_]
    entry: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, n: int, width: int) -> Answers:
        return cls(
            np.zeros((n, width), np.float32),
            np.full(n, MISS, np.int8),
            np.full(n, np.nan, np.float32),
            np.full(n, np.nan, np.float32),
            np.full(n, -1, np.int64),
            np.full(n, -1, np.int64),
            np.full(n, -1, np.int64),
            np.zeros(n, np.bool_),
        )

    def computed(
        self,
        places: NDArray[np.int64],
        outputs: NDArray[np.float32],
        entered: NDArray[np.int64],
        entries: Sequence[str],
    ) -> None:
        """What the model computed for these places, of which some were entered after a layer that was stored."""
        self.outputs[places] = outputs
        for place, enter, entry in zip(places.tolist(), entered.tolist(), entries, strict=True):
            if enter:
                self.tier[place], self.similarity[place], self.layer[place] = EXACT, 1, enter - 1
                self.entry[place] = entry

    def serve(self, places: NDArray[np.int64], rows: NDArray[np.int64], bank: Bank, tier: int) -> NDArray[np.int64]:
        """Fill these places from these bank rows; returns the indices into `places` whose rows could not be read."""
        intact = self.fill(places, rows, bank)
        lost = np.flatnonzero(~intact)
        if len(lost):
            places, rows = places[intact], rows[intact]
        self.tier[places], self.row[places] = tier, rows
        if tier == EXACT:
            self.similarity[places] = 1
        return lost

    def fill(self, places: NDArray[np.int64], rows: NDArray[np.int64], bank: Bank) -> NDArray[np.bool_]:
        """Outputs of these places from these bank rows; bool [n], which could be read."""
        reading = bank.read(rows)
        values = np.asarray(reading.values)
        if not reading.intact.all():
            self.outputs[places[reading.intact]] = values[reading.intact]
        elif len(places) == len(self.outputs) and (places == np.arange(len(places))).all():
            self.outputs = values  # nothing is copied where everything was there
        else:
            self.outputs[places] = values
        return reading.intact

    def set_device_outputs(self, places: NDArray[np.int64], vectors: Tensor) -> None:
        """The model's own tensor for these places, [n, width], for answers that are wanted where it is."""

    def set_from_neighbour(
        self,
        places: NDArray[np.int64],
        outputs: NDArray[np.float32],
        entered: NDArray[np.int64],
        entries: Sequence[str],
    ) -> None:
        """What the model computed for these places from neighbours' states."""
        self.computed(places, outputs, entered, entries)
        self.tier[places] = NEAR

    def given(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Outputs of these places as the caller gets them, float32 [n, width], on the host."""
        return self.outputs[places]

    def repeat(self, places: NDArray[np.int64], first: NDArray[np.int64]) -> None:
        """Give these places what their first occurrences got. A repeat of something computed is an exact hit on it."""
        if not len(places):
            return
        self.outputs[places] = self.outputs[first]
        self.similarity[places] = np.where(self.tier[first] == NEAR, self.similarity[first], 1)
        self.tier[places] = np.where(self.tier[first] == NEAR, NEAR, EXACT)
        self.consensus[places] = self.consensus[first]
        self.row[places] = self.row[first]
        self.layer[places] = self.layer[first]
        self.audited[places] = self.audited[first]
        self.duplicate_of[places] = first
