"""Parse sizes and durations: 10GB, 512MiB, 7d, 1h."""

from __future__ import annotations

import math
import re

from llmcache.errors import ConfigError

_SIZES = {"": 1, "b": 1} | {
    unit + ending: base**power
    for power, unit in enumerate("kmgt", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def size(text: str) -> int:
    """Parse a size into bytes. Units: B, kB, MB, GB, TB (1000) or KiB, MiB, GiB, TiB (1024). ConfigError otherwise."""
    return int(_amount(text, _SIZES, "a size", "10GB or 512MiB"))


def seconds(text: str) -> float:
    """Parse a duration into seconds. Units: s, m, h, d, w. ConfigError otherwise."""
    return _amount(text, _SECONDS, "a duration", "90s, 1h or 7d")


def _amount(text: str, units: dict[str, int], quantity: str, examples: str) -> float:
    match = _AMOUNT.fullmatch(text)
    if not match or match[2].lower() not in units:
        raise ConfigError(f"{text!r} is not {quantity}; write a number and a unit, such as {examples}")
    value = float(match[1]) * units[match[2].lower()]
    if not math.isfinite(value) or value >= 1 << 62:
        raise ConfigError(f"{text!r} is more than {quantity} can be; write something like {examples}")
    return value
