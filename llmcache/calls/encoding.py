"""Methods of `LLMCache` that embed documents, fill the store, or forecast a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

from tqdm.auto import tqdm

from llmcache.calls.base import LAYER, CacheParts, log
from llmcache.concurrency.calls import call
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall, Progress, bypass_reason, nothing, texts_argument
from llmcache.encoding.device_answers import DeviceAnswers
from llmcache.encoding.postprocess import finished
from llmcache.encoding.results import Result, Source, TierCounts, results
from llmcache.errors import ConfigError
from llmcache.model.prompts import ROLES
from llmcache.planning.forecast import planned
from llmcache.planning.plan import ForecastError, Plan
from llmcache.records import is_table

CHUNK = 8192  # documents that `run` reads, answers and yields together


class EncodeMethods(CacheParts):
    """Embed documents through the cache, and forecast such runs."""

    _planned_at: dict[str, float]
    """Counters at the last call of `plan`."""
    _reasons: set[str]
    """Reasons for bypassing the cache that were already logged."""

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
        """Embed texts as `SentenceTransformer.encode` does, with the same arguments, result type and order.

        The model answers directly, without the cache, when the output bank cannot hold the results: inputs that are not
        texts, `output_value` other than "sentence_embedding", a list of devices, a `pool`, and unknown keywords. Such
        documents are counted in `stats().counters.bypassed`, and each reason is logged once as a warning.
        Returns embeddings as `SentenceTransformer.encode`. ConfigError for a data frame or table; give one column.
        """
        self._check_open()
        execution, model = self._execution, cast(Any, self.model)
        self._check_model()
        inputs = texts_argument(inputs, others)
        if is_table(inputs):
            raise ConfigError(f"encode takes texts, got a {type(inputs).__name__}; give one of its columns, as a list")
        single = model.is_singular_input(inputs)
        texts = [inputs] if single else inputs if isinstance(inputs, list) else list(inputs)
        role = others.pop("task", None)
        reason = bypass_reason(texts, role, device, output_value, pool, others)
        if reason is not None or not texts:
            self._bypass(reason, len(texts))
            task = {} if role is None else {"task": role}
            if role in ROLES:  # the prompt that `encode_query` and `encode_document` choose
                prompt_name, prompt = None, self._prompt(role, prompt_name, prompt)
            # the method of the class, since users may set `model.encode = cache.encode`
            return type(model).encode(
                model, inputs if single else texts, prompt_name=prompt_name, prompt=prompt, batch_size=batch_size,
                output_value=output_value, show_progress_bar=show_progress_bar, precision=precision,
                convert_to_numpy=convert_to_numpy, convert_to_tensor=convert_to_tensor, device=device,
                normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim, pool=pool, chunk_size=chunk_size,
                **task, **others,
            )  # fmt: skip
        if device is not None:
            model.to(device)  # as `SentenceTransformer.encode` does
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
        """Embed queries as `SentenceTransformer.encode_query`. A text as query and as document has two entries."""
        return self.encode(*arguments, **{**settings, "task": "query"})

    def encode_document(self, *arguments: Any, **settings: Any) -> Any:
        """Embed documents as `SentenceTransformer.encode_document`. A text as query and as document has two entries."""
        return self.encode(*arguments, **{**settings, "task": "document"})

    def _bypass(self, reason: str | None, documents: int) -> None:
        """Count documents that the model answers without the cache, and log each reason once."""
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
        """Embed documents, and report for each where its output came from.

        documents: iterable of texts, `Document`s, or mappings with "text" and optionally "id". `chunk` of them are read
            at a time, which bounds the memory.
        role: None, "query" or "document".
        progress: called with the number of documents just answered, and how many of these the model computed.
        Returns an iterator over one result per document, in order. Outputs are the model's own vectors: not cut to
        truncate_dim, and normalised only if the model does so.
        """
        settings = self._settings(role, prompt_name, prompt, batch_size, progress)
        return self._results(documents, settings, chunk)

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
        """Compute and store the outputs of documents that are not stored yet; the arguments are those of `run`.

        Returns the numbers of documents by tier. Hits count as no saving, since nobody uses the outputs.
        """
        settings = replace(self._settings(role, prompt_name, prompt, batch_size, progress), wanted=False)
        return TierCounts.of(Counter(result.tier for result in self._results(documents, settings, chunk)))

    def _settings(
        self, role: str | None, prompt_name: str | None, prompt: str | None, batch_size: int, progress: Progress
    ) -> EncodeCall:
        """Return a call without texts. LLMCacheError when the cache is closed, ConfigError without embeddings."""
        self._check_open()
        self._execution  # noqa: B018  # raises ConfigError now, not when the first result is requested
        return EncodeCall([], None, self._prompt(role, prompt_name, prompt), role, batch_size, progress)

    def _results(self, documents: Iterable[Source], settings: EncodeCall, chunk: int) -> Iterator[Result]:
        """Return the results of documents, `chunk` at a time. settings: the call without texts and ids."""

        def answer(texts: Sequence[str], ids: Sequence[str]) -> Answers:
            self._check_open()
            self._check_model()
            return self._execution.answers(replace(settings, texts=texts, ids=ids))

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
        """Forecast `run` with these documents: hits by tier, seconds, bytes, and advice.

        Documents are read once: all are hashed, a sample is tokenised and looked up, and a few batches are computed to
        measure the model. This takes under 2 % of the time of computing all documents. Nothing is stored.
        """
        self._check_open()
        self._check_model()
        call = EncodeCall([], None, self._prompt(role, prompt_name, prompt), role, batch_size)
        self._planned_at = self._counters.as_dict()
        return planned(self._execution, documents, call, self._store, self.namespace, cast(Any, self.model))

    @call
    def compared(self, plan: Plan) -> ForecastError:
        """Compare a forecast with the calls since `plan`, or since opening if the plan is from another opening.

        Returns the comparison, whose `str` is one line. It is also stored in the store's run history.
        """
        now, before = self._counters.as_dict(), self._planned_at
        since = {name: value - before.get(name, 0) for name, value in now.items()}
        seconds = since["model_seconds"] + since["overhead_seconds"]
        comparison = plan.compared(int(since["documents"]), int(since["misses"]), seconds)
        self._storing.history.forecast(comparison.as_dict())
        return comparison
