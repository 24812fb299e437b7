"""What calibrated near reuse promised and what came of it, for `stats`. Needs neither torch nor FAISS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from llmcache.indexes.store import Store

SETTING = "calibration"
"""Name of the setting with the calibration of the output bank; other banks append "-" and their name."""
_ENOUGH = 200
"""Documents looked up, from which on it is worth saying that none was found."""


@dataclass(frozen=True, slots=True)
class NearReport:
    """One bank's near reuse. Shares are in [0, 1], times in seconds.

    state: "on", "off", or "aside" (it costs more than it saves). why: what is to be said about that, "" for nothing.
    drift: what is measured. budget: of all results; budget_of_hits: what that leaves to the near hits at the share of
    hits calibrated. bound, bound_of_hits: what calibration made certain. asked: documents looked up by openings of this
    store; hits. audits, audited_drift: how many, and their mean. saved, look_up, audit: seconds; net: what is left.
    """

    namespace: str
    bank: str
    state: str
    why: str
    drift: str
    budget: float
    budget_of_hits: float
    bound: float
    bound_of_hits: float
    asked: int
    hits: int
    audits: int
    audited_drift: float
    saved: float
    look_up: float
    audit: float

    @property
    def net(self) -> float:
        """Seconds saved, less look-ups and audits."""
        return self.saved - self.look_up - self.audit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "net": self.net}


def near_reports(
    store: Store,
    lifetime: Mapping[str, float],
    opened: str = "",
    states: Mapping[str, tuple[str, str]] | None = None,
) -> list[NearReport]:
    """Of every bank that is calibrated. opened: the namespace in use, states: "on", "off" or "aside" there, by bank.

    The counters are those of the whole store: where several banks are calibrated, of all of them.
    """
    found = []
    for namespace, space in sorted(store.manifest.namespaces.items()):
        for name, raw in sorted(calibrations_of(space.config).items()):
            bank = name.removeprefix(SETTING).lstrip("-") or "output"
            now = (states or {}).get(bank) if namespace == opened else None
            found.append(_report(namespace, bank, raw, lifetime, now))
    return found


def calibrations_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a namespace with these settings has calibrated, by the name of the setting: plain numbers, which are a
    `Calibration`, "fitted", and perhaps "kept".
    """
    found = {name: raw for name, raw in config.items() if name.startswith(SETTING)}
    return {name: dict(raw) for name, raw in found.items() if isinstance(raw, Mapping) and raw}


_NUMBERS = (
    "budget", "hits", "expected", "bound", "bound_of_hits", "samples", "needed", "entries", "temperature", "strength",
    "tolerated", "size", "rule",
)  # fmt: skip
_NUMBERS_OR_NONE = ("confidence", "limit", "threshold")
_TEXTS = ("drift", "reason", "guard_pattern")


def unreadable(raw: Mapping[str, Any]) -> str:
    """The first field of a saved calibration that is of another type than it should be; "" where there is none.

    Fields that are missing, or that nobody knows, are for whoever reads the calibration.
    """
    for name in (*_NUMBERS, *_NUMBERS_OR_NONE):
        value = raw.get(name, 0)
        if not _is_number(value) and not (value is None and name in _NUMBERS_OR_NONE):
            return name
    for name in _TEXTS:
        if not isinstance(raw.get(name, ""), str):
            return name
    kinds, curve = raw.get("guard_kinds", ()), raw.get("curve", ())
    if not isinstance(kinds, list | tuple) or not all(isinstance(one, str) for one in kinds):
        return "guard_kinds"
    if not isinstance(curve, list | tuple) or not all(
        isinstance(point, list | tuple) and len(point) == 4 and all(map(_is_number, point)) for point in curve
    ):
        return "curve"
    return "" if isinstance(raw.get("traffic", {}), Mapping) else "traffic"


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(cast(float, value)) < 1e300


def _report(
    namespace: str, bank: str, raw: Mapping[str, Any], lifetime: Mapping[str, float], now: tuple[str, str] | None
) -> NearReport:
    asked, hits, audits = (int(lifetime.get(name, 0)) for name in ("near_asked", "near", "audits"))
    seconds = [float(lifetime.get(name, 0)) for name in ("near_saved_seconds", "near_seconds", "audit_seconds")]
    if field := unreadable(raw):
        raw, now = {}, ("off", f"{field!r} of its calibration cannot be read; calibrate again")
    state, why = now or _state(raw)
    if state == "on" and asked >= _ENOUGH and not hits + audits:
        why = f"enabled and no hits: none of {asked:,} documents had a neighbour that could be trusted"
    elif state == "on" and asked >= _ENOUGH and seconds[0] < seconds[1] + seconds[2]:
        why = "it has cost more than it has saved so far"
    share = float(raw.get("hits", 0))
    return NearReport(
        namespace, bank, state, why, str(raw.get("drift", "")), float(raw.get("budget", 0)),
        min(1.0, float(raw.get("budget", 0)) / share) if share else 0.0, float(raw.get("bound", 0)),
        float(raw.get("bound_of_hits", 0)), asked, hits, audits,
        float(lifetime.get("audited_drift", 0)) / audits if audits else 0.0, *seconds,
    )  # fmt: skip


def _state(raw: Mapping[str, Any]) -> tuple[str, str]:
    kept = raw.get("kept")
    stopped = str(kept.get("stopped", "")) if isinstance(kept, Mapping) else ""
    if raw.get("threshold") is None:
        return "off", str(raw.get("reason", ""))
    return ("off", stopped) if stopped else ("on", "")
