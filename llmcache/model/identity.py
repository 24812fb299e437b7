"""Identity of a model: everything that decides an activation, so that no call gets another model's activations.

Digests are computed from the live tensors, after any cast or adapter, never from file names. They are chained over the
layers: two models that share their embeddings and first k layers agree on the first k digests, and on no later one.
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
    from torch.nn import Module

    from llmcache.model.description.describe import Description
    from llmcache.model.encoders import Encoder

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
    """Identity of a model. Two models with equal identities may reuse each other's activations.

    Digests are sha256 in 64 hexadecimal digits.
    model_class: name of the trunk's class.
    config: digest of the configuration, without settings that decide no activation.
    embeddings: digest of the tensors before the layers, or that all layers share.
    layers: per layer, digest of everything up to its end.
    head: digest of everything after the layers, and of the modules of a SentenceTransformer.
    tokenizer: digest of its rules, not of the truncation and padding of its last call.
    pooling: settings of the pooling module; "none" where there is none.
    max_seq_length: tokens after which a document is cut; None is no limit.
    prompts, default_prompt_name: of a SentenceTransformer; prompts as pairs of name and text.
    dtype, attention: of the weights, and attention implementation; "none" where there is none.
    form: version of the set of facts that the digests cover.
    name, revision, versions: origin of the model, and versions of packages with the class of sentence-transformers.
    They are shown, never compared.
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
        """sha256 over the fields that are compared, 32 bytes."""
        names = _COMPARED if self.form > 1 else [name for name in _COMPARED if name != "form"]
        return sha(b"identity %d" % self.form, *(canonical([name, getattr(self, name)]) for name in names))

    def up_to(self, layer: int) -> bytes:
        """Return 32 bytes that are equal for models with the same activations of this layer for the same token ids."""
        texts = (self.layers[layer], self.dtype, self.attention)
        return sha(b"layer %d" % self.form, *(text.encode() for text in texts))

    @property
    def encoder(self) -> str:
        """Name of the model's class in sentence-transformers; "" for other models, or if it was not recorded."""
        return dict(self.versions).get(CLASS, "")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as str, int, None and lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Identity:
        """Return the identity from `to_json`. SnapshotDamaged names a missing, unknown or invalid field."""
        raw = {"form": 1, **raw}  # the first version had no such field
        known = {each.name for each in fields(cls)}
        wrong = sorted(known ^ set(raw)) or [name for name in raw if not _valid(name, raw[name])]
        if wrong:
            raise SnapshotDamaged(
                f"the stored model identity has no valid field {wrong[0]!r}; open the store with the "
                "LLMCache that wrote it, or start a fresh namespace"
            )
        pairs = {name: tuple(map(tuple, raw[name])) for name in ("prompts", "versions")}
        return cls(**{**raw, **pairs, "layers": tuple(raw["layers"])})


CLASS = "class"
"""Name among `versions` of the class of sentence-transformers."""
_COMPARED = tuple(each.name for each in fields(Identity) if each.compare)
"""Names of the fields that are compared."""


def _valid(name: str, value: Any) -> bool:
    """Return whether a field of a stored identity has a value of the right type."""
    if name == "layers":
        return isinstance(value, list) and all(isinstance(digest, str) and _HEX.fullmatch(digest) for digest in value)
    if name in ("prompts", "versions"):
        pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        return pairs and all(isinstance(text, str) for pair in value for text in pair)
    if name == "form":
        return type(value) is int and 1 <= value <= FORM
    if name == "max_seq_length":
        return value is None or type(value) is int
    if name == "default_prompt_name" and value is None:
        return True
    return isinstance(value, str) and (name not in _DIGESTS or _HEX.fullmatch(value) is not None)


def difference(stored: Identity, given: Identity) -> list[tuple[str, str, str]]:
    """Return the fields in which two identities differ, each with both values in readable form.

    Differences that follow from another one are left out: a cast changes the bytes of all tensors, and other embeddings
    change the digests of all layers.
    """
    if stored.form != given.form:  # then every digest differs
        return [("form", str(stored.form), str(given.form))]
    names = [name for name in _COMPARED if getattr(stored, name) != getattr(given, name)]
    implied = {"embeddings", "layers", "head"} if "dtype" in names else set()
    if {"config", "embeddings"} & set(names) and _first_different(stored, given) == 0:
        implied.add("layers")
    return [(name, _shown(name, stored, given), _shown(name, given, stored)) for name in names if name not in implied]


def mismatch(stored: Identity, given: Identity, changes: str = "") -> ModelMismatch:
    """Return the error, on one line, for a model that differs from the one the entries were made with.

    changes: named changes of the model since the cache was opened; "" if none are known.
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
    if stored.encoder and given.encoder and stored.encoder != given.encoder:
        return ModelMismatch(
            f"the entries were made with a {stored.encoder} ({stored.name!r}), the model given is a {given.encoder}; "
            'open them with a model of the same kind, or start a fresh namespace (namespace="..." in Python, '
            "--namespace on the command line)"
        )
    parts = "; ".join(f"{name}: stored {old}, given {new}" for name, old, new in difference(stored, given))
    return ModelMismatch(
        f"the entries were made with {_title(stored)}, the model given is {_title(given)}; different are "
        f"{parts}; open the store with the same model, or start a fresh namespace "
        '(namespace="..." in Python, --namespace on the command line)'
    )


def _first_different(one: Identity, other: Identity) -> int:
    """Return the number of the first layer in which two identities differ."""
    pairs = enumerate(zip(one.layers, other.layers, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one.layers), len(other.layers)))


def _shown(name: str, mine: Identity, other: Identity) -> str:
    """Return a field's value in readable form, for a comparison with another identity."""
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


def load(name_or_path: str | os.PathLike[str], kind: str | None = None, **arguments: Any) -> tuple[Encoder, Identity]:
    """Load a model of sentence-transformers, with its identity. Weights that were hashed before are not hashed again.

    kind: see `llmcache.model.loading.encoder_class`. arguments: for the model's class.
    The identity is that of `identify(model)`, with the given name.
    """
    from llmcache.model.loading import encoder_class

    name = os.fspath(name_or_path)
    before = model_files(name, arguments)
    model = encoder_class(name, kind)(name, **arguments)
    # same files before and after: no file was changed, and no newer revision arrived, while they were read
    unchanged = before is not None and before == model_files(name, arguments)
    return model, replace(identify(model, files=before if unchanged else None), name=name)


def identify(
    model: Module, *, tokenizer: Any = None, files: ModelFiles | None = None, known: Digests | None = None
) -> Identity:
    """Return the identity of a SentenceTransformer, or of any transformers model, as it is in memory now.

    tokenizer: of a plain transformers model; a SentenceTransformer has its own.
    files: that the weights were just loaded from; digests of an earlier call are then reused.
    known: digests of tensors of other models in memory, see `tensor_digests`; new digests are added.
    ConfigError when the weights are on the meta device or belong to another runtime than torch.
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
    """Return the identity of a described model. digests: sha256 of its tensors, by path."""
    from llmcache.model.description.describe import pooling_settings
    from llmcache.model.description.tokenizer_rules import length_limit

    model, trunk = description.model, description.trunk
    config = getattr(trunk, "config", None)
    limit = getattr(model, "max_seq_length", None)
    pooling = [f"{k}={v}" for module in model.modules() for k, v in pooling_settings(module).items()]
    return Identity(
        model_class=type(trunk).__qualname__,
        config=sha(canonical(description.configuration)).hex(),
        **_parts(description, digests),
        tokenizer=description.rules,
        pooling=", ".join(pooling) or "none",
        max_seq_length=int(limit) if limit and limit < 1 << 53 else length_limit(description.tokenizer),
        prompts=tuple(sorted((name, text or "") for name, text in getattr(model, "prompts", {}).items())),
        default_prompt_name=getattr(model, "default_prompt_name", None),
        dtype="+".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()})) or "none",
        attention=description.attention,
        name=str(getattr(config, "_name_or_path", "")),
        revision=str(getattr(config, "_commit_hash", None) or ""),
        versions=(
            *((package, package_version(package)) for package in PACKAGES),
            *((CLASS, name) for name in [_encoder_name(model)] if name),
        ),
    )


def _encoder_name(model: Module) -> str:
    """Return the name of a model's class in sentence-transformers, or of the class it extends; "" for other models."""
    names = (kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("sentence_transformers."))
    return next(names, "")


def _parts(description: Description, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the digests of embeddings, layers and head, by field name."""
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
        # a model around the one with the layers: its own attributes come after them
        places.update({name: sum(depths) for name in inside if name.startswith("=")})
    groups: list[dict[str, bytes]] = [{} for _ in range(sum(depths) + 2)]
    for name, fact in inside.items():
        # relative names: a trunk has the same digests inside a classifier and alone
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
        "layers": tuple(digest.hex() for digest in chain[1:]),
        "head": sha(after, flat(rest)).hex(),
    }


def _trunk_settings(configuration: Any, depths: Sequence[int]) -> dict[str, Any]:
    """Return the settings that affect the layers: without those of the head and without the number of layers.

    So a model with fewer layers shares the digests of the layers it has. ALBERT has fewer blocks than layers, and their
    number decides which layer uses which block, so there it stays.
    """
    settings = {k: v for k, v in (configuration or {}).items() if not _ABOUT_HEAD.fullmatch(k)}
    return {k: v for k, v in settings.items() if not (_ABOUT_DEPTH.fullmatch(k) and v in depths)}
