"""Calibrating again in the background, when a cache has grown far beyond what it was calibrated on."""

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
"""Times the entries of a calibration, from which on it is made again."""
_AGAIN = ("label", "cosine", "beyond", "kl")  # kinds of drift that need nothing but what is stored


def grown(calibration: Calibration, entries: int) -> bool:
    """Return whether a calibration is to be made again for so many entries. Right answers and functions are not stored.

    The sample that a calibration was given is stored with the entries, so the bank counts as it was with the sample.
    """
    before = max(1, calibration.size, calibration.entries)
    return calibration.budget > 0 and calibration.drift in _AGAIN and entries >= GROWN * before


class Refitting:
    """A thread that calibrates again with the settings of an earlier calibration, on the cache's own entries.

    A head is fitted again in every fold to what it decides, since it may have been trained on entries.
    """

    def __init__(
        self,
        entries: Entries,
        read: Digests,
        before: Calibration,
        fitted: FittedModels,
        size: int,
        answering: NDArray[np.uint64],
    ) -> None:
        """entries: those that answer afterwards. read: digests of the fields of the entries, for the guard.

        size: of the bank. answering: see `FittedModels.answering`.
        """
        self._found: tuple[Calibration, FittedModels] | None = None
        self._size, self._answering = size, answering
        self._thread = Thread(target=self._run, args=(entries, read, before, fitted), daemon=True)
        self._thread.start()

    def result(self) -> tuple[Calibration, FittedModels] | None:
        """What it has come to; None while it works, or when it failed, which was logged."""
        return None if self._thread.is_alive() else self._found

    def wait(self) -> None:
        """Until it is done."""
        self._thread.join()

    def _run(self, entries: Entries, read: Digests, before: Calibration, fitted: FittedModels) -> None:
        try:
            found, numbers = calibrated(
                entries, read, None, None, budget=before.budget, drift=before.drift, head=fitted.boundary,
                limit=before.limit, confidence=before.confidence, guarded=before.guard, kinds=before.guard_kinds,
                pattern=before.guard_pattern, seed=self._size, refit_head=True,
            )  # fmt: skip
        except LLMCacheError as error:
            log.warning("near reuse keeps its calibration on %d entries: %s", before.entries, error)
            return
        self._found = replace(found, size=self._size, scope=before.scope), replace(numbers, answering=self._answering)
