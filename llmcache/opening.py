"""What has to be settled before a cache is opened: model, settings, and whose entries a namespace holds."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from sentence_transformers import SentenceTransformer
from torch.nn import Module

from llmcache.banks.namespaces import admit, secret_check
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError, SnapshotDamaged, UntrustedSnapshot
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.store import Store
from llmcache.model.batching import Sentences, compute, token_embedding
from llmcache.model.compiled import refuse_compiled
from llmcache.model.features import feature_width
from llmcache.model.identity import (
    Identity,
    identify,
    load,
    mismatch,
)
from llmcache.model.loading import packaged_model
from llmcache.model.tokens import check_inputs


def loaded(model: Module | str | os.PathLike[str], tokenizer: Any = None) -> tuple[Module, Identity]:
    if isinstance(model, Module):
        refuse_compiled(model)
        if isinstance(model, SentenceTransformer):
            check_inputs(model)
        return model, identify(model, tokenizer=tokenizer)
    name = os.fspath(model)
    try:
        found, identity = load(name)
    except (OSError, ValueError, ImportError) as error:
        folder = packaged_model(name)
        if folder is None:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"the model {name!r} cannot be loaded: {reason}") from error
        found, identity = load(folder)  # the hub cannot be reached, and a package carries this model
    check_inputs(found)
    return found, replace(identity, name=name)


def model_name(store: Store, namespace: str) -> str:
    """Name or path of the model whose entries the namespace holds."""
    if store.trust == "untrusted":
        raise UntrustedSnapshot(f"{store.folder.path} is not trusted to say which model to load; give the model")
    space = store.namespace(namespace)
    if space is None:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(f"the store has no namespace {namespace!r} (it has {known}); say which model to use")
    return Identity.from_json(space.identity).name


def settled(
    store: Store,
    namespace: str,
    identity: Identity,
    config: CacheConfig | None,
    model: Module,
    secret: bytes,
) -> CacheConfig:
    """The settings to use, once it is certain that the namespace is this model's."""
    if store.namespace(namespace) is None and store.read_only:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(
            f"{store.folder.path} has no namespace {namespace!r} (it has {known}), and none can be made in a store "
            "that is only read; give the name of one that is there, or open the store where it can be written"
        )
    if store.namespace(namespace) is None:
        store.declare(namespace, identity.to_json(), (config or CacheConfig()).to_json(), secret_check(secret))
    space = store.namespace(namespace)
    assert space is not None
    admit(space, namespace, secret)  # another process may have made it at the same time, with another one
    stored = Identity.from_json(space.identity)
    if stored.digest != identity.digest:
        raise mismatch(stored, identity)
    saved = CacheConfig.from_json(space.config)
    if config is None:
        return saved
    for name in ("fingerprint", "dtype"):
        if getattr(config, name) != getattr(saved, name):
            raise ConfigError(
                f"the namespace {namespace!r} was made with {name}={getattr(saved, name)!r}, asked for is "
                f"{getattr(config, name)!r}; keep the first, or start a fresh namespace"
            )
    return config


def check_width(stored: BankFacts, fresh: BankFacts) -> None:
    if (stored.width, stored.rank, stored.feature_width) != (fresh.width, fresh.rank, fresh.feature_width):
        raise SnapshotDamaged(
            f"the store says that this model gives vectors of {stored.width} numbers from {stored.feature_width} "
            f"features, it gives {fresh.width} from {fresh.feature_width}; do not use this store"
        )


def fresh_bank(model: SentenceTransformer, config: CacheConfig) -> BankFacts:
    """Facts of an empty output bank for this model; its width and dtype are those of one computed vector."""
    sentences = Sentences(model)
    probe = next(compute(sentences, sentences.tokenise(["a"], None, None), 1, None))
    dtype = str(model.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    width = feature_width(token_embedding(model), config.fingerprint)
    return BankFacts(dtype, probe.outputs.shape[1], 1, width)
