"""sha256 of tensors, with a cache on disk for models whose files have not changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llmcache.errors import CorpusError
from llmcache.indexes.files.atomic_write import write_atomically
from llmcache.model.keys import framed
from llmcache.private_files import open_plain

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("torch", "transformers", "sentence-transformers")
_SETTLED_NS = 100_000_000
_LIMIT = 64 << 20  # bytes that are read of a digest file
_DIGEST = re.compile("[0-9a-f]{64}")
_REMEMBERED = 64
"""Number of model states whose digests are cached; the file of each has some ten kilobytes."""

# arguments of SentenceTransformer under which the weights are decided by the folder's files
_HARMLESS = {
    *("device", "prompts", "default_prompt_name", "cache_folder", "revision", "local_files_only", "token"),
    *("truncate_dim", "similarity_fn_name", "processor_kwargs", "model_kwargs"),
}
_HARMLESS_MODEL = {"dtype", "torch_dtype", "attn_implementation", "device_map"}


Digests: TypeAlias = dict[tuple[Any, ...], str]
"""sha256 of tensors by their contents: checksum of the bytes, dtype, shape and strides."""


def tensor_digests(
    tensors: Mapping[str, Tensor], checksums: Mapping[str, bytes] | None = None, known: Digests | None = None
) -> dict[str, str]:
    """Return the sha256 of each tensor's bytes, in hexadecimal.

    Tied tensors are hashed once. At most four tensors are copied at a time.
    checksums: of the same tensors (`Contents.checksums`). known: digests by contents; tensors with a known digest are
    not hashed again, and new digests are added.
    """
    known = {} if known is None else known
    if checksums is None:
        places: dict[str, tuple[Any, ...]] = {name: _place(tensor) for name, tensor in tensors.items()}
    else:
        places = {name: _contents(tensor, checksums[name]) for name, tensor in tensors.items()}
    largest = sorted(tensors, key=lambda name: -tensors[name].numel())
    distinct = {places[name]: tensors[name] for name in largest if places[name] not in known}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        known.update(zip(distinct, threads.map(_tensor_digest, distinct.values()), strict=True))
    return {name: known[places[name]] for name in tensors}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return the memory location of a tensor; equal for two live tensors only if they are views of the same data."""
    if not _is_plain(tensor):
        return (id(tensor),)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _contents(tensor: Tensor, checksum: bytes) -> tuple[Any, ...]:
    return checksum, tensor.dtype, tensor.shape, tensor.stride() if _is_plain(tensor) else type(tensor)


def _is_plain(tensor: Tensor) -> bool:
    import torch

    wraps = hasattr(tensor, "__tensor_flatten__") or tensor.is_quantized
    return tensor.layout is torch.strided and not wraps


def _tensor_digest(tensor: Tensor) -> str:
    if _is_plain(tensor):
        return hashlib.sha256(_raw(tensor)).hexdigest()
    from llmcache.model.description.checksums import parts_of

    return sha(*(field for part in parts_of(tensor) for field in (described(part), bytes(_raw(part))))).hex()


def _raw(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order: a view if it is contiguous on the host, else a copy."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def described(tensor: Tensor, *more: str) -> bytes:
    """Return dtype, shape and further texts as one framed field."""
    return framed(*(text.encode() for text in (str(tensor.dtype), repr(tuple(tensor.shape)), *more)))


def flat(facts: Mapping[str, bytes]) -> bytes:
    """Return facts as one framed field, sorted by name."""
    return framed(*(part for name in sorted(facts) for part in (name.encode(), facts[name])))


def sha(*parts: bytes) -> bytes:
    """Return the sha256 over parts with their lengths, 32 bytes."""
    return hashlib.sha256(framed(*parts)).digest()


def canonical(value: Any) -> bytes:
    """Return a value as JSON that is equal for equal values in every process."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text  # addresses differ between processes


def package_version(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class ModelFiles:
    """Files of a model's folder. facts: (name, bytes, mtime ns, ctime ns, inode, device) of each file."""

    facts: tuple[tuple[str, int, int, int, int, int], ...]


def model_files(name_or_path: str, arguments: Mapping[str, Any]) -> ModelFiles | None:
    """Return the files that SentenceTransformer will load; None if they alone do not decide the weights.

    None also while a file is younger than 0.1 s: a second change in the same clock tick would not be detected.
    arguments: of SentenceTransformer.
    """
    known = set(arguments) <= _HARMLESS and set(arguments.get("model_kwargs") or {}) <= _HARMLESS_MODEL
    folder = _folder(name_or_path, arguments) if known else None
    facts = []
    try:
        for place, folders, names in os.walk(folder or ""):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if "adapter_config.json" in names or any(os.path.islink(os.path.join(place, name)) for name in folders):
                return None  # an adapter's base model, or a linked folder, lies elsewhere
            for path in (os.path.join(place, name) for name in names):
                s = os.stat(path)
                times = (s.st_mtime_ns, s.st_ctime_ns)
                facts.append((os.path.relpath(path, folder), s.st_size, *times, s.st_ino, s.st_dev))
    except OSError:
        return None
    settled = all(time.time_ns() - max(fact[2], fact[3]) > _SETTLED_NS for fact in facts)
    return ModelFiles(tuple(sorted(facts))) if facts and settled else None


def _folder(name_or_path: str, arguments: Mapping[str, Any]) -> str | None:
    """Return the local folder of a model; None if the hub's cache does not have it."""
    if os.path.isdir(name_or_path):
        return name_or_path
    from huggingface_hub import snapshot_download

    name = name_or_path if "/" in name_or_path else f"sentence-transformers/{name_or_path}"
    cache = arguments.get("cache_folder") or os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    try:
        return snapshot_download(name, revision=arguments.get("revision"), cache_dir=cache, local_files_only=True)
    except (OSError, ValueError):
        return None


def remembered_digests(
    tensors: Mapping[str, Tensor], files: ModelFiles, checksums: Mapping[str, bytes]
) -> dict[str, str]:
    """Return `tensor_digests`, read from the cache on disk if it has them for these files.

    checksums: of the tensors. A cached digest is used only for a tensor with the checksum it was stored with.
    """
    key = sha(canonical([files.facts, [package_version(package) for package in PACKAGES]]), _glimpse(tensors)).hex()
    known = _remembered(key, tensors)
    digests = {name: digest for name, (checksum, digest) in known.items() if checksum == checksums[name].hex()}
    if len(digests) == len(tensors):
        return digests
    rest = {name: tensor for name, tensor in tensors.items() if name not in digests}
    digests |= tensor_digests(rest)
    pairs = {name: [checksums[name].hex(), digests[name]] for name in tensors}
    with contextlib.suppress(OSError, RuntimeError):
        _write(_digest_folder(), f"{key}.json", {"check": _check(key, pairs), "tensors": pairs})
    return digests


def _remembered(key: str, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return checksum and digest of each tensor from the file of this key; {} if the file is missing or not intact.

    names: of the tensors. No link is followed, and another user's file is not read.
    """
    path = _digest_folder() / f"{key}.json"
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            raw = json.loads(file.read(_LIMIT))
        if raw["check"] != _check(key, raw["tensors"]) or set(raw["tensors"]) != set(names):
            return {}
        known = {name: (checksum, digest) for name, (checksum, digest) in raw["tensors"].items()}
        if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for _, digest in known.values()):
            return {}
        with contextlib.suppress(OSError):
            os.utime(path)  # the files used last are kept
        return known
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, CorpusError):
        return {}  # missing, or damaged


def _check(key: str, pairs: Any) -> str:
    """Return a checksum over a digest file's name and contents."""
    return sha(key.encode(), canonical(pairs)).hex()


def _glimpse(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a digest of names, dtypes, shapes, and the first and last 64 elements of all tensors.

    It differs where a weight that the files do not have was drawn at random.
    """
    seen = hashlib.sha256()
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            seen.update(framed(name.encode(), str(type(tensor)).encode()))
            continue
        flat = tensor.reshape(-1)
        ends = bytes(_raw(flat[:64])), bytes(_raw(flat[-64:]))
        seen.update(framed(name.encode(), described(tensor), *ends))
    return seen.digest()


def _digest_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "llmcache" / "digests"


def _write(folder: Path, name: str, value: Any) -> None:
    """Write a file of mode 0600 in a folder of mode 0700, and rename it into place."""
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(folder / name, canonical(value))
    _forget(folder)


def _forget(folder: Path) -> None:
    """Remove all but the newest files, and leftovers of killed processes. Several processes may do so at once."""
    aged = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            aged.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(aged, reverse=True)[_REMEMBERED:]:
        path.unlink(missing_ok=True)
