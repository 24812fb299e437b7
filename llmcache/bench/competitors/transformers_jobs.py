"""Language-model jobs with transformers alone: batches of prompts of similar length, and nothing kept between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.decoders.prompts import padded

ScoredIds: TypeAlias = tuple[list[int], int]
"""Token ids of a prompt with a choice, and the number of its last tokens that belong to the choice."""


class Batched:
    """Causal model that answers prompts in batches sorted by length, the longest first.

    batch_size: rows in a batch.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        ends = tokenizer.eos_token_id
        self._padding = 0 if ends is None else int(ends)

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each prompt."""
        return [list(ids) for ids in self._tokenizer(list(prompts))["input_ids"]]

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        return [order[at : at + self._batch_size] for at in range(0, len(order), self._batch_size)]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], new: int) -> list[str]:
        """Return the greedy answer of each prompt: `model.generate` in batches padded on the left.

        new: most tokens of an answer.
        """
        rows, texts = self.ids(prompts), [""] * len(prompts)
        for batch in self._batches(rows):
            ids, mask = padded([rows[i] for i in batch], self._padding, self._model.device)
            written = self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=self._padding
            )
            answers = self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, answers, strict=True):
                texts[i] = text
        return texts

    def scored_ids(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[list[ScoredIds]]:
        """Return the token ids of each choice, tokenised together with its prompt.

        A choice follows white space as it is, other prompts after one blank. It begins at the first token that differs
        from those of the prompt without the white space at its end.
        """
        found = []
        for prompt, stem, some in zip(prompts, self.ids([each.rstrip() for each in prompts]), choices, strict=True):
            between, rows = "" if prompt[-1:].isspace() else " ", list[ScoredIds]()
            for ids in self.ids([f"{prompt}{between}{choice}" for choice in some]):
                same = min(len(stem), len(ids))
                first = next((i for i in range(same) if stem[i] != ids[i]), same)
                rows.append((ids, len(ids) - first))
            found.append(rows)
        return found

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """Return the log-likelihoods of the choices of each prompt, in nats, float64 [choices].

        One row for each prompt and choice, padded on the right. The head computes the columns of the choices only.
        """
        by_prompt = self.scored_ids(prompts, choices)
        pairs = [pair for rows in by_prompt for pair in rows]
        rows, totals = [ids[:-1] for ids, _ in pairs], np.zeros(len(pairs))
        for batch in self._batches(rows):
            ids, mask = padded([rows[i] for i in batch], self._padding, self._model.device, left=False)
            firsts = [len(rows[i]) - pairs[i][1] for i in batch]
            columns = sorted({c for i, first in zip(batch, firsts, strict=True) for c in range(first, len(rows[i]))})
            logits = self._model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=torch.tensor(columns)
            ).logits
            for j, (i, first) in enumerate(zip(batch, firsts, strict=True)):
                kept = logits[j, [columns.index(column) for column in range(first, len(rows[i]))]]
                wanted = torch.tensor(pairs[i][0][first + 1 :])[:, None]
                totals[i] = float(torch.log_softmax(kept.float(), -1).gather(1, wanted).double().sum())
        return np.split(totals, np.cumsum([len(some) for some in by_prompt])[:-1])
