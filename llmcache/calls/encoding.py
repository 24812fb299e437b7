"""Methods of `LLMCache` that embed documents, fill the store, or forecast a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from llmcache.calls.base import LAYER, CacheParts
from llmcache.calls.sentence_transformers import drop_in
from llmcache.concurrency.calls import call
from llmcache.document import Text
from llmcache.encoding.answers import Answers
from llmcache.encoding.call import EncodeCall, GivenTexts, Progress, bypass_reason, nothing, texts_argument
from llmcache.encoding.device_answers import DeviceAnswers
from llmcache.encoding.executor import Executor
from llmcache.encoding.postprocess import finished, sparse_vectors, token_vectors
from llmcache.encoding.results import TOKENS, Result, Source, TierCounts, results
from llmcache.errors import ConfigError
from llmcache.model.encoders import limits_inside, text_fields
from llmcache.model.prompts import ROLES
from llmcache.planning.forecast import planned
from llmcache.planning.plan import ForecastError, Plan
from llmcache.records import is_table

CHUNK = 8192  # documents that `run` reads, answers and yields together


class EncodeMethods(CacheParts):
    """Embed documents through the cache, and forecast such runs."""

    _planned_at: dict[str, float]
    """Counters at the last call of `plan`."""

    @call
    def encode(self, inputs: Any = None, *arguments: Any, **settings: Any) -> Any:
        """Embed texts as `encode` of the cache's model does, with the same arguments, result type and order.

        The model answers directly, without the cache, when a bank cannot hold the results: inputs that are not texts,
        `output_value=None`, a list of devices, a `pool`, and unknown keywords. Such documents are counted in
        `stats().counters.bypassed`, and each reason is logged once as a warning.
        Returns what `encode` of a SentenceTransformer, SparseEncoder or MultiVectorEncoder returns. ConfigError for a
        CrossEncoder, which scores pairs (`predict`), and for a data frame or table; give one column.
        """
        self._check_open()
        self._execution  # noqa: B018  # raises ConfigError for a model without embeddings
        self._check_model()
        if isinstance(self.model, CrossEncoder):
            raise ConfigError("a CrossEncoder scores pairs of texts and has no embeddings; use predict or rank")
        kind: Callable[..., Any] = self._encode_vectors
        if isinstance(self.model, SparseEncoder):
            kind = self._encode_sparse
        elif isinstance(self.model, MultiVectorEncoder):
            kind = self._encode_tokens
        return kind(inputs, *arguments, **settings)

    def _encode_vectors(
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
        """Embed texts as `SentenceTransformer.encode` does."""
        model = cast(Any, self.model)
        given = self._texts(inputs, others)
        given_settings = {
            "prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size, "output_value": output_value,
            "show_progress_bar": show_progress_bar, "precision": precision, "convert_to_numpy": convert_to_numpy,
            "convert_to_tensor": convert_to_tensor, "device": device, "normalize_embeddings": normalize_embeddings,
            "truncate_dim": truncate_dim, "pool": pool, "chunk_size": chunk_size,
        }  # fmt: skip
        role = others.pop("task", None)
        reason = bypass_reason(given.texts, role, device, output_value, pool, others)
        tokens = output_value == "token_embeddings"
        if tokens:
            reason = reason or padded_left(model)
            if precision not in (None, "", "float32"):
                reason = reason or "it asks for quantised token embeddings"
        if reason is not None or not given.texts:
            return self._by_model(given, reason, role, **given_settings, **others)
        tensor = convert_to_tensor and precision == "float32" and not tokens
        executor = self._token_execution() if tokens else self._execution
        answers = self._answered(
            given.texts, prompt_name, prompt, role, batch_size, show_progress_bar, device, tensor, executor
        )
        if tokens:
            return token_vectors(answers.outputs, model, single=given.single)
        outputs = answers.vectors() if isinstance(answers, DeviceAnswers) else answers.outputs
        return finished(
            outputs, model, single=given.single, precision=precision, convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor, normalize=normalize_embeddings, truncate_dim=truncate_dim,
        )  # fmt: skip

    def as_sentence_transformer(self) -> SentenceTransformer:
        """Return the model as a SentenceTransformer whose `encode` goes through this cache, for other libraries.

        It shares all attributes with the model: settings, modules, device. ConfigError for another kind of model.
        """
        return cast(SentenceTransformer, drop_in(cast(Any, self), SentenceTransformer))

    def as_sparse_encoder(self) -> SparseEncoder:
        """Return the model as a SparseEncoder whose `encode` goes through this cache."""
        return cast(SparseEncoder, drop_in(cast(Any, self), SparseEncoder))

    def as_multi_vector_encoder(self) -> MultiVectorEncoder:
        """Return the model as a MultiVectorEncoder whose `encode` goes through this cache."""
        return cast(MultiVectorEncoder, drop_in(cast(Any, self), MultiVectorEncoder))

    def encode_query(
        self, inputs: Any = None, prompt_name: str | None = None, prompt: str | None = None, *more: Any, **settings: Any
    ) -> Any:
        """Embed queries as the model's `encode_query`. A text as query and as document has two entries."""
        return self._encode_role("query", inputs, prompt_name, prompt, *more, **settings)

    def encode_document(
        self, inputs: Any = None, prompt_name: str | None = None, prompt: str | None = None, *more: Any, **settings: Any
    ) -> Any:
        """Embed documents as the model's `encode_document`. A text as query and as document has two entries."""
        return self._encode_role("document", inputs, prompt_name, prompt, *more, **settings)

    def _encode_role(
        self, role: str, inputs: Any, prompt_name: str | None, prompt: str | None, *more: Any, **settings: Any
    ) -> Any:
        """Embed texts with the prompt of a role, and with `task` set to it, as sentence-transformers does."""
        if prompt_name is None and prompt is None:
            known = getattr(self.model, "prompts", None) or {}
            prompt_name = next((name for name in ROLES[role] if name in known), None)
        return self.encode(inputs, prompt_name, prompt, *more, **{**settings, "task": role})

    def _encode_sparse(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = True,
        convert_to_sparse_tensor: bool = True,
        save_to_cpu: bool = False,
        device: Any = None,
        max_active_dims: int | None = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **others: Any,
    ) -> Any:
        """Embed texts as `SparseEncoder.encode` does."""
        model = cast(Any, self.model)
        given = self._texts(inputs, others)
        given_settings = {
            "prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size,
            "show_progress_bar": show_progress_bar, "convert_to_tensor": convert_to_tensor,
            "convert_to_sparse_tensor": convert_to_sparse_tensor, "save_to_cpu": save_to_cpu, "device": device,
            "max_active_dims": max_active_dims, "pool": pool, "chunk_size": chunk_size,
        }  # fmt: skip
        role = others.pop("task", None)
        reason = bypass_reason(given.texts, role, device, "sentence_embedding", pool, others)
        if max_active_dims is not None and max_active_dims < 1:
            reason = reason or "it asks for no active dimensions"  # the model raises its own error
        if reason is None and max_active_dims not in (None, model.max_active_dims) and limits_inside(model):
            reason = "this model computes other values for another max_active_dims"
        if reason is not None or not given.texts:
            return self._by_model(given, reason, role, **given_settings, **others)
        answers = self._answered(given.texts, prompt_name, prompt, role, batch_size, show_progress_bar, device)
        return sparse_vectors(
            answers.outputs, model, single=given.single, convert_to_tensor=convert_to_tensor,
            convert_to_sparse_tensor=convert_to_sparse_tensor, save_to_cpu=save_to_cpu,
            max_active_dims=max_active_dims if max_active_dims is not None else model.max_active_dims,
        )  # fmt: skip

    def _encode_tokens(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "token_embeddings",
        convert_to_numpy: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        pool: Any = None,
        chunk_size: int | None = None,
        token_pooling: Any = None,
        task: str | None = None,
        **others: Any,
    ) -> Any:
        """Embed texts as `MultiVectorEncoder.encode` does."""
        given = self._texts(inputs, others)
        given_settings = {
            "prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size,
            "show_progress_bar": show_progress_bar, "output_value": output_value,
            "convert_to_numpy": convert_to_numpy, "device": device, "normalize_embeddings": normalize_embeddings,
            "pool": pool, "chunk_size": chunk_size, "token_pooling": token_pooling,
        }  # fmt: skip
        wanted = "sentence_embedding" if output_value == "token_embeddings" else output_value
        reason = bypass_reason(given.texts, task, device, wanted, pool, others)
        if reason is not None or not given.texts:
            return self._by_model(given, reason, task, **given_settings, **others)
        answers = self._answered(given.texts, prompt_name, prompt, task, batch_size, show_progress_bar, device)
        return token_vectors(
            answers.outputs, cast(Any, self.model), single=given.single, convert_to_numpy=convert_to_numpy,
            normalize=normalize_embeddings, pooling=token_pooling, task=task,
        )  # fmt: skip

    def _texts(self, inputs: Any, others: dict[str, Any]) -> GivenTexts:
        """Return the inputs of an `encode` call. TypeError for none, ConfigError for a table."""
        inputs = texts_argument(inputs, others)
        if is_table(inputs):
            raise ConfigError(f"encode takes texts, got a {type(inputs).__name__}; give one of its columns, as a list")
        if cast(Any, self.model).is_singular_input(inputs):
            return GivenTexts([inputs], True, inputs)
        texts = inputs if isinstance(inputs, list) else list(inputs)
        return GivenTexts(texts, False, texts)

    def _by_model(self, given: GivenTexts, reason: str | None, role: Any, **settings: Any) -> Any:
        """Return what `encode` of the model itself returns. reason: for bypassing the cache; None without texts."""
        self._bypass(reason, len(given.texts))
        if role is not None:
            settings["task"] = role
        # the method of the class, since users may set `model.encode = cache.encode`
        return type(cast(Any, self.model)).encode(self.model, given.inputs, **settings)

    def run(
        self,
        documents: Iterable[Source],
        *,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        chunk: int = CHUNK,
        output_value: str | None = None,
        progress: Progress = nothing,
    ) -> Iterator[Result]:
        """Embed documents or score pairs of texts, and report for each where its output came from.

        documents: iterable of texts, `Document`s, or mappings with "text" and optionally "id". `chunk` of them are read
            at a time, which bounds the memory. For a CrossEncoder: tuples or lists of two texts, `Document`s of such a
            tuple, or mappings with "query" and "document".
        role: None, "query" or "document".
        output_value: "sentence_embedding", or "token_embeddings" for the vectors of all tokens of a document, which a
            SentenceTransformer pools to its embedding; None for the output that `encode` gives.
        progress: called with the number of documents just answered, and how many of these the model computed.
        Returns an iterator over one result per document, in order. Outputs are the model's own vectors: not cut to
        truncate_dim, and normalised only if the model does so. Those of a CrossEncoder are the logits that are stored,
        float32 [labels], before the activation that `predict` applies. See `Result` for the other kinds of models.
        """
        settings = self._settings(role, prompt_name, prompt, batch_size, progress)
        return self._results(documents, settings, chunk, output_value)

    def warm(
        self,
        documents: Iterable[Source],
        *,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        chunk: int = CHUNK,
        output_value: str | None = None,
        progress: Progress = nothing,
    ) -> TierCounts:
        """Compute and store the outputs of documents that are not stored yet; the arguments are those of `run`.

        With output_value="token_embeddings" one pass of the model serves several outputs: later calls pool sentence
        embeddings from the stored token embeddings, and a `Pipeline` with late=True the embeddings of chunks.
        Returns the numbers of documents by tier. Hits count as no saving, since nobody uses the outputs.
        """
        settings = replace(self._settings(role, prompt_name, prompt, batch_size, progress), wanted=False)
        answered = self._results(documents, settings, chunk, output_value)
        return TierCounts.of(Counter(result.tier for result in answered))

    def _settings(
        self, role: str | None, prompt_name: str | None, prompt: str | None, batch_size: int, progress: Progress
    ) -> EncodeCall:
        """Return a call without texts. LLMCacheError when the cache is closed, ConfigError without embeddings."""
        self._check_open()
        self._execution  # noqa: B018  # raises ConfigError now, not when the first result is requested
        return EncodeCall([], None, self._prompt(role, prompt_name, prompt), role, batch_size, progress)

    def _results(
        self, documents: Iterable[Source], settings: EncodeCall, chunk: int, output_value: str | None
    ) -> Iterator[Result]:
        """Return the results of documents, `chunk` at a time. settings: the call without texts and ids."""
        tokens = self._pools_tokens(output_value)

        def executor() -> Executor:  # looked up anew, since a forked child opens the store again
            return self._token_execution() if tokens else self._execution

        def answer(texts: Sequence[Text], ids: Sequence[str]) -> Answers:
            self._check_open()
            self._check_model()
            return executor().answers(replace(settings, texts=texts, ids=ids))

        fields, layer = text_fields(self.model), TOKENS if tokens else LAYER
        return results(documents, answer, lambda: executor().bank, layer, chunk, fields=fields, calls=self._calls)

    def _pools_tokens(self, output_value: str | None) -> bool:
        """Return whether this value of `output_value` asks for the token embeddings of a SentenceTransformer.

        ConfigError for another value, or where the model gives no such output.
        """
        usual = "token_embeddings" if isinstance(self.model, MultiVectorEncoder) else "sentence_embedding"
        if output_value in (None, usual):
            return False
        if output_value == "sentence_embedding":  # of a model that gives token vectors
            raise ConfigError(f"a {type(self.model).__name__} gives token embeddings only; leave out output_value")
        if output_value != "token_embeddings":
            raise ConfigError(f"output_value is 'sentence_embedding' or 'token_embeddings', got {output_value!r}")
        if not isinstance(self.model, SentenceTransformer):
            raise ConfigError(f"a {type(self.model).__name__} gives no token embeddings; leave out output_value")
        if reason := padded_left(self.model):
            raise ConfigError(f"{reason}, so they cannot be stored; leave out output_value")
        return True

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
        documents: as for `run`, so pairs of texts for a CrossEncoder. CorpusError without documents, or for a record
        that is none.
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


def padded_left(model: Any) -> str | None:
    """Return why token embeddings of a model cannot be stored; None if they can."""
    if getattr(model.tokenizer, "padding_side", "right") == "left":  # the model returns the padding too
        return "token embeddings of a model that pads on the left depend on the other texts of a batch"
    return None
