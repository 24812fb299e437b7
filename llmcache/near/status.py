"""Report calibrated bounds of near reuse and its measured results, for `stats`. Needs neither torch nor FAISS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from llmcache.indexes.store import Store

SETTING = "calibration"
"""Name of the setting with the calibration of the output bank; other banks append "-" and their name."""
_ENOUGH = 200  # least number of documents looked up for a remark that there were no hits


@dataclass(frozen=True, slots=True)
class NearReport:
    """Near reuse of one bank. Shares are in [0, 1], times in seconds.

    state: "on", "off", or "aside" (it costs more than it saves). why: reason for the state, or a remark; "" for none.
    drift: kind of drift, see `Calibration`.
    budget: highest mean drift over all results. budget_of_hits: the same for near hits, at the calibrated hit share.
    bound, bound_of_hits: calibrated upper bounds of the drift over all results, and over near hits.
    asked: number of documents looked up over all openings of the store. hits: near hits among them.
    audits: number of audited hits. audited_drift: their mean drift.
    saved: time that hits saved. look_up, audit: time spent. net: saved minus spent.
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
        """Seconds saved minus seconds of look-ups and audits."""
        return self.saved - self.look_up - self.audit

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and `net` as JSON values."""
        return {**asdict(self), "net": self.net}


def near_reports(
    store: Store,
    lifetime: Mapping[str, float],
    opened: str = "",
    states: Mapping[str, tuple[str, str]] | None = None,
) -> list[NearReport]:
    """Return a report for every calibrated bank of a store.

    lifetime: counters of the whole store. They are not split by bank when several banks are calibrated.
    opened: the namespace in use. states: (state, why) of its banks, by name.
    """
    reports = []
    for namespace, space in sorted(store.manifest.namespaces.items()):
        for name, raw in sorted(calibrations_of(space.config).items()):
            bank = name.removeprefix(SETTING).lstrip("-") or "output"
            state = (states or {}).get(bank) if namespace == opened else None
            reports.append(_report(namespace, bank, raw, lifetime, state))
    return reports


def calibrations_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the calibrations in the settings of a namespace, by the name of the setting.

    Each is the JSON form of a `Calibration`, with the key "fitted" and, after audits, "kept".
    """
    calibrations = {name: raw for name, raw in config.items() if name.startswith(SETTING)}
    return {name: dict(raw) for name, raw in calibrations.items() if isinstance(raw, Mapping) and raw}


_NUMBERS = (
    "budget", "hits", "expected", "bound", "bound_of_hits", "samples", "needed", "entries", "temperature", "strength",
    "tolerated", "size", "rule",
)  # fmt: skip
_NUMBERS_OR_NONE = ("confidence", "limit", "threshold")
_TEXTS = ("drift", "reason", "guard_pattern")


def unreadable(raw: Mapping[str, Any]) -> str:
    """Return the first field of a saved calibration with a wrong type, "" if there is none.

    Missing and unknown fields are not checked here; `Calibration.from_json` does that.
    """
    for name in (*_NUMBERS, *_NUMBERS_OR_NONE):
        value = raw.get(name, 0)
        if not _is_number(value) and not (value is None and name in _NUMBERS_OR_NONE):
            return name
    for name in _TEXTS:
        if not isinstance(raw.get(name, ""), str):
            return name
    kinds, curve = raw.get("guard_kinds", ()), raw.get("curve", ())
    if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) for kind in kinds):
        return "guard_kinds"
    if not isinstance(curve, list | tuple) or not all(
        isinstance(point, list | tuple) and len(point) == 4 and all(map(_is_number, point)) for point in curve
    ):
        return "curve"
    return "" if isinstance(raw.get("traffic", {}), Mapping) else "traffic"


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(cast(float, value)) < 1e300


def _report(
    namespace: str, bank: str, raw: Mapping[str, Any], lifetime: Mapping[str, float], current: tuple[str, str] | None
) -> NearReport:
    asked, hits, audits = (int(lifetime.get(name, 0)) for name in ("near_asked", "near", "audits"))
    seconds = [float(lifetime.get(name, 0)) for name in ("near_saved_seconds", "near_seconds", "audit_seconds")]
    if field := unreadable(raw):
        raw, current = {}, ("off", f"{field!r} of its calibration cannot be read; calibrate again")
    state, why = current or _saved_state(raw)
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


def _saved_state(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Return state and reason as saved with the calibration."""
    audits = raw.get("kept")
    stopped = str(audits.get("stopped", "")) if isinstance(audits, Mapping) else ""
    if raw.get("threshold") is None:
        return "off", str(raw.get("reason", ""))
    return ("off", stopped) if stopped else ("on", "")
