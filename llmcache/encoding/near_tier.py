"""The near tier of an encode call: answer documents without an exact match from their nearest neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.banks.lookup import near
from llmcache.banks.pace import Pace
from llmcache.banks.reader import BankReader
from llmcache.banks.writer import BankWriter
from llmcache.config import CacheConfig
from llmcache.document import as_text
from llmcache.encoding.answers import NEAR, Answers
from llmcache.encoding.call import EncodeCall, OpenDocuments, Places
from llmcache.encoding.device_answers import DeviceAnswers
from llmcache.encoding.near_layers import asked_with, near_layers
from llmcache.model.batching import Model
from llmcache.model.encoders import TokenVectors
from llmcache.near.matcher import NearMatcher
from llmcache.near.neighbors.index_torch import place_of
from llmcache.near.neighbors.near_matches import TAKEN, NearMatches
from llmcache.near.repeats import NearAnswers


@dataclass(frozen=True, slots=True)
class LookedUp:
    """Documents that were looked up by calibrated near reuse.

    places: int64 [n], positions in the call. again: bool [n], True for documents that are computed for an audit.
    """

    places: Places
    near: NearMatches
    again: NDArray[np.bool_]


class NearTier:
    """Near matches from one bank: by a calibrated matcher, or by the similarity threshold `tau` without calibration."""

    def __init__(
        self,
        model: Model,
        config: CacheConfig,
        storing: BankWriter,
        reader: BankReader,
        inside: Callable[[], AbstractContextManager[Any]],
        pace: Pace,
    ) -> None:
        """reader: of the bank. inside: context that the model runs in. pace: speed of the model."""
        self._model, self._config, self._storing = model, config, storing
        self._reader, self._bank = reader, reader.bank
        self._inside, self._pace = inside, pace
        self._embedding, self._counters = model.token_embedding(), storing.counters
        self._matcher: NearMatcher | None = None
        self.near_answers = NearAnswers(config.near_repeats)

    @property
    def matcher(self) -> NearMatcher | None:
        """Calibrated matcher, set to search on the model's device; None where nothing is calibrated."""
        if self._matcher is not None:
            self._matcher.place = place_of(self._config, self._embedding)
        return self._matcher

    @matcher.setter
    def matcher(self, matcher: NearMatcher | None) -> None:
        self._matcher = matcher
        if matcher is not None:
            matcher.pace = self._pace

    def answer(self, answers: Answers, call: EncodeCall, documents: OpenDocuments) -> tuple[Places, LookedUp | None]:
        """Serve near matches, and report them to `call.progress`.

        Returns the indices into `documents` that stay open, in order, and the documents that `audit` needs after the
        open ones were computed.
        """
        count, config, matcher = len(documents.places), self._config, self.matcher
        everything: Places = np.arange(count)
        looked_up: LookedUp | None = None
        if not count or isinstance(self._model, TokenVectors):  # a near text has other tokens
            return everything, None
        if matcher is not None:
            if matcher.scope != documents.scope:
                matcher.foreign += count
                return everything, None
            open_, looked_up = self._by_calibration(answers, call, documents, matcher)
        elif config.reuse == "exact" or (config.tau is None and not config.layer_tau):
            return everything, None
        elif config.reuse == "layer":
            with self._inside() as attachment, asked_with(attachment, call):
                open_ = near_layers(attachment, self._model, config, self._counters, answers, call, documents)
        else:
            features = documents.drawn if self._bank.near.takes_tensors else documents.raw
            open_ = self._by_tau(answers, documents, features, on_device=call.tensor)
        call.progress(count - len(open_), 0)
        return open_, looked_up

    def audit(self, answers: Answers, asked: int, looked_up: LookedUp) -> None:
        """Compare the computed outputs of audited documents with their near matches, and record the drift.

        asked: number of documents in the window.
        """
        matcher = self.matcher
        assert matcher is not None
        places = looked_up.places[looked_up.again]
        drift = matcher.audit(asked, looked_up.near, looked_up.again, answers.outputs[places])
        answers.audited[places] = True
        self._counters.audits += len(drift)
        self._counters.audited_drift += float(drift.sum())

    def _by_tau(
        self, answers: Answers, documents: OpenDocuments, features: Floats32 | torch.Tensor, *, on_device: bool
    ) -> Places:
        """Serve the nearest entries above `tau`. Returns the indices into `documents` that stay open."""
        places = documents.places
        if self._config.tau is None:
            return np.arange(len(places))
        rows, similarity = near(self._bank, features, self._config.tau, documents.scope)
        self._storing.history.similar(similarity, rows >= 0)
        hits = np.flatnonzero(rows >= 0)
        values, intact = self._reader.load(rows[hits], on_device=on_device, counted=False)
        answers.serve(places[hits], rows[hits], values, intact, NEAR)
        served = hits[intact]
        answers.similarity[places[served]] = similarity[served]
        return np.delete(np.arange(len(rows)), served)

    def _by_calibration(
        self, answers: Answers, call: EncodeCall, documents: OpenDocuments, matcher: NearMatcher
    ) -> tuple[Places, LookedUp | None]:
        """Serve the matches that pass all gates, less a share that is audited. Returns as `answer`."""
        places, keys, copies = documents.places, documents.keys, documents.copies
        features = documents.raw if matcher.place is None else documents.drawn
        tokens, texts = documents.token_ids(), [as_text(call.texts[i]) for i in places.tolist()]
        tried = matcher.select_for_lookup(len(places))
        tried = tried[self.near_answers.allowed(keys[tried], copies[tried])]
        if not len(tried):
            return np.arange(len(places)), None
        matcher.refresh()  # before the clock starts: loading the index belongs to opening, not to a look-up
        began = time.perf_counter()
        chosen = tried.tolist()
        matches = matcher.look_up(features[tried], [tokens[i] for i in chosen], [texts[i] for i in chosen])
        self._storing.history.similar(matches.closest, matches.gate == TAKEN)
        matcher.watch(matches.closest)
        again = matcher.chosen_for_audit(matches)
        served = (matches.gate == TAKEN) & ~again
        where = places[tried[served]]
        if isinstance(answers, DeviceAnswers) and isinstance(outputs := matches.given(served), torch.Tensor):
            answers.set_device_outputs(where, outputs)
        else:
            answers.outputs[where] = matches.on_host(served)
        answers.tier[where], answers.row[where] = NEAR, matches.rows[served]
        answers.similarity[where], answers.consensus[where] = matches.similarity[served], matches.consensus[served]
        self._bank.used(matches.rows[served])
        self.near_answers.add(keys[tried[served]], copies[tried[served]])
        lengths = np.array([len(tokens[i]) for i in chosen])
        seconds = time.perf_counter() - began
        counters = self._counters
        counters.near_asked += len(tried)
        counters.near_seconds += seconds
        saved, audits = matcher.paid(len(tried), int(lengths[served].sum()), seconds, int(lengths[again].sum()))
        counters.near_saved_seconds += saved
        counters.audit_seconds += audits
        return np.setdiff1d(np.arange(len(places)), tried[served]), LookedUp(places[tried], matches, again)
