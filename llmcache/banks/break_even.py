"""Break-even test of reuse: seconds saved against seconds spent, averaged over the latest documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MEMORY = 4096
"""Half-life of the moving averages, in documents."""
LEAST = 1024
"""Number of documents looked up before the first decision."""
PROBED = 1 / 16
"""Share of documents that are looked up while reuse does not pay, to notice when it pays again."""
_HYSTERESIS = 1.2  # ratio of seconds saved to seconds spent from which on reuse is resumed


class BreakEven:
    """Moving averages of seconds saved and spent, one object per opening of a cache.

    pays: True while all documents are looked up; otherwise only a random share (`PROBED`) is.
    """

    def __init__(self) -> None:
        self.pays = True
        self.saved = self.spent = 0.0
        """Seconds, exponentially decayed by document."""
        self.documents = 0
        """Number of documents looked up so far."""
        self._random = np.random.default_rng()

    def select_for_lookup(self, n: int) -> NDArray[np.int64]:
        """Choose the documents to look up. Returns ascending indices in [0, n), int64."""
        return np.arange(n) if self.pays else np.flatnonzero(self._random.random(n) < PROBED)

    def observe(self, documents: int, saved: float, spent: float) -> bool:
        """Record look-ups of some documents. saved, spent: seconds. Returns True if `pays` changed."""
        decay = 0.5 ** (documents / MEMORY)
        self.saved, self.spent = self.saved * decay + saved, self.spent * decay + spent
        self.documents += documents
        before = self.pays
        if self.documents >= LEAST:
            self.pays = self.saved >= self.spent * (1 if self.pays else _HYSTERESIS)
        return self.pays != before


@dataclass(frozen=True, slots=True)
class Profile:
    """Mean seconds and bytes per entry, measured on a sample of a bank.

    entries: size of the sample. compute: seconds of the model; measured: True if they were measured on this machine,
    False if they are those recorded when the entries were stored. look_up: seconds to find the key. load: seconds to
    read the entry and verify its checksum. bytes: size of the payload.
    """

    entries: int
    compute: float
    measured: bool
    look_up: float
    load: float
    bytes: float

    @property
    def pays(self) -> bool:
        """True if reuse is faster than the model, or if the model's time is unknown."""
        return not self.compute or self.compute >= self.look_up + self.load

    @property
    def load_per_byte(self) -> float:
        """Seconds to load one byte of payload."""
        return self.load / max(1.0, self.bytes)


@dataclass(frozen=True, slots=True)
class Decision:
    """Decision whether entries of one bank are reused.

    state: "on"; "always on" (the setting forbids to stand aside); "too few entries to tell"; "aside" (only a few
    entries are looked up, to measure); or "memory" (like "aside", but entries in the `DeviceCache` are reused).
    saved, spent: seconds, averaged over the latest documents. held: number of documents answered from the
    `DeviceCache` so far; held_saved, held_spent: their seconds, averaged over the latest of them.
    """

    bank: str
    state: str
    profile: Profile | None
    saved: float
    spent: float
    held: int = 0
    held_saved: float = 0.0
    held_spent: float = 0.0
