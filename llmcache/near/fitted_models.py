"""Fitted numbers in a store: a row of a bank of their own, checksummed and copied like every other one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.model.keys import key
from llmcache.near.calibration.calibrate import FittedModels

BANK = "fitted"
FACTS = BankFacts("float32", 1, 2, 0)


def put(bank: Bank, fitted: FittedModels) -> dict[str, Any]:
    """Keep the arrays in the bank, until it is committed; what is needed to find them again, as JSON."""
    # sorted, as the manifest sorts them
    arrays = {name: _single(np.asarray(one, np.float64)) for name, one in sorted(fitted.to_arrays().items())}
    flat = np.concatenate([one.ravel() for one in arrays.values()])
    name = key(b"", "fitted", flat.tobytes())
    kept = bank.put(
        np.frombuffer(name, np.uint64).reshape(1, 2),
        [flat[:, None]],
        tokens=[np.zeros(0, np.int32)],
        sources=["calibration"],
        features=np.zeros((1, 0), np.float32),
        cost=np.zeros(1, np.float32),
    )
    if not kept.all():
        raise ConfigError("what was fitted holds numbers that are not finite; calibrate on other documents")
    return {"key": name.hex(), "shapes": {name: list(one.shape) for name, one in arrays.items()}}


def get(bank: Bank, place: Mapping[str, Any]) -> FittedModels:
    """What `put` kept there. ConfigError when it is gone or damaged."""
    rows = bank.find(np.frombuffer(bytes.fromhex(place["key"]), np.uint64).reshape(1, 2))
    reading = bank.read(rows[rows >= 0])
    if not len(reading.intact) or not reading.intact.all():
        raise ConfigError("what the calibration fitted is gone from the store, or damaged; calibrate again")
    flat: NDArray[np.float32] = np.asarray(reading.values[0]).ravel()
    arrays: dict[str, NDArray[np.generic]] = {}
    at = 0
    if sum(int(np.prod(shape)) for shape in place["shapes"].values()) != len(flat):
        raise ConfigError("the shapes of what the calibration fitted do not fit its numbers; calibrate again")
    for name, shape in sorted(place["shapes"].items()):
        count = int(np.prod(shape))
        arrays[name] = flat[at : at + count].reshape(shape)
        at += count
    return FittedModels.from_arrays(arrays)


def _single(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """As float32, in which what is above 0 stays above 0: a scale of nothing could not be divided by."""
    tiny = np.finfo(np.float32).tiny
    return np.where((numbers > 0) & (numbers < tiny), tiny, numbers).astype(np.float32)
