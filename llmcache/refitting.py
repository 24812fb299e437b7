"""Calibrating again in the background, when a cache has grown far beyond what it was calibrated on."""

from __future__ import annotations

import logging
from dataclasses import replace
from threading import Thread

from llmcache.calibrating import Calibration, Digests, Fitted, calibrated
from llmcache.crossfit import Entries
from llmcache.errors import LLMCacheError

log = logging.getLogger("llmcache")

GROWN = 2
"""Times the entries of a calibration, from which on it is made again."""
_AGAIN = ("label", "cosine", "beyond", "kl")  # kinds of drift that need nothing but what is stored


def grown(calibration: Calibration, entries: int) -> bool:
    """Whether a calibration is to be made again for so many entries. Right answers and functions are not stored."""
    return calibration.budget > 0 and calibration.drift in _AGAIN and entries >= GROWN * max(1, calibration.entries)


class Refitting:
    """A thread that calibrates again with the settings of an earlier calibration, on the cache's own entries.

    A head is fitted again in every fold to what it decides, since it may have been trained on entries.
    """

    MOST = 20_000
    """Entries that take part: fewer that answer than there are make the evidence pessimistic, not wrong."""

    def __init__(
        self, entries: Entries, read: Digests, before: Calibration, fitted: Fitted, of: int, until: int
    ) -> None:
        """read: digests of the fields of the entries, for the guard. of: how many entries there are in all;
        until: when the last was put.
        """
        self._found: tuple[Calibration, Fitted] | None = None
        self._of, self._until = of, until
        self._thread = Thread(target=self._run, args=(entries, read, before, fitted), daemon=True)
        self._thread.start()

    def result(self) -> tuple[Calibration, Fitted] | None:
        """What it has come to; None while it works, or when it failed, which was logged."""
        return None if self._thread.is_alive() else self._found

    def wait(self) -> None:
        """Until it is done."""
        self._thread.join()

    def _run(self, entries: Entries, read: Digests, before: Calibration, fitted: Fitted) -> None:
        try:
            found, numbers = calibrated(
                entries, read, None, None, budget=before.budget, drift=before.drift, head=fitted.boundary,
                limit=before.limit, confidence=before.confidence, guarded=before.guard, kinds=before.guard_kinds,
                pattern=before.guard_pattern, seed=self._of, refit_head=True,
            )  # fmt: skip
        except LLMCacheError as error:
            log.warning("near reuse keeps its calibration on %d entries: %s", before.entries, error)
            return
        self._found = replace(found, entries=self._of, until=self._until, scope=before.scope), numbers
