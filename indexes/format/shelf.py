"""Arena for pending activations, whose memory is reused from one commit to the next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 20
_KEPT = 64 << 20


class Shelf:
    """Arena allocator: `clear` frees all allocations at once and keeps up to 64 MiB for reuse.

    Reuse matters because new pages cost as much as the copy into them: the kernel zeroes each page first.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []
        self._block = self._used = 0

    def place(self, rows: int, nbytes: int) -> NDArray[np.uint8]:
        """Allocate uint8 [rows, nbytes], uninitialised, valid until `clear`."""
        size = rows * nbytes
        while self._block < len(self._blocks) and self._used + size > len(self._blocks[self._block]):
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(np.empty(max(size, _BLOCK), np.uint8))
        start, self._used = self._used, self._used + -(-size // 64) * 64
        return self._blocks[self._block][start : start + size].reshape(rows, nbytes)

    def clear(self) -> None:
        """Free all allocations. Their memory is overwritten by later ones."""
        nbytes = 0
        for count, block in enumerate(self._blocks):
            nbytes += len(block)
            if nbytes > _KEPT:
                del self._blocks[count:]
                break
        self._block = self._used = 0
