"""Audits of exact hits: stored results are compared with what the model gives now.

An identity describes a model, and no description of a Python object is complete: a hook, a global setting or code that
was changed in place can give other results under the same identity. So before an opening serves its first hits of a
bank, it recomputes a few of them, and later a small random share. A difference that re-batching does not explain ends
reuse for this opening.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch.nn import Module

from llmcache.banks.agreement import Agreement
from llmcache.banks.counters import Counters
from llmcache.config import CacheConfig
from llmcache.errors import ModelMismatch
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys

log = logging.getLogger("llmcache")

Rows = NDArray[np.int64]
Result = TypeVar("Result")
Put = TypeVar("Put")

_OF_CALLS = 0.02
"""Random audits take at most this share of the seconds that calls took: hits are answered so quickly that one audit in
2,000 of them would take longer than all of them."""


class ExactAudits:
    """The audits of one opening: which hits are recomputed, what that took, and whether a difference was found.

    Shared by all that one cache answers from: embeddings, heads, layers and beginnings of prompts.
    """

    def __init__(self, config: CacheConfig, counters: Counters, seed: int | None = None) -> None:
        """seed: of the random choice of hits; None takes one from the system."""
        self._config, self._counters = config, counters
        self._random = np.random.default_rng(seed)
        self._evidence: WeakKeyDictionary[Module, dict[tuple[str, bytes], Evidence]] = WeakKeyDictionary()
        self._discard: Callable[[], object] = _nothing
        self._warned = False
        self._saved_seconds = 0.0
        self.recomputing = False
        """True if an audit is under way: an attached model then computes everything itself."""
        self.epoch = 0
        """How often `renew` was called."""
        self.mismatch = ""
        """What was found to differ; "" as long as nothing was."""

    def renew(self) -> None:
        """Count no entry as verified any more: the first hits of every bank are audited again.

        For a model that has changed, also where its identity takes note of that.
        """
        self.epoch += 1

    def discard_with(self, discard: Callable[[], object]) -> None:
        """Call this function, which drops what was put and not committed, when a difference is found."""
        self._discard = discard

    def evidence(self, bank: Bank, name: str, model: Module, digest: bytes) -> Evidence:
        """Evidence for a bank, a model object and an identity; created once and then returned again.

        name: of the bank, for messages.
        """
        known = self._evidence.setdefault(model, {})
        if (name, digest) not in known or known[name, digest].bank is not bank:
            known[name, digest] = Evidence(self, bank, name, self._config.exact_audits)
        return known[name, digest]

    # -- after a difference ---------------------------------------------------------------------------------

    def refusal(self) -> str | None:
        """Reason why the cache is bypassed after a mismatch; None if no mismatch was found.

        ModelMismatch where a difference was found and the settings ask for an error.
        """
        if not self.mismatch:
            return None
        if self._config.on_mismatch == "error":
            raise ModelMismatch(self.mismatch)
        return "an audit has found stored results that are not this model's"

    def require(self) -> None:
        """ModelMismatch where a difference was found: for what cannot do without the store."""
        if self.mismatch:
            raise ModelMismatch(self.mismatch)

    def answered(self, cached: Callable[[], Result], uncached: Callable[[], Result]) -> Result:
        """The result of `cached`; of `uncached` where an audit finds a difference and the settings ask for that."""
        if self.refusal() is not None:
            return uncached()
        try:
            return cached()
        except ModelMismatch:
            if self.refusal() is None:
                raise
            return uncached()

    def conclude(self, evidence: Evidence, rows: Rows, agreement: Agreement) -> None:
        """Take note of a comparison of these rows. ModelMismatch when they do not agree.

        Nothing more is served or stored from then on, and what waits to be committed is dropped.
        """
        counters = self._counters
        counters.exact_audits += len(rows)
        counters.exact_audit_largest = max(counters.exact_audit_largest, agreement.absolute)
        if agreement.agrees:
            evidence.agreed(rows)
            return
        counters.exact_mismatches += 1
        self.mismatch = _described(evidence, int(rows[agreement.entry]), agreement)
        self._discard()
        if self._config.on_mismatch == "bypass" and not self._warned:
            self._warned = True
            log.warning("%s. Going on without the cache", self.mismatch)
        raise ModelMismatch(self.mismatch)

    # -- what is recomputed, and what that takes ------------------------------------------------------------

    @contextmanager
    def recompute(self) -> Iterator[None]:
        """Inside, the model computes without any cache, and the seconds are counted as those of audits."""
        began, outer = time.perf_counter(), self.recomputing
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = outer
            self._counters.exact_audit_seconds += time.perf_counter() - began

    def saved(self, seconds: float) -> None:
        """Take note of seconds of the model that hits saved and no counter has."""
        self._saved_seconds += seconds

    def drawn(self, count: int, cost: Callable[[Rows], float], elapsed: float = 0.0) -> Rows:
        """Draw random hits to audit; int64, indices in [0, count).

        cost: seconds the model takes for hits at these places. elapsed: seconds of the call that is under way.
        """
        share = self._config.exact_audit_share
        number = int(self._random.binomial(count, share)) if share else 0
        if not number:
            return np.zeros(0, np.int64)
        chosen = np.sort(self._random.choice(count, number, replace=False)).astype(np.int64)
        counters = self._counters
        each = cost(chosen) / number
        if counters.exact_audits:
            each = max(each, counters.exact_audit_seconds / counters.exact_audits)
        layers = counters.layers.values()
        saved = self._saved_seconds + counters.saved_seconds + sum(layer.saved_seconds for layer in layers)
        spent = counters.overhead_seconds + counters.model_seconds
        spent += sum(layer.load_seconds + layer.look_up_seconds for layer in layers)
        spent += counters.prefix.lookup_seconds + counters.prefix.model_seconds
        saved += cost(np.arange(count))
        room = min(self._config.exact_audit_time * saved, _OF_CALLS * (spent + elapsed))
        affordable = int((room - counters.exact_audit_seconds) / max(each, 1e-9))
        return chosen[: max(0, affordable)]


class Evidence:
    """Rows of one bank that this opening has verified with one model object.

    The first few hits of entries that this model object has not computed itself in this opening are audited, after
    that a random share of all. When rows get other numbers, or after `ExactAudits.renew`, it begins again.
    """

    def __init__(self, audits: ExactAudits, bank: Bank, name: str, first: int) -> None:
        """first: how many hits are audited before others are believed."""
        self.bank, self.name = bank, name
        self._audits, self._first = audits, first
        self._begin()

    def _begin(self) -> None:
        self._open = self._first
        self._epoch, self._moves = self._audits.epoch, self.bank.renumberings
        self._verified = np.zeros(0, np.bool_)  # by row, as long as anything depends on it
        self._sampled: set[bytes] = set()

    @property
    def open(self) -> int:
        """Number of hits to audit before other hits are served without an audit."""
        if self._epoch != self._audits.epoch or self._moves != self.bank.renumberings:
            self._begin()
        return self._open

    def computed(self, keys: Keys) -> None:
        """Count the entries of these keys as verified: the model object has just computed them. uint64 [n, 2]."""
        if self.open:
            rows = self.bank.find(keys)
            self._mark(rows[rows >= 0])

    def agreed(self, rows: Rows) -> None:
        """Count these rows as verified by an audit."""
        if self.open:
            self._open = max(0, self._open - len(rows))
            self._mark(rows)

    def verified(self, rows: Rows) -> NDArray[np.bool_]:
        """Mask of the rows that were computed or audited with the model object; bool [n]."""
        known = rows < len(self._verified)
        known[known] = self._verified[rows[known]]
        return known

    def chosen(self, rows: Rows, sizes: Callable[[], NDArray[np.int64]], elapsed: float = 0.0) -> Rows:
        """Choose the hits to audit; int64, indices into `rows`.

        sizes: gives the length of each hit, int64 [n]. elapsed: seconds of the call that is under way.
        """
        if not len(rows):
            return rows
        if self.open:
            return self.spread(~self.verified(rows), sizes)
        return self._audits.drawn(len(rows), lambda places: self.bank.cost(rows[places]), elapsed)

    def chosen_among(self, groups: Sequence[Rows], sizes: Sequence[int]) -> list[int]:
        """Choose hits to audit that consist of several rows each. groups: rows of each hit. sizes: their lengths."""
        if self.open:
            unverified = np.array([not self.verified(group).all() for group in groups], np.bool_)
            return self.spread(unverified, lambda: np.array(sizes, np.int64)).tolist()  # type: ignore[no-any-return]

        def cost(places: Rows) -> float:
            return sum(self.bank.cost(groups[place]) for place in places.tolist())

        return self._audits.drawn(len(groups), cost).tolist()  # type: ignore[no-any-return]

    def spread(self, unverified: NDArray[np.bool_], sizes: Callable[[], NDArray[np.int64]]) -> Rows:
        """Places of the first hits to be audited: evenly spread over the lengths, shortest and longest among them."""
        places = np.flatnonzero(unverified)
        if not len(places) or not self.open:
            return places[:0]
        order = places[np.argsort(sizes()[places], kind="stable")]
        ranks = np.linspace(len(order) - 1, 0, min(self.open, len(order))).astype(np.int64)
        return np.sort(order[ranks])

    def sample(self, kind: bytes) -> Rows:
        """Some of the bank's rows that are not verified, once for each kind of call; int64, none when enough are."""
        if not self.open or kind in self._sampled:
            return np.zeros(0, np.int64)
        self._sampled.add(kind)
        rows = self.bank.near.live()
        rows = rows[~self.verified(rows)]
        return rows[np.unique(np.linspace(0, len(rows) - 1, min(64, len(rows))).astype(np.int64))]

    def recompute(self) -> AbstractContextManager[None]:
        """The context in which entries are computed again, see `ExactAudits.recompute`."""
        return self._audits.recompute()

    def conclude(self, rows: Rows, agreement: Agreement, beside: Rows | None = None) -> None:
        """Take note of a comparison of these rows, see `ExactAudits.conclude`. beside: rows that it covered too."""
        self._audits.conclude(self, rows, agreement)
        if beside is not None and self._open:
            self._mark(beside)

    def saved(self, rows: Rows) -> None:
        """Take note of hits on these rows, whose saved seconds no counter has."""
        self._audits.saved(self.bank.cost(rows))

    def verifying(self, put: Callable[..., Put]) -> Callable[..., Put]:
        """Wrap `put(bank, keys, ...)` so that the entries it stores count as verified."""

        def put_and_note(bank: Bank, keys: Keys, *values: Any, **entry: Any) -> Put:
            result = put(bank, keys, *values, **entry)
            self.computed(keys)
            return result

        return put_and_note

    def _mark(self, rows: Rows) -> None:
        if len(rows) and rows.max() >= len(self._verified):
            grown = np.zeros(2 * int(rows.max()) + 64, np.bool_)
            grown[: len(self._verified)] = self._verified
            self._verified = grown
        self._verified[rows] = True


def _nothing() -> None:
    """Nothing waits to be committed."""


def _described(evidence: Evidence, row: int, agreement: Agreement) -> str:
    source = evidence.bank.source(row)
    document = f" (document {source!r:.60})" if source else ""
    how = agreement.reason or (
        f"they differ by {agreement.difference:.2g} of the largest number, where other batches explain "
        f"{agreement.allowed:.2g}"
    )
    return (
        f"entry {evidence.bank.key(row)}{document} of the bank {evidence.name} is not what this model gives: {how}. "
        "Either the model is not the one that filled the store, although it looks alike (a hook, a setting, code "
        "changed in place), or the entry was stored by such a model. Nothing more is reused or stored in this opening: "
        "check the model with `llmcache verify-model --model M --data FILE`, and open the store with a fresh namespace"
    )
