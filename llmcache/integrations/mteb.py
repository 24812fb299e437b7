"""MTEB models whose texts go through a cache. Needs the extra `mteb`."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mteb.models import CrossEncoderWrapper, MultiVectorWrapper, SentenceTransformerEncoderWrapper, SparseEncoderWrapper
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from llmcache.cache import LLMCache
from llmcache.calls.sentence_transformers import drop_in
from llmcache.errors import ConfigError
from llmcache.model.identity import Identity, identify

_WRAPPERS: dict[type[Any], type[Any]] = {
    SentenceTransformer: SentenceTransformerEncoderWrapper,
    CrossEncoder: CrossEncoderWrapper,
    SparseEncoder: SparseEncoderWrapper,
    MultiVectorEncoder: MultiVectorWrapper,
}
"""Classes of sentence-transformers, and the classes that make MTEB models of them."""


@contextmanager
def cached_model(store: str | os.PathLike[str], model: Any, **settings: Any) -> Iterator[Any]:
    """Open a store for an MTEB model, and close it after the evaluation: `with cached_model(...) as model:`.

    One store serves all tasks and models: each model has a namespace of its own, named after the model and its
    identity. A text that several tasks have with the same prompt is computed once.

    store: its folder, which is created if there is none.
    model: a SentenceTransformer, CrossEncoder, SparseEncoder or MultiVectorEncoder, or a model of `mteb.get_model` that
        computes with one of these.
    settings: further arguments of `LLMCache.open`.
    Yields a model of MTEB's own class for `mteb.evaluate`, with the metadata and scores of the given one. Its attribute
    `cache` is the open cache. ConfigError for any other model, or the name of one.
    """
    kind = _kind(model)
    given = model if kind is None else _WRAPPERS[kind](model)
    # looked at after MTEB has made its model, which may change prompts and the head of a CrossEncoder
    computing: Any = getattr(given, "model", None)
    computing = getattr(computing, "uncached_model", computing)  # of a drop-in
    kind = _kind(computing)
    if kind is None or not hasattr(given, "mteb_model_meta"):
        raise ConfigError(
            f"a {type(model).__name__} computes with no model of sentence-transformers, so its results are not cached; "
            "give one of mteb.get_model that does, a SentenceTransformer, CrossEncoder, SparseEncoder or "
            "MultiVectorEncoder"
        )
    settings.setdefault("namespace", _namespace(identify(computing)))
    with LLMCache.open(store, computing, **settings) as cache:
        made = copy.copy(given)
        made.model = drop_in(cache, kind)
        made.cache = cache
        yield made


def _kind(model: Any) -> type[Any] | None:
    return next((kind for kind in _WRAPPERS if isinstance(model, kind)), None)


def _namespace(identity: Identity) -> str:
    """Return the name of a model's namespace, which differs between models with different results."""
    name = "".join(one for one in os.path.basename(identity.name) if one.isprintable())
    return f"mteb-{name[:100]}-{identity.digest.hex()[:16]}"
