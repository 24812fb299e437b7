"""Store the fitted models of a calibration as a row of their own bank, checksummed and copied like every other row."""

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
    """Put the fitted models into a bank; the next commit makes them durable.

    Returns their reference for `get`, as JSON values. ConfigError when a number is not finite.
    """
    # sorted by name, since the manifest sorts the shapes
    arrays = {name: _single(np.asarray(array, np.float64)) for name, array in sorted(fitted.to_arrays().items())}
    flat = np.concatenate([array.ravel() for array in arrays.values()])
    row_key = key(b"", "fitted", flat.tobytes())
    accepted = bank.put(
        np.frombuffer(row_key, np.uint64).reshape(1, 2),
        [flat[:, None]],
        tokens=[np.zeros(0, np.int32)],
        sources=["calibration"],
        features=np.zeros((1, 0), np.float32),
        cost=np.zeros(1, np.float32),
    )
    if not accepted.all():
        raise ConfigError("the fitted models have numbers that are not finite; calibrate on other documents")
    return {"key": row_key.hex(), "shapes": {name: list(array.shape) for name, array in arrays.items()}}


def get(bank: Bank, place: Mapping[str, Any]) -> FittedModels:
    """Read the fitted models. place: the result of `put`. ConfigError when they are missing or damaged."""
    rows = bank.find(np.frombuffer(bytes.fromhex(place["key"]), np.uint64).reshape(1, 2))
    reading = bank.read(rows[rows >= 0])
    if not len(reading.intact) or not reading.intact.all():
        raise ConfigError("the fitted models of the calibration are missing from the store or damaged; calibrate again")
    flat: NDArray[np.float32] = np.asarray(reading.values[0]).ravel()
    arrays: dict[str, NDArray[np.generic]] = {}
    at = 0
    if sum(int(np.prod(shape)) for shape in place["shapes"].values()) != len(flat):
        raise ConfigError("the saved shapes of the fitted models do not fit their numbers; calibrate again")
    for name, shape in sorted(place["shapes"].items()):
        count = int(np.prod(shape))
        arrays[name] = flat[at : at + count].reshape(shape)
        at += count
    return FittedModels.from_arrays(arrays)


def _single(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Convert to float32; positive numbers stay positive, since scales are used as divisors."""
    tiny = np.finfo(np.float32).tiny
    return np.where((numbers > 0) & (numbers < tiny), tiny, numbers).astype(np.float32)
