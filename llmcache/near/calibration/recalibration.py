"""Recalibrate in the background when a cache has grown far beyond the entries of its calibration."""

from __future__ import annotations

import logging
from dataclasses import replace
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import LLMCacheError
from llmcache.near.calibration.calibrate import (
    Calibration,
    Digests,
    FittedModels,
    calibrated,
)
from llmcache.near.neighbors.index import Entries

log = logging.getLogger("llmcache")

GROWN = 2
"""Growth of the bank, as a factor, from which it is calibrated again."""
_AGAIN = ("label", "cosine", "beyond", "kl")  # kinds of drift that need stored data only


def grown(calibration: Calibration, entries: int) -> bool:
    """Return True if a bank with this number of entries should be calibrated again.

    A calibration by correct labels or by a user's function is not repeated, since these are not stored. Growth counts
    from the size of the bank including the calibration sample, which is stored with the entries.
    """
    before = max(1, calibration.size, calibration.entries)
    return calibration.budget > 0 and calibration.drift in _AGAIN and entries >= GROWN * before


class Refitting:
    """A background thread that calibrates on the cache's own entries, with the settings of an earlier calibration.

    A head is fitted again in every fold to its own decisions, since it may have been trained on the entries.
    """

    def __init__(
        self,
        entries: Entries,
        read: Digests,
        before: Calibration,
        fitted: FittedModels,
        size: int,
        answering: NDArray[np.uint64],
        pairs: bool = False,
    ) -> None:
        """Start the thread.

        entries: those that answer later. read: digests of their fields, for the guard.
        before, fitted: the earlier calibration. size: number of entries in the bank.
        answering: see `FittedModels.answering`. pairs: True if the documents are pairs of texts.
        """
        self._result: tuple[Calibration, FittedModels] | None = None
        self._size, self._answering = size, answering
        self._thread = Thread(target=self._run, args=(entries, read, before, fitted, pairs), daemon=True)
        self._thread.start()

    def result(self) -> tuple[Calibration, FittedModels] | None:
        """Return the new calibration; None while the thread runs, or when it failed (which it logs)."""
        return None if self._thread.is_alive() else self._result

    def wait(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def _run(self, entries: Entries, read: Digests, before: Calibration, fitted: FittedModels, pairs: bool) -> None:
        try:
            calibration, models = calibrated(
                entries, read, None, None, budget=before.budget, drift=before.drift, head=fitted.boundary,
                limit=before.limit, confidence=before.confidence, guarded=before.guard, kinds=before.guard_kinds,
                pattern=before.guard_pattern, seed=self._size, refit_head=True, pairs=pairs,
            )  # fmt: skip
        except LLMCacheError as error:
            log.warning("near reuse keeps its calibration on %d entries: %s", before.entries, error)
            return
        self._result = (
            replace(calibration, size=self._size, scope=before.scope),
            replace(models, answering=self._answering),
        )
