"""Settings of a cache: a frozen dataclass, validated at creation and saved with the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from llmcache.indexes.errors import ConfigError
from llmcache.indexes.eviction.budget import Budget
from llmcache.indexes.files.folder import Reading
from llmcache.indexes.format.codec import DTYPES
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.search.vector_index import needs_faiss

Index = Literal[
    "auto",
    "flat",
    "ivf-flat",
    "ivf-sq8",
    "ivf-fp16",
    "ivf-pq",
    "hnsw",
    "cagra",
    "binary-flat",
    "binary-ivf",
    "binary-hnsw",
    "torch",
    "torch-fp16",
]
Fingerprint = Literal["mean", "mean+attention"]
Projection = Literal["pca", "simhash", "none"]
Stored = Literal["auto", "float32", "float16", "bfloat16", "int8"]
StoredPrefixes = Literal["auto", "float16", "bfloat16", "int8"]

Reuse = Literal["deepest", "layer", "exact"]

Policy = Literal["lru", "lfu", "decay", "cost", "divergence"]

OnMismatch = Literal["error", "bypass"]

LEAST_BYTES = 1 << 20
"""Lowest `max_bytes`: manifests alone would fill a smaller store."""
HIGHEST_TAU = 0.9999
"""Highest `tau`: equal fingerprints give 0.9999997 to 1.0000002 in float32. Repeats are found by key, not by tau."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings that affect the answers of a cache and how it stores them. All have defaults that need no change.

    The settings that most users meet.

    tau: lowest cosine similarity at which a neighbour's output is served for a new document, in (0, 0.9999]. None
        disables near matches without calibration: only repeats are reused, and results are the model's own.
    layers: layers with banks: "output", the model's final output only; "all"; or numbers of layers, from 0. A bank
        stores the states of its layer, float [tokens, width] per document, which is large.
    dtype: storage type of activations; "auto" is the model's own, which is lossless. float16 and int8 take less space
        and round the outputs of hits. For KV blocks of decoders there is `prefix_dtype`.
    device: device of the index search, "cpu" or "cuda".
    max_bytes: largest size of the store's folder on disk; None: no limit. Whole segments are evicted from a full store;
        entries that cannot fit are computed and not stored.

    Storage and memory.

    policy: eviction policy, a name in llmcache.indexes.eviction.policies.POLICIES.
    commit_seconds: longest time that entries wait to be committed; 256 MiB of waiting entries are committed earlier.
    background: True lets a thread write the commits that are due during a call, while the model goes on; this needs
        memory for two batches of 256 MiB. A store with max_bytes commits synchronously, since it must evict first.
    reading: access to stored activations: "mmap" shares them between processes; "pread" is safe when other processes
        truncate files, and on network disks; "auto" maps on local disks.
    device_bytes, pinned_bytes: sizes of the caches of outputs in the memory of the model's GPU and in page-locked host
        memory, from which `encode(convert_to_tensor=True)` gathers hits on the device. 0: none.
    stand_aside: True stops reusing a bank while loading its entries takes longer than computing them; a few lookups go
        on to notice a change. False: stored entries are always reused.
    prefix_block: tokens per KV block, for decoders; 0 stores none.
    prefix_dtype: storage type of KV blocks; "auto" is the model's own, which is lossless. "float16", "bfloat16" and
        "int8", with a scale for each head and token, take less space and round what is computed after a restored
        prefix. Each type has a bank of its own in the namespace, and finds only what was stored with it. For a model of
        16 bits there is only "int8" beside its own type.
    answers: True stores the finished answers of `generate` where the settings always give the same answer, and the
        log-likelihoods of `score` and `perplexity`; the same prompts then compute nothing. False stores none.

    Calibrated near reuse.

    near_repeats: number of requests for one document that calibrated near reuse answers in one opening, at least 1.
        After that the document is computed and stored. With 1 the calibrated bound over distinct documents also holds
        over requests, however often documents repeat. None: no limit; the bound holds over distinct documents only.
    audit_share: share of calibrated near hits that are recomputed to check the budget; it rises while audits or
        a shift of the traffic indicate more drift. 0: none.
    audit_time: time limit of audits, as a share of the seconds that near hits have saved; above it the share does not
        rise above audit_share.
    recalibrate: True repeats a calibration in the background when the cache has doubled.

    Audits of exact hits.

    exact_audits: number of exact hits, per bank and model, on entries of earlier openings that are recomputed and
        compared before other hits are trusted. 0: none.
    exact_audit_share: largest share of later exact hits that are recomputed at random. 0: none.
    exact_audit_time: time limit of random audits of exact hits, as a share of the seconds that hits have saved. There
        are also none while audits have taken 2 % of the seconds of all calls.
    on_mismatch: reaction to an exact hit whose recomputed output differs: "error" raises ModelMismatch in this and all
        later calls; "bypass" warns once, and the model answers everything. In both cases nothing is reused or stored
        any more in this opening.

    Advanced: look-up of near matches, with the variants of the paper.

    index: FAISS index over the fingerprints, or "torch" or "torch-fp16", an exact search in torch that needs no FAISS.
        "auto" chooses by the number of entries, and "torch" on a GPU that FAISS does not support.
    fingerprint: features of an input: "mean", the mean of its token embeddings, or "mean+attention", the same plus
        the mean with each token weighted by the attention it receives (see llmcache.model.features).
    projection: compression of fingerprints: "pca" (half-whitened), "simhash" (bits), or "none".
    dim: components of the PCA, or bits of the SimHash.
    reuse: activation that a near match reuses: "deepest", the deepest one stored for the neighbour; or "layer", the
        state of the deepest layer whose own tau is reached, computing the later layers (the paper's rule; both give the
        neighbour's output). "exact" turns near matches off, also in a calibrated store.
    layer_tau: tau of single layers, by number, for reuse="layer"; other layers use `tau`.
    """

    tau: float | None = None
    fingerprint: Fingerprint = "mean"
    projection: Projection = "pca"
    dim: int = 128
    index: Index = "auto"
    dtype: Stored = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    device_bytes: int = 0
    pinned_bytes: int = 0
    reading: Reading = "auto"
    layers: Literal["output", "all"] | tuple[int, ...] = "output"
    reuse: Reuse = "deepest"
    layer_tau: Mapping[int, float] = field(default_factory=dict)
    prefix_block: int = 16
    prefix_dtype: StoredPrefixes = "auto"
    answers: bool = True
    near_repeats: int | None = 1
    audit_share: float = 0.02
    audit_time: float = 0.25
    exact_audits: int = 4
    exact_audit_share: float = 1 / 2000
    exact_audit_time: float = 0.01
    on_mismatch: OnMismatch = "error"
    recalibrate: bool = True
    stand_aside: bool = True
    commit_seconds: float = 60.0
    background: bool = True
    max_bytes: int | None = None
    policy: Policy = "lru"

    def __repr__(self) -> str:
        changed = (one for one in fields(self) if getattr(self, one.name) != _default(one))
        return f"CacheConfig({', '.join(f'{one.name}={getattr(self, one.name)!r}' for one in changed)})"

    def __post_init__(self) -> None:
        for tau in (self.tau, *self.layer_tau.values()):
            if tau is not None and not 0.0 < tau <= HIGHEST_TAU:
                raise ConfigError(
                    f"tau is a cosine similarity in (0, {HIGHEST_TAU}], got {tau}; for repeats only, leave tau=None"
                )
        if self.layers not in ("output", "all") and not (self.layers and _are_layers(self.layers)):
            raise ConfigError(f'layers is "output", "all" or numbers of layers such as (4, 8), got {self.layers!r}')
        if not _are_layers(tuple(self.layer_tau)):
            raise ConfigError(f"layer_tau goes from numbers of layers to similarities, got {dict(self.layer_tau)!r}")
        if self.reuse == "layer" and self.layers == "output":
            raise ConfigError('reuse="layer" reuses states of layers: give layers="all" or numbers such as (4, 8)')
        if self.near_repeats is not None and (type(self.near_repeats) is not int or self.near_repeats < 1):
            raise ConfigError(f"near_repeats is a whole number of at least 1, or None, got {self.near_repeats!r}")
        if not 0 <= self.audit_share <= 1:
            raise ConfigError(f"audit_share is a share of near hits in [0, 1], got {self.audit_share}")
        if not self.audit_time >= 0:
            raise ConfigError(f"audit_time is a share of the seconds saved, at least 0, got {self.audit_time}")
        if type(self.exact_audits) is not int or self.exact_audits < 0:
            raise ConfigError(f"exact_audits is a whole number of hits, 0 for none, got {self.exact_audits!r}")
        if not 0 <= self.exact_audit_share <= 1:
            raise ConfigError(f"exact_audit_share is a share of exact hits in [0, 1], got {self.exact_audit_share}")
        if not self.exact_audit_time >= 0:
            raise ConfigError(
                f"exact_audit_time is a share of the seconds saved, at least 0, got {self.exact_audit_time}"
            )
        if type(self.prefix_block) is not int or not 0 <= self.prefix_block <= 1024:
            raise ConfigError(f"prefix_block is a whole number of tokens from 0 to 1024, got {self.prefix_block!r}")
        for name, allowed in (
            ("fingerprint", get_args(Fingerprint)),
            ("projection", get_args(Projection)),
            ("index", get_args(Index)),
            ("dtype", ("auto", *DTYPES)),
            ("prefix_dtype", get_args(StoredPrefixes)),
            ("device", ("cpu", "cuda")),
            ("reading", get_args(Reading)),
            ("policy", get_args(Policy)),
            ("reuse", get_args(Reuse)),
            ("on_mismatch", get_args(OnMismatch)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if type(self.dim) is not int or not 2 <= self.dim <= 4096:
            raise ConfigError(f"dim is a whole number from 2 to 4096, got {self.dim!r}")
        if self.projection == "simhash" and self.dim % 8:
            raise ConfigError(f"a SimHash has whole bytes: dim must be a multiple of 8, got {self.dim}")
        binary = self.index.startswith("binary-")
        if self.index != "auto" and binary != (self.projection == "simhash"):
            raise ConfigError(
                f"index {self.index!r} does not go with projection {self.projection!r}: the binary-* indexes are for "
                "simhash, the others for pca and none"
            )
        for name in ("device_bytes", "pinned_bytes"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ConfigError(f"{name} is a whole number of bytes, 0 for none, got {getattr(self, name)!r}")
        if not self.commit_seconds > 0:
            raise ConfigError(f"commit_seconds must be above 0, got {self.commit_seconds}")
        if self.max_bytes is not None and (type(self.max_bytes) is not int or self.max_bytes < LEAST_BYTES):
            raise ConfigError(
                f"max_bytes is a whole number of bytes from {LEAST_BYTES:,} on, or None, got {self.max_bytes!r}"
            )

    @property
    def near(self) -> NearChoice:
        """Index settings of the banks."""
        return NearChoice(self.index, self.projection, self.dim, self.device)

    @property
    def needs_faiss(self) -> bool:
        """True if the index needs FAISS."""
        return needs_faiss(self.index, self.device, binary=self.projection == "simhash")

    @property
    def budget(self) -> Budget | None:
        """Size limit of the store; None without one."""
        return None if self.max_bytes is None else Budget(self.max_bytes, self.policy)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> CacheConfig:
        """Read settings saved with a store, ignoring unknown ones of a later version. ConfigError if unreadable."""
        known = {setting.name for setting in fields(cls)}
        settings = {name: value for name, value in raw.items() if name in known}
        try:
            if isinstance(settings.get("layers"), list):  # JSON has neither tuples nor integer keys
                settings["layers"] = tuple(settings["layers"])
            if "layer_tau" in settings:
                settings["layer_tau"] = {int(layer): tau for layer, tau in settings["layer_tau"].items()}
            return cls(**settings)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the settings saved with the store cannot be read: {error}") from None


def _are_layers(numbers: object) -> bool:
    """Return True for a tuple of layer numbers."""
    return isinstance(numbers, tuple) and all(type(number) is int and number >= 0 for number in numbers)


def _default(setting: Field[Any]) -> object:
    """Return the default value of a setting."""
    return setting.default if setting.default is not MISSING else {}
