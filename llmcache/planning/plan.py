"""Forecast of a run, and its comparison with the run afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmcache import units
from llmcache.errors import ConfigError
from llmcache.planning.advice import Advice

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Forecast of one run. Counts are of documents.

    in_store: with a stored text. in_store_by_tokens: with stored token ids, estimated from a sample. repeats: of other
    documents of the corpus, by text or token ids. near: expected near hits; drift, bound: their expected drift and its
    bound, as means over all results; near_from: source of these numbers. computed: documents left for the model.
    margin: half of the 95 % interval of the hit rate, from sampling; exact counts add nothing. seconds,
    uncached_seconds: of the run with and without the cache, without loading the model. cost_from: source of the model's
    cost. new_bytes: bytes that the run will write; total_bytes: size of the store afterwards. pass_seconds: time of the
    forecast itself.
    """

    documents: int
    characters: int
    tokens: int
    in_store: int
    in_store_by_tokens: int
    repeats: int
    near: int
    near_from: str
    drift: float | None
    bound: float | None
    computed: int
    hit_rate: float
    margin: float
    seconds: float
    uncached_seconds: float
    model_seconds: float
    cost_from: str
    new_bytes: int
    total_bytes: int
    pass_seconds: float
    model: str = ""
    namespace: str = "default"
    created: float = 0.0
    advice: tuple[Advice, ...] = field(default=())
    version: int = VERSION

    def __repr__(self) -> str:
        hits = self.documents - self.computed
        return "\n    ".join(
            [
                f"Plan({units.count(self.documents)} documents: {units.count(hits)} hits ({self.hit_rate:.1%}), "
                f"{units.count(self.computed)} to compute)",
                f"{units.duration(self.seconds)}, without the cache {units.duration(self.uncached_seconds)}",
                f"{units.size(self.new_bytes)} to write, {units.size(self.total_bytes)} in the store afterwards",
                "advice: " + ", ".join(f"{advice.about} {advice.value}" for advice in self.advice),
            ][: 4 if self.advice else 3]
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Plan:
        """Make a plan from the result of `to_json`. ConfigError when it is something else."""
        try:
            if raw["version"] > VERSION:
                raise ConfigError(f"the plan has version {raw['version']}, this LLMCache reads up to {VERSION}")
            known = {column.name for column in fields(cls)}
            values = {name: value for name, value in raw.items() if name in known}
            return cls(**{**values, "advice": tuple(Advice(**advice) for advice in raw["advice"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"this is not a plan of `llmcache plan`: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan written by `llmcache plan -o`. ConfigError when the file is not a plan."""
        try:
            return cls.from_json(json.loads(path.read_bytes()))
        except OSError as error:
            raise ConfigError(f"the plan {path} cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not a plan of `llmcache plan`: {error}") from None

    def compared(self, documents: int, computed: int, seconds: float) -> ForecastError:
        """Compare the forecast with a run. seconds: of the model and the cache. Returns the comparison."""
        return ForecastError(self, documents, computed, seconds)


@dataclass(frozen=True, slots=True)
class ForecastError:
    """Comparison of a forecast with its run, which had these documents, computed documents and seconds."""

    plan: Plan
    documents: int
    computed: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Hit rate of the run."""
        return 1 - self.computed / self.documents if self.documents else 0.0

    @property
    def points(self) -> float:
        """Percentage points by which the hit rate exceeded the forecast."""
        return 100 * (self.hit_rate - self.plan.hit_rate)

    @property
    def time(self) -> float:
        """Ratio of the seconds of the run to those of the forecast."""
        return self.seconds / self.plan.seconds if self.plan.seconds else float("inf")

    def as_dict(self) -> dict[str, float]:
        return {
            "forecast_documents": self.plan.documents, "documents": self.documents,
            "forecast_hit_rate": self.plan.hit_rate, "hit_rate": self.hit_rate, "points": self.points,
            "forecast_seconds": self.plan.seconds, "seconds": self.seconds, "time": self.time,
        }  # fmt: skip

    def __str__(self) -> str:
        line = (
            f"forecast {self.plan.hit_rate:.1%} hits, was {self.hit_rate:.1%}; "
            f"{seconds_said(self.plan.seconds)}, was {seconds_said(self.seconds)}"
        )
        if self.documents != self.plan.documents:
            line += f" (planned for {self.plan.documents:,} documents, met {self.documents:,})"
        return line


def seconds_said(seconds: float) -> str:
    """Format seconds in a readable unit."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
