"""Reading of rows from sealed files, which are mapped or read with `preadv`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.files.descriptors import OPEN_FILES


class Sealed:
    """Bytes of a sealed file, mapped, or read with `preadv` on each access."""

    def __init__(
        self,
        size: int,
        *,
        mapped: NDArray[np.uint8] | None = None,
        descriptor: int = -1,
        again: Callable[[], int] | None = None,
    ) -> None:
        """mapped: the file's bytes, or None. descriptor: of a file that is not mapped; this object owns it.

        The descriptor is closed when too many files are open, and with the last reference to this object.
        again: opens the file again; OSError when the name belongs to another file by then.
        """
        self.size, self.mapped, self._again = size, mapped, again
        self._key = 0
        if mapped is None:
            self._key = OPEN_FILES.add(descriptor)
            weakref.finalize(self, OPEN_FILES.close, self._key)

    def part(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Return bytes of the file, uint8 [nbytes], a view or a copy. Shorter if the file ends before."""
        if start >= self.size:
            return np.zeros(0, np.uint8)
        nbytes = min(nbytes, self.size - start)
        if self.mapped is not None:
            return self.mapped[start : start + nbytes]
        data = np.empty(nbytes, np.uint8)
        return data[: self._fill(data, start)]

    def table(self, rows: NDArray[np.int64], pitch: int, nbytes: int) -> NDArray[np.uint8]:
        """Copy the first `nbytes` bytes of rows that are `pitch` bytes apart. Returns uint8 [n, nbytes].

        Bytes that cannot be read are zeros, which fail the row's checksum.
        """
        nbytes = min(nbytes, pitch)
        if self.mapped is not None:
            whole = self.mapped[: self.size // pitch * pitch].reshape(-1, pitch)
            return whole[rows, :nbytes]
        data = np.zeros((len(rows), nbytes), np.uint8)
        for i, row in enumerate(rows.tolist()):
            done = self._fill(data[i], row * pitch)
            data[i, done:] = 0
        return data

    def fill(self, rows: NDArray[np.int64], pitch: int, into: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> None:
        """Copy rows that are `pitch` bytes apart into `into`. Bytes that cannot be read are zeros."""
        if self.mapped is not None and isinstance(into, np.ndarray):
            whole = self.mapped[: self.size // pitch * pitch].reshape(-1, pitch)
            if into.shape[1] == pitch:
                np.take(whole, rows, axis=0, out=into, mode="clip")  # any other mode copies twice
            else:
                into[:] = whole[rows, : into.shape[1]]
            return
        if isinstance(into, np.ndarray) and into.shape[1] == pitch and into.flags.c_contiguous:
            cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
            for first, end in pairwise(cuts):  # one call for consecutive rows
                place = into[first:end].reshape(-1)
                place[self._fill(place, int(rows[first]) * pitch) :] = 0
            return
        for place, row in zip(into, rows.tolist(), strict=True):
            if self.mapped is not None:
                place[:] = self.mapped[row * pitch : row * pitch + place.nbytes]
            else:
                place[self._fill(place, row * pitch) :] = 0

    def _fill(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """Read into the buffer. Returns the bytes read: fewer, and so a miss, for truncated files and disk errors."""
        assert self._again is not None
        try:
            with OPEN_FILES.using(self._key, self._again) as descriptor:
                return read_into(descriptor, buffer, offset)
        except OSError:
            return 0


def read_into(descriptor: int, buffer: NDArray[np.uint8], offset: int) -> int:
    """Fill a contiguous buffer from `offset` of a file. Returns the number of bytes read, fewer at the file's end."""
    view, done = buffer.data, 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return done
