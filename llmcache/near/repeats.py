"""Count near answers per document, so that a wrong one is not repeated in one opening.

Near answers are not stored. The bound of a calibration is over distinct documents, so a document that a thousand
requests ask for could be a thousand wrong answers. When each document is answered near at most once, and computed and
stored when it is asked again, there are at most as many wrong answers among the requests as among the distinct
documents, and the bound holds for requests too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.format.key_table import KeyTable
from llmcache.indexes.format.rows import Keys


class NearAnswers:
    """Counts of near answers, by key of the document. most: answers to one document; None for any number.

    It holds 24 bytes for each document that was answered.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._counts = KeyTable()

    def allowed(self, keys: Keys, copies: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mask of documents that may be answered near, bool [n]. keys: uint64 [n, 2]. copies: requests for each."""
        if self._most is None:
            return np.ones(len(keys), np.bool_)
        return np.asarray(self._before(keys) + copies <= self._most)

    def add(self, keys: Keys, copies: NDArray[np.int64]) -> None:
        """Take note of documents that were answered near."""
        if self._most is not None and len(keys):
            self._counts.add(keys, self._before(keys) + copies)
            self._counts.settle()

    def _before(self, keys: Keys) -> NDArray[np.int64]:
        return np.maximum(self._counts.find(keys), 0)
