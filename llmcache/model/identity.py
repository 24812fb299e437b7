"""Identity: all that decides an activation, so that nobody is served another model's.

Digests are taken over the live tensors, after any cast or adapter, never over file names. They are chained
over the layers: two models that share their embeddings and first k layers agree on the first k digests, and
on no later one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from llmcache.errors import ModelMismatch, SnapshotDamaged
from llmcache.model.architecture import INDEXED, layer_places, layer_stacks
from llmcache.model.digests import (
    PACKAGES,
    Digests,
    ModelFiles,
    canonical,
    described,
    flat,
    model_files,
    package_version,
    remembered_digests,
    sha,
    tensor_digests,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch.nn import Module

    from llmcache.model.description.describe import Description

_DIGESTS = ("config", "embeddings", "head", "tokenizer")
_HEX = re.compile(r"[0-9a-f]{64}")

_ABOUT_HEAD = re.compile(
    r"classifier.*|summary_.*|pooler_.*|num_labels|tie_word_embeddings|task_.*|(final_|output_)?logits?_.*|"
    r"(max_)?logit_scale.*|num_logits_to_keep|contrastive_logits_.*"
)  # and not attn_logit_softcapping, which every layer sees
_ABOUT_DEPTH = re.compile(r"num_(hidden_|decoder_)?layers|n_layers?|(en|de)coder_layers")
FORM = 2
"""Version of what an identity covers; identities of different versions are never equal."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Two models with equal identities may reuse each other's activations. Digests: sha256, 64 hex digits.

    config: digest of the configuration, without what decides no activation.
    embeddings: digest of the tensors that come before the layers, or that all layers share.
    layers: per layer, digest of everything up to its end.
    head: digest of what comes after the layers, and of the modules of a SentenceTransformer.
    tokenizer: digest of its rules, not of the truncation and padding of its last call.
    pooling: settings of the pooling module; "none" where there is none.
    max_seq_length: tokens after which a document is cut; None is no limit.
    dtype, attention: of the weights, and attention implementation; "none" where there is no such thing.
    form: version of what the digests cover.
    name, revision, versions: where it came from. They are shown, never compared.
    """

    model_class: str
    config: str
    embeddings: str
    layers: tuple[str, ...]
    head: str
    tokenizer: str
    pooling: str
    max_seq_length: int | None
    prompts: tuple[tuple[str, str], ...]
    default_prompt_name: str | None
    dtype: str
    attention: str
    form: int = FORM
    name: str = field(default="", compare=False)
    revision: str = field(default="", compare=False)
    versions: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def digest(self) -> bytes:
        """32 bytes, sha256 over the fields that are compared."""
        named = _HARD if self.form > 1 else [one for one in _HARD if one != "form"]
        return sha(b"identity %d" % self.form, *(canonical([one, getattr(self, one)]) for one in named))

    def up_to(self, layer: int) -> bytes:
        """32 bytes, equal for models that give this layer's activations alike for the same token ids."""
        return sha(b"layer %d" % self.form, *(one.encode() for one in (self.layers[layer], self.dtype, self.attention)))

    def to_json(self) -> dict[str, Any]:
        """The fields as str, int, None and lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Identity:
        """What `to_json` gave. SnapshotDamaged names a field that is missing, unknown, or of a wrong type."""
        raw = {"form": 1, **raw}  # the first version had no such field
        known = {one.name for one in fields(cls)}
        wrong = sorted(known ^ set(raw)) or [one for one in raw if not _valid(one, raw[one])]
        if wrong:
            raise SnapshotDamaged(
                f"the stored model identity has no valid field {wrong[0]!r}; open the store with the "
                "LLMCache that wrote it, or start a fresh namespace"
            )
        pairs = {one: tuple(map(tuple, raw[one])) for one in ("prompts", "versions")}
        return cls(**{**raw, **pairs, "layers": tuple(raw["layers"])})


_HARD = tuple(one.name for one in fields(Identity) if one.compare)


def _valid(name: str, value: Any) -> bool:
    if name == "layers":
        return isinstance(value, list) and all(isinstance(one, str) and _HEX.fullmatch(one) for one in value)
    if name in ("prompts", "versions"):
        pairs = isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value)
        return pairs and all(isinstance(text, str) for one in value for text in one)
    if name == "form":
        return type(value) is int and 1 <= value <= FORM
    if name == "max_seq_length":
        return value is None or type(value) is int
    if name == "default_prompt_name" and value is None:
        return True
    return isinstance(value, str) and (name not in _DIGESTS or _HEX.fullmatch(value) is not None)


def difference(stored: Identity, given: Identity) -> list[tuple[str, str, str]]:
    """Fields that keep two identities apart, each with both values as they are shown to people.

    What only follows from a difference already named is left out: a cast changes the bytes of all tensors,
    and other embeddings the digests of all layers.
    """
    if stored.form != given.form:  # every digest differs for it
        return [("form", str(stored.form), str(given.form))]
    named = [one for one in _HARD if getattr(stored, one) != getattr(given, one)]
    follows = {"embeddings", "layers", "head"} if "dtype" in named else set()
    if {"config", "embeddings"} & set(named) and _first_different(stored, given) == 0:
        follows.add("layers")
    return [(one, _shown(one, stored, given), _shown(one, given, stored)) for one in named if one not in follows]


def mismatch(stored: Identity, given: Identity, changes: str = "") -> ModelMismatch:
    """The error for a model that is not the one the entries were made with, on one line.

    changes: what is known to have changed since the cache was opened, by name.
    """
    if stored.form != given.form:
        return ModelMismatch(
            f"the entries were made with form {stored.form} of the model identity, this version has form {given.form}: "
            "an older form does not cover all that decides a result, so they may be another model's; start a "
            'fresh namespace (namespace="..." in Python, --namespace on the command line)'
        )
    if changes:
        return ModelMismatch(
            f"the model has changed since the cache was opened, so the entries are not what it gives now: {changes}; "
            "undo the change, or open a cache for the model as it is now, with a namespace of its own "
            '(namespace="..." in Python, --namespace on the command line)'
        )
    parts = "; ".join(f"{name}: stored {old}, given {new}" for name, old, new in difference(stored, given))
    return ModelMismatch(
        f"the entries were made with {_title(stored)}, the model given is {_title(given)}; different are "
        f"{parts}; open the store with the same model, or start a fresh namespace "
        '(namespace="..." in Python, --namespace on the command line)'
    )


def _first_different(one: Identity, other: Identity) -> int:
    pairs = enumerate(zip(one.layers, other.layers, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one.layers), len(other.layers)))


def _shown(name: str, mine: Identity, other: Identity) -> str:
    value = getattr(mine, name)
    if name == "layers":
        first = _first_different(mine, other)
        digest = value[first][:8] if first < len(value) else "nothing"
        return f"{digest} from layer {first} on ({len(value)} layers)"
    if name == "prompts":
        value = json.dumps(dict(value))
    elif name in _DIGESTS:
        value = value[:8]
    text = "none" if value is None else str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 160 else text[:160] + "..."


def _title(identity: Identity) -> str:
    return f"{identity.name!r} ({identity.digest.hex()[:8]})"


def load(name_or_path: str | os.PathLike[str], **arguments: Any) -> tuple[SentenceTransformer, Identity]:
    """A SentenceTransformer and its identity, without hashing weights that were hashed before.

    arguments: go to SentenceTransformer. The identity is that of `identify(model)`, with the name as given.
    """
    from sentence_transformers import SentenceTransformer

    name = os.fspath(name_or_path)
    before = model_files(name, arguments)
    model = SentenceTransformer(name, **arguments)
    # same files before and after: nobody changed them, and no newer revision came in, while they were read
    unchanged = before is not None and before == model_files(name, arguments)
    return model, replace(identify(model, files=before if unchanged else None), name=name)


def identify(
    model: Module, *, tokenizer: Any = None, files: ModelFiles | None = None, known: Digests | None = None
) -> Identity:
    """The identity of a SentenceTransformer, or of any transformers model, as it is in memory now.

    tokenizer: of a plain transformers model; a SentenceTransformer has its own.
    files: what the weights were loaded from in this very call; digests of an earlier call may then be used.
    known: digests of tensors of other models in memory, see `tensor_digests`; filled.
    ConfigError where tensors have no bytes: on the meta device, or held by another runtime than torch.
    """
    from llmcache.model.description.checksums import Contents
    from llmcache.model.description.describe import describe

    description = describe(model, tokenizer)
    tensors = description.tensors
    if files is not None:
        digests = remembered_digests(tensors, files, Contents(tensors).checksums())
    elif known is not None:
        digests = tensor_digests(tensors, Contents(tensors).checksums(), known)
    else:
        digests = tensor_digests(tensors)
    return identity_of(description, digests)


def identity_of(description: Description, digests: Mapping[str, str]) -> Identity:
    """The identity of a described model. digests: sha256 of its tensors, by path."""
    from llmcache.model.description.describe import pooling_settings
    from llmcache.model.description.tokenizer_rules import length_limit

    model, trunk = description.model, description.trunk
    config = getattr(trunk, "config", None)
    limit = getattr(model, "max_seq_length", None)
    pooling = [f"{k}={v}" for one in model.modules() for k, v in pooling_settings(one).items()]
    return Identity(
        model_class=type(trunk).__qualname__,
        config=sha(canonical(description.configuration)).hex(),
        **_parts(description, digests),
        tokenizer=description.rules,
        pooling=", ".join(pooling) or "none",
        max_seq_length=int(limit) if limit and limit < 1 << 53 else length_limit(description.tokenizer),
        prompts=tuple(sorted((one, text or "") for one, text in getattr(model, "prompts", {}).items())),
        default_prompt_name=getattr(model, "default_prompt_name", None),
        dtype="+".join(sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters()})) or "none",
        attention=description.attention,
        name=str(getattr(config, "_name_or_path", "")),
        revision=str(getattr(config, "_commit_hash", None) or ""),
        versions=tuple((one, package_version(one)) for one in PACKAGES),
    )


def _parts(description: Description, digests: Mapping[str, str]) -> dict[str, Any]:
    """The digests of embeddings, layers and head."""
    trunk, prefix, tensors = description.trunk, description.prefix, description.tensors
    config = getattr(trunk, "config", None)
    base = f"{getattr(trunk, 'base_model_prefix', '')}."
    facts = {name: text.encode() for name, text in description.facts.items()}
    facts |= {name: described(tensors[name], digests[name]) for name in tensors}
    inside = {name.removeprefix(prefix): fact for name, fact in facts.items() if name.startswith(prefix)}
    sizes = {name: tensors[prefix + name].numel() if prefix + name in tensors else 0 for name in inside}
    stacks = layer_stacks(sizes, 2 if getattr(config, "is_encoder_decoder", False) else 1)
    places, depths = layer_places(list(inside), stacks)
    if len(base) > 1 and base[:-1] in getattr(trunk, "_modules", {}):
        # a model around the one with the layers: what it holds itself comes after them
        places.update({name: sum(depths) for name in inside if name.startswith("=")})
    groups: list[dict[str, bytes]] = [{} for _ in range(sum(depths) + 2)]
    for name, fact in inside.items():
        # relative names: a trunk has the same digests under a classifier and without one
        indexed = INDEXED.match(name)
        short = name[indexed.end() :] if indexed and (indexed[1] or "") in stacks else name.removeprefix(base)
        groups[places[name] + 1][short] = fact
    before, *layers, after = (flat(group) for group in groups)
    embeddings = sha(before)
    chain = [sha(canonical(_trunk_settings(description.configuration, depths)), embeddings)]
    for layer in layers:
        chain.append(sha(chain[-1], layer))
    rest = {name: fact for name, fact in facts.items() if not name.startswith(prefix)}
    return {
        "embeddings": embeddings.hex(),
        "layers": tuple(one.hex() for one in chain[1:]),
        "head": sha(after, flat(rest)).hex(),
    }


def _trunk_settings(configuration: Any, depths: Sequence[int]) -> dict[str, Any]:
    """What the layers see: not the head, and not their number, so that a model cut short shares what it kept.

    ALBERT has fewer blocks than layers, and the number of both says which layer uses which block: it stays.
    """
    settings = {k: v for k, v in (configuration or {}).items() if not _ABOUT_HEAD.fullmatch(k)}
    return {k: v for k, v in settings.items() if not (_ABOUT_DEPTH.fullmatch(k) and v in depths)}
