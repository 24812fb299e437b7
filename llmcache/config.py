"""The settings of a cache: one frozen dataclass, checked once, saved with the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
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

Reuse = Literal["deepest", "layer", "exact"]

Policy = Literal["lru", "lfu", "decay", "cost", "divergence"]

OnMismatch = Literal["error", "bypass"]

LEAST_BYTES = 1 << 20
"""Below this, manifests alone would take up what is given."""
HIGHEST_TAU = 0.9999
"""A fingerprint and itself give 0.9999997 to 1.0000002 in float32; repeats are found by their keys, never by tau."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Everything that changes what a cache answers, and how it keeps it.

    tau: lowest cosine similarity at which a neighbour's output may be given for a new document, in (0, 0.9999].
        None: never; only repeats are reused, and results are the model's own.
    fingerprint: what stands for an input: "mean", the mean of its token embeddings, or "mean+attention", the same
        and the mean again with each token weighted by the attention it draws (llmcache.model.features says why).
    projection: how fingerprints are compressed: "pca" (half-whitened), "simhash" (bits), or "none".
    dim: components of the PCA, or bits of the SimHash.
    index: the FAISS index over the fingerprints, or "torch" or "torch-fp16", an exact search in torch that needs no
        FAISS; "auto" goes by the number of entries, and takes "torch" on a GPU that FAISS does not see.
    dtype: how activations are stored; "auto" is the model's own, which is lossless. float16 and int8 are smaller and
        round what a hit gives back.
    device: where the index is searched, "cpu" or "cuda".
    device_bytes, pinned_bytes: outputs kept beside the store's files, in the memory of the model's GPU and in
        page-locked memory of the host, so that `encode(convert_to_tensor=True)` gathers hits on the device. 0: none.
    reading: how stored activations are read: "mmap" shares them between processes, "pread" survives files that others
        shorten or that lie on a network; "auto" maps on local disks.
    commit_seconds: entries wait at most this long, or until 256 MiB of them wait, before they are made durable.
    background: whether commits that come due during a call are written by a thread, while the model goes on; up to two
        lots of 256 MiB are in memory then. A store with max_bytes waits for its commits, since room is made first.
    layers: which layers have banks: "output", the model's last result alone; "all"; or the numbers of layers, from 0.
        A bank holds what its layer gives, float [tokens, width] per document, which is large.
    reuse: what a near match takes over: "deepest", the deepest activation stored for the neighbour; or "layer", the
        state of the deepest layer whose own tau the similarity reaches, from which the rest is computed (the paper's
        rule; both give the neighbour's answer). "exact" takes over nothing, also where a store was calibrated.
    layer_tau: tau of single layers, by number, for reuse="layer"; where a layer has none, `tau` holds.
    near_repeats: requests for one document that calibrated near reuse answers in one opening, at least 1; asked again,
        the document is computed and stored. With 1 the calibrated bound holds for requests as it does for distinct
        documents, however often each is repeated. None: any number; the bound is then over distinct documents alone.
    audit_share: share of calibrated near hits that are recomputed, to see whether the budget is kept; more when
        something speaks against it. 0: none.
    audit_time: what audits may take, as a share of the seconds that near hits have saved, before no more than
        audit_share are made.
    exact_audits: how many exact hits on entries that this opening has not computed itself are recomputed and compared,
        for each bank and model, before others are believed. 0: none.
    exact_audit_share: at most this share of the later exact hits is recomputed too, at random. 0: none.
    exact_audit_time: what audits of exact hits may take, as a share of the seconds that hits have saved, before no
        random ones are made; nor are there any while they have taken 2 % of the seconds of all calls.
    on_mismatch: what follows when an audit of an exact hit finds another result than the stored one: "error" raises
        ModelMismatch, in this call and in all later ones; "bypass" warns once, and the model answers everything. Either
        way nothing more is reused or stored in this opening.
    recalibrate: whether a calibration is made again, in the background, when the cache has doubled.
    stand_aside: whether entries of a bank are left alone while loading them takes longer than computing them; a few are
        still looked up, to notice when that changes. False: what is stored is always reused.
    prefix_block: tokens per block of stored keys and values, for decoders; 0 stores none.
    max_bytes: what the store's folder may take up on the disk; None is without bound. When it is full, whole segments
        are evicted; entries that cannot fit at all are computed and not stored.
    policy: which entries go first, a name in llmcache.indexes.eviction.policies.POLICIES.
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
            raise ConfigError('reuse="layer" takes over states of layers: give layers="all" or numbers such as (4, 8)')
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
        """What of this the banks need."""
        return NearChoice(self.index, self.projection, self.dim, self.device)

    @property
    def needs_faiss(self) -> bool:
        """Whether its index is one of FAISS."""
        return needs_faiss(self.index, self.device, binary=self.projection == "simhash")

    @property
    def budget(self) -> Budget | None:
        """What of this bounds the store."""
        return None if self.max_bytes is None else Budget(self.max_bytes, self.policy)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> CacheConfig:
        """The settings saved with a store; unknown ones, of a later version, are left out."""
        known = {one.name for one in fields(cls)}
        given = {name: value for name, value in raw.items() if name in known}
        try:
            if isinstance(given.get("layers"), list):  # JSON has neither tuples nor numbers as names
                given["layers"] = tuple(given["layers"])
            if "layer_tau" in given:
                given["layer_tau"] = {int(layer): tau for layer, tau in given["layer_tau"].items()}
            return cls(**given)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the settings saved with the store cannot be read: {error}") from None


def _are_layers(numbers: object) -> bool:
    return isinstance(numbers, tuple) and all(type(one) is int and one >= 0 for one in numbers)
