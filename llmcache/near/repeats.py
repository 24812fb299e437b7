"""Count near answers per document, so that a wrong one is not repeated in one opening.

Near answers are not stored. The bound of a calibration covers distinct documents, so a document in a thousand requests
could give a thousand wrong answers. If each document is answered near at most once, and computed and stored when it is
asked again, the requests have at most as many wrong answers as the distinct documents, and the bound covers requests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.key_table import KeyTable
from llmcache.indexes.format.rows import Keys


class NearAnswers:
    """Counts of near answers by document key, 24 bytes each.

    most: highest number of near answers to one document; None for no limit.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._counts = KeyTable()

    def allowed(self, keys: Keys, copies: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask of the documents that may be answered near, bool [n].

        keys: of the documents, uint64 [n, 2]. copies: number of requests for each, int64 [n].
        """
        if self._most is None:
            return np.ones(len(keys), np.bool_)
        return np.asarray(self._earlier(keys) + copies <= self._most)

    def add(self, keys: Keys, copies: NDArray[np.int64]) -> None:
        """Count documents that were answered near. Arguments as for `allowed`."""
        if self._most is not None and len(keys):
            self._counts.add(keys, self._earlier(keys) + copies)
            self._counts.settle()

    def _earlier(self, keys: Keys) -> NDArray[np.int64]:
        return np.maximum(self._counts.find(keys), 0)
