"""sha256 of tensors, and a memory of it for models whose files have not changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llmcache.keys import framed

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("torch", "transformers", "sentence-transformers")
_SETTLED_NS = 100_000_000
_REMEMBERED = 64
"""Model states whose digests are kept; a file of each is some ten kilobytes."""

# arguments of SentenceTransformer under which the weights still are what the folder's files say
_HARMLESS = {
    *("device", "prompts", "default_prompt_name", "cache_folder", "revision", "local_files_only", "token"),
    *("truncate_dim", "similarity_fn_name", "processor_kwargs", "model_kwargs"),
}
_HARMLESS_MODEL = {"dtype", "torch_dtype", "attn_implementation", "device_map"}


Digests: TypeAlias = dict[tuple[Any, ...], str]
"""Digests of tensors by where they lie, valid while none of them is written to or released."""


def tensor_digests(tensors: Mapping[str, Tensor], known: Digests | None = None) -> dict[str, str]:
    """sha256 of each tensor's bytes, in hex. Tied ones are hashed once; at most four are copied at a time.

    known: what was hashed before, which is not hashed again; filled.
    """
    known = {} if known is None else known
    places = {n: (t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for n, t in tensors.items()}
    largest = sorted(tensors, key=lambda name: -tensors[name].numel())
    distinct = {places[name]: tensors[name] for name in largest if places[name] not in known}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        known.update(zip(distinct, threads.map(_tensor_digest, distinct.values()), strict=True))
    return {name: known[places[name]] for name in tensors}


def _tensor_digest(tensor: Tensor) -> str:
    return hashlib.sha256(_raw(tensor)).hexdigest()


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


def remembered_digests(tensors: Mapping[str, Tensor], files: ModelFiles) -> dict[str, str]:
    """`tensor_digests`, from an earlier call for the same files where there is one."""
    key = sha(canonical([files.facts, [package_version(one) for one in PACKAGES]]), _glimpse(tensors)).hex()
    try:
        path = _digest_folder() / f"{key}.json"
        raw = json.loads(path.read_bytes())
        if raw["check"] == sha(canonical(raw["tensors"])).hex() and set(raw["tensors"]) == set(tensors):
            with contextlib.suppress(OSError):
                os.utime(path)  # what is in use is forgotten last
            return dict(raw["tensors"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # nothing there, or nothing that can be believed
    digests = tensor_digests(tensors)
    with contextlib.suppress(OSError, RuntimeError):
        _write(_digest_folder(), f"{key}.json", {"check": sha(canonical(digests)).hex(), "tensors": digests})
    return digests


def _glimpse(tensors: Mapping[str, Tensor]) -> bytes:
    """Names, dtypes, shapes, and the first and last 64 numbers of each tensor.

    A weight that is not in the files is drawn at random at every load; this is where it shows.
    """
    seen = hashlib.sha256()
    for name, tensor in tensors.items():
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
