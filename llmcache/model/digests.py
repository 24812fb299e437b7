"""sha256 of tensors, and a memory of it for models whose files have not changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llmcache.errors import CorpusError
from llmcache.model.keys import framed
from llmcache.private_files import open_plain

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("torch", "transformers", "sentence-transformers")
_SETTLED_NS = 100_000_000
_LIMIT = 64 << 20  # bytes of a file of digests
_DIGEST = re.compile("[0-9a-f]{64}")
_REMEMBERED = 64
"""Model states whose digests are kept; a file of each is some ten kilobytes."""

# arguments of SentenceTransformer under which the weights still are what the folder's files say
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
    """sha256 of each tensor's bytes, in hex. Tied ones are hashed once; at most four are copied at a time.

    checksums: of the same tensors (`Contents.checksums`). known: digests of tensors with these checksums, which are not
    hashed again; filled.
    """
    known = {} if known is None else known
    if checksums is None:
        places: dict[str, tuple[Any, ...]] = {name: _place(one) for name, one in tensors.items()}
    else:
        places = {name: _contents(one, checksums[name]) for name, one in tensors.items()}
    largest = sorted(tensors, key=lambda name: -tensors[name].numel())
    distinct = {places[name]: tensors[name] for name in largest if places[name] not in known}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        known.update(zip(distinct, threads.map(_tensor_digest, distinct.values()), strict=True))
    return {name: known[places[name]] for name in tensors}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Memory location of a tensor; equal for two live tensors only if they are views of the same numbers."""
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

    return sha(*(part for one in parts_of(tensor) for part in (described(one), bytes(_raw(one))))).hex()


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, on the host: a view if it is there and contiguous, else a copy."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def described(tensor: Tensor, *more: str) -> bytes:
    return framed(*(one.encode() for one in (str(tensor.dtype), repr(tuple(tensor.shape)), *more)))


def flat(facts: Mapping[str, bytes]) -> bytes:
    return framed(*(part for name in sorted(facts) for part in (name.encode(), facts[name])))


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(framed(*parts)).digest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text  # addresses are others in every process


def package_version(package: str) -> str:
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
            if "adapter_config.json" in names or any(os.path.islink(os.path.join(place, one)) for one in folders):
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
        return snapshot_download(name, revision=arguments.get("revision"), cache_dir=cache, local_files_only=True)
    except (OSError, ValueError):
        return None


def remembered_digests(
    tensors: Mapping[str, Tensor], files: ModelFiles, checksums: Mapping[str, bytes]
) -> dict[str, str]:
    """`tensor_digests`, from an earlier call for the same files where there is one.

    checksums: of the tensors. A digest is believed for a tensor of the very bytes that it was taken of, and no other.
    """
    key = sha(canonical([files.facts, [package_version(one) for one in PACKAGES]]), _glimpse(tensors)).hex()
    known = _remembered(key, tensors)
    digests = {name: digest for name, (checksum, digest) in known.items() if checksum == checksums[name].hex()}
    if len(digests) == len(tensors):
        return digests
    rest = {name: one for name, one in tensors.items() if name not in digests}
    digests |= tensor_digests(rest)
    pairs = {name: [checksums[name].hex(), digests[name]] for name in tensors}
    with contextlib.suppress(OSError, RuntimeError):
        _write(_digest_folder(), f"{key}.json", {"check": _check(key, pairs), "tensors": pairs})
    return digests


def _remembered(key: str, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Checksum and digest of each tensor, as the file of this key has them; {} unless it is just what was written.

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
            os.utime(path)  # what is in use is forgotten last
        return known
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, CorpusError):
        return {}  # nothing there, or nothing that can be believed


def _check(key: str, pairs: Any) -> str:
    """Checksum over a digest file's name and contents."""
    return sha(key.encode(), canonical(pairs)).hex()


def _glimpse(tensors: Mapping[str, Tensor]) -> bytes:
    """Names, dtypes, shapes, and the first and last 64 numbers of each tensor.

    A weight that is not in the files is drawn at random at every load; this is where it shows.
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
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "llmcache" / "digests"


def _write(folder: Path, name: str, value: Any) -> None:
    """Mode 0600 in a folder of mode 0700, moved into place whole."""
    for one in (folder.parent, folder):
        one.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder)  # created 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(canonical(value))
        os.replace(partial, folder / name)
    except BaseException:
        os.unlink(partial)
        raise
    _forget(folder)


def _forget(folder: Path) -> None:
    """Remove all but the newest files, and what killed processes left; another process may do the same."""
    aged = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            aged.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(aged, reverse=True)[_REMEMBERED:]:
        path.unlink(missing_ok=True)
