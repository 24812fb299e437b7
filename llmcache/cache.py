"""LLMCache: the one object a user holds."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch.nn import Module
from tqdm.auto import tqdm

from llmcache.architecture import Trunk, find_trunk
from llmcache.attachment import Attachment, refuse_compiled
from llmcache.config import CacheConfig
from llmcache.encoding import finished
from llmcache.errors import ConfigError, FaissMissing, LLMCacheError, SnapshotDamaged, UntrustedSnapshot
from llmcache.execution import Call, Execution, Progress, compute, nothing, token_embedding
from llmcache.fingerprint import feature_width, features
from llmcache.identity import Identity, identify, load, mismatch
from llmcache.indexes.bank import Bank
from llmcache.indexes.manifest import BankFacts
from llmcache.indexes.signatures import secret_from_file
from llmcache.indexes.store import Store
from llmcache.indexes.trust import Trust
from llmcache.matching import Answers
from llmcache.namespace import admit, checked_name, resolved_secret, secret_check
from llmcache.passes import Anatomy
from llmcache.pipeline import Result, Source, results
from llmcache.prompts import ROLES, resolve
from llmcache.states import LayerBanks, bank_name
from llmcache.statistics import Counters, Statistics, statistics
from llmcache.storing import Storing
from llmcache.tokens import check_inputs, tokenise

log = logging.getLogger("llmcache")

LAYER = "output"
CHUNK = 8192  # documents that `run` reads, answers and gives out together


class LLMCache:
    """A model with a store behind it: repeats cost a look-up, the rest is computed once and kept.

    One per process or thread; after a fork open it again in the child.
    """

    def __init__(
        self,
        store: Store,
        model: Module,
        identity: Identity,
        config: CacheConfig,
        namespace: str,
        secret: bytes = b"",
    ) -> None:
        """Takes finished parts; `LLMCache.open` makes them."""
        self.model = model
        self.identity = identity
        self.config = config
        self.namespace = namespace
        self._store = store
        self._secret = secret
        store.budget = config.budget
        self._counters = Counters()
        self._storing = Storing(store, config, self._counters)
        self._attachments: WeakKeyDictionary[Module, Attachment] = WeakKeyDictionary()
        self._encoding: Execution | None = None
        if isinstance(model, SentenceTransformer):
            bank = store.bank(namespace, LAYER, lambda: fresh_bank(model, config), config.near)
            if store.trust != "own":
                _check_width(bank.facts, fresh_bank(model, config))
            inside = nullcontext if config.layers == "output" else self.attached
            self._encoding = Execution(model, identity.digest, config, self._storing, bank, secret, inside)
        self._opened = True

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: Module | str | os.PathLike[str] | None = None,
        *,
        tokenizer: Any = None,
        config: CacheConfig | None = None,
        namespace: str = "default",
        tau: float | None = None,
        secret: bytes | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        trust: Trust = "auto",
        key: bytes | None = None,
        key_file: str | os.PathLike[str] | None = None,
        min_generation: int = 0,
        allow_untrusted: bool = False,
    ) -> Self:
        """Open the store in this folder, or make one, for this model.

        model: a SentenceTransformer, or the name or path of one; None loads the one the store was made with. Any other
            transformers model, or a module with a list of layers, is used through `attached`, `generate` and `score`.
        tokenizer: of a transformers model, for `generate` and `score`; a SentenceTransformer has its own.
        config: for a new namespace, its settings. For an old one they are saved with it; what is given here holds for
            this opening, except `fingerprint` and `dtype`, which cannot change.
        namespace: entries of different models live in different namespaces of one store.
        tau: for this opening, instead of the one in the settings.
        secret, secret_file: what goes into the keys of this namespace, at least 32 bytes, or the file that holds it.
            Whoever has another one, or none, is refused.
        trust, key, key_file, min_generation, allow_untrusted: who vouches for the store, see `Store.open`. What nobody
            vouches for is only read, with the model given, and only equal token ids match.
        ModelMismatch when the namespace belongs to another model; ConfigError for settings that cannot be had;
        UntrustedSnapshot when nobody vouches for the store.
        """
        if importlib.util.find_spec("faiss") is None:
            raise FaissMissing
        checked_name(namespace)
        salt = resolved_secret(secret, secret_file)
        if key is None and key_file is not None:
            key = secret_from_file(key_file, "the key that signs a store")
        given = (
            None if model is None else _loaded(model, tokenizer)
        )  # first: a model that cannot be had leaves no store behind
        store = Store.open(
            path,
            create=given is not None and not allow_untrusted,
            trust=trust,
            key=key,
            min_generation=min_generation,
            allow_untrusted=allow_untrusted,
        )
        try:
            space = store.namespace(namespace)
            if space is not None:  # before a model is loaded
                admit(space, namespace, salt)
            loaded, identity = given or _loaded(_name(store, namespace))
            settled = _settled(store, namespace, identity, config, loaded, salt)
            if tau is not None:
                settled = replace(settled, tau=tau)
            if store.trust == "untrusted" and settled.tau is not None:
                log.warning("%s is not trusted: near matches are off", store.folder.path)
                settled = replace(settled, tau=None)
            store.folder.reading = settled.reading
            opened = cls(store, loaded, identity, settled, namespace, salt)
            opened.tokenizer = getattr(loaded, "tokenizer", None) if tokenizer is None else tokenizer
            return opened
        except BaseException:
            store.close()
            raise

    # -- embedding ------------------------------------------------------------------------------------------

    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        **others: Any,
    ) -> Any:
        """`SentenceTransformer.encode`, with the same arguments, result type and order.

        What the output bank cannot hold goes to the model itself, past the cache (`stats().counters.bypassed`):
        inputs that are not texts, `output_value` other than "sentence_embedding", a list of devices, `pool` and other
        keywords.
        """
        self._check_open()
        model: Any = self.model
        single = model.is_singular_input(inputs)
        texts = [inputs] if single else inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
        role = others.pop("task") if others.get("task") in ROLES else None
        past_it = others or isinstance(device, list) or output_value != "sentence_embedding"
        if past_it or not texts or not all(isinstance(text, str) for text in texts):
            self._counters.bypassed += len(texts)
            past: Any = getattr(model, f"encode_{role}" if role else "encode")
            return past(
                inputs, prompt_name=prompt_name, prompt=prompt, batch_size=batch_size, output_value=output_value,
                show_progress_bar=show_progress_bar, precision=precision, convert_to_numpy=convert_to_numpy,
                convert_to_tensor=convert_to_tensor, device=device, normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim, **others,
            )  # fmt: skip
        if device is not None:
            model.to(device)  # as `encode` does
        if batch_size <= 0:
            raise ConfigError(f"batch_size must be a positive integer, got {batch_size}")
        resolved = self._prompt(role, prompt_name, prompt)
        with tqdm(total=len(texts), desc="Documents", disable=not show_progress_bar) as bar:

            def advance(answered: int, _: int) -> None:
                bar.update(answered)

            answers = self._execution.answers(Call(texts, None, resolved, role, batch_size, advance))
        return finished(
            answers.outputs, model, single=single, precision=precision, convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor, normalize=normalize_embeddings, truncate_dim=truncate_dim,
        )  # fmt: skip

    def encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **others: Any
    ) -> Any:
        """`SentenceTransformer.encode_query`. A text as query and as document never share an entry."""
        return self.encode(inputs, prompt_name, prompt, task="query", **others)

    def encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **others: Any
    ) -> Any:
        """`SentenceTransformer.encode_document`. A text as query and as document never share an entry."""
        return self.encode(inputs, prompt_name, prompt, task="document", **others)

    def run(
        self,
        documents: Iterable[Source],
        *,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        chunk: int = CHUNK,
        progress: Progress = nothing,
    ) -> Iterator[Result]:
        """One result per document, in order, each saying where it came from.

        documents: texts, `Document`s, or mappings with "text" and perhaps "id"; any iterable, read `chunk` at a time,
            which bounds the memory. role: None, "query" or "document".
        progress: called with the numbers of documents answered, and of these computed, as they are.
        Results hold the model's own vector: not cut to truncate_dim, and normalised only if the model does it.
        """
        resolved = self._prompt(role, prompt_name, prompt)

        def answer(texts: Sequence[str], ids: Sequence[str]) -> Answers:
            self._check_open()
            return self._execution.answers(Call(texts, ids, resolved, role, batch_size, progress))

        return results(documents, answer, self._bank, LAYER, chunk)

    def _prompt(self, role: str | None, name: str | None, prompt: str | None) -> str | None:
        return resolve(self.model.prompts, self.model.default_prompt_name, role=role, name=name, prompt=prompt)

    # -- any model ------------------------------------------------------------------------------------------

    def attached(self, model: Module | None = None, *, stack: str | None = None) -> Attachment:
        """A context in which a model's own forward goes by the banks: `with cache.attached(model): model(**inputs)`.

        model: None is the cache's own; another may share the trunk of it up to some layer, and then shares the banks.
        stack: name of the list of layers in the model, where it is not found by itself.
        ConfigError when the model has no layers that can be skipped, or is compiled.
        """
        self._check_open()
        model = self.model if model is None else model
        refuse_compiled(model)
        trunk = find_trunk(model, stack)
        if trunk.module not in self._attachments:
            own = model is self.model and (trunk.module is model or isinstance(model, SentenceTransformer))
            keeper = _TrunkIdentity(trunk, self.identity if own else identify(trunk.module))
            self._attachments[trunk.module] = Attachment(
                trunk,
                lambda anatomy: self._layer_banks(trunk.module, keeper, anatomy),
                lambda count: chosen_layers(self.config.layers, count),
                keeper.renew,
                self._counters,
            )
        return self._attachments[trunk.module]

    def _layer_banks(self, trunk: Module, keeper: _TrunkIdentity, anatomy: Anatomy) -> LayerBanks:
        embedding: Any = token_embedding(trunk) if self.config.reuse == "layer" else None
        width = feature_width(embedding, self.config.fingerprint) if embedding is not None else 0
        floats = (one.dtype for one in trunk.parameters() if one.is_floating_point())
        own = str(next(floats, anatomy.dtype)).removeprefix("torch.")
        facts = BankFacts(own if self.config.dtype == "auto" else self.config.dtype, anatomy.width, 2, width)

        def features_of(tokens: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
            if embedding is None:
                return np.zeros((len(tokens), 0), np.float32)
            return features(embedding, tokens, self.config.fingerprint)

        def open_bank(layer: int) -> Bank:
            bank = self._store.bank(self.namespace, bank_name(layer), lambda: facts, self.config.near)
            found = bank.facts
            if (found.dtype, found.width, found.feature_width) != (facts.dtype, facts.width, facts.feature_width):
                raise ConfigError(
                    f"the bank of layer {layer} holds {found.dtype} states of width {found.width} with "
                    f"{found.feature_width} features, this model's would be {facts.dtype} of width {facts.width} with "
                    f"{facts.feature_width}; use another namespace"
                )
            return bank

        layers = chosen_layers(self.config.layers, anatomy.layers)
        return LayerBanks(layers, open_bank, keeper.up_to, self._storing, self._secret, features_of)

    # -- the store ------------------------------------------------------------------------------------------

    @property
    def _execution(self) -> Execution:
        if self._encoding is None:
            raise ConfigError(
                f"embeddings come from a SentenceTransformer; this cache has a {type(self.model).__name__}: use "
                "attached(), generate() or score()"
            )
        return self._encoding

    @property
    def _bank(self) -> Bank:
        return self._execution.bank

    def __len__(self) -> int:
        """Entries in the output bank, those not committed yet included."""
        return len(self._bank)

    def commit(self) -> None:
        """Make what was computed durable and visible to other processes.

        StoreFull or StoreFenced when a write fails. Everything committed before is safe, and the cache goes on
        serving what it has and computing the rest, without storing.
        """
        self._check_open()
        self._storing.commit()

    def reload(self) -> None:
        """Find from now on what other processes have committed. What is not committed here is kept.

        ModelMismatch when the namespace belongs to another model by now.
        """
        self._check_open()
        self._store.reload()

    def rebuild(self) -> None:
        """Fit the projection and build the FAISS index again, over all entries, and commit both."""
        self._check_open()
        self._store.commit()
        self._bank.near.rebuild()
        self.commit()

    @property
    def width(self) -> int:
        """Numbers in one output vector."""
        return self._bank.facts.width

    def stats(self) -> Statistics:
        """What was reused and what it saved, since this opening, and what the store holds."""
        return statistics(self._store, self._counters, index=self._bank.near.kind if self._encoding else None)

    def close(self) -> None:
        """Commit and close. Closing twice is fine."""
        if not self._opened:
            return
        try:
            if self._store.writable:
                self.commit()
        finally:
            self._opened = False
            self._store.close()

    def _check_open(self) -> None:
        if not self._opened:
            raise LLMCacheError("the cache is closed; open it again with LLMCache.open")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except LLMCacheError as second:  # the first error is the one to show
            log.warning("%s", second)


def _loaded(model: Module | str | os.PathLike[str], tokenizer: Any = None) -> tuple[Module, Identity]:
    if isinstance(model, Module):
        refuse_compiled(model)
        return model, identify(model, tokenizer=tokenizer)
    try:
        return load(os.fspath(model))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the model {os.fspath(model)!r} cannot be loaded: {reason}") from error


def _name(store: Store, namespace: str) -> str:
    """Name or path of the model whose entries the namespace holds."""
    if store.trust == "untrusted":
        raise UntrustedSnapshot(f"{store.folder.path} is not trusted to say which model to load; give the model")
    space = store.namespace(namespace)
    if space is None:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(f"the store has no namespace {namespace!r} (it has {known}); say which model to use")
    return Identity.from_json(space.identity).name


def _settled(
    store: Store,
    namespace: str,
    identity: Identity,
    config: CacheConfig | None,
    model: Module,
    secret: bytes,
) -> CacheConfig:
    """The settings to use, once it is certain that the namespace is this model's."""
    if store.namespace(namespace) is None:
        if isinstance(model, SentenceTransformer):
            check_inputs(model)
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


def _check_width(stored: BankFacts, fresh: BankFacts) -> None:
    if (stored.width, stored.rank, stored.feature_width) != (fresh.width, fresh.rank, fresh.feature_width):
        raise SnapshotDamaged(
            f"the store says that this model gives vectors of {stored.width} numbers from {stored.feature_width} "
            f"features, it gives {fresh.width} from {fresh.feature_width}; do not use this store"
        )


class _TrunkIdentity:
    """The identity of an attached trunk, which changes with its weights."""

    def __init__(self, trunk: Trunk, identity: Identity) -> None:
        self._trunk, self._identity = trunk, identity

    def up_to(self, layer: int) -> bytes:
        layers = len(self._identity.layers)  # fewer than there are where a block is used again and again
        return self._identity.up_to(min(layer, layers - 1)) if layers else self._identity.digest

    def renew(self) -> None:
        identity = identify(self._trunk.module)
        if identity.layers != self._identity.layers or identity.attention != self._identity.attention:
            log.warning("the weights of the attached model have changed: what they gave before is not reused")
        self._identity = identity


def chosen_layers(layers: str | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Numbers of the layers that have banks, of `count`; ConfigError for one that is not there."""
    if layers == "output":
        return (count - 1,)
    if isinstance(layers, str):
        return tuple(range(count))
    if wrong := [layer for layer in layers if layer >= count]:
        raise ConfigError(f"there is no layer {wrong[0]}: the model has {count}, numbered from 0 to {count - 1}")
    return tuple(sorted(set(layers)))


def fresh_bank(model: SentenceTransformer, config: CacheConfig) -> BankFacts:
    """Facts of an empty output bank for this model; its width and dtype are those of one computed vector."""
    probe = next(compute(model, tokenise(model, ["a"], None, None), 1, None))
    dtype = str(model.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    width = feature_width(token_embedding(model), config.fingerprint)
    return BankFacts(dtype, probe.outputs.shape[1], 1, width)
