"""Methods of `LLMCache` that score pairs of texts with a CrossEncoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from sentence_transformers import CrossEncoder

from llmcache.calls.base import CacheParts
from llmcache.calls.sentence_transformers import drop_in
from llmcache.concurrency.calls import call
from llmcache.encoding.postprocess import scores
from llmcache.errors import ConfigError
from llmcache.records import is_table

_ABSENT: Any = object()  # not None, which is no pair of texts either


class PairMethods(CacheParts):
    """Score and rank pairs of texts through the cache."""

    @call
    def predict(
        self,
        inputs: Any = _ABSENT,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **others: Any,
    ) -> Any:
        """Score pairs of texts as `CrossEncoder.predict` does, with the same arguments, result type and order.

        Logits are stored; activations are applied to what is returned. Pairs are ordered: (a, b) and (b, a) have two
        entries. The model answers directly, without the cache, when inputs are not pairs of texts, or for a list of
        devices, a `pool`, or unknown keywords; see `encode`.
        Returns scores as `CrossEncoder.predict`. ConfigError for a model that is no CrossEncoder, a data frame or
        table, or a pair with fewer or more than two sides, or without one of them; TypeError without inputs. Whatever
        else is no pair of texts goes to the model, whose errors are passed on.
        """
        self._check_open()
        if not isinstance(self.model, CrossEncoder):
            raise ConfigError(f"a {type(self.model).__name__} scores no pairs; open the cache with a CrossEncoder")
        self._check_model()
        model = cast(Any, self.model)
        inputs = others.pop("sentences", inputs)
        if inputs is _ABSENT:
            raise TypeError("predict() needs inputs: a pair of texts or a list of pairs")
        if inputs is None:
            raise ConfigError("predict takes a pair of texts or a list of pairs, got None; give (query, document)")
        if is_table(inputs):
            raise ConfigError(
                f"predict takes pairs of texts, got a {type(inputs).__name__}; give list(zip(queries, documents))"
            )
        single = bool(model.is_singular_input(inputs))
        plain = inputs.tolist() if isinstance(inputs, np.ndarray) else inputs
        given = [plain] if single else list(plain)
        reason = _bypass_reason(given, single, device, pool, others)
        if reason is not None or not given:
            self._bypass(reason, len(given), "predict")
            return CrossEncoder.predict(
                model, inputs if single else given, prompt_name=prompt_name, prompt=prompt, batch_size=batch_size,
                show_progress_bar=show_progress_bar, activation_fn=activation_fn, apply_softmax=apply_softmax,
                convert_to_numpy=convert_to_numpy, convert_to_tensor=convert_to_tensor, device=device, pool=pool,
                chunk_size=chunk_size, **others,
            )  # fmt: skip
        pairs = [(pair[0], pair[1]) for pair in given]
        answers = self._answered(pairs, prompt_name, prompt, None, batch_size, show_progress_bar, device)
        return scores(
            answers.outputs, model, single=single, activation=activation_fn, softmax=bool(apply_softmax),
            convert_to_numpy=convert_to_numpy, convert_to_tensor=convert_to_tensor,
        )  # fmt: skip

    def as_cross_encoder(self) -> CrossEncoder:
        """Return the model as a CrossEncoder whose `predict` and `rank` go through this cache, for other libraries.

        It shares all attributes with the model: settings, modules, device. ConfigError for another kind of model.
        """
        return cast(CrossEncoder, drop_in(cast(Any, self), CrossEncoder))

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Rank documents for a query as `CrossEncoder.rank` does: best first, each with `corpus_id` and `score`.

        ConfigError for a model that is no CrossEncoder; ValueError for a CrossEncoder with several labels.
        """
        labels = getattr(self.model, "num_labels", 1)
        if labels != 1:
            raise ValueError(f"rank() needs a CrossEncoder with one label, this has {labels}; use predict()")
        if isinstance(documents, str):
            raise ConfigError("rank() takes a list of documents, got one text; give [text]")
        if query is None:
            raise ConfigError("rank() takes a query, got None; give a text")
        documents = list(documents)
        values = self.predict(
            [(query, document) for document in documents], prompt_name, prompt, batch_size, show_progress_bar,
            activation_fn, convert_to_tensor=True, device=device, pool=pool, chunk_size=chunk_size,
        ).tolist()  # fmt: skip
        ranked = [
            {"corpus_id": i, "score": score, **({"text": documents[i]} if return_documents else {})}
            for i, score in enumerate(values)
        ]
        return sorted(ranked, key=lambda entry: entry["score"], reverse=True)[:top_k]


def _bypass_reason(pairs: Sequence[Any], single: bool, device: Any, pool: Any, others: dict[str, Any]) -> str | None:
    """Return why the bank cannot answer these pairs; None if it can. single: True if one pair was given, not a list.

    ConfigError when a pair has fewer or more than two sides, or lacks one.
    """
    if pool is not None or isinstance(device, list):
        return "it computes in a pool of processes"
    if others:
        return f"the argument {min(others)!r} is not known"
    for place, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence):
            return "its inputs are not all pairs of texts"
        if len(pair) != 2 or any(side is None for side in pair):
            what = "the input" if single else f"input {place}"
            seen = "a side that is None" if len(pair) == 2 else f"{len(pair)} side{'s' * (len(pair) != 1)}"
            raise ConfigError(
                f"{what} is no pair of texts: it has {seen}; give (query, document), or a list of such pairs"
            )
        if not (isinstance(pair[0], str) and isinstance(pair[1], str)):
            return "its inputs are not all pairs of texts"
    return None
