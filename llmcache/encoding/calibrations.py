"""Calibrations of near reuse for all banks of a cache: load, calibrate, save, and report their state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmcache.config import CacheConfig
from llmcache.document import Text
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall
from llmcache.encoding.executor import Executor
from llmcache.encoding.results import Source, documents_of, results
from llmcache.errors import ConfigError
from llmcache.indexes.store import Store
from llmcache.model.encoders import text_fields
from llmcache.near.calibration.calibrate import OWN, Calibration
from llmcache.near.calibration.drift import Drift
from llmcache.near.calibration.risk_control import check
from llmcache.near.calibration_store import CalibrationStore

CHUNK = 8192  # documents of a sample that are computed together


class Calibrations:
    """Calibrations by bank name, each with the executor that uses it."""

    def __init__(
        self,
        store: Store,
        namespace: str,
        config: CacheConfig,
        drift: Drift | None,
        commit: Callable[[], object],
    ) -> None:
        """drift: the user's own drift function, if any. commit: commits the store."""
        self._store, self._namespace, self._config = store, namespace, config
        self._commit = commit
        self._own: dict[str, Drift] = {} if drift is None else {"output": drift}
        self._open: dict[str, tuple[CalibrationStore, Executor]] = {}

    def follow(self, name: str, execution: Executor) -> None:
        """Load the saved calibration of an executor's bank, if this opening may use it."""
        own, fields = self._own.get(name), execution.fields
        near = CalibrationStore(self._store, self._namespace, self._config, name, execution.bank, fields, own)
        self._open[name] = near, execution
        usable = self._store.trust != "untrusted" and self._config.tau is None and self._config.reuse == "deepest"
        execution.reuse = near.saved() if usable else None
        fields.pattern = near.pattern

    def calibrate(
        self,
        name: str,
        execution: Executor,
        sample: Iterable[Source] | None,
        truth: Iterable[Any] | None,
        prompt: str | None,
        role: str | None = None,
        **settings: Any,
    ) -> Calibration:
        """Calibrate a bank, see `LLMCache.calibrate`; the executor uses the calibration from now on.

        prompt, role: of the entries to match and of the sample. settings: of `CalibrationStore.calibrate`.
        """
        check(settings["budget"], settings["confidence"])
        documents = None if sample is None else list(documents_of(sample, text_fields(execution.model.module)))
        labels = None if truth is None else np.asarray(list(truth))
        if settings["drift"] == "accuracy" and labels is None:
            raise ConfigError('drift="accuracy" needs the right answers of a sample; give truth=, one for each')
        if labels is not None and len(labels) != len(documents or ()):
            raise ConfigError(
                f"{len(labels)} right answers for {len(documents or ())} documents of a sample; give one for each"
            )
        known, execution.reuse = execution.bank.near.live(), None  # compute the sample without near matches
        call = EncodeCall([], None, prompt, role)
        try:
            execution.fields.pattern = settings["pattern"]
            _compute(execution, documents or (), call)
            answers = None
            if labels is not None and documents is not None:
                rows = execution.rows([document.text for document in documents], call)
                answers = rows[rows >= 0], labels[rows >= 0]
            near = CalibrationStore(self._store, self._namespace, self._config, name, execution.bank, execution.fields)
            scope = execution.scope(call)
            answering = None if documents is None else known
            calibration = near.calibrate(answering, scope, commit=self._commit, truth=answers, **settings)
            if calibration.drift == OWN:
                self._own[name] = settings["drift"]
            return calibration
        finally:
            self.follow(name, execution)

    def keep(self) -> None:
        """Save audit results and recalibrations."""
        for near, execution in self._open.values():
            if execution.reuse is not None:
                near.keep(execution.reuse, self._commit)

    def forget(self) -> None:
        """Reset the matchers after a reload, when bank rows have been renumbered."""
        for _, execution in self._open.values():
            if execution.reuse is not None:
                execution.reuse.forget()

    def states(self) -> dict[str, tuple[str, str]]:
        """Return the state "on", "off" or "aside" and its reason, by bank name."""
        states = {}
        for name, (_, execution) in self._open.items():
            if (reuse := execution.reuse) is not None:
                state = "off" if reuse.off else "aside" if reuse.stands_aside else "on"
                reasons = [reuse.off or reuse.stands_aside or reuse.shifted]
                if reuse.foreign:
                    reasons.append(
                        f"{reuse.foreign:,} documents had another role or prompt than the calibration, and were "
                        "not looked up"
                    )
                states[name] = state, "; ".join(filter(None, reasons))
        return states


def _compute(execution: Executor, documents: Iterable[Source], call: EncodeCall) -> None:
    """Compute and store documents, with the role and prompt of a call."""

    def answer(texts: Sequence[Text], ids: Sequence[str]) -> Answers:
        return execution.answers(replace(call, texts=texts, ids=ids))

    fields = text_fields(execution.model.module)
    for _ in results(documents, answer, lambda: execution.bank, "output", CHUNK, fields=fields):
        continue
