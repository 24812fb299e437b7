"""Generation with a causal model or an encoder-decoder, by plain calls of `model.generate`.

A cache takes part through the context manager `attached`, which is entered around the calls of the model, and through
its stored answers. Without them the results are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcache.arrays import Floats32
from llmcache.decoders.answer_audits import Ids, audit_answers
from llmcache.decoders.answer_settings import AnswerSettings, answer_settings, end_tokens
from llmcache.decoders.likelihoods import scoring_batches
from llmcache.decoders.prompts import (
    Attached,
    check_batch_size,
    forward_call,
    logits_of,
    padded,
    padding_id,
    prompt_ids,
)
from llmcache.decoders.stored_answers import StoredResults, answered, up_to_end
from llmcache.model.row_batches import batching_of
from llmcache.records import check_texts


@dataclass(frozen=True, slots=True)
class Generated:
    """Generated texts.

    ids: int64 [new tokens] for each prompt (and each returned sequence), as `model.generate` returns them, but without
        the padding after an end token.
    reused: for each prompt, the share of its new tokens that came from stored answers, in [0, 1].
    not_stored: reason why answers of these settings are not stored; "" if they are, or without a store.
    """

    texts: list[str]
    ids: list[Ids]
    reused: list[float] = field(default_factory=list)
    not_stored: str = ""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    attached: Attached = nullcontext,
    stored: StoredResults | None = None,
    batch_size: int = 32,
    **generate_kwargs: Any,
) -> Generated:
    """Run `model.generate` on prompts, in batches in the given order, padded on the left.

    Prompts of an encoder-decoder are padded on the right, since its encoder counts positions from the left. Where
    padding changes the generated tokens (recurrent models), only prompts of equal length share a batch.
    stored: stored answers, which are used, continued and extended where the settings always give the same answer.
    generate_kwargs: for `model.generate`. With num_return_sequences there are that many answers per prompt.
    Returns texts without special tokens, and ids. A prompt that is too long for the model raises the model's own error.
    """
    check_batch_size(batch_size)
    check_texts(prompts, "prompts")
    whole = bool(getattr(model.config, "is_encoder_decoder", False))
    rows = [list(tokenizer(prompt)["input_ids"]) if whole else prompt_ids(tokenizer, prompt) for prompt in prompts]
    if not rows:
        return Generated([], [])
    padding = padding_id(model, tokenizer)
    batching = batching_of(model, "generate", lambda batch: _first_steps(model, batch, padding, left=not whole))
    more = generate_kwargs.get("max_new_tokens") or getattr(model.generation_config, "max_new_tokens", None) or 20
    arguments = {"pad_token_id": padding, **generate_kwargs}
    ends = _ends(model, arguments)

    def compute(inputs: list[list[int]], most: int | None) -> list[list[Ids]]:
        answers: dict[int, list[Ids]] = {}
        limits = arguments if most is None else {**arguments, "max_new_tokens": most}
        with torch.inference_mode(), attached():
            for chosen in batching.batches(range(len(inputs)), list(map(len, inputs)), batch_size, most or int(more)):
                ids, mask = padded([inputs[i] for i in chosen], padding, model.device, left=not whole)
                output = model.generate(input_ids=ids, attention_mask=mask, **limits)
                output = output if isinstance(output, Tensor) else output.sequences
                written = list(output[:, 0 if whole else ids.shape[1] :].cpu().numpy())
                written = [up_to_end(each, ends, int(whole)) for each in written]
                of_each = len(written) // len(chosen)
                answers |= {row: written[of_each * i : of_each * (i + 1)] for i, row in enumerate(chosen)}
        return [answers[row] for row in range(len(inputs))]

    settings = _settings(model, tokenizer, arguments, max(map(len, rows))) if stored is not None else ""
    if stored is None or isinstance(settings, str):
        sequences = [ids for of_prompt in compute(rows, None) for ids in of_prompt]
        reason = settings if stored is not None and isinstance(settings, str) else ""
        return Generated(_texts(tokenizer, sequences), sequences, [0.0] * len(rows), reason)

    def logits(pairs: list[tuple[list[int], Ids]]) -> list[Floats32]:
        with torch.inference_mode(), attached():
            return _answer_logits(model, pairs, padding)

    audit = partial(audit_answers, stored.answers.evidence, settings, model=model, logits=logits, compute=compute)
    found = answered(rows, settings, stored.answers, compute, audit)
    stored.counters.answers_stored += sum(answer.stored for answer in found)
    sequences = [ids for answer in found for ids in answer.sequences]
    reused = [answer.reused / max(1, sum(map(len, answer.sequences))) for answer in found]
    return Generated(_texts(tokenizer, sequences), sequences, reused)


def _texts(tokenizer: Any, sequences: Sequence[Ids]) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]


def _settings(model: Any, tokenizer: Any, arguments: dict[str, Any], longest: int) -> AnswerSettings | str:
    """Return the settings that name answers, or the reason why answers to prompts of these lengths cannot be stored."""
    settings = answer_settings(model, arguments)
    if isinstance(settings, str) or getattr(model.config, "is_encoder_decoder", False):
        return settings
    batching = scoring_batches(model, tokenizer)
    if not (batching.causal and batching.padded):
        return "the model reads later tokens, or padding, so an answer depends on the other prompts of a batch"
    return batching.reach.refusal(longest + settings.most) or settings


def _ends(model: Any, arguments: dict[str, Any]) -> frozenset[int]:
    """Return the ids of the tokens that end an answer, with these arguments of `model.generate`."""
    given = arguments.get("eos_token_id")
    if given is not None:
        return frozenset(map(int, given if isinstance(given, list | tuple) else [given]))
    config = arguments.get("generation_config")
    return (end_tokens(config) if config is not None else frozenset()) or end_tokens(model.generation_config)


def _answer_logits(model: Any, pairs: list[tuple[list[int], Ids]], padding: int) -> list[Floats32]:
    """Return the logits that decide each token of some answers, float32 [tokens, vocabulary] each, in one batch."""
    if getattr(model.config, "is_encoder_decoder", False):
        call = forward_call(model, [prompt for prompt, _ in pairs], padding)
        starts = [ids[:-1].tolist() or ids.tolist() for _, ids in pairs]
        call["decoder_input_ids"], call["decoder_attention_mask"] = padded(starts, padding, model.device, left=False)
        table = logits_of(model, call).float().cpu().numpy()
        # the first id is the decoder's start token, which no logits decide
        return [_with_start(rows[: len(ids) - 1], ids) for rows, (_, ids) in zip(table, pairs, strict=True)]
    rows = [[*prompt, *ids.tolist()][:-1] for prompt, ids in pairs]
    table = logits_of(model, forward_call(model, rows, padding)).float().cpu().numpy()
    return [each[len(prompt) - 1 :][: len(ids)] for each, (prompt, ids) in zip(table, pairs, strict=True)]


def _with_start(logits: Floats32, ids: Ids) -> Floats32:
    """Return logits with a row before them that is highest at the start token."""
    first = np.zeros((1, logits.shape[1]), np.float32)
    first[0, ids[0]] = 1
    return np.concatenate([first, logits])


def _first_steps(model: Any, rows: list[list[int]], padding: int, *, left: bool) -> list[Tensor]:
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
