"""Answers of one call whose outputs stay on the device of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcache.banks.device_cache import DeviceCache, dtype_of, numbers_on
from llmcache.encoding.answers import Answers
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts

Rows: TypeAlias = NDArray[np.int64]


@dataclass(slots=True)
class DeviceAnswers(Answers):
    """Answers whose outputs are on a device: hits are gathered there, and what is computed or corrected there stays.

    levels: None where hits come from the files. tensor: [n, width]; there: bool [n], which rows of it are filled. The
    others are in `outputs`.
    """

    levels: DeviceCache | None = field(default=None, kw_only=True)
    tensor: Tensor = field(default_factory=lambda: torch.zeros(0), kw_only=True)
    there: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_), kw_only=True)

    @classmethod
    def on(cls, like: Tensor, facts: BankFacts, levels: DeviceCache | None, n: int) -> DeviceAnswers:
        """For n documents, on the device of `like`, a tensor of the model, whose own numbers are not to be rounded as
        stored ones may be.
        """
        plain = Answers.empty(n, facts.width)
        found = cls(*(getattr(plain, name) for name in Answers.__slots__))
        found.levels, found.there = levels, np.zeros(n, np.bool_)
        dtype = torch.promote_types(like.dtype, dtype_of(facts))
        found.tensor = torch.zeros((n, facts.width), dtype=dtype, device=like.device)
        return found

    def fill(self, places: Rows, rows: Rows, bank: Bank) -> NDArray[np.bool_]:
        if self.levels is None:
            self.there[places] = False
            return Answers.fill(self, places, rows, bank)
        values, intact = self.levels.gather(rows)
        good = np.flatnonzero(intact)
        if len(good):
            self._set(places[good], values if len(good) == len(rows) else values[self._numbers(good)])
        return intact

    def set_device_outputs(self, places: Rows, vectors: Tensor) -> None:
        self._set(places, vectors.detach())

    def given(self, places: Rows) -> NDArray[np.float32]:
        if not self.there[places].all():
            return Answers.given(self, places)
        return self.tensor[self._numbers(places)].float().cpu().numpy()

    def repeat(self, places: Rows, first: Rows) -> None:
        Answers.repeat(self, places, first)
        if len(places):
            self.tensor[self._numbers(places)] = self.tensor[self._numbers(first)]
            self.there[places] = self.there[first]

    def vectors(self) -> Tensor:
        """All outputs, [n, width] on the device; what is on the host goes there now."""
        rest = np.flatnonzero(~self.there)
        if len(rest):
            self._set(rest, torch.from_numpy(self.outputs[rest]))
        return self.tensor

    def _set(self, places: Rows, vectors: Tensor) -> None:
        self.tensor[self._numbers(places)] = vectors.to(self.tensor.device, self.tensor.dtype)
        self.there[places] = True

    def _numbers(self, numbers: Rows) -> Tensor:
        return numbers_on(self.tensor.device, numbers)
