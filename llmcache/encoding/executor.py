"""The way of a call through the cache: what is known is read, the rest is computed in compacted batches and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.banks.device_cache import DeviceCache, levels_of
from llmcache.banks.lookup import exact_by_tokens, first_occurrences, near
from llmcache.banks.pace import Pace
from llmcache.banks.payoff import sample
from llmcache.banks.writer import BankWriter
from llmcache.config import CacheConfig
from llmcache.encoding.answers import EXACT, MISS, NEAR, Answers
from llmcache.encoding.device_answers import DeviceAnswers
from llmcache.encoding.hit_audits import AuditedHits, Window
from llmcache.encoding.near_layers import Asking, asked_with, near_layers
from llmcache.encoding.uncached import answer_by_model, at_limit, seconds_again
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import Marks
from llmcache.indexes.format.rows import Keys
from llmcache.model.async_batch import one_ahead
from llmcache.model.batching import Model, compute
from llmcache.model.description.process_settings import running_mode
from llmcache.model.digests import sha
from llmcache.model.features import features_on
from llmcache.model.keys import (
    Seed,
    key_seed,
    text_keys,
    token_keys,
)
from llmcache.model.tokens import TokenRows
from llmcache.near.marks import FieldDigests, scope_of
from llmcache.near.matcher import NearMatcher
from llmcache.near.neighbors.index_torch import place_of
from llmcache.near.neighbors.near_matches import TAKEN, NearMatches
from llmcache.near.repeats import NearAnswers

Places: TypeAlias = NDArray[np.int64]  # places of documents in a call, or indices into such

_WINDOW = 8192  # documents that are tokenised, looked up and length-sorted together
_AHEAD = ("cuda",)  # devices beside which the host tokenises
_BATCHES = 4  # in a window there
_PROBED = 16  # documents that are computed again to measure the model's pace, where nothing was computed yet


Progress: TypeAlias = Callable[[int, int], None]
"""Told of documents as they are answered: how many, and how many of them the model computed."""


def nothing(answered: int, computed: int) -> None:
    """The progress that nobody looks at."""


@dataclass(frozen=True, slots=True)
class EncodeCall:
    """What one call asks for. ids: of the documents, to say later where an entry came from, or None.

    tensor: whether the outputs are wanted on the model's device. wanted: whether somebody takes the outputs; a call
    that only fills the store saves nobody the model's time with what it finds there.
    """

    texts: Sequence[str]
    ids: Sequence[str] | None = None
    prompt: str | None = None
    role: str | None = None
    batch_size: int = 32
    progress: Progress = nothing
    tensor: bool = False
    wanted: bool = True


@dataclass(frozen=True, slots=True)
class Misses:
    """Documents that the model has to compute; everything has one row per document."""

    places: Places
    text_keys: Keys
    keys: Keys
    tokens: TokenRows
    features: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Audited:
    """Documents that near reuse was asked for: places, what it has for them, and which are computed after all."""

    places: Places
    near: NearMatches
    again: NDArray[np.bool_]


class Executor:
    """Answers calls from one bank and one model, and counts how."""

    def __init__(
        self,
        model: Model,
        digest: bytes,
        config: CacheConfig,
        storing: BankWriter,
        bank: Bank,
        secret: bytes,
        inside: Callable[[], AbstractContextManager[Any]],
        name: str = "output",
    ) -> None:
        """digest: of the model's identity; secret: of the namespace, b"" for none. Both go into every key.

        inside: the context that the model runs in. name: of the bank.
        """
        self._model, self._digest, self._secret = model, digest, secret
        self.config = config
        self._storing, self.bank, self._inside = storing, bank, inside
        self.embedding = model.token_embedding()
        self.counters = storing.counters
        self._worth = storing.worth(bank, name, partial(seconds_again, model, bank))
        self._exact_audits = storing.exact_audits
        self._hits = AuditedHits(model, bank, storing.exact_audits.evidence(bank, name, model.module, digest))
        self._near_reuse: NearMatcher | None = None
        self._pace = Pace(self._probe)
        self.near_answers = NearAnswers(config.near_repeats)
        self.fields = FieldDigests(secret, lambda: getattr(model, "limit", None))
        """Digests of what the guard compares, of the texts that are stored here and asked for."""
        self.levels: DeviceCache | None = None
        """Memory above the bank's files; None before it is wanted."""
        self._levels_for: torch.device | None = None

    @property
    def reuse(self) -> NearMatcher | None:
        """Calibrated near reuse, which looks up where the model is now; None where there is none, and `tau` decides."""
        if self._near_reuse is not None:
            self._near_reuse.place = place_of(self.config, self.embedding)
        return self._near_reuse

    @reuse.setter
    def reuse(self, reuse: NearMatcher | None) -> None:
        self._near_reuse = reuse
        if reuse is not None:
            reuse.pace = self._pace

    def answers(self, call: EncodeCall) -> Answers:
        """Outputs and provenance of the call's texts, as arrays: what `encode` and `run` are made of.

        A call that is interrupted counts the documents that were answered until then. ModelMismatch when an audit finds
        that stored results are not the model's; with `on_mismatch="bypass"` all documents are computed instead.
        """
        counters, answered, computed = self.counters, 0, 0

        def advance(more: int, by_model: int) -> None:
            nonlocal answered, computed
            answered, computed = answered + more, computed + by_model
            call.progress(more, by_model)

        told = replace(call, progress=advance)
        try:
            return self._exact_audits.answered(lambda: self._answers(told), lambda: self._uncached(told))
        except BaseException:
            counters.documents += answered
            counters.misses += computed
            raise

    def _answers(self, call: EncodeCall) -> Answers:
        before, began = self.counters.model_seconds, time.perf_counter()
        answers = self._empty(call)
        keys = text_keys(self._seed("text", call), call.texts).view(np.uint64)
        distinct, first = first_occurrences(keys)
        tried = distinct[self._tried(answers, keys[distinct])]
        rest = self._exact(answers, call, tried, self.bank.find_text(keys[tried]), began)
        self.counters.exact_text += len(tried) - len(rest)
        left = distinct[:0] if len(tried) == len(distinct) else np.setdiff1d(distinct, tried)
        call.progress(len(call.texts) - len(rest) - len(left), 0)
        answer_by_model(answers, call, left, self._model, self.counters)
        self.counters.left_alone += len(left)
        if len(rest):
            rest = rest[np.argsort([-len(call.texts[i]) for i in rest], kind="stable")]
            copies = np.bincount(first, minlength=len(first))
            for window, tokens in self._windows(call, rest):
                self._answer_unknown(answers, call, window, keys[window], tokens, copies[window])
        repeats = np.flatnonzero(first != np.arange(len(first)))
        answers.repeat(repeats, first[repeats])
        self._count(call, answers, len(repeats), time.perf_counter() - began - (self.counters.model_seconds - before))
        return answers

    def _uncached(self, call: EncodeCall) -> Answers:
        """Outputs of the model alone, for all texts of the call; each distinct text is computed once."""
        answers = Answers.empty(len(call.texts), self.bank.facts.width)
        distinct, first = first_occurrences(text_keys(self._seed("text", call), call.texts).view(np.uint64))
        answer_by_model(answers, call, distinct, self._model, self.counters)
        repeats = np.flatnonzero(first != np.arange(len(first)))
        answers.repeat(repeats, first[repeats])
        self.counters.bypassed += len(call.texts)
        self._count(call, answers, len(repeats), 0.0)
        return answers

    def _empty(self, call: EncodeCall) -> Answers:
        if not call.tensor:
            return Answers.empty(len(call.texts), self.bank.facts.width)
        embedding = self._model.token_embedding()
        if self._levels_for != embedding.device:
            self.levels, self._levels_for = levels_of(self.bank, embedding.device, self.config), embedding.device
        near_there = self.reuse is not None and self.reuse.place is not None
        if self.levels is None and not near_there:
            return Answers.empty(len(call.texts), self.bank.facts.width)
        return DeviceAnswers.on(embedding, self.bank.facts, self.levels, len(call.texts))

    def _seed(self, kind: str, call: EncodeCall) -> Seed:
        """Seed of all keys of a call: the one place where model, process mode, role, prompt and secret enter a key."""
        return key_seed(self.digest(), kind, call.role, call.prompt, self._secret)

    def digest(self) -> bytes:
        """32 bytes: of the model, and of the settings of the process that decide its results, such as autocast."""
        mode = running_mode(self.embedding.device.type)
        return sha(self._digest, mode.encode()) if mode else self._digest

    @property
    def model(self) -> Model:
        """What computes, for those who measure it (`llmcache.planning.forecast`)."""
        return self._model

    def seed(self, kind: str, call: EncodeCall) -> Seed:
        """What the keys of this call's "text" or "tokens" begin with."""
        return self._seed(kind, call)

    def scope(self, call: EncodeCall) -> int:
        """Near scope of a call, uint64: only entries stored with the same scope can answer its near matches.

        It comes from the same bytes as the keys, so whatever decides which entries match exactly decides this too.
        """
        return scope_of(self._seed("scope", call))

    def marks(self, call: EncodeCall, places: Places) -> Marks | None:
        """Marks of the entries that are made of these documents; None where nothing is stored, or found by likeness."""
        if not self._storing.store.writable or not self.bank.facts.feature_width:
            return None
        return self.fields.marks(self.scope(call), [call.texts[i] for i in places.tolist()])

    def keys_of(self, text: str, prompt: str | None, role: str | None) -> tuple[Keys, Keys, TokenRows]:
        """Of one text: its text key and its token key, uint64 [1, 2], and its tokens."""
        call = EncodeCall([text], None, prompt, role)
        tokens = self._model.tokenise([text], prompt, role)
        by_text = text_keys(self._seed("text", call), [text]).view(np.uint64)
        return by_text, token_keys(self._seed("tokens", call), tokens.key_bytes()).view(np.uint64), tokens

    def rows(self, texts: Sequence[str], call: EncodeCall) -> Places:
        """Rows of texts that the bank holds for the role and prompt of a call, -1 elsewhere; int64 [n]."""
        tokens = self._model.tokenise(texts, call.prompt, call.role)
        seed = self._seed("tokens", call)
        return exact_by_tokens(self.bank, token_keys(seed, tokens.key_bytes()).view(np.uint64), tokens.ids)

    def _tried(self, answers: Answers, keys: Keys) -> Places:
        """Which of these documents to look up, int64, in order: all, unless it does not pay."""
        levels = _levels(answers)
        some = self._worth.select_for_lookup(len(keys), memory=levels is not None)
        if len(some) == len(keys) or levels is None:
            return some
        return self._worth.with_memory(some, levels, lambda: self.bank.find_text(keys))

    def _exact(
        self, answers: Answers, call: EncodeCall, places: Places, rows: Places, window: Window | float
    ) -> Places:
        """Serve the places that have a row; returns those that have none, or one that could not be read, in order.

        A few of them are audited: ModelMismatch. window: see `AuditedHits.audit`.
        """
        found = rows >= 0
        with self._worth.loading(rows[found], _levels(answers)):
            lost = answers.serve(places[found], rows[found], self.bank, EXACT)
        served = places[found] if not len(lost) else np.delete(places[found], lost)
        self._hits.audit(answers, served, call, window)
        return places[~found | np.isin(places, places[found][lost])] if len(lost) else places[~found]

    def _probe(self) -> tuple[int, float]:
        """Tokens of a few documents of the bank, and seconds the model takes to compute them again."""
        rows = sample(self.bank)[:_PROBED]
        tokens = sum(len(ids) for ids in self.bank.tokens_of(rows))
        return tokens, seconds_again(self._model, self.bank, rows)

    def _windows(self, call: EncodeCall, places: Places) -> Iterator[tuple[Places, TokenRows]]:
        """Documents that are tokenised, looked up and length-sorted together.

        On a GPU they are fewer, and the next are tokenised while it computes; not where near reuse is calibrated, which
        needs the tokenizer too, and no tokenizer is for two threads.
        """
        ahead = self._model.token_embedding().device.type in _AHEAD and self.reuse is None
        size = min(_WINDOW, _BATCHES * call.batch_size) if ahead else _WINDOW
        parts = [places[start : start + size] for start in range(0, len(places), size)]

        def tokenised(part: Places) -> TokenRows:
            return self._model.tokenise([call.texts[i] for i in part], call.prompt, call.role)

        return zip(parts, one_ahead(tokenised, parts) if ahead else map(tokenised, parts), strict=True)

    def _answer_unknown(
        self, answers: Answers, call: EncodeCall, places: Places, text_keys: Keys, tokens: TokenRows, copies: Places
    ) -> None:
        """Answer documents whose text is not known: by their tokens, by a near match, or by the model.

        copies: int64 [n], how often the call has each text.
        """
        self.counters.at_limit += at_limit(self._model, tokens)
        keys = token_keys(self._seed("tokens", call), tokens.key_bytes()).view(np.uint64)
        distinct, first = first_occurrences(keys)
        rows = exact_by_tokens(self.bank, keys[distinct], [tokens.ids[i] for i in distinct])
        todo = distinct[np.isin(places[distinct], self._exact(answers, call, places[distinct], rows, (places, tokens)))]
        if len(todo):  # before anything that is near is given, and before anything is stored beside what is there
            self._hits.audit_sample(tokens, self._seed("tokens", call), call.role)
        self.counters.exact_tokens += len(distinct) - len(todo)
        call.progress(len(places) - len(todo), 0)
        drawn = features_on(self.embedding, [tokens.ids[i] for i in todo], self.config.fingerprint)
        raw = drawn.cpu().numpy()
        audited: _Audited | None = None
        reuse = self.reuse
        if len(todo) and reuse is not None:
            if reuse.scope == self.scope(call):
                asked = raw if reuse.place is None else drawn
                texts = [call.texts[i] for i in places[todo].tolist()]
                same = np.bincount(first, copies, minlength=len(first)).astype(np.int64)
                ids = [tokens.ids[i] for i in todo]
                open_, audited = self._reuse(answers, places[todo], keys[todo], same[todo], ids, asked, texts)
                call.progress(len(todo) - len(open_), 0)
                todo, raw = todo[open_], raw[open_]
            else:
                reuse.foreign += len(todo)
        elif len(todo) and self.config.reuse != "exact" and (self.config.tau is not None or self.config.layer_tau):
            if self.config.reuse == "layer":
                with self._inside() as attachment, asked_with(attachment, call):
                    asking = Asking(call, places[todo], tokens.take(todo.tolist()), raw)
                    open_ = near_layers(attachment, self._model, self.config, self.counters, answers, asking)
            else:
                asked = drawn if self.bank.near.takes_tensors else raw
                open_ = self._near(answers, places[todo], asked, self.scope(call))
            call.progress(len(todo) - len(open_), 0)
            todo, raw = todo[open_], raw[open_]
        unknown = Misses(places[todo], text_keys[todo], keys[todo], tokens.take(todo.tolist()), raw)
        self._compute(answers, call, unknown)
        if audited is not None:
            self._audit(answers, len(places), audited)
        repeats = np.flatnonzero(first != np.arange(len(first)))
        answers.repeat(places[repeats], places[first[repeats]])
        others = np.setdiff1d(np.arange(len(places)), todo)
        self._storing.alias(self.bank, text_keys[others], keys[others])

    def _near(self, answers: Answers, places: Places, raw: NDArray[np.float32] | torch.Tensor, scope: int) -> Places:
        """Serve near matches from entries of this scope; returns the indices into `places` that stay open."""
        if self.config.tau is None:
            return np.arange(len(places))
        rows, similarity = near(self.bank, raw, self.config.tau, scope)
        self._storing.history.similar(similarity, rows >= 0)
        found = np.flatnonzero(rows >= 0)
        lost = answers.serve(places[found], rows[found], self.bank, NEAR)
        answers.similarity[places[found]] = similarity[found]
        answers.similarity[places[found[lost]]] = np.nan
        return np.flatnonzero((rows < 0) | np.isin(np.arange(len(rows)), found[lost]))

    def _reuse(
        self,
        answers: Answers,
        places: Places,
        keys: Keys,
        copies: Places,
        tokens: Sequence[NDArray[np.int32]],
        raw: NDArray[np.float32] | torch.Tensor,
        texts: Sequence[str],
    ) -> tuple[Places, _Audited | None]:
        """Serve what calibrated reuse lets through, but for a share; the indices into `places` that stay open.

        keys: of the documents. copies: requests of this call that each of them answers.
        """
        reuse = self.reuse
        assert reuse is not None
        tried = reuse.select_for_lookup(len(places))
        tried = tried[self.near_answers.allowed(keys[tried], copies[tried])]
        if not len(tried):
            return np.arange(len(places)), None
        reuse.refresh()  # its time is that of opening, not of a look-up
        began = time.perf_counter()
        chosen = tried.tolist()
        near = reuse.look_up(raw[tried], [tokens[i] for i in chosen], [texts[i] for i in chosen])
        self._storing.history.similar(near.closest, near.gate == TAKEN)
        reuse.watch(near.closest)
        again = reuse.chosen_for_audit(near)
        served = (near.gate == TAKEN) & ~again
        where = places[tried[served]]
        if isinstance(answers, DeviceAnswers) and isinstance(given := near.given(served), torch.Tensor):
            answers.set_device_outputs(where, given)
        else:
            answers.outputs[where] = near.on_host(served)
        answers.tier[where], answers.row[where] = NEAR, near.rows[served]
        answers.similarity[where], answers.consensus[where] = near.similarity[served], near.consensus[served]
        self.bank.used(near.rows[served])
        self.near_answers.add(keys[tried[served]], copies[tried[served]])
        lengths = np.array([len(tokens[i]) for i in tried.tolist()])
        seconds = time.perf_counter() - began
        counters = self.counters
        counters.near_asked += len(tried)
        counters.near_seconds += seconds
        saved, audits = reuse.paid(len(tried), int(lengths[served].sum()), seconds, int(lengths[again].sum()))
        counters.near_saved_seconds += saved
        counters.audit_seconds += audits
        return np.setdiff1d(np.arange(len(places)), tried[served]), _Audited(places[tried], near, again)

    def _audit(self, answers: Answers, asked: int, audited: _Audited) -> None:
        """Compare what was computed for the audited documents with what they would have been given."""
        assert self.reuse is not None
        places = audited.places[audited.again]
        drift = self.reuse.audit(asked, audited.near, audited.again, answers.outputs[places])
        answers.audited[places] = True
        self.counters.audits += len(drift)
        self.counters.audited_drift += float(drift.sum())

    def _compute(self, answers: Answers, call: EncodeCall, unknown: Misses) -> None:
        tokens, lengths = unknown.tokens, unknown.tokens.lengths.astype(np.float32)
        with self._inside() as attachment, asked_with(attachment, call):
            for done in compute(self._model, tokens, call.batch_size, call.role, ahead=attachment is None):
                chosen, where = done.chosen, unknown.places[done.chosen]
                answers.set_device_outputs(where, done.vectors)
                passed = None if attachment is None else attachment.last_pass()
                if passed is None:
                    answers.outputs[where] = done.outputs
                    self.counters.model_seconds += done.seconds
                    self._pace.observe(len(chosen), int(lengths[chosen].sum()), done.seconds)
                else:  # the attachment counts the seconds itself
                    answers.computed(where, done.outputs, *passed)
                try:
                    self._storing.put(
                        self.bank,
                        unknown.keys[chosen],
                        done.outputs,
                        unknown.text_keys[chosen],
                        tokens=[tokens.ids[i] for i in chosen],
                        sources=[call.ids[i] if call.ids else "" for i in where],
                        features=unknown.features[chosen],
                        cost=lengths[chosen] * np.float32(done.seconds / max(1.0, lengths[chosen].sum())),
                        marks=self.marks(call, where),
                    )
                    self._hits.computed(unknown.keys[chosen])
                finally:  # Ctrl-C while they are stored: they were computed, and count
                    call.progress(len(chosen), len(chosen))

    def _count(self, call: EncodeCall, answers: Answers, repeats: int, seconds: float) -> None:
        counters = self.counters
        counters.documents += len(answers.tier)
        counters.repeats += repeats
        counters.near += int(np.count_nonzero(answers.tier == NEAR))
        counters.misses += int(np.count_nonzero(answers.tier == MISS))
        counters.damaged = self.bank.damaged
        counters.overhead_seconds += seconds
        if not call.wanted:
            return
        counters.saved_seconds += self.bank.cost(answers.row[answers.row >= 0])
        of_computed = int(np.count_nonzero((answers.duplicate_of >= 0) & (answers.row < 0)))
        if counters.misses:
            counters.saved_seconds += of_computed * counters.model_seconds / counters.misses


def _levels(answers: Answers) -> DeviceCache | None:
    """The memory above the files that a call's hits come from, where there is any."""
    return answers.levels if isinstance(answers, DeviceAnswers) else None
