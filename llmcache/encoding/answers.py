"""Outputs and provenance of the documents of one call, as arrays over the call without an object per document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats32, objects
from llmcache.banks.reader import Loaded
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

MISS, EXACT, NEAR = 0, 1, 2
TIERS = ("miss", "exact", "near")
"""Names of the tiers, indexed by their numbers."""
POOLED = -2
"""Layer number of outputs that were pooled from stored token embeddings."""


@dataclass(slots=True)
class Answers:
    """Outputs and provenance of the documents of one call. Every array has one element or row per document.

    outputs: float32 [n, width]; of a model with matrices an array of n objects, each float32 [rows, width]. tier: int8.
    similarity: float32, 1 for exact hits, NaN for misses. consensus: float32, mean cosine of the other neighbours'
    outputs to the nearest one's; NaN except for calibrated near hits. row: int64, bank row that served the document,
    -1 for misses. duplicate_of: int64, for a repeat in the call the place of its first occurrence, else -1. layer:
    int64, layer whose state was reused, -1 for an output or a miss, or POOLED; entry: key or id of that state by place.
    audited: bool, True for documents computed for an audit although they had a near match.
    """

    outputs: NDArray[Any]
    tier: NDArray[np.int8]
    similarity: Floats32
    consensus: Floats32
    row: Rows
    duplicate_of: Rows
    layer: Rows
    audited: NDArray[np.bool_]
    entry: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, n: int, facts: BankFacts) -> Answers:
        """Return answers for n documents, all of them misses with zero or empty outputs. facts: of the bank."""
        nothing = np.zeros((0, facts.width), np.float32)
        return cls(
            np.zeros((n, facts.width), np.float32) if facts.rank == 1 else objects([nothing] * n),
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
        places: Rows,
        outputs: Floats32,
        entered: Rows,
        entries: Sequence[str],
    ) -> None:
        """Set computed outputs. Documents that resumed from a stored layer state count as exact hits on that layer.

        outputs: float32 [n, width]. entered: int64 [n], number of layers skipped, 0 for none; POOLED + 1 where all were
        skipped, and the output was pooled. entries: keys or ids of the states.
        """
        self.outputs[places] = outputs
        for place, skipped, entry in zip(places.tolist(), entered.tolist(), entries, strict=True):
            if skipped:
                self.tier[place], self.similarity[place], self.layer[place] = EXACT, 1, skipped - 1
                self.entry[place] = entry

    def serve(self, places: Rows, rows: Rows, values: Loaded, intact: NDArray[np.bool_], tier: int) -> None:
        """Serve places from bank rows that were loaded.

        rows: int64 [n]. values: their outputs, [n, width]. intact: bool [n]; places whose row is not intact stay open.
        """
        self.fill(places, values, intact)
        if not intact.all():
            places, rows = places[intact], rows[intact]
        self.tier[places], self.row[places] = tier, rows
        if tier == EXACT:
            self.similarity[places] = 1

    def fill(self, places: Rows, values: Loaded, intact: NDArray[np.bool_]) -> None:
        """Set the outputs of these places, where they are intact. Arguments as for `serve`."""
        outputs = objects(values) if isinstance(values, list) else np.asarray(values)
        if not intact.all():
            self.outputs[places[intact]] = outputs[intact]
        elif len(places) == len(self.outputs) and (places == np.arange(len(places))).all():
            self.outputs = outputs  # every document is a hit: no copy needed
        else:
            self.outputs[places] = outputs

    def set_device_outputs(self, places: Rows, vectors: Tensor | None) -> None:
        """Keep the model's own tensor for these places, [n, width]. Does nothing for answers on the host."""

    def set_from_neighbour(
        self,
        places: Rows,
        outputs: Floats32,
        entered: Rows,
        entries: Sequence[str],
    ) -> None:
        """Set outputs that were computed from neighbours' layer states, as near hits. Arguments as for `computed`."""
        self.computed(places, outputs, entered, entries)
        self.tier[places] = NEAR

    def given(self, places: Rows) -> NDArray[Any]:
        """Return the outputs of these places as the caller gets them, on the host, in the form of `outputs`."""
        return self.outputs[places]

    def repeat(self, places: Rows, first: Rows) -> None:
        """Copy the answers of first occurrences to repeats. A repeat of a computed document is an exact hit."""
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
