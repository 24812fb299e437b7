"""Embedding recycling as in s2re: states after one fixed layer are stored on disk, the layers above computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmcache.arrays import Floats32
from llmcache.bench.harness.rounds import Opened, Task
from llmcache.bench.layers import attention
from llmcache.errors import ConfigError
from llmcache.model.tokens import batch, tokenise


@contextmanager
def cut_layer(task: Task, folder: Path) -> Iterator[Opened]:
    """Contender: states after the middle layer of a BERT-like model, float32, appended to one memory-mapped file.

    Equal texts hit. New texts of a batch run through the layers below the cut as a batch of their own. ConfigError for
    models without BERT's layers.
    """
    trunk: Any = task.model.transformers_model
    blocks = getattr(getattr(trunk, "encoder", None), "layer", None)
    if blocks is None:
        raise ConfigError(f"a fixed cut layer needs BERT's layers, and {type(trunk).__name__} has others")
    cut, size = len(blocks) // 2, int(trunk.config.hidden_size)
    path, table = folder / "states.f32", folder / "table.npz"
    path.touch()
    places: dict[str, tuple[int, int]] = {}  # text -> its first row of the file, its tokens
    if table.exists():
        with np.load(table) as file:
            places = {t: (int(a), int(n)) for t, a, n in zip(file["texts"], file["first"], file["tokens"], strict=True)}
    computed = 0

    def below(inputs: dict[str, torch.Tensor], hidden: torch.Tensor | None) -> torch.Tensor:
        state = trunk.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs.get("token_type_ids"))
        for block in blocks[:cut]:
            state = block(state, hidden)
        result: torch.Tensor = state
        return result

    def append(file: Any, texts: Sequence[str], states: torch.Tensor, lengths: Sequence[int]) -> None:
        for text, state, n in zip(texts, states.cpu().numpy(), lengths, strict=True):
            places[text] = (file.tell() // (4 * size), n)
            file.write(np.ascontiguousarray(state[:n], np.float32).data)

    @torch.inference_mode()
    def answer(texts: Sequence[str]) -> Floats32:
        nonlocal computed
        rows = tokenise(task.model, list(texts), None, None)
        outputs: Floats32 = np.empty((len(texts), size), np.float32)
        order = np.argsort(-rows.lengths, kind="stable").tolist()
        with path.open("ab") as file:
            for start in range(0, len(order), task.batch_size):
                chosen = order[start : start + task.batch_size]
                new = list({texts[i]: i for i in chosen if texts[i] not in places}.values())
                if new:
                    inputs = batch(task.model.tokenizer, task.model.device, rows, new)
                    states = below(inputs, attention(inputs["attention_mask"], trunk))
                    append(file, [texts[i] for i in new], states, [int(rows.lengths[i]) for i in new])
                    file.flush()
                    computed += len(new)
                stored = np.memmap(path, np.float32, "r").reshape(-1, size)
                inputs = batch(task.model.tokenizer, task.model.device, rows, chosen)
                state = torch.zeros(*inputs["input_ids"].shape, size)
                for place, i in enumerate(chosen):
                    first, n = places[texts[i]]
                    state[place, :n] = torch.from_numpy(stored[first : first + n].copy())
                state = state.to(task.model.device)
                hidden = attention(inputs["attention_mask"], trunk)
                for block in blocks[cut:]:
                    state = block(state, hidden)
                inputs["token_embeddings"] = state
                for module in list(task.model)[1:]:
                    inputs = module(inputs)
                outputs[chosen] = inputs["sentence_embedding"].float().cpu().numpy()
        return outputs

    yield Opened(answer, lambda: computed)
    first, tokens = np.array(list(places.values()), np.int64).reshape(-1, 2).T
    np.savez(table, texts=np.array(list(places), dtype=np.str_), first=first, tokens=tokens)
