"""Sentence embeddings from stored token embeddings: the modules of a SentenceTransformer after its Transformer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize, Pooling

from llmcache.arrays import Floats32
from llmcache.errors import ConfigError
from llmcache.model.tokens import TokenRows, batch, tokenise

_OF_EMBEDDINGS = (Dense, Dropout, LayerNorm, Normalize)
"""Modules after the Pooling that read nothing but the sentence embedding."""
_TRIED = ("a", "some words of a second text, which is longer")  # texts that show whether the tail gives the same


class Tail:
    """Modules of a SentenceTransformer after its Transformer, such as Pooling, Dense and Normalize."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self._works: bool | None = None

    @property
    def works(self) -> bool:
        """True if these modules alone make the model's embeddings of its token embeddings; tried once, on two texts."""
        if self._works is None:
            self._works = self._tried()
        return self._works

    @torch.inference_mode()
    def vectors(self, states: Sequence[Floats32], rows: TokenRows) -> torch.Tensor:
        """Return sentence embeddings, [n, width], on the model's device.

        states: token embeddings of each document, float32 [tokens, width]. rows: token ids of the same documents.
        """
        inputs = batch(self._model.tokenizer, self._model.device, rows, range(len(states)))
        table = np.zeros((*inputs["input_ids"].shape, states[0].shape[1]), np.float32)
        for place, state in zip(table, states, strict=True):
            place[: len(state)] = state
        features = {**inputs, "token_embeddings": torch.from_numpy(table).to(self._model.device, self._model.dtype)}
        for module in list(self._model.children())[1:]:
            features = module(features)
        vectors: torch.Tensor = features["sentence_embedding"]
        return vectors

    @torch.inference_mode()
    def of_means(self, means: Floats32) -> Floats32:
        """Return embeddings of means of token embeddings, float32 [n, width]: as the modules after a mean Pooling give.

        means: float32 [n, width of the token embeddings].
        """
        vectors = torch.from_numpy(means).to(self._model.device, self._model.dtype)
        features = {"sentence_embedding": vectors}
        for module in list(self._model.children())[2:]:
            features = module(features)
        embeddings: Floats32 = features["sentence_embedding"].float().cpu().numpy()
        return embeddings

    def check_mean(self) -> None:
        """ConfigError unless the model averages the token embeddings of its Transformer."""
        kinds = [type(module).__name__ for module in self._model.children()]
        pooling = list(self._model.children())[1] if len(kinds) > 1 else None
        if not isinstance(pooling, Pooling) or pooling.pooling_mode not in ("mean", ("mean",), ["mean"]):
            how = f"pools by {pooling.pooling_mode!r}" if isinstance(pooling, Pooling) else f"consists of {kinds}"
            raise ConfigError(
                f"late chunks are means of token embeddings, and this model {how}; leave out late=True, or use a model "
                "with mean pooling"
            )
        if not self.works:
            raise ConfigError(
                "the modules of this model after its Transformer do not give its embeddings when they run alone, so "
                "chunks cannot be pooled from stored token embeddings; leave out late=True"
            )

    @torch.inference_mode()
    def _tried(self) -> bool:
        model, modules = self._model, list(self._model.children())
        right = getattr(model.tokenizer, "padding_side", "right") == "right"
        if len(modules) < 2 or type(modules[0]) is not Transformer or type(modules[1]) is not Pooling or not right:
            return False
        if any(type(module) not in _OF_EMBEDDINGS for module in modules[2:]):  # may act on some texts only
            return False
        training, rows = model.training, tokenise(model, _TRIED, None, None)
        model.eval()
        try:
            features = model(batch(model.tokenizer, model.device, rows, range(len(_TRIED))))
            states = [
                state[: len(ids)].float().cpu().numpy()
                for state, ids in zip(features["token_embeddings"], rows.ids, strict=True)
            ]
            own, ours = features["sentence_embedding"].float(), self.vectors(states, rows).float()
        except Exception:  # a module of the user that needs other inputs
            return False
        finally:
            model.train(training)
        return own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-5, atol=1e-6)
