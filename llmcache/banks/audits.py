"""Audits of exact hits: compare stored results with freshly computed ones.

A model's identity cannot describe a Python object completely: a hook, a global setting or code changed in place can
give other results under the same identity. Therefore an opening recomputes the first few hits of every bank before it
serves them, and later a small random share. A difference that another batch shape does not explain ends reuse for the
opening.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch.nn import Module

from llmcache.banks.agreement import Agreement
from llmcache.banks.counters import Counters
from llmcache.config import CacheConfig
from llmcache.errors import ModelMismatch
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys, Rows

log = logging.getLogger("llmcache")

Result = TypeVar("Result")

_SHARE_OF_CALLS = 0.02
"""Largest share of the calls' seconds that random audits take. Hits are so fast that recomputing one in 2,000 would
take longer than answering all of them."""


class ExactAudits:
    """Audits of one opening: choice of the hits to recompute, time spent on them, and the mismatch, if one was found.

    One object is shared by all banks of a cache: embeddings, heads, layers and prefixes of prompts.
    """

    def __init__(self, config: CacheConfig, counters: Counters, seed: int | None = None) -> None:
        """seed: seed of the random choice of hits; None draws one from the operating system."""
        self._config, self._counters = config, counters
        self._random = np.random.default_rng(seed)
        self._evidence: WeakKeyDictionary[Module, dict[tuple[str, bytes], Evidence]] = WeakKeyDictionary()
        self._discard: Callable[[], object] = _nothing
        self._warned = False
        self._saved_seconds = 0.0
        self.recomputing = False
        """True during an audit: an attached model then computes without the cache."""
        self.epoch = 0
        """Number of calls of `renew`."""
        self.mismatch = ""
        """Description of the mismatch; "" if none was found."""

    def renew(self) -> None:
        """Mark all entries as not verified, so that the first hits of every bank are audited again.

        Called when the model has changed, even if its identity changed with it.
        """
        self.epoch += 1

    def discard_with(self, discard: Callable[[], object]) -> None:
        """Register the function to call on a mismatch; it drops uncommitted entries."""
        self._discard = discard

    def evidence(self, bank: Bank, name: str, model: Module, digest: bytes) -> Evidence:
        """Return the Evidence for a bank, a model object and an identity; created at first use.

        name: name of the bank, for messages. digest: digest of the identity.
        """
        of_model = self._evidence.setdefault(model, {})
        if (name, digest) not in of_model or of_model[name, digest].bank is not bank:
            of_model[name, digest] = Evidence(self, bank, name, self._config.exact_audits)
        return of_model[name, digest]

    # -- after a difference ---------------------------------------------------------------------------------

    def refusal(self) -> str | None:
        """Return the reason to bypass the cache after a mismatch; None if no mismatch was found.

        ModelMismatch when there was one and the settings ask for an error.
        """
        if not self.mismatch:
            return None
        if self._config.on_mismatch == "error":
            raise ModelMismatch(self.mismatch)
        return "an audit has found stored results that are not this model's"

    def require(self) -> None:
        """Raise ModelMismatch if a mismatch was found; for operations that need the store."""
        if self.mismatch:
            raise ModelMismatch(self.mismatch)

    def answered(self, cached: Callable[[], Result], uncached: Callable[[], Result]) -> Result:
        """Return `cached()`, or `uncached()` if an audit finds a mismatch and the settings ask to bypass the cache."""
        if self.refusal() is not None:
            return uncached()
        try:
            return cached()
        except ModelMismatch:
            if self.refusal() is None:
                raise
            return uncached()

    def conclude(self, evidence: Evidence, rows: Rows, agreement: Agreement) -> None:
        """Record the comparison of these rows. ModelMismatch when they do not agree.

        After a mismatch nothing more is served or stored, and uncommitted entries are dropped.
        """
        counters = self._counters
        counters.exact_audits += len(rows)
        counters.exact_audit_largest = max(counters.exact_audit_largest, agreement.absolute)
        if agreement.agrees:
            evidence.agreed(rows)
            return
        counters.exact_mismatches += 1
        self.mismatch = _describe_mismatch(evidence, int(rows[agreement.entry]), agreement)
        self._discard()
        if self._config.on_mismatch == "bypass" and not self._warned:
            self._warned = True
            log.warning("%s. Going on without the cache", self.mismatch)
        raise ModelMismatch(self.mismatch)

    # -- what is recomputed, and what that takes ------------------------------------------------------------

    @contextmanager
    def recompute(self) -> Iterator[None]:
        """Make the model compute without the cache inside the block, and count the seconds as audit time."""
        began, outer = time.perf_counter(), self.recomputing
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = outer
            self._counters.exact_audit_seconds += time.perf_counter() - began

    def saved(self, seconds: float) -> None:
        """Record model seconds that hits saved and that no counter includes."""
        self._saved_seconds += seconds

    def drawn(self, count: int, cost: Callable[[Rows], float], elapsed: float = 0.0) -> Rows:
        """Draw random hits to audit, as many as the time budget allows. Returns ascending indices in [0, count), int64.

        cost: returns the model's seconds for hits at these indices. elapsed: seconds of the current call so far.
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
        budget = min(self._config.exact_audit_time * saved, _SHARE_OF_CALLS * (spent + elapsed))
        affordable = int((budget - counters.exact_audit_seconds) / max(each, 1e-9))
        return chosen[: max(0, affordable)]


class Evidence:
    """Rows of one bank that this opening has verified with one model object.

    The first few hits on entries that this model object has not computed in this opening are audited, then a random
    share of all hits. The verified rows are forgotten when rows are renumbered, and after `ExactAudits.renew`.
    """

    def __init__(self, audits: ExactAudits, bank: Bank, name: str, first: int) -> None:
        """first: number of hits to audit before other hits are served without an audit."""
        self.bank, self.name = bank, name
        self._audits, self._first = audits, first
        self.epsilon = 0.0
        """Machine epsilon of what the entries were computed from, if it is coarser than the model's arithmetic."""
        self._reset()

    def _reset(self) -> None:
        self._open = self._first
        self._enough = False  # True if the next audits that agree are enough, however few
        self._epoch, self._renumberings = self._audits.epoch, self.bank.renumberings
        self._verified = np.zeros(0, np.bool_)  # by row number; not updated any more once `_open` is 0
        self._sampled: set[bytes] = set()

    @property
    def open(self) -> int:
        """Number of hits to audit before other hits are served without an audit."""
        if self._epoch != self._audits.epoch or self._renumberings != self.bank.renumberings:
            self._reset()
        return self._open

    def computed(self, keys: Keys) -> None:
        """Mark the entries of these keys as verified: the model object has just computed them. keys: uint64 [n, 2]."""
        if self.open:
            rows = self.bank.find(keys)
            self._mark(rows[rows >= 0])

    def agreed(self, rows: Rows) -> None:
        """Mark these rows as verified by an audit."""
        if self.open:
            self._open = 0 if self._enough else max(0, self._open - len(rows))
            self._mark(rows)

    def verified(self, rows: Rows) -> NDArray[np.bool_]:
        """Return a mask of the rows that were computed or audited with the model object; bool [n]."""
        mask = rows < len(self._verified)
        mask[mask] = self._verified[rows[mask]]
        return mask

    def chosen(
        self,
        rows: Rows,
        sizes: Callable[[], NDArray[np.int64]],
        elapsed: float = 0.0,
        most: int | None = None,
    ) -> Rows:
        """Choose the hits to audit. Returns indices into `rows`, int64.

        sizes: returns the length of each hit, int64 [n]. elapsed: seconds of the current call so far. most: total
            length of the first hits to audit, apart from one; fewer of them are then enough. None: no limit.
        """
        if not len(rows):
            return rows
        if self.open:
            places = self.spread(~self.verified(rows), sizes)
            if most is None or not len(places):
                return places
            lengths = sizes()[places]
            order = np.argsort(lengths, kind="stable")
            fitting = max(1, int((np.cumsum(lengths[order]) <= most).sum()))
            self._enough = fitting < len(places)
            return np.sort(places[order[:fitting]])
        return self._audits.drawn(len(rows), lambda places: self.bank.cost(rows[places]), elapsed)

    def chosen_among(self, groups: Sequence[Rows], sizes: Sequence[int]) -> list[int]:
        """Choose the hits to audit where each hit has several rows. Returns indices into `groups`.

        groups: rows of each hit. sizes: length of each hit.
        """
        if self.open:
            unverified = np.array([not self.verified(group).all() for group in groups], np.bool_)
            return self.spread(unverified, lambda: np.array(sizes, np.int64)).tolist()  # type: ignore[no-any-return]

        def cost(places: Rows) -> float:
            return sum(self.bank.cost(groups[place]) for place in places.tolist())

        return self._audits.drawn(len(groups), cost).tolist()  # type: ignore[no-any-return]

    def spread(self, unverified: NDArray[np.bool_], sizes: Callable[[], NDArray[np.int64]]) -> Rows:
        """Choose the first hits to audit, evenly from the longest to the shortest. Returns indices, int64."""
        places = np.flatnonzero(unverified)
        if not len(places) or not self.open:
            return places[:0]
        order = places[np.argsort(sizes()[places], kind="stable")]
        ranks = np.linspace(len(order) - 1, 0, min(self.open, len(order))).astype(np.int64)
        return np.sort(order[ranks])

    def sample(self, kind: bytes) -> Rows:
        """Choose rows to audit, once per kind of call. Returns up to 64 unverified rows, int64; none if enough are."""
        if not self.open or kind in self._sampled:
            return np.zeros(0, np.int64)
        self._sampled.add(kind)
        rows = self.bank.near.live()
        rows = rows[~self.verified(rows)]
        return rows[np.unique(np.linspace(0, len(rows) - 1, min(64, len(rows))).astype(np.int64))]

    def recompute(self) -> AbstractContextManager[None]:
        """Return the context in which entries are recomputed, see `ExactAudits.recompute`."""
        return self._audits.recompute()

    def conclude(self, rows: Rows, agreement: Agreement, beside: Rows | None = None) -> None:
        """Record the comparison of these rows, see `ExactAudits.conclude`. beside: further rows that it covers."""
        self._audits.conclude(self, rows, agreement)
        if beside is not None and self._open:
            self._mark(beside)

    def saved(self, rows: Rows) -> None:
        """Record hits on these rows, whose saved seconds no counter includes."""
        self._audits.saved(self.bank.cost(rows))

    def _mark(self, rows: Rows) -> None:
        if len(rows) and rows.max() >= len(self._verified):
            grown = np.zeros(2 * int(rows.max()) + 64, np.bool_)
            grown[: len(self._verified)] = self._verified
            self._verified = grown
        self._verified[rows] = True


def _nothing() -> None:
    """Do nothing: there are no uncommitted entries."""


def _describe_mismatch(evidence: Evidence, row: int, agreement: Agreement) -> str:
    source = evidence.bank.source(row)
    document = f" (document {source!r:.60})" if source else ""
    difference = agreement.reason or (
        f"they differ by {agreement.difference:.2g} of the largest number, and other batch shapes explain "
        f"{agreement.allowed:.2g}"
    )
    return (
        f"entry {evidence.bank.key(row)}{document} of the bank {evidence.name} is not what this model gives: "
        f"{difference}. Either this model or the one that stored the entry differs from its identity (a hook, a "
        "setting, code changed in place). Nothing more is reused or stored in this opening: "
        "check the model with `llmcache verify-model --model M --data FILE`, and open the store with a fresh namespace"
    )
