"""Whether near reuse pays: the seconds it saves against those it takes, of the latest documents."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MEMORY = 4096
"""Documents after which what was seen counts half."""
LEAST = 1024
"""Documents that are looked up before anything is decided."""
PROBED = 1 / 16
"""Share of documents that are still looked up while it does not pay, so as to notice when it does."""
_MORE = 1.2  # what it has to save, times what it takes, to go on again


class Balance:
    """One for each opening of a cache. pays: whether documents are looked up, but for `PROBED`."""

    def __init__(self) -> None:
        self.pays = True
        self.saved = self.spent = 0.0
        """Seconds, decayed."""
        self._documents = 0.0
        self._random = np.random.default_rng()

    def tried(self, n: int) -> NDArray[np.int64]:
        """Which of n documents are to be looked up, int64, in order."""
        return np.arange(n) if self.pays else np.flatnonzero(self._random.random(n) < PROBED)

    def observe(self, documents: int, saved: float, spent: float) -> bool:
        """Take note of documents that were looked up, and seconds. Returns whether `pays` has changed."""
        kept = 0.5 ** (documents / MEMORY)
        self.saved, self.spent = self.saved * kept + saved, self.spent * kept + spent
        self._documents += documents
        before = self.pays
        if self._documents >= LEAST:
            self.pays = self.saved >= self.spent * (1 if self.pays else _MORE)
        return self.pays != before
