"""Backends that compute misses: the model of this process, or processes that also store what they compute."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.encoding.call import EncodeCall, Misses
from llmcache.encoding.near_layers import asked_with
from llmcache.indexes.format.rows import Rows
from llmcache.model.batching import Model, compute


@dataclass(frozen=True, slots=True)
class ComputedMisses:
    """Some of the misses, computed together.

    chosen: indices into the misses. outputs: float32 [n, width] or n matrices, on the host. cost: seconds of the model
    for each document, float32 [n]. seconds: time that the caller waited. vectors: the model's own output, [n, width],
    on its device; None if another process computed. layers: numbers of layers that an attached model skipped, int64
    [n], and keys of the states that it resumed from; None if it was not attached. An attachment counts the seconds
    itself. stored: True if another process has committed the entries, False if it could not; None if the caller stores
    them. lossless: False if they come from rounded states, and are not stored.
    """

    chosen: list[int]
    outputs: NDArray[Any]
    cost: Floats32
    seconds: float
    vectors: torch.Tensor | None = None
    layers: tuple[Rows, list[str]] | None = None
    stored: bool | None = None
    lossless: bool = True


class Compute(Protocol):
    """Interface of a backend that computes misses.

    stores: True if the backend also stores the entries; it then gets misses with marks.
    """

    stores: bool

    def check(self, device: torch.device) -> None:
        """Check the settings of this process before a call. ConfigError when the backend does not compute under them.

        device: device of the model in this process, since autocast is a setting of each kind of device.
        """

    def batches(self, misses: Misses, call: EncodeCall) -> Generator[ComputedMisses]:
        """Compute all misses of a window, and yield them in batches. The caller closes the generator."""
        ...

    def close(self) -> None:
        """End the processes of the backend."""


class LocalCompute:
    """Backend that runs the model in this process, in batches of similar length, and stores nothing."""

    stores = False

    def __init__(self, model: Model, inside: Callable[[], AbstractContextManager[Any]]) -> None:
        """inside: returns the context that the model runs in, an attachment if the model reuses layers."""
        self._model, self._inside = model, inside

    def check(self, device: torch.device) -> None:
        """Accept all settings: they are the model's own, and part of every key."""

    def batches(self, misses: Misses, call: EncodeCall) -> Generator[ComputedMisses]:
        lengths = misses.tokens.lengths.astype(np.float32)
        with self._inside() as attachment, asked_with(attachment, call):
            for done in compute(self._model, misses.tokens, call.batch_size, call.role, ahead=attachment is None):
                tokens = lengths[done.chosen]
                cost = tokens * np.float32(done.seconds / max(1.0, tokens.sum()))
                layers = None if attachment is None else attachment.last_pass()
                yield ComputedMisses(done.chosen, done.outputs, cost, done.seconds, done.vectors, layers)

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""
