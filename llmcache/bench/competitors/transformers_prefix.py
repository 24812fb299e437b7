"""transformers' own reuse of a beginning: its keys and values are kept by the caller, who has to know where it ends."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from llmcache.decoders.generation import padded


class Kept:
    """Keys and values of beginnings, in memory, by the beginning's text."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._kept: dict[str, tuple[list[int], Any]] = {}

    @torch.inference_mode()
    def keep(self, beginning: str) -> tuple[list[int], Any]:
        """Tokens of the beginning, and its keys and values for one row; computed when it is asked for first."""
        if beginning not in self._kept:
            ids = self._tokenizer(beginning)["input_ids"]
            values = self._model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
            self._kept[beginning] = (ids, values)
        return self._kept[beginning]

    def logits(self, prompts: Sequence[tuple[str, str]]) -> torch.Tensor:
        """Of the token after each (beginning, rest), [n, vocabulary]; rows that begin alike in a pass of their own."""
        parts = []
        for beginning, group in groupby(prompts, key=lambda one: one[0]):
            parts.append(self._group(beginning, [rest for _, rest in group]))
        return torch.cat(parts)

    @torch.inference_mode()
    def _group(self, beginning: str, rests: Sequence[str]) -> torch.Tensor:
        tokens, values = self.keep(beginning)
        rows = [self._tokenizer(beginning + rest)["input_ids"] for rest in rests]
        shortest = min(len(tokens), *(len(row) - 1 for row in rows))
        # its last token may be another where a text follows
        count = next((i for i in range(shortest) if any(row[i] != tokens[i] for row in rows)), shortest)
        ids, mask = padded([row[count:] for row in rows], 0, "cpu")
        whole = torch.cat([torch.ones(len(rows), count, dtype=mask.dtype), mask], dim=1)
        values = copy.deepcopy(values)  # a pass adds to what it is given
        if count < len(tokens):
            values.crop(count - len(tokens))
        values.batch_repeat_interleave(len(rows))
        found = self._model(
            input_ids=ids,
            attention_mask=whole,
            position_ids=(whole.cumsum(1) - 1).clamp(min=0)[:, count:],
            past_key_values=values,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = found.logits[:, 0]
        return logits
