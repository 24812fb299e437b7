"""Execute an encode call: exact lookup, near match, compute the misses, store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from llmcache.banks.device_cache import levels_of
from llmcache.banks.lookup import first_occurrences
from llmcache.banks.pace import Pace
from llmcache.banks.reader import BankReader
from llmcache.banks.writer import BankWriter
from llmcache.config import CacheConfig
from llmcache.document import Text, as_text, characters
from llmcache.encoding.answers import EXACT, MISS, NEAR, Answers
from llmcache.encoding.call import EncodeCall, Misses, OpenDocuments, Places
from llmcache.encoding.compute import Compute, ComputedMisses, LocalCompute
from llmcache.encoding.device_answers import DeviceAnswers
from llmcache.encoding.hit_audits import AuditedHits, Window
from llmcache.encoding.near_tier import NearTier
from llmcache.encoding.uncached import answer_by_model, at_limit, seconds_again, tokens_and_seconds_again
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.marks import Marks
from llmcache.indexes.format.rows import Keys
from llmcache.model.async_batch import one_ahead
from llmcache.model.batching import Model
from llmcache.model.description.process_settings import running_mode
from llmcache.model.digests import sha
from llmcache.model.features import features_on
from llmcache.model.keys import Seed, key_seed, token_keys
from llmcache.model.tokens import TokenRows
from llmcache.near.marks import FieldDigests, scope_of
from llmcache.near.matcher import NearMatcher

_WINDOW = 8192  # documents that are tokenised, looked up and sorted by length together
_AHEAD = ("cuda",)  # device types for which the host tokenises the next window while the device computes
_BATCHES = 4  # batches in a window on these devices


class Executor:
    """Executor of encode calls on one bank and one model; it counts hits, misses and seconds."""

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
        backend: Compute | None = None,
    ) -> None:
        """digest: of the model's identity. secret: of the namespace, b"" for none. Both enter every key.

        inside: context that the model runs in. name: of the bank. backend: computes the misses; None: this model does.
        """
        self._backend = LocalCompute(model, inside) if backend is None else backend
        self._model, self._digest, self._secret = model, digest, secret
        self.config = config
        self._storing, self.bank = storing, bank
        self.embedding = model.token_embedding()
        self.counters = storing.counters
        self.reader = BankReader(bank, storing.worth(bank, name, partial(seconds_again, model, bank)))
        """Reader of the bank; it has a device cache from the first call for a tensor on, where the settings ask."""
        self._exact_audits = storing.exact_audits
        self._hits = AuditedHits(model, bank, storing.exact_audits.evidence(bank, name, model.module, digest))
        self._pace = Pace(partial(tokens_and_seconds_again, model, bank))
        self.near_tier = NearTier(model, config, storing, self.reader, inside, self._pace)
        self.fields = FieldDigests(secret, lambda: getattr(model, "limit", None))
        """Digests of the fields that the guard compares, of stored and of requested texts."""
        self._levels_for: torch.device | None = None

    @property
    def reuse(self) -> NearMatcher | None:
        """Calibrated near matcher, set to search on the model's device; None where nothing is calibrated."""
        return self.near_tier.matcher

    @reuse.setter
    def reuse(self, reuse: NearMatcher | None) -> None:
        self.near_tier.matcher = reuse

    def answers(self, call: EncodeCall) -> Answers:
        """Return outputs and provenance of the call's texts, as arrays.

        An interrupted call counts the documents that were answered until then. ModelMismatch when an audit finds that
        stored outputs are not those of the model; with `on_mismatch="bypass"` all documents are computed instead.
        ConfigError when the backend does not compute under the settings of this process.
        """
        self._backend.check(self.embedding.device)
        self._storing.release()
        counters, answered, computed = self.counters, 0, 0

        def advance(more: int, by_model: int) -> None:
            nonlocal answered, computed
            answered, computed = answered + more, computed + by_model
            call.progress(more, by_model)

        counted = replace(call, progress=advance)
        try:
            return self._exact_audits.answered(lambda: self._answers(counted), lambda: self._uncached(counted))
        except BaseException:
            counters.documents += answered
            counters.misses += computed
            raise

    def _answers(self, call: EncodeCall) -> Answers:
        """Answer a call through the cache: distinct texts first, then their repeats."""
        before, began = self.counters.model_seconds, time.perf_counter()
        answers = self._empty(call)
        keys = self._model.keys(self.seed("text", call), call.texts)
        distinct, first = first_occurrences(keys)
        tried = distinct[self._tried(call, keys[distinct])]
        rest = self._exact(answers, call, tried, self.bank.find_text(keys[tried]), began)
        self.counters.exact_text += len(tried) - len(rest)
        skipped = distinct[:0] if len(tried) == len(distinct) else np.setdiff1d(distinct, tried)
        call.progress(len(call.texts) - len(rest) - len(skipped), 0)
        answer_by_model(answers, call, skipped, self._model, self.counters)
        self.counters.left_alone += len(skipped)
        if len(rest):
            rest = rest[np.argsort([-characters(call.texts[i]) for i in rest], kind="stable")]
            copies = np.bincount(first, minlength=len(first))
            for window, tokens in self._windows(call, rest):
                self._answer_new_texts(answers, call, window, keys[window], tokens, copies[window])
        repeats = np.flatnonzero(first != np.arange(len(first)))
        answers.repeat(repeats, first[repeats])
        self._count(call, answers, len(repeats), time.perf_counter() - began - (self.counters.model_seconds - before))
        return answers

    def _uncached(self, call: EncodeCall) -> Answers:
        """Answer all texts of the call by the model alone; each distinct text is computed once."""
        answers = Answers.empty(len(call.texts), self.bank.facts)
        distinct, first = first_occurrences(self._model.keys(self.seed("text", call), call.texts))
        answer_by_model(answers, call, distinct, self._model, self.counters)
        repeats = np.flatnonzero(first != np.arange(len(first)))
        answers.repeat(repeats, first[repeats])
        self.counters.bypassed += len(call.texts)
        self._count(call, answers, len(repeats), 0.0)
        return answers

    def _empty(self, call: EncodeCall) -> Answers:
        """Return empty answers, on the device if the call wants a tensor and there is a device cache or index."""
        if not call.tensor:
            return Answers.empty(len(call.texts), self.bank.facts)
        embedding = self._model.token_embedding()
        if self._levels_for != embedding.device:
            self.reader.levels = levels_of(self.bank, embedding.device, self.config)
            self._levels_for = embedding.device
        near_on_device = self.reuse is not None and self.reuse.place is not None
        if self.reader.levels is None and not near_on_device:
            return Answers.empty(len(call.texts), self.bank.facts)
        return DeviceAnswers.on(embedding, self.bank.facts, len(call.texts))

    def digest(self) -> bytes:
        """Return 32 bytes that identify the model and the process settings that change outputs, such as autocast."""
        mode = running_mode(self.embedding.device.type)
        return sha(self._digest, mode.encode()) if mode else self._digest

    @property
    def model(self) -> Model:
        """The model that computes misses."""
        return self._model

    def seed(self, kind: str, call: EncodeCall) -> Seed:
        """Return the hash seed of this call's keys. Model, process mode, role, prompt and secret enter keys only here.

        kind: "text", "tokens", or "scope" for `scope`.
        """
        return key_seed(self.digest(), kind, call.role, call.prompt, self._secret)

    def scope(self, call: EncodeCall) -> int:
        """Return the near scope of a call, uint64: only entries stored with the same scope can be its near matches.

        The scope is hashed from the same seed as the keys, so near matches are restricted just as exact ones are.
        """
        return scope_of(self.seed("scope", call))

    def _token_keys(self, call: EncodeCall, tokens: TokenRows) -> Keys:
        """Return the keys of tokenised documents of a call, uint64 [n, 2]."""
        return token_keys(self.seed("tokens", call), tokens.key_bytes()).view(np.uint64)

    def marks(self, call: EncodeCall, places: Places) -> Marks | None:
        """Return the guard marks to store with these documents; None if nothing is stored, or without features."""
        if not self._storing.store.writable or not self.bank.facts.feature_width:
            return None
        return self.fields.marks(self.scope(call), [as_text(call.texts[i]) for i in places.tolist()])

    def keys_of(self, text: Text, prompt: str | None, role: str | None) -> tuple[Keys, Keys, TokenRows]:
        """Return the text key and the token key of one text, each uint64 [1, 2], and its tokens."""
        call = EncodeCall([text], None, prompt, role)
        tokens = self._model.tokenise([text], prompt, role)
        by_text = self._model.keys(self.seed("text", call), [text])
        return by_text, self._token_keys(call, tokens), tokens

    def rows(self, texts: Sequence[Text], call: EncodeCall) -> Places:
        """Return the bank rows of texts under the role and prompt of a call, int64 [n]; -1 for a text not stored."""
        tokens = self._model.tokenise(texts, call.prompt, call.role)
        return self.reader.lookup(self._token_keys(call, tokens), tokens.ids)

    def served(self, call: EncodeCall, rows: Places, tokens: TokenRows) -> Answers:
        """Return the stored outputs of a call's texts, audited as hits; a row that cannot be read stays a miss.

        rows: int64 [n], all >= 0. tokens: of the texts.
        """
        answers, places = self._empty(call), np.arange(len(rows))
        self._exact(answers, call, places, rows, (places, tokens))
        return answers

    def _tried(self, call: EncodeCall, keys: Keys) -> Places:
        """Return the texts to look up, indices into their keys, int64, in order."""
        selected, in_memory = self.reader.select(len(keys), keys if call.tensor else None, texts=True)
        return np.union1d(selected, in_memory) if len(in_memory) else selected

    def _exact(
        self, answers: Answers, call: EncodeCall, places: Places, rows: Places, window: Window | float
    ) -> Places:
        """Serve the places that have a row, and audit a few of these hits. window: see `AuditedHits.audit`.

        Returns the places without a readable row, in order. ModelMismatch when an audit fails.
        """
        hit = np.flatnonzero(rows >= 0)
        values, intact = self.reader.load(rows[hit], on_device=call.tensor)
        answers.serve(places[hit], rows[hit], values, intact, EXACT)
        self._hits.audit(answers, places[hit[intact]], call, window)
        return np.delete(places, hit[intact])

    def _windows(self, call: EncodeCall, places: Places) -> Iterator[tuple[Places, TokenRows]]:
        """Split a call into windows: documents that are tokenised, looked up and sorted by length together.

        On a GPU windows are smaller, and a thread tokenises the next one while the GPU computes. Not so with calibrated
        near reuse, which uses the tokenizer too, and a tokenizer is not safe in two threads.
        """
        ahead = self._model.token_embedding().device.type in _AHEAD and self.reuse is None
        size = min(_WINDOW, _BATCHES * call.batch_size) if ahead else _WINDOW
        parts = [places[start : start + size] for start in range(0, len(places), size)]

        def tokenised(part: Places) -> TokenRows:
            return self._model.tokenise([call.texts[i] for i in part], call.prompt, call.role)

        return zip(parts, one_ahead(tokenised, parts) if ahead else map(tokenised, parts), strict=True)

    def _answer_new_texts(
        self, answers: Answers, call: EncodeCall, places: Places, text_keys: Keys, tokens: TokenRows, copies: Places
    ) -> None:
        """Answer documents whose text is not stored: by their token ids, by a near match, or by the model.

        copies: int64 [n], number of times that the call has each text.
        """
        self.counters.at_limit += at_limit(self._model, tokens)
        keys = self._token_keys(call, tokens)
        distinct, first = first_occurrences(keys)
        rows = self.reader.lookup(keys[distinct], [tokens.ids[i] for i in distinct])
        todo = distinct[np.isin(places[distinct], self._exact(answers, call, places[distinct], rows, (places, tokens)))]
        if len(todo):  # a changed model must neither serve near matches nor store new entries
            self._hits.audit_sample(tokens, self.seed("tokens", call), call.role)
        self.counters.exact_tokens += len(distinct) - len(todo)
        call.progress(len(places) - len(todo), 0)
        drawn = features_on(self.embedding, [tokens.ids[i] for i in todo], self.config.fingerprint)
        raw = drawn.cpu().numpy()
        requests = np.bincount(first, copies, minlength=len(first)).astype(np.int64)[todo]
        documents = OpenDocuments(places[todo], keys[todo], requests, tokens, todo, drawn, raw, self.scope(call))
        open_, looked_up = self.near_tier.answer(answers, call, documents)
        if len(open_) < len(todo):
            todo, raw = todo[open_], raw[open_]
        sources = [call.ids[i] if call.ids else "" for i in places[todo]]
        marks = self.marks(call, places[todo]) if self._backend.stores else None
        misses = Misses(places[todo], text_keys[todo], keys[todo], tokens.take(todo.tolist()), sources, raw, marks)
        self._compute(answers, call, misses)
        if looked_up is not None:
            self.near_tier.audit(answers, len(places), looked_up)
        repeats = np.flatnonzero(first != np.arange(len(first)))
        answers.repeat(places[repeats], places[first[repeats]])
        others = np.setdiff1d(np.arange(len(places)), todo)
        self._storing.alias(self.bank, text_keys[others], keys[others])

    def _compute(self, answers: Answers, call: EncodeCall, misses: Misses) -> None:
        """Compute the misses, fill in their outputs, and store them."""
        lengths = misses.tokens.lengths
        # closed here, since the generator of an interrupted call would leave the model attached
        with closing(self._backend.batches(misses, call)) as batches:
            for done in batches:
                chosen, where = done.chosen, misses.places[done.chosen]
                if done.vectors is not None:
                    answers.set_device_outputs(where, done.vectors)
                if done.layers is not None:
                    answers.computed(where, done.outputs, *done.layers)
                else:
                    answers.outputs[where] = done.outputs
                    self.counters.model_seconds += done.seconds
                    if done.stored is None:
                        self._pace.observe(len(chosen), int(lengths[chosen].sum()), done.seconds)
                try:
                    self._store(call, misses, done)
                finally:  # after Ctrl-C during `put` the documents count as computed
                    call.progress(len(chosen), len(chosen))

    def _store(self, call: EncodeCall, misses: Misses, done: ComputedMisses) -> None:
        """Store computed misses, unless the backend has stored them, or could not."""
        chosen = done.chosen
        if not done.lossless:
            return
        keys, text_keys, entry = misses.keys[chosen], misses.text_keys[chosen], misses.entry(chosen)
        if done.stored is None:
            entry["marks"] = self.marks(call, misses.places[chosen])
            self._storing.put(self.bank, keys, done.outputs, text_keys, cost=done.cost, **entry)
            self._hits.computed(keys)
        elif done.stored:
            self._storing.remember(self.bank, keys, done.outputs, text_keys, cost=done.cost, **entry)
        else:
            self.counters.not_stored += len(chosen)

    def _count(self, call: EncodeCall, answers: Answers, repeats: int, seconds: float) -> None:
        """Add a finished call to the counters. seconds: of the call without those of the model."""
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
