"""Whether reuse pays: the seconds it saves against those it takes, of the latest documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MEMORY = 4096
"""Documents after which what was seen counts half."""
LEAST = 1024
"""Documents that are looked up before anything is decided."""
PROBED = 1 / 16
"""Share of documents that are still looked up while it does not pay, so as to notice when it does."""
_MORE = 1.2  # what it has to save, times what it takes, to go on again


class BreakEven:
    """One for each opening of a cache. pays: whether documents are looked up, but for `PROBED`."""

    def __init__(self) -> None:
        self.pays = True
        self.saved = self.spent = 0.0
        """Seconds, decayed."""
        self.documents = 0
        """That were looked up."""
        self._random = np.random.default_rng()

    def select_for_lookup(self, n: int) -> NDArray[np.int64]:
        """Which of n documents are to be looked up, int64, in order."""
        return np.arange(n) if self.pays else np.flatnonzero(self._random.random(n) < PROBED)

    def observe(self, documents: int, saved: float, spent: float) -> bool:
        """Take note of documents that were looked up, and seconds. Returns whether `pays` has changed."""
        kept = 0.5 ** (documents / MEMORY)
        self.saved, self.spent = self.saved * kept + saved, self.spent * kept + spent
        self.documents += documents
        before = self.pays
        if self.documents >= LEAST:
            self.pays = self.saved >= self.spent * (1 if self.pays else _MORE)
        return self.pays != before


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds and bytes of one entry, as measured on a sample of them.

    compute: what the model takes for what an entry holds. measured: whether that was tried here; else it is what was
    recorded when the entries were made. look_up: by key. load: reading it, checksum included. bytes: of its payload.
    """

    entries: int
    compute: float
    measured: bool
    look_up: float
    load: float
    bytes: float

    @property
    def pays(self) -> bool:
        """Whether reuse is quicker than the model; so where nothing is known of the model."""
        return not self.compute or self.compute >= self.look_up + self.load

    @property
    def load_per_byte(self) -> float:
        """Seconds."""
        return self.load / max(1.0, self.bytes)


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about a bank. state: "on", "aside", "too few entries to tell", or "memory": the files are left
    alone but for a few entries, and those that memory holds (`Levels`) are reused.

    saved, spent: seconds of the latest documents. held: of all documents, how many memory answered; held_saved,
    held_spent: seconds of the latest of these.
    """

    bank: str
    state: str
    profile: Profile | None
    saved: float
    spent: float
    held: int = 0
    held_saved: float = 0.0
    held_spent: float = 0.0
