"""Answers of one call whose outputs stay on the model's device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.banks.device_cache import dtype_of, numbers_on
from llmcache.banks.reader import Loaded
from llmcache.encoding.answers import Answers
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.rows import Rows


@dataclass(slots=True)
class DeviceAnswers(Answers):
    """Answers on a device: hits are gathered there, and computed or corrected outputs stay there.

    tensor: [n, width], on the device. there: bool [n], True for the rows of `tensor` that are filled; the other
    documents are in `outputs`.
    """

    tensor: Tensor = field(default_factory=lambda: torch.zeros(0), kw_only=True)
    there: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_), kw_only=True)

    @classmethod
    def on(cls, like: Tensor, facts: BankFacts, n: int) -> DeviceAnswers:
        """Return answers for n documents on the device of `like`, a tensor of the model.

        The dtype is the wider one of the model's and the bank's, so that computed outputs are not rounded.
        """
        plain = Answers.empty(n, facts)
        answers = cls(*(getattr(plain, name) for name in Answers.__slots__))
        answers.there = np.zeros(n, np.bool_)
        dtype = torch.promote_types(like.dtype, dtype_of(facts))
        answers.tensor = torch.zeros((n, facts.width), dtype=dtype, device=like.device)
        return answers

    def fill(self, places: Rows, values: Loaded, intact: NDArray[np.bool_]) -> None:
        if not isinstance(values, Tensor):
            self.there[places] = False
            Answers.fill(self, places, values, intact)
            return
        readable = np.flatnonzero(intact)
        if len(readable):
            self._set(places[readable], values if len(readable) == len(places) else values[self._on_device(readable)])

    def set_device_outputs(self, places: Rows, vectors: Tensor | None) -> None:
        if vectors is not None:
            self._set(places, vectors.detach())

    def given(self, places: Rows) -> NDArray[Any]:
        if not self.there[places].all():
            return Answers.given(self, places)
        return self.tensor[self._on_device(places)].float().cpu().numpy()

    def repeat(self, places: Rows, first: Rows) -> None:
        Answers.repeat(self, places, first)
        if len(places):
            self.tensor[self._on_device(places)] = self.tensor[self._on_device(first)]
            self.there[places] = self.there[first]

    def vectors(self) -> Tensor:
        """Return all outputs, [n, width] on the device; outputs on the host are copied there."""
        rest = np.flatnonzero(~self.there)
        if len(rest):
            self._set(rest, torch.from_numpy(self.outputs[rest]))
        return self.tensor

    def _set(self, places: Rows, vectors: Tensor) -> None:
        self.tensor[self._on_device(places)] = vectors.to(self.tensor.device, self.tensor.dtype)
        self.there[places] = True

    def _on_device(self, numbers: Rows) -> Tensor:
        """Return integers as an index tensor on the device."""
        return numbers_on(self.tensor.device, numbers)
