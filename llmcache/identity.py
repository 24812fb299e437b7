"""Identity: all that decides an activation, so that nobody is served another model's.

Digests are taken over the live tensors, after any cast or adapter, never over file names. They are chained
over the layers: two models that share their embeddings and first k layers agree on the first k digests, and
on no later one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcache.errors import ConfigError, ModelMismatch, SnapshotDamaged
from llmcache.keys import framed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor
    from torch.nn import Module

_PACKAGES = ("torch", "transformers", "sentence-transformers")
_DIGESTS = ("config", "embeddings", "head", "tokenizer")
_HEX = re.compile(r"[0-9a-f]{64}")
_SETTLED_NS = 100_000_000

# parts of a configuration about training, about where a model came from, or what it returns beside its states
_VOLATILE = re.compile(
    r"_name_or_path|_commit_hash|transformers_version|dtype|torch_dtype|architectures|auto_map|id2label|"
    r"label2id|problem_type|return_dict|output_attentions|output_hidden_states|use_cache|"
    r"gradient_checkpointing|.*dropout.*|.*_pdrop|.*layerdrop|initializer_.*"
)
_ABOUT_HEAD = re.compile(
    r"classifier.*|summary_.*|pooler_.*|num_labels|tie_word_embeddings|.*logit.*|task_.*"
)
_ABOUT_DEPTH = re.compile(r"num_(hidden_|decoder_)?layers|n_layers?|(en|de)coder_layers")
_INDEXED = re.compile(r"(?:(.+?)\.)?(\d+)\.")
_FINAL_NORM = re.compile(r"(norm|norm_f|ln_f|final_norm|final_layer_?norm)\.[^.]+")

# arguments of SentenceTransformer under which the weights still are what the folder's files say
_HARMLESS = {
    *("device", "prompts", "default_prompt_name", "cache_folder", "revision", "local_files_only", "token"),
    *("truncate_dim", "similarity_fn_name", "processor_kwargs", "model_kwargs"),
}
_HARMLESS_MODEL = {"dtype", "torch_dtype", "attn_implementation", "device_map"}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Two models with equal identities may reuse each other's activations. Digests: sha256, 64 hex digits.

    config: digest of the configuration, without what decides no activation.
    embeddings: digest of the tensors that come before the layers, or that all layers share.
    layers: per layer, digest of everything up to its end.
    head: digest of what comes after the layers, and of the modules of a SentenceTransformer.
    tokenizer: digest of its rules, not of the truncation and padding of its last call.
    pooling: settings of the pooling module, and truncate_dim; "none" where there is none.
    max_seq_length: tokens after which a document is cut; None is no limit.
    dtype, attention: of the weights, and attention implementation; "none" where there is no such thing.
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
    name: str = field(default="", compare=False)
    revision: str = field(default="", compare=False)
    versions: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def digest(self) -> bytes:
        """32 bytes, sha256 over the fields that are compared."""
        return _sha(b"identity 1", *(_canonical([one, getattr(self, one)]) for one in _HARD))

    def up_to(self, layer: int) -> bytes:
        """32 bytes, equal for models that give this layer's activations alike for the same token ids."""
        return _sha(b"layer 1", *(one.encode() for one in (self.layers[layer], self.dtype, self.attention)))

    def to_json(self) -> dict[str, Any]:
        """The fields as str, int, None and lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Identity:
        """What `to_json` gave. SnapshotDamaged names a field that is missing, unknown, or of a wrong type."""
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
    named = [one for one in _HARD if getattr(stored, one) != getattr(given, one)]
    follows = {"embeddings", "layers", "head"} if "dtype" in named else set()
    if {"config", "embeddings"} & set(named) and _first_different(stored, given) == 0:
        follows.add("layers")
    return [
        (one, _shown(one, stored, given), _shown(one, given, stored)) for one in named if one not in follows
    ]


def mismatch(stored: Identity, given: Identity) -> ModelMismatch:
    """The error for a model that is not the one the entries were made with, on one line."""
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


def identify(model: Module, *, tokenizer: Any = None, files: ModelFiles | None = None) -> Identity:
    """The identity of a SentenceTransformer, or of any transformers model, as it is in memory now.

    tokenizer: of a plain transformers model; a SentenceTransformer has its own.
    files: what the weights were loaded from in this very call; digests of an earlier call may then be used.
    ConfigError where tensors have no bytes: on the meta device, or held by another runtime than torch.
    """
    trunk, prefix = _trunk(model)
    tensors = _tensors(model, trunk, prefix)
    digests = _digests(tensors) if files is None else _remembered_digests(tensors, files)
    # adapters first: what is not in a layer must not seem to come after them
    facts = _adapters(model) | {name: _described(tensors[name], digests[name]) for name in tensors}
    config = getattr(trunk, "config", None)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    limit = getattr(model, "max_seq_length", None) or getattr(tokenizer, "model_max_length", None)
    return Identity(
        model_class=type(trunk).__qualname__,
        config=_sha(_canonical(_settings(config, _VOLATILE))).hex(),
        **_parts(model, trunk, prefix, facts, tensors),
        tokenizer=_tokenizer_digest(tokenizer),
        pooling=_pooling(model),
        max_seq_length=int(limit) if limit and limit < 1 << 53 else None,  # 10^30 and infinity mean no limit
        prompts=tuple(sorted((one, text or "") for one, text in getattr(model, "prompts", {}).items())),
        default_prompt_name=getattr(model, "default_prompt_name", None),
        dtype="+".join(sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters()}))
        or "none",
        attention=str(getattr(config, "_attn_implementation", None) or "none"),
        name=str(getattr(config, "_name_or_path", "")),
        revision=str(getattr(config, "_commit_hash", None) or ""),
        versions=tuple((one, _version(one)) for one in _PACKAGES),
    )


def _trunk(model: Module) -> tuple[Module, str]:
    """The transformers model inside, and what its tensors' names begin with."""
    inner = getattr(model, "transformers_model", None)
    for name, module in model.named_modules():
        if inner is None or module is inner:
            return module, f"{name}." if name else ""
    raise ConfigError(
        f"the weights are held by {type(inner).__name__}, not by torch; load with backend='torch'"
    )


def _tensors(model: Module, trunk: Module, prefix: str) -> dict[str, Tensor]:
    found = {name: one for name, one in model.state_dict().items() if hasattr(one, "untyped_storage")}
    if trunk is not model and _pooler_is_idle(model, trunk):
        found = {name: one for name, one in found.items() if not name.startswith(f"{prefix}pooler.")}
    for name, one in found.items():
        if one.is_meta:
            raise ConfigError(
                f"{name} is on the meta device and has no bytes; load the model's weights first"
            )
    return found


def _pooler_is_idle(model: Module, trunk: Module) -> bool:
    """Whether nothing but the last hidden state is used.

    A checkpoint without a pooler gets a random one at every load; the model would never be recognised again.
    """
    owner = next((one for one in model.modules() if getattr(one, "model", None) is trunk), None)
    modes: Mapping[Any, Mapping[str, Any]] = getattr(owner, "modality_config", None) or {}
    return bool(modes) and all(
        mode.get("method_output_name") == "last_hidden_state" for mode in modes.values()
    )


def _parts(
    model: Module, trunk: Module, prefix: str, facts: Mapping[str, bytes], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The digests of embeddings, layers and head."""
    config = getattr(trunk, "config", None)
    base = f"{getattr(trunk, 'base_model_prefix', '')}."
    inside = {name.removeprefix(prefix): fact for name, fact in facts.items() if name.startswith(prefix)}
    sizes = {name: tensors[prefix + name].numel() if prefix + name in tensors else 0 for name in inside}
    stacks = _stacks(sizes, 2 if getattr(config, "is_encoder_decoder", False) else 1)
    places, depths = _places(list(inside), stacks)
    groups: list[dict[str, bytes]] = [{} for _ in range(sum(depths) + 2)]
    for name, fact in inside.items():
        # relative names: a trunk has the same digests under a classifier and without one
        indexed = _INDEXED.match(name)
        short = name[indexed.end() :] if indexed and (indexed[1] or "") in stacks else name.removeprefix(base)
        groups[places[name] + 1][short] = fact
    before, *layers, after = (_flat(group) for group in groups)
    embeddings = _sha(before)
    chain = [_sha(_canonical(_trunk_settings(config, depths)), embeddings)]
    for layer in layers:
        chain.append(_sha(chain[-1], layer))
    rest = {name: fact for name, fact in facts.items() if not name.startswith(prefix)}
    head = _sha(after, _flat(rest), _canonical(_modules(model)))
    return {
        "embeddings": embeddings.hex(),
        "layers": tuple(one.hex() for one in chain[1:]),
        "head": head.hex(),
    }


def _stacks(sizes: Mapping[str, int], count: int) -> list[str]:
    """The lists of blocks that hold most numbers, in the model's order: "encoder.layer", "model.layers"."""
    held: Counter[str] = Counter()
    for name, size in sizes.items():
        if indexed := _INDEXED.match(name):
            held[indexed[1] or ""] += size
    largest = {name for name, _ in held.most_common(count)}
    return [name for name in held if name in largest]


def _places(names: Sequence[str], stacks: Sequence[str]) -> tuple[dict[str, int], list[int]]:
    """Where each tensor comes in: -1 before the layers, its layer's number, or after them; layers per stack.

    Only what certainly comes late is placed late, since a mistake would let different models share layers. A
    stack's siblings are often used inside its blocks (relative positions in MPNet and DeBERTa), in any order.
    """
    places: dict[str, int] = dict.fromkeys(names, -1)
    indexed = {name: _INDEXED.match(name) for name in names}
    depths: list[int] = []
    for stack in stacks:
        inside = {name: int(one[2]) for name, one in indexed.items() if one and (one[1] or "") == stack}
        places.update({name: sum(depths) + index for name, index in inside.items()})
        depths.append(max(inside.values()) + 1)
        parent = stack[: stack.rfind(".") + 1]
        last = max(i for i, name in enumerate(names) if name in inside)
        for name in names[last + 1 :]:
            sibling = name.startswith(parent)
            late = _FINAL_NORM.fullmatch(name.removeprefix(parent)) if sibling else "emb" not in name
            if late and places[name] < 0 and (sibling or stack == stacks[-1]):
                places[name] = sum(depths)  # the head; after an encoder, the first layer of its decoder
    return places, depths


def _modules(model: Module) -> list[Any]:
    """The modules of a SentenceTransformer and their settings, without those that `_pooling` has."""
    if not hasattr(model, "transformers_model"):
        return []
    every = [[type(one).__qualname__, settings] for one, settings in _described_modules(model)]
    return [
        [type(one).__qualname__ for one in model.children()],
        *(x for x in every if "pooling_mode" not in x[1]),
    ]


def _described_modules(model: Module) -> list[tuple[Module, dict[str, Any]]]:
    every: Iterable[Any] = model.modules()
    return [(one, one.get_config_dict()) for one in every if hasattr(one, "get_config_dict")]


def _pooling(model: Module) -> str:
    every = [settings for _, settings in _described_modules(model)]
    found = [f"{k}={v}" for settings in every if "pooling_mode" in settings for k, v in settings.items()]
    if (cut := getattr(model, "truncate_dim", None)) is not None:
        found.append(f"truncate_dim={cut}")
    return ", ".join(found) or "none"


def _settings(config: Any, without: re.Pattern[str]) -> Any:
    """A configuration as a dict, without the names that match; sub-configurations likewise."""
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, dict):
        return config
    return {str(k): _settings(v, without) for k, v in config.items() if not without.fullmatch(str(k))}


def _trunk_settings(config: Any, depths: Sequence[int]) -> dict[str, Any]:
    """What the layers see: not the head, and not their number, so that a model cut short shares what it kept.

    ALBERT has fewer blocks than layers, and the number of both says which layer uses which block: it stays.
    """
    settings = _settings(_settings(config, _VOLATILE), _ABOUT_HEAD) or {}
    return {k: v for k, v in settings.items() if not (_ABOUT_DEPTH.fullmatch(k) and v in depths)}


def _adapters(model: Module) -> dict[str, bytes]:
    """Settings of adapters (PEFT) that no tensor shows: which are on, and how strongly."""
    names = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
    found = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    return {
        f"{name}.adapter": _canonical([getattr(one, n, None) for n in names]) for name, one in found.items()
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    rules: Any = None
    if hasattr(backend, "to_str"):
        # truncation and padding are what the last call asked for. They stand before the first of these words,
        # whose quotes would be escaped inside a text; parsing a large vocabulary takes longer than loading it
        text = backend.to_str()
        rules = text.partition(',"added_tokens":')[2] or text
    elif tokenizer is not None:
        flags = {k: v for k, v in tokenizer.init_kwargs.items() if isinstance(v, bool) and "local" not in k}
        rules = [type(tokenizer).__qualname__, tokenizer.get_vocab(), flags]
    names = ("padding_side", "truncation_side", "model_input_names", "special_tokens_map", "chat_template")
    return _sha(_canonical([rules, [getattr(tokenizer, one, None) for one in names]])).hex()


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of each tensor's bytes, in hex. Tied ones are hashed once; at most four are copied at a time."""
    places = {n: (t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for n, t in tensors.items()}
    largest = sorted(tensors, key=lambda name: -tensors[name].numel())
    distinct = {places[name]: tensors[name] for name in largest}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        done = dict(zip(distinct, threads.map(_tensor_digest, distinct.values()), strict=True))
    return {name: done[places[name]] for name in tensors}


def _tensor_digest(tensor: Tensor) -> str:
    return hashlib.sha256(_raw(tensor)).hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, on the host: a view if it is there and contiguous, else a copy."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _described(tensor: Tensor, *more: str) -> bytes:
    return framed(*(one.encode() for one in (str(tensor.dtype), repr(tuple(tensor.shape)), *more)))


def _flat(facts: Mapping[str, bytes]) -> bytes:
    return framed(*(part for name in sorted(facts) for part in (name.encode(), facts[name])))


def _sha(*parts: bytes) -> bytes:
    return hashlib.sha256(framed(*parts)).digest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text  # addresses are others in every process


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model's folder. facts: (name, bytes, mtime ns, ctime ns, inode, device) of each."""

    facts: tuple[tuple[str, int, int, int, int, int], ...]


def model_files(name_or_path: str, arguments: Mapping[str, Any]) -> ModelFiles | None:
    """The files that SentenceTransformer will load, or None where they alone do not decide the weights.

    None also while a file is younger than 0.1 s: a second change in one tick of the clock would not show.
    """
    known = set(arguments) <= _HARMLESS and set(arguments.get("model_kwargs") or {}) <= _HARMLESS_MODEL
    folder = _folder(name_or_path, arguments) if known else None
    facts = []
    try:
        for place, folders, names in os.walk(folder or ""):
            folders[:] = [one for one in folders if not one.startswith(".")]
            if "adapter_config.json" in names or any(
                os.path.islink(os.path.join(place, one)) for one in folders
            ):
                return None  # an adapter's base model, or a linked folder, lies elsewhere
            for path in (os.path.join(place, one) for one in names):
                s = os.stat(path)
                times = (s.st_mtime_ns, s.st_ctime_ns)
                facts.append((os.path.relpath(path, folder), s.st_size, *times, s.st_ino, s.st_dev))
    except OSError:
        return None
    settled = all(time.time_ns() - max(fact[2], fact[3]) > _SETTLED_NS for fact in facts)
    return ModelFiles(tuple(sorted(facts))) if facts and settled else None


def _folder(name_or_path: str, arguments: Mapping[str, Any]) -> str | None:
    if os.path.isdir(name_or_path):
        return name_or_path
    from huggingface_hub import snapshot_download

    name = name_or_path if "/" in name_or_path else f"sentence-transformers/{name_or_path}"
    cache = arguments.get("cache_folder") or os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    try:
        return snapshot_download(
            name, revision=arguments.get("revision"), cache_dir=cache, local_files_only=True
        )
    except (OSError, ValueError):
        return None


def _remembered_digests(tensors: Mapping[str, Tensor], files: ModelFiles) -> dict[str, str]:
    """`_digests`, from an earlier call for the same files where there is one."""
    key = _sha(_canonical([files.facts, [_version(one) for one in _PACKAGES]]), _glimpse(tensors)).hex()
    try:
        raw = json.loads((_digest_folder() / f"{key}.json").read_bytes())
        if raw["check"] == _sha(_canonical(raw["tensors"])).hex() and set(raw["tensors"]) == set(tensors):
            return dict(raw["tensors"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # nothing there, or nothing that can be believed
    digests = _digests(tensors)
    with contextlib.suppress(OSError, RuntimeError):
        _write(
            _digest_folder(), f"{key}.json", {"check": _sha(_canonical(digests)).hex(), "tensors": digests}
        )
    return digests


def _glimpse(tensors: Mapping[str, Tensor]) -> bytes:
    """Names, dtypes, shapes, and the first and last 64 numbers of each tensor.

    A weight that is not in the files is drawn at random at every load; this is where it shows.
    """
    seen = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        ends = bytes(_raw(flat[:64])), bytes(_raw(flat[-64:]))
        seen.update(framed(name.encode(), _described(tensor), *ends))
    return seen.digest()


def _digest_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "llmcache" / "digests"


def _write(folder: Path, name: str, value: Any) -> None:
    """Mode 0600 in a folder of mode 0700, moved into place whole."""
    for one in (folder.parent, folder):
        one.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder)  # created 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_canonical(value))
        os.replace(partial, folder / name)
    except BaseException:
        os.unlink(partial)
        raise
