"""Data that is derived from all entries of a namespace: calibrations, their fitted arrays, and predictions.

A calibration is a setting of the namespace. Its fitted arrays, which include features of entries (landmarks), are a row
of the bank `fitted`. Outputs predicted with them are the bank `distilled-<version>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcache.indexes.format.manifest import NamespaceFacts

SETTING = "calibration"
"""Name of the setting with the calibration of the output bank; for other banks, "-" and the bank's name follow."""
FITTED = "fitted"
DISTILLED = "distilled-"
VERSION = 16
"""Number of digits of the key of fitted arrays in the name of the bank of predictions made with them."""


def calibrations(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the settings that are calibrations, by name."""
    return {name: raw for name, raw in config.items() if name.startswith(SETTING) and isinstance(raw, Mapping) and raw}


def calibrated_bank(setting: str) -> str:
    """Return the name of the bank from whose entries a calibration was made."""
    return setting.removeprefix(SETTING).lstrip("-") or "output"


def may_hold(raw: Mapping[str, Any], earliest: int | None) -> bool:
    """Return whether a calibration may have used an entry of its bank.

    earliest: when the first of the entries in question was put, seconds since the epoch; None: no entry.
    """
    until = raw.get("until")
    return earliest is not None and (not isinstance(until, int) or until == 0 or earliest <= until)


def fitted_keys(config: Mapping[str, Any]) -> set[str]:
    """Return the keys of the fitted arrays that the calibrations of a namespace use, in hexadecimal."""
    places = [raw.get("fitted") for raw in calibrations(config).values()]
    return {str(place["key"]) for place in places if isinstance(place, Mapping) and "key" in place}


def without(space: NamespaceFacts, settings: frozenset[str]) -> tuple[dict[str, Any], set[str]]:
    """Return the settings of a namespace without some calibrations, and the banks of predictions unused after that."""
    config = {name: value for name, value in space.config.items() if name not in settings}
    used = {f"{DISTILLED}{key[:VERSION]}" for key in fitted_keys(config)}
    return config, {name for name in space.banks if name.startswith(DISTILLED) and name not in used}
