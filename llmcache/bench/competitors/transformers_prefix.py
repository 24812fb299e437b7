"""transformers' own prefix reuse: the caller keeps keys and values, and has to know where the prefix ends."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from llmcache.decoders.prompts import padded


class Kept:
    """Prefix cache in memory: keys and values by the text of the prefix."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._kept: dict[str, tuple[list[int], Any]] = {}

    @torch.inference_mode()
    def keep(self, prefix: str) -> tuple[list[int], Any]:
        """Return the tokens of a prefix, and its keys and values for one row; computed at first use."""
        if prefix not in self._kept:
            ids = self._tokenizer(prefix)["input_ids"]
            values = self._model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
            self._kept[prefix] = (ids, values)
        return self._kept[prefix]

    def logits(self, prompts: Sequence[tuple[str, str]]) -> torch.Tensor:
        """Compute the next-token logits of (prefix, rest) prompts, [n, vocabulary], one pass per prefix."""
        parts = []
        for prefix, group in groupby(prompts, key=lambda prompt: prompt[0]):
            parts.append(self._group(prefix, [rest for _, rest in group]))
        return torch.cat(parts)

    @torch.inference_mode()
    def _group(self, prefix: str, rests: Sequence[str]) -> torch.Tensor:
        tokens, values = self.keep(prefix)
        rows = [self._tokenizer(prefix + rest)["input_ids"] for rest in rests]
        shortest = min(len(tokens), *(len(row) - 1 for row in rows))
        # the last tokens of a prefix may differ where a text follows
        count = next((i for i in range(shortest) if any(row[i] != tokens[i] for row in rows)), shortest)
        ids, mask = padded([row[count:] for row in rows], 0, "cpu")
        whole = torch.cat([torch.ones(len(rows), count, dtype=mask.dtype), mask], dim=1)
        values = copy.deepcopy(values)  # a pass extends its key/value cache in place
        if count < len(tokens):
            values.crop(count - len(tokens))
        values.batch_repeat_interleave(len(rows))
        output = self._model(
            input_ids=ids,
            attention_mask=whole,
            position_ids=(whole.cumsum(1) - 1).clamp(min=0)[:, count:],
            past_key_values=values,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, 0]
        return logits
