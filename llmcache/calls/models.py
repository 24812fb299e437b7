"""Methods of `LLMCache` that run a model's own forward through the banks: attached models, heads, generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sentence_transformers.base.model import BaseModel
from torch.nn import Module

from llmcache.banks.reader import BankReader
from llmcache.calls.base import CacheParts
from llmcache.concurrency.calls import call
from llmcache.decoders import generation as decoding
from llmcache.decoders import likelihoods, scoring
from llmcache.decoders.answer_bank import ANSWERS, FACTS, LIKELIHOODS, AnswerBank
from llmcache.decoders.generation import Answers, Generated
from llmcache.decoders.kv_encoding import RESULT_EPSILONS
from llmcache.decoders.likelihoods import CountedRow, Likelihoods
from llmcache.decoders.prompts import Prompt
from llmcache.decoders.scoring import Scores
from llmcache.decoders.stored_answers import StoredResults
from llmcache.encoding.call import Progress, nothing
from llmcache.encoding.results import Result, Source
from llmcache.errors import ConfigError, ForkedStoreError
from llmcache.layers.attachment import Attachment
from llmcache.model.description.process_settings import running_mode
from llmcache.model.digests import sha
from llmcache.model.keys import Seed, key_seed

Answered = TypeVar("Answered")


class ModelMethods(CacheParts):
    """Attach models to the cache, run heads, generate and score."""

    @call
    def attached(self, model: Module | None = None, *, stack: str | None = None) -> Attachment:
        """Return a context in which a model's forward uses the banks: `with cache.attached(model): model(**inputs)`.

        model: None for the cache's own. A model that equals it up to some layer shares the banks of these layers.
        stack: name of the list of layers in the model, if it is not found automatically.
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
        """Run several heads over documents. Layers that heads share are computed once.

        heads: models by name, with the cache's tokenizer: transformers models that return logits [rows, classes], or
            SentenceTransformers. Shared layers are found by comparing weights. The last shared layer gets a bank, so
            that later heads, also in other runs, start there.
        Returns an iterator over one mapping per document, in order, from head names to results.
        """
        with self._calls:
            self._check_open()
            runner, storing = self._heads(heads), self._storing
        resolved = self._prompt(role, prompt_name, prompt) if isinstance(self.model, BaseModel) else prompt

        @contextmanager
        def answering() -> Iterator[None]:
            with self._calls:
                self._check_open()
                if storing is not self._storing:
                    raise ForkedStoreError("these results belong to a call before a fork; call run_heads in the child")
                yield

        return runner.results(documents, resolved, role, batch_size, progress, answering)

    @call
    def generate(
        self, prompts: Sequence[Prompt], *, batch_size: int = 32, likelihoods: bool = False, **generate_kwargs: Any
    ) -> Generated:
        """Generate a continuation of each prompt with `model.generate`, restoring stored KV blocks of prompt prefixes.

        An encoder-decoder generates from each text; the states of its encoder are reused.

        Finished answers are stored where the settings always give the same answer (no sampling), unless the cache has
        `CacheConfig(answers=False)`. They are read when the prompt comes again, and an answer that ended at
        max_new_tokens is continued by a call with a higher limit.

        prompts: texts, or chats: lists of messages with "role" and "content", written by the tokenizer's chat template.
        likelihoods: True for the log-likelihoods of the new tokens; those of stored answers are there in any case.
        generate_kwargs: for `model.generate`, such as max_new_tokens, num_beams or do_sample.
        Returns texts and token ids. ConfigError when the model cannot generate, or there is no tokenizer.
        """
        model, tokenizer = self.decoder()
        return self._with_stored_results(
            lambda stored: decoding.generate(
                model, tokenizer, prompts, attached=self.attached, stored=stored, batch_size=batch_size,
                likelihoods=likelihoods, **generate_kwargs,
            )
        )  # fmt: skip

    @call
    def score(
        self, prompts: Sequence[Prompt], choices: Sequence[str] | Sequence[Sequence[str]], *, batch_size: int = 32
    ) -> Scores:
        """Compute the log-likelihood of each choice as the continuation of its prompt; each prompt is computed once.

        prompts: texts or chats, as of `generate`. choices: the same for all prompts, or one list per prompt.
        Returns the scores; `Scores.total.argmax(1)` are the most likely choices.
        """
        model, tokenizer = self.decoder(causal=True)
        return self._with_stored_results(
            lambda stored: scoring.score(
                model, tokenizer, prompts, choices, attached=self.attached, stored=stored, batch_size=batch_size
            )
        )

    @call
    def perplexity(
        self, texts: str | Sequence[str], *, window: int, stride: int | None = None, batch_size: int = 8
    ) -> float:
        """Return the perplexity: exp of the mean negative log-likelihood per token, over windows of tokens."""
        model, tokenizer = self.decoder(causal=True)
        return self._with_stored_results(
            lambda stored: scoring.perplexity(
                model, tokenizer, texts, window=window, stride=stride, attached=self.attached, stored=stored,
                batch_size=batch_size,
            )
        )  # fmt: skip

    @call
    def answers(
        self,
        rows: Sequence[list[int]],
        settings: Mapping[str, Any],
        *,
        batch_size: int = 32,
        stored_only: bool = False,
    ) -> Answers:
        """Generate answers of prompts that are given as token ids, for code that tokenises and batches prompts itself.

        settings: for `model.generate`. stored_only: look up stored answers, and compute none.
        Returns the answers with the log-likelihoods of their tokens. Errors as `generate`.
        """
        model, tokenizer = self.decoder()

        def run(stored: StoredResults | None) -> Answers:
            generation = decoding.Generation(
                model, tokenizer, settings, self.attached, stored, batch_size, likelihoods=True
            )
            found = {i: answer for batch in generation.answers(rows, stored_only=stored_only) for i, answer in batch}
            return Answers.of(generation, [found.get(i) for i in range(len(rows))], generation.not_stored)

        return self._with_stored_results(run)

    @call
    def known_prefixes(self, rows: Sequence[list[int]]) -> tuple[list[int], int]:
        """Return how many leading tokens of each row of token ids are stored, and the bytes that a token takes.

        Zeros without a prefix cache. Nothing is read but keys, and no use is counted.
        """
        self.decoder()
        with self.attached() as attachment:
            prefixes = attachment.prefix_cache() if attachment.decodes else ""
            if isinstance(prefixes, str):
                return [0] * len(rows), 0
            return prefixes.known(rows), prefixes.bytes_per_token

    @call
    def check_generation(self, settings: Mapping[str, Any], *, rows: int = 1) -> None:
        """ConfigError when `model.generate` refuses these settings for a batch of `rows` prompts."""
        decoding.check_settings(*self.decoder(), settings, rows)

    @call
    def likelihoods(
        self, prompts: Sequence[Sequence[CountedRow]], *, batch_size: int = 32, stored_only: bool = False
    ) -> list[Likelihoods | None]:
        """Compute log-likelihoods of rows that are given as token ids, for code that tokenises and batches itself.

        prompts: for each prompt its rows: token ids, and the number of last tokens that count. stored_only: look up
            stored values, and compute none.
        Returns the values of each prompt; None where they are not stored and `stored_only` is set. Errors as `score`.
        """
        model, tokenizer = self.decoder(causal=True)

        def run(stored: StoredResults | None) -> list[Likelihoods | None]:
            if stored is None and stored_only:
                return [None] * len(prompts)
            batches = likelihoods.likelihoods(
                model, tokenizer, prompts, attached=self.attached, stored=stored, batch_size=batch_size,
                stored_only=stored_only,
            )  # fmt: skip
            found = {i: each for batch in batches for i, each in batch}
            return [found.get(i) for i in range(len(prompts))]

        return self._with_stored_results(run)

    def _stored_results(self) -> StoredResults | None:
        """Return the banks of finished answers and log-likelihoods; None if they are not used.

        Their keys have the identity of the model as it is now, so a changed model finds no answers of its former state.
        """
        if not self.config.answers:
            return None
        mode = running_mode(next(self.model.parameters()).device.type)
        digest = sha(self._identity_now().digest, mode.encode()) if mode else self._identity_now().digest
        if (prefix_dtype := self.config.prefix_dtype) != "auto":  # results after rounded prefixes are not the model's
            digest = sha(digest, b"prefixes", prefix_dtype.encode())

        def results(name: str) -> AnswerBank:
            bank = self._layers.bank(name, FACTS)
            reader = BankReader(bank, self._storing.worth(bank, name))

            def seed(settings: str) -> Seed:
                return key_seed(digest, name, None, settings, self._layers.secret)

            evidence = self._exact_audits.evidence(bank, name, self.model, digest)
            evidence.epsilon = RESULT_EPSILONS.get(prefix_dtype, 0.0)
            return AnswerBank(reader, seed, self._storing.put, self._counters, evidence)

        return StoredResults(results(ANSWERS), results(LIKELIHOODS), self._counters)

    def _with_stored_results(self, run: Callable[[StoredResults | None], Answered]) -> Answered:
        """Return `run(stored results)`; `run(None)` if an audit finds a mismatch and the settings ask for a bypass."""
        return self._exact_audits.answered(lambda: run(self._stored_results()), lambda: run(None))

    def decoder(self, *, causal: bool = False) -> tuple[Any, Any]:
        """Return the model and a private copy of its tokenizer. ConfigError when the model cannot generate.

        causal: True if it must be a causal model, not an encoder-decoder.
        """
        self._check_open()
        not_causal = causal and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if not_causal or not hasattr(self.model, "generate") or isinstance(self.model, BaseModel):
            raise ConfigError(f"a {type(self.model).__name__} cannot do this; open the cache with a causal model")
        if self.tokenizer is None:
            raise ConfigError("prompts need a tokenizer; open the cache with tokenizer=...")
        return self.model, self._tokenizer_copy.of(self.tokenizer)
