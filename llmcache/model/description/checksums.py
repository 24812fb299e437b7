"""Checksums of the bytes of tensors, which detect writes that leave no trace in a version counter.

On the host a tensor is cut into blocks of 64 KiB, each with its xxh3. On other devices a checksum is a sum of 64-bit
words, each multiplied by an odd number that depends on its place, so that any single changed word is detected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

Checksum: TypeAlias = bytes

_BLOCK = 1 << 16
_SAMPLED = 8  # elements of a tensor that are compared before every call
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORDS = 1 << 22  # 64-bit words of a tensor on a device that are summed in one operation
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed number


class Contents:
    """Checksums of the bytes of some tensors, to be compared with their present bytes in part or as a whole.

    It keeps references to the storages, so that no other tensor gets the same address.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Read all tensors. tensors: by path. Tensors at the same address are read once."""
        self._paths: dict[int, list[str]] = {}
        self._parts: list[tuple[int, Tensor]] = []
        places: dict[object, int] = {}
        for path, tensor in tensors.items():
            whole = not _has_parts(tensor)
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if whole else (id(tensor),)
            key = (place, tensor.dtype, tensor.device)
            number = places.setdefault(key, len(places))
            self._paths.setdefault(number, []).append(path)
            if len(self._paths[number]) == 1:
                self._parts += [(number, part) for part in parts_of(tensor)]
        self.nbytes = sum(part.numel() * part.element_size() for _, part in self._parts)
        self._blocks: list[tuple[int, int, Callable[[], int]]] = []
        for number, part in self._parts:
            self._blocks += [(number, nbytes, read) for nbytes, read in _blocks(part)]
        began = time.perf_counter()
        self._sums = [read() for _, _, read in self._blocks]
        self.seconds = time.perf_counter() - began
        self._next = 0
        # NumPy views have raw addresses, which are freed memory once a storage is moved (`share_memory_`)
        self._addresses = [part.data_ptr() for _, part in self._parts]
        self._sampled: dict[torch.dtype, list[NDArray[Any]]] = {}
        for _, part in self._parts:
            _add_sample(part, self._sampled)
        self._sample = self._read_sample()

    def checksums(self) -> dict[str, Checksum]:
        """Return 16 bytes per path; equal for tensors with the same bytes."""
        of_number: dict[int, Any] = {number: xxhash.xxh3_128() for number in self._paths}
        for (number, _, _), value in zip(self._blocks, self._sums, strict=True):
            of_number[number].update(value.to_bytes(8, "little", signed=False))
        return {path: of_number[number].digest() for number, paths in self._paths.items() for path in paths}

    def sample_holds(self) -> bool:
        """Return whether a few elements of each tensor on the host are unchanged. Detects a write to a whole tensor."""
        return not self._moved() and self._read_sample() == self._sample

    def _moved(self) -> set[int]:
        """Return the numbers of the tensors whose storage has moved; their old views must not be read."""
        if [part.data_ptr() for _, part in self._parts] == self._addresses:
            return set()
        pairs = zip(self._parts, self._addresses, strict=True)
        return {number for (number, part), address in pairs if part.data_ptr() != address}

    def _read_sample(self) -> bytes:
        return b"".join(np.concatenate(views).tobytes() for views in self._sampled.values())

    def changed(self) -> list[str]:
        """Read all bytes; return the paths of tensors whose bytes have changed."""
        return self._changed(range(len(self._blocks)), self._moved())

    def changed_in_part(self, nbytes: float) -> list[str]:
        """Like `changed`, but read about this many bytes (at least one block), continuing where the last call stopped.

        To be called right after `sample_holds`, which detects moved storages.
        """
        numbers: list[int] = []
        left = nbytes
        while left > 0 and len(numbers) < len(self._blocks):
            numbers.append(self._next)
            left -= self._blocks[self._next][1]
            self._next = (self._next + 1) % len(self._blocks)
        return self._changed(numbers, set())

    def _changed(self, numbers: Sequence[int] | range, moved: set[int]) -> list[str]:
        blocks, sums = self._blocks, self._sums
        owners = {blocks[i][0] for i in numbers if blocks[i][0] in moved or blocks[i][2]() != sums[i]}
        return [path for number in sorted(owners) for path in self._paths[number]]


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors with a tensor's data: several for a quantised, sparse or wrapping tensor."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(tensor, name))]
    tensor = tensor.detach()
    if tensor.is_quantized:
        return [tensor.int_repr(), *_scales(tensor)]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout is not torch.strided:
        return [tensor.to_dense()]
    return [tensor]


def _add_sample(tensor: Tensor, sampled: dict[torch.dtype, list[NDArray[Any]]]) -> None:
    """Add a view of up to eight evenly spaced elements of a tensor on the host, as integers of their width."""
    integer = _INTEGERS.get(tensor.element_size())
    if tensor.device.type != "cpu" or not tensor.numel() or integer is None:
        return
    if tensor.is_conj() or tensor.is_neg():
        return
    if not tensor.is_contiguous():
        tensor = in_memory_order(tensor)
    if not tensor.is_contiguous():  # the longest row of elements that has no gaps of other sizes
        longest = max(range(tensor.ndim), key=lambda axis: tensor.shape[axis])
        tensor = tensor[tuple(slice(None) if axis == longest else 0 for axis in range(tensor.ndim))]
    elements = tensor if tensor.ndim == 1 else tensor.view(-1)
    elements = elements[:: max(1, elements.numel() // _SAMPLED)][:_SAMPLED]
    sampled.setdefault(integer, []).append(elements.view(integer).numpy())


def _has_parts(tensor: Tensor) -> bool:
    """Return whether a tensor is quantised, sparse, or wraps others."""
    return hasattr(tensor, "__tensor_flatten__") or tensor.is_quantized or tensor.layout is not torch.strided


def _scales(tensor: Tensor) -> list[Tensor]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the tensor with its dimensions in the order of its strides: often contiguous without a copy."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))
    return tensor.permute(order)


def _blocks(tensor: Tensor) -> Iterator[tuple[int, Callable[[], int]]]:
    """Yield the size of each block in bytes, and a function that computes its present checksum."""
    if not tensor.numel():
        return
    ordered = tensor if tensor.is_contiguous() else in_memory_order(tensor)
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or not ordered.is_contiguous():
        yield nbytes, lambda: _sum_of_words(tensor)
        return
    if ordered.is_conj() or ordered.is_neg():
        yield nbytes, lambda: _sum_of_words(ordered.resolve_conj().resolve_neg())
        return
    data = ordered.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, nbytes, _BLOCK):
        block = data[start : start + _BLOCK]
        yield len(block), lambda block=block: xxhash.xxh3_64_intdigest(block)  # type: ignore[misc]


def _sum_of_words(tensor: Tensor) -> int:
    """Return a checksum that is computed on the tensor's device."""
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    if rest := len(octets) % 8:
        octets = torch.cat([octets, octets.new_zeros(8 - rest)])
    if octets.storage_offset() % 8:
        octets = octets.clone()
    words = octets.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _WORDS):
        chunk = words[start : start + _WORDS]
        places = torch.arange(start, start + len(chunk), device=words.device)
        total += (chunk * (2 * places * _ODD + 1)).sum()  # modulo 2^64; 2n + 1 is odd, so no single change cancels
    return int(total) & 0xFFFF_FFFF_FFFF_FFFF
