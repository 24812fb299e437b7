"""Open the parts of a cache: the store, the model, its identity, and the settings of the namespace."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.base.model import BaseModel
from torch.nn import Module

from llmcache.arrays import Floats32
from llmcache.banks.namespaces import admit, checked_name, resolved_secret, secret_check
from llmcache.concurrency.reopening import Opening
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError, FaissMissing, SnapshotDamaged, UntrustedSnapshot
from llmcache.indexes.commits.signatures import secret_from_file
from llmcache.indexes.commits.trust import Trust
from llmcache.indexes.format.codec import DTYPES
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.store import Store
from llmcache.model.batching import Model, compute, token_embedding
from llmcache.model.compiled import refuse_compiled
from llmcache.model.encoders import ENCODERS, PairScores, SparseVectors
from llmcache.model.features import feature_width
from llmcache.model.identity import Identity, identify, load, mismatch
from llmcache.model.loading import KINDS, packaged_model
from llmcache.model.tokens import check_inputs
from llmcache.near.calibration.drift import Drift

log = logging.getLogger("llmcache")


@dataclass(frozen=True, slots=True)
class OpenedParts:
    """Parts of a new cache. arguments: those of `LLMCache.open`, for pickles and forked processes."""

    store: Store
    model: Module
    identity: Identity
    config: CacheConfig
    secret: bytes = field(repr=False)
    arguments: Opening


def open_parts(
    path: str | os.PathLike[str],
    model: Module | str | os.PathLike[str] | None = None,
    *,
    kind: str | None = None,
    tokenizer: Any = None,
    config: CacheConfig | None = None,
    namespace: str = "default",
    tau: float | None = None,
    drift: Drift | None = None,
    max_bytes: int | None = None,
    secret: bytes | None = None,
    secret_file: str | os.PathLike[str] | None = None,
    trust: Trust = "auto",
    key: bytes | None = None,
    key_file: str | os.PathLike[str] | None = None,
    min_generation: int = 0,
    allow_untrusted: bool = False,
    read_only: bool = False,
) -> OpenedParts:
    """Open or create the store and load the model. Arguments and errors are those of `LLMCache.open`."""
    if config is not None or not os.path.exists(path):  # else the settings are those saved with the store
        _check_faiss(config or CacheConfig())
    checked_name(namespace)
    salt = resolved_secret(secret, secret_file)
    if key is None and key_file is not None:
        key = secret_from_file(key_file, "the key that signs a store")
    # load the model first, so that no store is created for a model that cannot be loaded
    model_and_identity = None if model is None else loaded(model, tokenizer, kind)
    if model_and_identity is not None:  # nor for settings that do not fit the model
        asked = config or CacheConfig()
        check_near(model_and_identity[0], asked if tau is None else replace(asked, tau=tau))
    store = Store.open(
        path,
        create=model_and_identity is not None and not allow_untrusted and not read_only,
        trust=trust,
        key=key,
        min_generation=min_generation,
        allow_untrusted=allow_untrusted,
        read_only=read_only,
    )
    try:
        if store.writable and not store.folder.writable():
            log.warning("%s cannot be written: what is computed is not kept", store.folder.path)
            store.only_read("its folder cannot be written")
        space = store.namespace(namespace)
        if space is not None:  # check the secret before a model is loaded
            admit(space, namespace, salt)
        if model_and_identity is None:
            name, no_tokenizer, own = model_name(store, namespace)
            if kind not in (None, own):
                raise ConfigError(f"the namespace {namespace!r} has a {own or 'model'}, not a {kind}; leave out kind")
            model_and_identity = loaded(name, no_tokenizer, own)
        module, identity = model_and_identity
        settings = settled(store, namespace, identity, config, module, salt)
        _check_faiss(settings)
        if tau is not None:
            settings = replace(settings, tau=tau)
        if max_bytes is not None:
            settings = replace(settings, max_bytes=max_bytes)
        if store.trust == "untrusted" and settings.tau is not None:
            log.warning("%s is not trusted: near matches are off", store.folder.path)
            settings = replace(settings, tau=None)
        check_near(module, settings, saved=config is None and tau is None)
        store.folder.reading = settings.reading
        arguments = Opening(
            path=os.path.abspath(path),
            model=module if isinstance(model, Module) else identity.name if model is None else os.fspath(model),
            kind=kind,
            tokenizer=tokenizer,
            config=settings,
            namespace=namespace,
            drift=drift,
            secret_file=None if secret_file is None else os.path.abspath(secret_file),
            trust=trust,
            key=key,
            key_file=None if key_file is None else os.path.abspath(key_file),
            min_generation=min_generation,
            allow_untrusted=allow_untrusted,
            secret_in_memory="secret" if secret is not None else "key" if key and key_file is None else "",
        )
        return OpenedParts(store, module, identity, settings, salt, arguments)
    except BaseException:
        store.close()
        raise


def check_near(model: Module, config: CacheConfig, *, saved: bool = False) -> None:
    """ConfigError when these settings ask for near matches by similarity, which this model cannot have.

    saved: True if they are those of the namespace, False if they were given.
    """
    if (config.tau is None and not config.layer_tau) or config.reuse == "exact":
        return
    given = f"layer_tau={dict(config.layer_tau)}" if config.tau is None else f"tau={config.tau:g}"
    advice = "leave it out" if not saved else "it is saved with the namespace, so open with config=CacheConfig()"
    if isinstance(model, MultiVectorEncoder):
        raise ConfigError(
            f"{given} asks for near matches, and a MultiVectorEncoder has none: its outputs are the vectors of a "
            f"document's own tokens, and a similar document has other tokens; {advice}: repeats are reused without it"
        )
    if isinstance(model, CrossEncoder):
        raise ConfigError(
            f"{given} asks for near matches by similarity, which is 1 between the pairs (a, b) and (b, a), and a "
            f"CrossEncoder scores them differently; {advice}, and calibrate near reuse instead (cache.calibrate)"
        )


def _check_faiss(config: CacheConfig) -> None:
    """FaissMissing when these settings need FAISS, and it is not installed."""
    if config.needs_faiss and importlib.util.find_spec("faiss") is None:
        raise FaissMissing


def loaded(
    model: Module | str | os.PathLike[str], tokenizer: Any = None, kind: str | None = None
) -> tuple[Module, Identity]:
    """Load a model of this name or path, and return it with its identity. ConfigError when it cannot be loaded.

    kind: see `llmcache.model.loading.encoder_class`.
    """
    if isinstance(model, Module):
        model = getattr(model, "uncached_model", model)  # of a drop-in
        refuse_compiled(model)
        if isinstance(model, ENCODERS):
            check_inputs(model)
        return model, identify(model, tokenizer=tokenizer)
    name = os.fspath(model)
    if not name:
        raise ConfigError("the name of the model is empty; give the name or path of a model")
    try:
        module, identity = load(name, kind)
    except (OSError, ValueError, ImportError) as error:
        folder = packaged_model(name)
        if folder is None:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"the model {name!r} cannot be loaded: {reason.rstrip('.')}; give the path of its folder"
            ) from error
        module, identity = load(folder, kind)  # without network, from an installed package that contains the model
    check_inputs(module)
    return module, replace(identity, name=name)


def model_name(store: Store, namespace: str) -> tuple[str, None, str | None]:
    """Return the name or path of a namespace's model, no tokenizer, and the model's kind, as arguments of `loaded`.

    UntrustedSnapshot or ConfigError if the model is not known.
    """
    if store.trust == "untrusted":
        raise UntrustedSnapshot(f"{store.folder.path} is not trusted to say which model to load; give the model")
    space = store.namespace(namespace)
    if space is None:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(f"the store has no namespace {namespace!r} (it has {known}); say which model to use")
    identity = Identity.from_json(space.identity)
    return identity.name, None, next((kind for kind, name in KINDS.items() if name == identity.encoder), None)


def settled(
    store: Store,
    namespace: str,
    identity: Identity,
    config: CacheConfig | None,
    model: Module,
    secret: bytes,
) -> CacheConfig:
    """Return the settings of a namespace, which is created if new.

    config: settings of this opening; None for the saved ones. Errors as `LLMCache.open`.
    """
    if store.namespace(namespace) is None and store.read_only:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(
            f"{store.folder.path} has no namespace {namespace!r} (it has {known}), and none can be made in a store "
            "that is read-only; give the name of an existing namespace, or open the store with write access"
        )
    if store.namespace(namespace) is None:
        store.declare(namespace, identity.to_json(), (config or CacheConfig()).to_json(), secret_check(secret))
    space = store.namespace(namespace)
    assert space is not None
    admit(space, namespace, secret)  # another process may just have created it, with another secret
    stored = Identity.from_json(space.identity)
    if stored.digest != identity.digest:
        raise mismatch(stored, identity)
    saved = CacheConfig.from_json(space.config)
    if config is None:
        return saved
    for name in ("fingerprint", "dtype"):
        if getattr(config, name) != getattr(saved, name):
            raise ConfigError(
                f"the namespace {namespace!r} was made with {name}={getattr(saved, name)!r}, requested is "
                f"{getattr(config, name)!r}; keep the first, or start a fresh namespace"
            )
    return config


def check_width(stored: BankFacts, fresh: BankFacts) -> None:
    """SnapshotDamaged when the shapes in the store are not those of the model."""
    if (stored.width, stored.rank, stored.feature_width) != (fresh.width, fresh.rank, fresh.feature_width):
        raise SnapshotDamaged(
            f"the store says that this model gives vectors of {stored.width} numbers from {stored.feature_width} "
            f"features, it gives {fresh.width} from {fresh.feature_width}; do not use this store"
        )


def fresh_bank(model: BaseModel, runner: Model, config: CacheConfig) -> BankFacts:
    """Return the facts of an empty bank for the outputs of this model, with the width and dtype of a computed one."""
    text: Any = ("a", "b") if isinstance(runner, PairScores) else "a"
    probe = next(compute(runner, runner.tokenise([text], None, None), 1, None))
    dtype = _exact_dtype(model, probe.outputs[0]) if config.dtype == "auto" else config.dtype
    if dtype not in DTYPES:
        raise ConfigError(
            f"the model computes in {dtype}, which banks cannot store; open the cache with "
            'CacheConfig(dtype="float32"), which rounds the outputs of hits'
        )
    if isinstance(runner, SparseVectors):
        dtype = "float32"  # other types would round the dimensions
    width = feature_width(token_embedding(model), config.fingerprint)
    return BankFacts(dtype, probe.outputs[0].shape[-1], 2 if runner.matrices else 1, width)


def _exact_dtype(model: BaseModel, output: Floats32) -> str:
    """Return the model's dtype, or float32 where that would round its output, as with a head in float32."""
    values = torch.tensor(output)
    exact = torch.equal(values.to(model.dtype).float(), values)
    return str(model.dtype).removeprefix("torch.") if exact else "float32"
