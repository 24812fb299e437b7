"""LLMCache: the one object a user holds."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch.nn import Module
from tqdm.auto import tqdm

from llmcache import opening
from llmcache.banks.audits import ExactAudits
from llmcache.banks.counters import Counters
from llmcache.banks.device_cache import DeviceCache
from llmcache.banks.namespaces import admit, checked_name, resolved_secret
from llmcache.banks.writer import BankWriter
from llmcache.concurrency import at_exit as leaving
from llmcache.concurrency.calls import Calls, WorkerCommits, call
from llmcache.concurrency.reopening import Opening, reopened
from llmcache.config import CacheConfig
from llmcache.decoders import generation as decoding
from llmcache.decoders.generation import Generated, Scores
from llmcache.encoding.answers import Answers
from llmcache.encoding.calibrations import Calibrations
from llmcache.encoding.device_answers import DeviceAnswers
from llmcache.encoding.executor import (
    EncodeCall,
    Executor,
    Progress,
    nothing,
)
from llmcache.encoding.explain import Explanation, explain
from llmcache.encoding.heads import Heads
from llmcache.encoding.postprocess import finished
from llmcache.encoding.results import Result, Source, results
from llmcache.errors import ConfigError, FaissMissing, ForkedStoreError, LLMCacheError
from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.signatures import secret_from_file
from llmcache.indexes.commits.trust import Trust
from llmcache.indexes.store import Store
from llmcache.layers.attachment import Attachment
from llmcache.layers.registry import Layers
from llmcache.model.batching import Sentences
from llmcache.model.description.watch import ModelWatch
from llmcache.model.digests import canonical, sha
from llmcache.model.identity import Identity, mismatch
from llmcache.model.locks import lock_of
from llmcache.model.private_tokenizer import PrivateCopy, private_copy
from llmcache.model.prompts import ROLES, resolve
from llmcache.near.calibration.calibrate import Calibration
from llmcache.near.calibration.drift import Drift, DriftKind
from llmcache.near.guard.fields import KINDS
from llmcache.planning.forecast import planned
from llmcache.planning.plan import ForecastError, Plan
from llmcache.planning.preview import TierCounts
from llmcache.records import is_table
from llmcache.report.statistics import Statistics, statistics

log = logging.getLogger("llmcache")

LAYER = "output"
CHUNK = 8192  # documents that `run` reads, answers and gives out together


class LLMCache:
    """A model with a store behind it: repeats cost a look-up, the rest is computed once and kept.

    Threads may share it, and caches may share a model: calls of one model wait for each other. In a child of a fork
    the first call opens the store again; a pickle is how the cache was opened, and opens the store where it is loaded.
    """

    def __init__(
        self,
        store: Store,
        model: Module,
        identity: Identity,
        config: CacheConfig,
        namespace: str,
        secret: bytes = b"",
        drift: Drift | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Takes finished parts; `LLMCache.open` makes them."""
        self.model = model
        self.tokenizer: Any = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        self.identity = identity
        self.config = config
        self.namespace = namespace
        self._salt, self._drift = secret, drift
        self._opening: Opening | None = None
        self._worker_commits = WorkerCommits()
        self._calls = Calls(lock_of(model), self._reopen, lambda: self._worker_commits.commit(self._storing))
        self._tokenizer_copy = PrivateCopy()
        self._watch, self._current = ModelWatch(model, self.tokenizer, name=identity.name), identity
        self._begin(store)

    def _begin(self, store: Store) -> None:
        """Take over a store that was opened in this process."""
        model, identity, config, namespace = self.model, self.identity, self.config, self.namespace
        secret = self._salt
        self._store = store
        store.budget = config.budget
        self._counters = Counters()
        self._exact_audits = ExactAudits(config, self._counters)
        self._storing = BankWriter(store, config, self._counters, self._exact_audits)
        self._storing.lock = self._calls.lock
        self._storing.history.namespace, self._storing.history.model = namespace, identity.name
        self._watch.witness = self._storing
        self._layers = Layers(config, namespace, self._storing, secret, self._calls.lock, lambda: self.is_open)
        self._calibrations = Calibrations(store, namespace, config, self._drift, self._storing.commit)
        self._encoding: Executor | None = None
        if isinstance(model, SentenceTransformer):
            bank = store.bank(namespace, LAYER, lambda: opening.fresh_bank(model, config), config.near)
            if store.trust != "own":
                opening.check_width(bank.facts, opening.fresh_bank(model, config))
            inside = nullcontext if config.layers == "output" else self.attached
            self._encoding = Executor(Sentences(model), identity.digest, config, self._storing, bank, secret, inside)
            self._calibrations.follow(LAYER, self._encoding)
        self._opened = True
        leaving.opened(self)
        self._last: Statistics | None = None
        self._planned_at: dict[str, float] = {}
        self._reasons: set[str] = set()  # why calls of `encode` went past the cache, as far as it was said

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: Module | str | os.PathLike[str] | None = None,
        *,
        tokenizer: Any = None,
        config: CacheConfig | None = None,
        namespace: str = "default",
        tau: float | None = None,
        drift: Drift | None = None,
        max_bytes: int | None = None,
        secret: bytes | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        trust: Trust = "auto",
        key: bytes | None = None,
        key_file: str | os.PathLike[str] | None = None,
        min_generation: int = 0,
        allow_untrusted: bool = False,
        read_only: bool = False,
    ) -> Self:
        """Open the store in this folder, or make one, for this model.

        model: a SentenceTransformer, or the name or path of one; None loads the one the store was made with. Any other
            transformers model, or a module with a list of layers, is used through `attached`, `generate` and `score`.
        tokenizer: of a transformers model, for `generate` and `score`; a SentenceTransformer has its own.
        config: for a new namespace, its settings. For an old one they are saved with it; what is given here holds for
            this opening, except `fingerprint` and `dtype`, which cannot change.
        namespace: entries of different models live in different namespaces of one store.
        tau, max_bytes: for this opening, instead of those in the settings.
        drift: the function that near reuse was calibrated by, where it was one of your own.
        secret, secret_file: what goes into the keys of this namespace, at least 32 bytes, or the file that holds it.
            Whoever has another one, or none, is refused.
        trust, key, key_file, min_generation, allow_untrusted: who vouches for the store, see `Store.open`. What nobody
            vouches for is only read, with the model given, and only equal token ids match.
        read_only: write nothing below the folder: what is known is served, the rest is computed and not kept. So it is,
            with a warning, where the folder cannot be written.
        ModelMismatch when the namespace belongs to another model; ConfigError for settings that cannot be had;
        UntrustedSnapshot when nobody vouches for the store.
        """
        if config is not None or not os.path.exists(path):  # else the settings are those saved with the store
            _check_faiss(config or CacheConfig())
        checked_name(namespace)
        salt = resolved_secret(secret, secret_file)
        if key is None and key_file is not None:
            key = secret_from_file(key_file, "the key that signs a store")
        # first: a model that cannot be had leaves no store behind
        given = None if model is None else opening.loaded(model, tokenizer)
        store = Store.open(
            path,
            create=given is not None and not allow_untrusted and not read_only,
            trust=trust,
            key=key,
            min_generation=min_generation,
            allow_untrusted=allow_untrusted,
            read_only=read_only,
        )
        try:
            if store.writable and not store.folder.writable():
                log.warning("%s cannot be written: what is computed is not kept", store.folder.path)
                store.only_read("its folder cannot be written")
            space = store.namespace(namespace)
            if space is not None:  # before a model is loaded
                admit(space, namespace, salt)
            loaded, identity = given or opening.loaded(opening.model_name(store, namespace))
            settled = opening.settled(store, namespace, identity, config, loaded, salt)
            _check_faiss(settled)
            if tau is not None:
                settled = replace(settled, tau=tau)
            if max_bytes is not None:
                settled = replace(settled, max_bytes=max_bytes)
            if store.trust == "untrusted" and settled.tau is not None:
                log.warning("%s is not trusted: near matches are off", store.folder.path)
                settled = replace(settled, tau=None)
            store.folder.reading = settled.reading
            opened = cls(store, loaded, identity, settled, namespace, salt, drift, tokenizer)
            opened._opening = Opening(
                path=os.path.abspath(path),
                model=loaded if isinstance(model, Module) else identity.name if model is None else os.fspath(model),
                tokenizer=tokenizer,
                config=settled,
                namespace=namespace,
                drift=drift,
                secret_file=None if secret_file is None else os.path.abspath(secret_file),
                trust=trust,
                key=key,
                key_file=None if key_file is None else os.path.abspath(key_file),
                min_generation=min_generation,
                allow_untrusted=allow_untrusted,
                secret_in_memory="secret" if secret is not None else "key" if key and key_file is None else "",
            )
            return opened
        except BaseException:
            store.close()
            raise

    # -- other processes ------------------------------------------------------------------------------------

    def _reopen(self) -> None:
        """Open the store again, in a child of the process that opened it; what waits there is for that to commit."""
        if self._opening is None:
            raise ForkedStoreError("this cache was opened by the process that forked this one; open it in the child")
        if not self._opened:
            return
        inherited = self._store
        self._begin(self._opening.store())
        inherited.close()

    def works_for_another_process(self) -> None:
        """Commit after each call from now on: this process may end without notice."""
        self._calls.worker = True

    def __reduce__(self) -> Any:
        if not self._opened or self._opening is None:
            raise LLMCacheError("a closed cache cannot be pickled or copied; open it again with LLMCache.open")
        return reopened, (type(self), self._opening)

    # -- embedding ------------------------------------------------------------------------------------------

    @call
    def encode(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **others: Any,
    ) -> Any:
        """Embed texts: `SentenceTransformer.encode`, with the same arguments, result type and order.

        What the output bank cannot hold goes to the model itself, past the cache (`stats().counters.bypassed`, and a
        warning that names the reason once): inputs that are not texts, `output_value` other than
        "sentence_embedding", a list of devices, a `pool`, and other keywords.
        Raises ConfigError for a frame or table; give one of its columns.
        """
        self._check_open()
        execution, model = self._execution, cast(Any, self.model)
        self._check_model()
        inputs = _renamed(inputs, others)
        if is_table(inputs):
            raise ConfigError(f"encode takes texts, got a {type(inputs).__name__}; give one of its columns, as a list")
        single = model.is_singular_input(inputs)
        texts = [inputs] if single else inputs if isinstance(inputs, list) else list(inputs)
        role = others.pop("task", None)
        reason = _past_the_cache(texts, role, device, output_value, pool, others)
        if reason is not None or not texts:
            self._bypass(reason, len(texts))
            asked = {} if role is None else {"task": role}
            if role in ROLES:  # as `encode_query` and `encode_document` choose it
                prompt_name, prompt = None, self._prompt(role, prompt_name, prompt)
            # the method of the class: `model.encode` may be this very method
            return type(model).encode(
                model, inputs if single else texts, prompt_name=prompt_name, prompt=prompt, batch_size=batch_size,
                output_value=output_value, show_progress_bar=show_progress_bar, precision=precision,
                convert_to_numpy=convert_to_numpy, convert_to_tensor=convert_to_tensor, device=device,
                normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim, pool=pool, chunk_size=chunk_size,
                **asked, **others,
            )  # fmt: skip
        if device is not None:
            model.to(device)  # as `encode` does
        if batch_size <= 0:
            raise ConfigError(f"batch_size must be a positive integer, got {batch_size}")
        resolved = self._prompt(role, prompt_name, prompt)
        tensor = convert_to_tensor and precision == "float32"
        with tqdm(total=len(texts), desc="Documents") if show_progress_bar else nullcontext() as bar:

            def advance(answered: int, _: int) -> None:
                if bar is not None:
                    bar.update(answered)

            answers = execution.answers(EncodeCall(texts, None, resolved, role, batch_size, advance, tensor))
        outputs = answers.vectors() if isinstance(answers, DeviceAnswers) else answers.outputs
        self._watch.rested_at = time.perf_counter()
        return finished(
            outputs, model, single=single, precision=precision, convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor, normalize=normalize_embeddings, truncate_dim=truncate_dim,
        )  # fmt: skip

    def encode_query(self, *arguments: Any, **settings: Any) -> Any:
        """`SentenceTransformer.encode_query`. A text as query and as document never share an entry."""
        return self.encode(*arguments, **{**settings, "task": "query"})

    def encode_document(self, *arguments: Any, **settings: Any) -> Any:
        """`SentenceTransformer.encode_document`. A text as query and as document never share an entry."""
        return self.encode(*arguments, **{**settings, "task": "document"})

    def _bypass(self, reason: str | None, documents: int) -> None:
        """Count documents that the model answers past the cache, and say why, once for each reason."""
        self._counters.bypassed += documents
        if reason is not None and reason not in self._reasons:
            self._reasons.add(reason)
            log.warning("encode goes past the cache: %s", reason)

    def run(
        self,
        documents: Iterable[Source],
        *,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        chunk: int = CHUNK,
        progress: Progress = nothing,
    ) -> Iterator[Result]:
        """One result per document, in order, each saying where it came from.

        documents: texts, `Document`s, or mappings with "text" and perhaps "id"; any iterable, read `chunk` at a time,
            which bounds the memory. role: None, "query" or "document".
        progress: called with the numbers of documents answered, and of these computed, as they are.
        Results hold the model's own vector: not cut to truncate_dim, and normalised only if the model does it.
        """
        asked = self._asked(role, prompt_name, prompt, batch_size, progress)
        return self._results(documents, asked, chunk)

    def warm(
        self,
        documents: Iterable[Source],
        *,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        chunk: int = CHUNK,
        progress: Progress = nothing,
    ) -> TierCounts:
        """Store the outputs of documents that the cache does not know yet; the arguments are those of `run`.

        Returns how many documents were known and how many were computed. What was known counts as no saving, since
        nobody takes the outputs.
        """
        asked = replace(self._asked(role, prompt_name, prompt, batch_size, progress), wanted=False)
        tally = TierCounts()
        for _ in tally.counted(self._results(documents, asked, chunk)):
            continue
        return tally

    def _asked(
        self, role: str | None, prompt_name: str | None, prompt: str | None, batch_size: int, progress: Progress
    ) -> EncodeCall:
        """A call without its texts; LLMCacheError where the cache is closed, ConfigError where the model gives none."""
        self._check_open()
        self._execution  # noqa: B018  # ConfigError now, and not when results are asked for
        return EncodeCall([], None, self._prompt(role, prompt_name, prompt), role, batch_size, progress)

    def _results(self, documents: Iterable[Source], asked: EncodeCall, chunk: int) -> Iterator[Result]:
        """Results of documents, `chunk` at a time. asked: the call, without its texts and ids."""

        def answer(texts: Sequence[str], ids: Sequence[str]) -> Answers:
            self._check_open()
            self._check_model()
            return self._execution.answers(replace(asked, texts=texts, ids=ids))

        return results(documents, answer, lambda: self._bank, LAYER, chunk, calls=self._calls)

    @call
    def plan(
        self,
        documents: Iterable[Source],
        *,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
    ) -> Plan:
        """What `run` would meet and take with these documents: hits by tier, seconds, bytes, and what is advised.

        They are read once. The pass takes under 2 % of what computing all of them would: everything is hashed, a sample
        is tokenised and looked up, and a few batches are computed to see what the model costs. Nothing is stored.
        """
        self._check_open()
        self._check_model()
        call = EncodeCall([], None, self._prompt(role, prompt_name, prompt), role, batch_size)
        self._planned_at = self._counters.as_dict()
        return planned(self._execution, documents, call, self._store, self.namespace, cast(Any, self.model))

    @call
    def compared(self, plan: Plan) -> ForecastError:
        """How everything that was asked since `plan` (since the opening, when that was another one) went beside it.

        `str` of it is one line; it is kept with the store's record of its runs.
        """
        now, before = self._counters.as_dict(), self._planned_at
        since = {name: value - before.get(name, 0) for name, value in now.items()}
        seconds = since["model_seconds"] + since["overhead_seconds"]
        found = plan.compared(int(since["documents"]), int(since["misses"]), seconds)
        self._storing.history.forecast(found.as_dict())
        return found

    def _prompt(self, role: str | None, name: str | None, prompt: str | None) -> str | None:
        model: Any = self.model
        return resolve(model.prompts, model.default_prompt_name, role=role, name=name, prompt=prompt)

    # -- near reuse -----------------------------------------------------------------------------------------

    @call
    def calibrate(
        self,
        sample: Iterable[Source] | None = None,
        *,
        budget: float,
        drift: DriftKind | Drift = "label",
        head: Any = None,
        truth: Iterable[Any] | None = None,
        limit: float | None = None,
        confidence: float | None = 0.95,
        guard: bool | Collection[str] = True,
        guard_pattern: str = "",
        seed: int = 0,
        of: Module | None = None,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> Calibration:
        """Choose what near matches may be given, so that the mean drift of all results stays within a budget.

        sample: documents that the cache does not know and the head has not seen; they are computed. None takes the
            entries themselves, each against others, with a head that is fitted again to what it decides.
        budget: 0.005 allows one result in 200 to differ. confidence: with which the bound holds; None takes the drift
            as measured ("accuracy": and a standard error).
        drift: "label", decisions of `head` that change (a classifier of scikit-learn, or a callable from outputs to
            labels or logits); "accuracy", decisions that become wrong, less those that become right, by `truth`;
            "cosine", 1 - cosine; "beyond", 1 - cosine above `limit`; "kl", of logits, as a share of `limit` nats; or
            a function of computed and reused outputs, [n, out], that gives [n] in [0, 1]. It is not stored: give it
            again to `open`.
        truth: right answers of the sample, whose documents may then also be in the cache.
        guard: refuse matches whose numbers, dates, identifiers, quotations or negations differ; or only some of these
            kinds (`llmcache.near.guard.rules.KINDS`). guard_pattern: a regular expression for further fields; it is
            read in the texts that are stored from now on, and entries from before pass no guard with it.
        role, prompt_name, prompt: of the documents that near matches are for, as for `run`: a near match never comes
            from an entry with another role or prompt, and what is calibrated here holds for these only.
        seed: of the folds. of: a head, as `run_heads` takes it: what it gives is calibrated, instead of embeddings.
        The choice is saved with the store and holds from now on; `Calibration.threshold` is None where none is safe.
        ConfigError: settings that cannot work, or too few entries or documents.
        """
        self._check_open()
        if of is None:
            self._check_model()
        self._exact_audits.require()
        if self._store.read_only:
            raise ConfigError("a calibration is saved with its store, and this one is only read; open it to be written")
        if isinstance(self.model, SentenceTransformer):
            prompt = self._prompt(role, prompt_name, prompt)
        name, execution = (LAYER, self._execution) if of is None else self._heads({"": of}).only()
        return self._calibrations.calibrate(
            name, execution, sample, truth, prompt, role, budget=budget, drift=drift, head=head, limit=limit,
            confidence=confidence, guarded=bool(guard), pattern=guard_pattern, seed=seed,
            kinds=KINDS if isinstance(guard, bool) else tuple(guard),
        )  # fmt: skip

    @property
    @call
    def calibration(self) -> Calibration | None:
        """What near reuse was calibrated to, None where it was not."""
        reuse = self._execution.reuse
        return reuse.calibration if reuse else None

    @property
    @call
    def vectors_id(self) -> str:
        """A digest of all that decides the vectors that this cache gives, 64 hexadecimal digits: for keys of caches
        above this one.

        Two models, and one model with other pooling, prompts or settings of near reuse, have different ones.
        """
        self._check_open()
        config, reuse = self.config, self._encoding.reuse if self._encoding else None
        calibrated = None if reuse is None else [reuse.calibration.to_json()]
        near = [config.reuse, config.tau, sorted(config.layer_tau.items()), config.dtype, calibrated]
        return sha(self._identity_now().digest, canonical(near)).hex()

    @property
    @call
    def near_is_off(self) -> str:
        """Why a calibrated cache gives no near matches at the moment; "" when it does, or was never calibrated."""
        reuse = self._execution.reuse
        return reuse.off or reuse.stands_aside if reuse else ""

    @call
    def explain(
        self, text: str, *, role: str | None = None, prompt_name: str | None = None, prompt: str | None = None
    ) -> Explanation:
        """How one text would be answered: the tier, its nearest neighbour, and what decided. Nothing is computed."""
        self._check_open()
        self._check_model()
        return explain(self._execution, text, self._prompt(role, prompt_name, prompt), role, self._decoded)

    def _decoded(self, tokens: Sequence[NDArray[np.int32]]) -> list[str]:
        rows = [ids.tolist() for ids in tokens]
        with private_copy(self.model if isinstance(self.model, SentenceTransformer) else self.tokenizer) as own:
            texts: list[str] = getattr(own, "tokenizer", own).batch_decode(rows, skip_special_tokens=True)
        return texts

    # -- any model ------------------------------------------------------------------------------------------

    @call
    def attached(self, model: Module | None = None, *, stack: str | None = None) -> Attachment:
        """A context in which a model's own forward goes by the banks: `with cache.attached(model): model(**inputs)`.

        model: None is the cache's own; another may share the trunk of it up to some layer, and then shares the banks.
        stack: name of the list of layers in the model, where it is not found by itself.
        ConfigError when the model has no layers that can be skipped, or is compiled.
        """
        self._check_open()
        return self._layers.attachment(self.model if model is None else model, stack)

    def run_heads(
        self,
        documents: Iterable[Source],
        heads: Mapping[str, Module],
        *,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        progress: Progress = nothing,
    ) -> Iterator[dict[str, Result]]:
        """One result of every head per document, in order. The layers that heads share are computed once.

        heads: models by name, with the cache's tokenizer: transformers models that give logits [rows, classes], or
            SentenceTransformers. Up to which layer they are equal is found from their weights, and that layer gets a
            bank, so that a head which comes later, or in another run, starts there.
        """
        with self._calls:
            self._check_open()
            run, storing = self._heads(heads), self._storing
        resolved = self._prompt(role, prompt_name, prompt) if isinstance(self.model, SentenceTransformer) else prompt

        @contextmanager
        def answering() -> Iterator[None]:
            with self._calls:
                self._check_open()
                if storing is not self._storing:
                    raise ForkedStoreError("these results were begun before a fork; call run_heads in the child")
                yield

        return run.results(documents, resolved, role, batch_size, progress, answering)

    def _heads(self, heads: Mapping[str, Module]) -> Heads:
        return Heads(
            self.model, self.tokenizer, heads, self._layers, self.config, self._calibrations.follow, self._check_tokens
        )

    def _check_tokens(self) -> None:
        """ModelMismatch when texts may become other token ids by now than those of the namespace."""
        if isinstance(self.model, SentenceTransformer):
            self._check_model()

    # -- decoders -------------------------------------------------------------------------------------------

    @call
    def generate(self, prompts: Sequence[str], *, batch_size: int = 32, **generate_kwargs: Any) -> Generated:
        """What `model.generate` writes after each prompt; beginnings that were computed before are restored.

        Of an encoder-decoder what it makes of each text; its encoder's states are reused.

        generate_kwargs: for `model.generate`, such as max_new_tokens, num_beams or do_sample.
        ConfigError when the model does not generate, or there is no tokenizer.
        """
        model, tokenizer = self._decoder()
        return decoding.generate(
            model, tokenizer, prompts, attached=self.attached, batch_size=batch_size, **generate_kwargs
        )

    @call
    def score(
        self, prompts: Sequence[str], choices: Sequence[str] | Sequence[Sequence[str]], *, batch_size: int = 32
    ) -> Scores:
        """Log-likelihood of each choice as what follows its prompt; a prompt is computed once for all its choices.

        choices: the same for all prompts, or a list for each. `Scores.total.argmax(1)` are the choices made.
        """
        model, tokenizer = self._decoder(causal=True)
        return decoding.score(model, tokenizer, prompts, choices, attached=self.attached, batch_size=batch_size)

    @call
    def perplexity(
        self, texts: str | Sequence[str], *, window: int, stride: int | None = None, batch_size: int = 8
    ) -> float:
        """exp of the mean negative log-likelihood per token, over texts cut into windows of tokens."""
        model, tokenizer = self._decoder(causal=True)
        return decoding.perplexity(
            model, tokenizer, texts, window=window, stride=stride, attached=self.attached, batch_size=batch_size
        )

    def _identity_now(self) -> Identity:
        """The identity of the cache's own model, taken anew when it has changed."""
        if self._watch.changed():
            self._current = self._watch.identity()
            self._exact_audits.renew()
        return self._current

    def _check_model(self) -> None:
        """ModelMismatch when the model gives other outputs by now than those that the namespace holds."""
        now = self._identity_now()
        if now is not self.identity and now.digest != self.identity.digest:
            raise mismatch(self.identity, now, self._watch.changes())

    def _decoder(self, *, causal: bool = False) -> tuple[Any, Any]:
        self._check_open()
        other = causal and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if other or not hasattr(self.model, "generate") or isinstance(self.model, SentenceTransformer):
            raise ConfigError(f"a {type(self.model).__name__} cannot do this; open the cache with a causal model")
        if self.tokenizer is None:
            raise ConfigError("prompts need a tokenizer; open the cache with tokenizer=...")
        return self.model, self._tokenizer_copy.of(self.tokenizer)

    # -- the store ------------------------------------------------------------------------------------------

    @property
    def _execution(self) -> Executor:
        if self._encoding is None:
            raise ConfigError(
                f"embeddings come from a SentenceTransformer; this cache has a {type(self.model).__name__}: use "
                "attached(), generate() or score()"
            )
        return self._encoding

    @property
    def _bank(self) -> Bank:
        return self._execution.bank

    @property
    @call
    def storing(self) -> BankWriter:
        """What puts and commits, for a run that says itself when to commit."""
        self._check_open()
        return self._storing

    def __bool__(self) -> bool:
        """True: `len` is 0 of a cache that is empty, which is a cache all the same."""
        return True

    @call
    def __len__(self) -> int:
        """Entries in the output bank, those not committed yet included."""
        return len(self._bank)

    @property
    def read_only(self) -> bool:
        """True if nothing is stored: opened with `read_only=True`, or the folder cannot be written."""
        return self._store.read_only

    @call
    def commit(self) -> None:
        """Make what was computed durable and visible to other processes; nothing in a store that is only read.

        StoreFull or StoreFenced when a write fails. Everything committed before is safe, and the cache goes on
        serving what it has and computing the rest, without storing.
        """
        self._check_open()
        self._storing.commit()
        self._calibrations.keep()

    @call
    def reload(self) -> None:
        """Find from now on what other processes have committed. What is not committed here is kept.

        ModelMismatch when the namespace belongs to another model by now.
        """
        self._check_open()
        self._store.reload()
        self._calibrations.forget()

    @call
    def rebuild(self) -> None:
        """Fit the projection and build the FAISS index again, over all entries, and commit both.

        StoreFenced when nothing may be written to the store.
        """
        self._check_open()
        if self._store.read_only:
            self._store.commit()  # raises, with the reason
        self._storing.commit()
        self._bank.near.rebuild()
        self.commit()

    @property
    @call
    def levels(self) -> DeviceCache | None:
        """What is held in the memory of the device and in page-locked memory; None before it is first asked for."""
        return self._execution.levels

    @property
    @call
    def corpus(self) -> str:
        """Name of what is being asked, for the store's record of its runs (`llmcache report`); "" for none."""
        return self._storing.history.corpus

    @corpus.setter
    @call
    def corpus(self, name: str) -> None:
        self._storing.history.begin(name)

    @property
    @call
    def width(self) -> int:
        """Numbers in one output vector."""
        return self._bank.facts.width

    def stats(self) -> Statistics:
        """What was reused and what it saved, since this opening, and what the store holds; at the end, when closed."""
        if self._last is not None:
            return self._last
        with self._calls:
            return self._statistics()

    def _statistics(self) -> Statistics:
        index = self._bank.near.kind if self._encoding else None
        return statistics(
            self._store, self._counters, index, self.namespace, self._calibrations.states(), self._storing.decisions(),
            self._exact_audits.mismatch,
        )  # fmt: skip

    def close(self) -> None:
        """Commit and close. Closing twice is fine; what is still open when Python exits is closed then.

        Calls of other threads that are at work are waited for; later ones raise LLMCacheError.
        """
        if self._calls.inherited:  # nothing was asked in this child of a fork, and what waits is the parent's
            self._opened = False
            self._store.close()
            return
        with self._calls:
            if not self._opened:
                return
            try:
                if self._store.writable:
                    self.commit()
                self._last = self._statistics()
            finally:
                self._opened = False
                self._store.close()

    @property
    def is_open(self) -> bool:
        """False once the cache is closed."""
        return self._opened

    @property
    def busy(self) -> bool:
        """True while any thread runs a call on this model."""
        return self._calls.lock.depth > 0

    def _check_open(self) -> None:
        if not self._opened:
            raise LLMCacheError("the cache is closed; open it again with LLMCache.open")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except LLMCacheError as second:  # the first error is the one to show
            log.warning("%s", second)


def _renamed(inputs: Any, others: dict[str, Any]) -> Any:
    """The texts of a call of `encode`, which sentence-transformers also takes under their former name."""
    former = others.pop("sentences", None)
    given = former if inputs is None else inputs
    if given is None:
        raise TypeError("encode() needs inputs: a text or a list of texts")
    if isinstance(given, torch.Tensor | list | tuple | str):
        return given
    for name in ("tolist", "to_list", "to_pylist"):  # a series of pandas or polars, an Arrow array, an array of texts
        if hasattr(given, name) and getattr(given, "ndim", 1) == 1:
            values = getattr(given, name)()
            return values if values and all(isinstance(text, str) for text in values) else given
    return given


def _past_the_cache(
    texts: Sequence[Any], role: Any, device: Any, output_value: Any, pool: Any, others: Mapping[str, Any]
) -> str | None:
    """Reason why the output bank cannot answer a call of `encode`; None if it can."""
    if pool is not None or isinstance(device, list):
        return "it computes in a pool of processes"
    if output_value != "sentence_embedding":
        return f"output_value={output_value!r} is not kept"
    if role is not None and role not in ROLES:
        return f"task={role!r} is not known"
    if others:
        return f"the argument {min(others)!r} is not known"
    if not all(isinstance(text, str) for text in texts):
        return "its inputs are not all texts"
    return None


def _check_faiss(config: CacheConfig) -> None:
    if config.needs_faiss and importlib.util.find_spec("faiss") is None:
        raise FaissMissing
