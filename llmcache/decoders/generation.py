"""Generation with a causal model or an encoder-decoder, by plain calls of `model.generate`.

A cache takes part through the context manager `attached`, which is entered around the calls of the model, and through
its stored answers. Without them the results are the model's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList, StopStringCriteria

from llmcache.arrays import Floats32
from llmcache.decoders.answer_audits import Ids, audit_answers
from llmcache.decoders.answer_bank import Answered
from llmcache.decoders.answer_settings import PADDING, AnswerSettings, answer_settings, end_tokens
from llmcache.decoders.likelihoods import computed_likelihoods, logits_at, scoring_batches
from llmcache.decoders.prefix_cache import restored_shares
from llmcache.decoders.prefix_order import prefix_order
from llmcache.decoders.prompts import (
    Attached,
    Prompt,
    check_batch_size,
    check_prompts,
    forward_call,
    logits_of,
    padded,
    padding_id,
    prompts_ids,
    rendered,
    whole_ids,
)
from llmcache.decoders.stored_answers import Answer, StoredResults, answered, up_to_end
from llmcache.errors import ConfigError
from llmcache.model.row_batches import batching_of
from llmcache.model.trial import vocabulary_of


@dataclass(frozen=True, slots=True)
class Generated:
    """Generated texts. Lists have an element for each prompt, or for each returned sequence of each prompt.

    ids: int64 [new tokens] for each sequence, as `model.generate` returns them, but without the padding after an end
        token.
    likelihoods: log-likelihood of each new token of each sequence in nats, float32 [new tokens]; empty if neither asked
        for nor stored. The start token of an encoder-decoder counts 0.
    finish: for each sequence "end" if it ended with an end token, "length" if it reached the limit of new tokens, or
        "stop" if something else ended it.
    reused: for each prompt, the share of its new tokens that came from stored answers, in [0, 1].
    restored: for each prompt, the share of the prompt's tokens that were not computed for it, in [0, 1].
    not_stored: reason why answers of these settings are not stored; "" if they are, or without a store.
    """

    texts: list[str]
    ids: list[Ids]
    reused: list[float] = field(default_factory=list)
    not_stored: str = ""
    likelihoods: list[Floats32] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    restored: list[float] = field(default_factory=list)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    attached: Attached = nullcontext,
    stored: StoredResults | None = None,
    batch_size: int = 32,
    likelihoods: bool = False,
    **generate_kwargs: Any,
) -> Generated:
    """Run `model.generate` on prompts, in batches of prompts with common beginnings, padded on the left.

    Prompts of an encoder-decoder are padded on the right, since its encoder counts positions from the left. Where
    padding changes the generated tokens (recurrent models), only prompts of equal length share a batch.
    stored: stored answers, which are used, continued and extended where the settings always give the same answer.
    likelihoods: True to compute the log-likelihoods of the new tokens.
    generate_kwargs: for `model.generate`. With num_return_sequences there are that many answers per prompt.
    Returns texts without special tokens, and ids. A prompt that is too long for the model raises the model's own error.
    """
    check_batch_size(batch_size)
    check_prompts(prompts)
    texts = [rendered(tokenizer, prompt) for prompt in prompts]
    rows = prompts_ids(tokenizer, texts)
    if getattr(model.config, "is_encoder_decoder", False):
        rows = [whole_ids(tokenizer, text) for text in texts]
    if not rows:
        return Generated([], [])
    run = Generation(model, tokenizer, generate_kwargs, attached, stored, batch_size, likelihoods=likelihoods)
    found = {i: answer for batch in run.answers(rows) for i, answer in batch}
    answers = [found[i] for i in range(len(rows))]
    sequences = [each for answer in answers for each in answer.sequences]
    return Generated(
        run.texts(sequences),
        [each.ids for each in sequences],
        [answer.reused / max(1, answer.tokens) for answer in answers],
        run.not_stored,
        [each.likelihoods for each in sequences],
        [run.finish(each) for each in sequences],
        [answer.restored for answer in answers],
    )


class Generation:
    """Generation with one model and the same settings for all prompts."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Mapping[str, Any],
        attached: Attached = nullcontext,
        stored: StoredResults | None = None,
        batch_size: int = 32,
        *,
        likelihoods: bool = False,
    ) -> None:
        """settings: for `model.generate`. Other arguments as of `generate`."""
        self._model, self._tokenizer, self._attached, self._stored = model, tokenizer, attached, stored
        self._batch_size, self._likelihoods = batch_size, likelihoods
        self._whole = bool(getattr(model.config, "is_encoder_decoder", False))
        self._padding = padding_id(model, tokenizer)
        self._arguments: dict[str, Any] = {"pad_token_id": self._padding, **settings}
        self._ends = _ends(model, self._arguments)
        self._settings = answer_settings(model, self._arguments)
        self._arguments = _with_criteria(tokenizer, self._arguments)
        most = settings.get("max_new_tokens") or getattr(model.generation_config, "max_new_tokens", None) or 20
        self._most = int(most)
        self.not_stored = self._settings if stored is not None and isinstance(self._settings, str) else ""
        """Reason why the answers computed so far are not stored; "" if they are, or without a store."""

    def texts(self, sequences: Sequence[Answered]) -> list[str]:
        """Return the texts of answers, without special tokens."""
        return [self._tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in sequences]

    def finish(self, answer: Answered) -> str:
        """Return why an answer ended: "end", "length" or "stop"; see `Generated`."""
        if answer.finished:
            return "end"
        return "length" if len(answer.ids) - self._whole >= self._most else "stop"

    def answers(self, rows: Sequence[list[int]], *, stored_only: bool = False) -> Iterator[list[tuple[int, Answer]]]:
        """Yield the answers of rows of token ids with the numbers of the rows: the stored ones first, then each batch.

        Equal rows whose answers are stored are computed once. stored_only: yield the stored answers only.
        """
        if not rows:
            return
        stored, settings = self._stored, self._settings
        if stored is None or isinstance(settings, str):
            if not stored_only:
                yield from self._computed(rows, None)
            return
        audit = partial(
            audit_answers, stored.answers.evidence, settings, model=self._model, logits=self._logits,
            compute=self._computed,
        )  # fmt: skip
        words = vocabulary_of(self._model)
        compute = None if stored_only else self._computed
        found = set[int]()
        for batch in answered(rows, settings, stored.answers, compute, audit, words, self._may_store):
            stored.counters.answers_stored += sum(answer.stored for _, answer in batch)
            found.update(i for i, _ in batch)
            yield batch
        rest = [i for i in range(len(rows)) if i not in found]
        if rest and not stored_only:  # they may not be stored
            for batch in self._computed([rows[i] for i in rest], None):
                yield [(rest[i], answer) for i, answer in batch]

    def _may_store(self, rows: Sequence[Sequence[int]]) -> bool:
        """Return whether answers to these rows may be stored. Trials of the model show it, at the first call."""
        named = self._named(rows)
        self.not_stored = named if isinstance(named, str) else self.not_stored
        return not isinstance(named, str)

    def _computed(self, rows: Sequence[list[int]], most: int | None) -> Iterator[list[tuple[int, Answer]]]:
        """Yield the model's answers of rows of token ids, batch by batch. most: limit of new tokens, or None."""
        model, whole, settings = self._model, self._whole, self._settings
        probe = partial(_first_steps, model, padding=self._padding, left=not whole)
        batching = batching_of(model, "generate", probe)
        if isinstance(settings, str) and PADDING in settings:  # without padding, no answer depends on other prompts
            batching = replace(batching, padded=False)
        limits = self._arguments if most is None else {**self._arguments, "max_new_tokens": most}
        wanted = self._likelihoods or (self._stored is not None and not isinstance(self._named(rows), str))
        greedy = wanted and isinstance(settings, AnswerSettings) and settings.greedy
        order, lengths = prefix_order(rows), list(map(len, rows))
        for chosen in batching.batches(order, lengths, self._batch_size, most or self._most):
            recorded = GreedyLikelihoods()
            more = {"logits_processor": [recorded]} if greedy else {}
            with torch.inference_mode(), self._attached(), restored_shares() as shares, self._counted():
                ids, mask = padded([rows[i] for i in chosen], self._padding, model.device, left=not whole)
                output = model.generate(input_ids=ids, attention_mask=mask, **limits, **more)
            output = output if isinstance(output, Tensor) else output.sequences
            written = list(output[:, 0 if whole else ids.shape[1] :].cpu().numpy())
            written = [up_to_end(each, self._ends, int(whole)) for each in written]
            of_each = len(written) // len(chosen)
            inputs = [rows[i] for i in chosen for _ in range(of_each)]
            if greedy:
                likely = recorded.of([len(each) - whole for each in written])
                likely = [np.append(np.zeros(int(whole), np.float32), each) for each in likely]
            elif wanted:
                likely = self._likelihoods_of(inputs, written)
            else:
                likely = [np.zeros(0, np.float32)] * len(written)
            done = [len(each) > whole and int(each[-1]) in self._ends for each in written]
            answers = list(map(Answered, written, likely, done))
            known = shares[0] if shares and len(shares[0]) == len(chosen) else [0.0] * len(chosen)
            yield [
                (row, Answer([[each] for each in answers[of_each * i : of_each * (i + 1)]], 0, known[i]))
                for i, row in enumerate(chosen)
            ]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the seconds of a batch as the model's, but for those that the prefix cache counts."""
        if self._stored is None:
            yield
            return
        counters, began = self._stored.counters, time.perf_counter()
        prefix = counters.prefix
        before = prefix.model_seconds + prefix.lookup_seconds + prefix.store_seconds
        yield
        inside = prefix.model_seconds + prefix.lookup_seconds + prefix.store_seconds - before
        counters.model_seconds += max(0.0, time.perf_counter() - began - inside)

    def _likelihoods_of(self, prompts: Sequence[list[int]], answers: Sequence[Ids]) -> list[Floats32]:
        """Return the log-likelihoods of the tokens of answers, float32 [tokens] each, with a further forward."""
        if self._whole:
            likely = []
            for pair in zip(prompts, answers, strict=True):  # one by one, since there are logits of every token
                (table,) = self._logits([(pair[0], pair[1])])
                ids = torch.from_numpy(pair[1][1:, None])
                chosen = torch.log_softmax(torch.from_numpy(table), -1).gather(1, ids)[:, 0].numpy()
                likely.append(np.append(np.zeros(1, np.float32), chosen)[: len(pair[1])])
            return likely
        rows = [([*prompt, *ids.tolist()], len(ids)) for prompt, ids in zip(prompts, answers, strict=True)]
        found = {i: values for i, values, _ in computed_likelihoods(
            self._model, self._tokenizer, rows, self._batch_size, self._attached
        )}  # fmt: skip
        return [found[i].astype(np.float32) for i in range(len(rows))]

    def _named(self, rows: Sequence[Sequence[int]]) -> AnswerSettings | str:
        """Return the settings that name answers, or the reason why answers to these rows cannot be stored."""
        settings = self._settings
        if isinstance(settings, str) or self._whole:
            return settings
        batching = scoring_batches(self._model, self._tokenizer)
        if not (batching.causal and batching.padded):
            return "the model reads later tokens, or padding, so an answer depends on the other prompts of a batch"
        return batching.reach.refusal(max(map(len, rows), default=0) + settings.most) or settings

    def _logits(self, pairs: list[tuple[list[int], Ids]]) -> list[Floats32]:
        with torch.inference_mode():  # not through the cache, whose prefixes may be of another model, too
            return _answer_logits(self._model, pairs, self._padding)


def _with_criteria(tokenizer: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `model.generate` with stop strings as a stopping criterion, which needs the tokenizer."""
    texts = arguments.get("stop_strings")
    if not texts:
        return arguments
    others = {name: value for name, value in arguments.items() if name not in ("stop_strings", "tokenizer")}
    given = arguments.get("stopping_criteria") or []
    return {**others, "stopping_criteria": StoppingCriteriaList([*given, StopStringCriteria(tokenizer, texts)])}


def run_plainly(model: Any, tokenizer: Any, rows: Sequence[list[int]], new: int) -> None:
    """Run a model without a cache on rows of token ids in one batch, to measure it; generate `new` tokens, or none."""
    padding, whole = padding_id(model, tokenizer), bool(getattr(model.config, "is_encoder_decoder", False))
    with torch.inference_mode():
        if not new:
            logits_of(model, forward_call(model, rows, padding) | {"logits_to_keep": 1})
            return
        ids, mask = padded(rows, padding, model.device, left=not whole)
        model.generate(
            input_ids=ids, attention_mask=mask, pad_token_id=padding, do_sample=False, num_beams=1, max_new_tokens=new,
            min_new_tokens=new,
        )  # fmt: skip


def check_settings(model: Any, tokenizer: Any, settings: Mapping[str, Any], rows: int = 1) -> None:
    """ConfigError when `model.generate` refuses these settings; it is tried with one token for a batch of `rows`."""
    padding = padding_id(model, tokenizer)
    ids, mask = padded([[padding]] * rows, padding, model.device)
    arguments = _with_criteria(tokenizer, {"pad_token_id": padding, **settings})
    most = arguments.get("max_new_tokens", 1)
    if type(most) is int and most > 1:
        arguments |= {"max_new_tokens": 1, "min_new_tokens": None}
    device = model.device
    try:
        with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.generate(input_ids=ids, attention_mask=mask, **arguments)
    except Exception as error:  # a model may have code of its own
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the model refuses these settings of generation: {reason}") from error


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers of prompts that were given as token ids, without a text.

    answers: of each prompt; None where no answer is stored and none was to be computed. finish: for each prompt, why
    the first answer ended; "" without an answer. texts: of the first answers. not_stored: see `Generated`.
    """

    answers: list[Answer | None]
    texts: list[str]
    finish: list[str]
    not_stored: str

    @classmethod
    def of(cls, generation: Generation, answers: list[Answer | None], not_stored: str) -> Answers:
        """Make the answers. generation: that made them."""
        firsts = [None if each is None else each.sequences[0] for each in answers]
        texts = iter(generation.texts([first for first in firsts if first is not None]))
        return cls(
            answers,
            ["" if first is None else next(texts) for first in firsts],
            ["" if first is None else generation.finish(first) for first in firsts],
            not_stored,
        )


class GreedyLikelihoods(LogitsProcessor):
    """Logits processor that changes nothing and records the log-likelihood of each step's largest logit."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._steps.append(scores.amax(-1) - torch.logsumexp(scores, -1))
        return scores

    def of(self, lengths: Sequence[int]) -> list[Floats32]:
        """Return the log-likelihoods of the first tokens of each row, float32 [length] each."""
        table = torch.stack(self._steps, 1).float().cpu().numpy()
        return [row[:length] for row, length in zip(table, lengths, strict=True)]


def _ends(model: Any, arguments: dict[str, Any]) -> frozenset[int]:
    """Return the ids of the tokens that end an answer, with these arguments of `model.generate`."""
    given = arguments.get("eos_token_id")
    if given is not None:
        return frozenset(map(int, given if isinstance(given, list | tuple) else [given]))
    config = arguments.get("generation_config")
    return (end_tokens(config) if config is not None else frozenset()) or end_tokens(model.generation_config)


def _answer_logits(model: Any, pairs: list[tuple[list[int], Ids]], padding: int) -> list[Floats32]:
    """Return the logits that decide the tokens of some answers, float32 [tokens, vocabulary] each, in one batch.

    Of an encoder-decoder, the first id is the decoder's start token, which no logits decide.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        call = forward_call(model, [prompt for prompt, _ in pairs], padding)
        starts = [ids[:-1].tolist() or ids.tolist() for _, ids in pairs]
        call["decoder_input_ids"], call["decoder_attention_mask"] = padded(starts, padding, model.device, left=False)
        table = logits_of(model, call).float().cpu().numpy()
        return [rows[: len(ids) - 1] for rows, (_, ids) in zip(table, pairs, strict=True)]
    rows = [[*prompt, *ids.tolist()][:-1] for prompt, ids in pairs]
    counts = [len(ids) for _, ids in pairs]
    of = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(counts))
    columns = torch.cat([len(prompt) - 1 + torch.arange(len(ids)) for prompt, ids in pairs])
    table = logits_at(model, forward_call(model, rows, padding), of, columns).float().cpu().numpy()
    return np.split(table, np.cumsum(counts)[:-1])


def _first_steps(model: Any, rows: list[list[int]], *, padding: int, left: bool) -> list[Tensor]:
    """Return logits of the first two generated tokens of each row, run in one batch; [2, vocabulary] each."""
    ids, mask = padded(rows, padding, model.device, left=left)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pad_token_id=padding,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return list(torch.stack(output.logits, 1))
