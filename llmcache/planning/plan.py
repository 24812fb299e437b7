"""The forecast of a run, said before anything is computed; and afterwards, how far it was off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmcache.errors import ConfigError
from llmcache.planning.advice import Advice

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The forecast of one run. Counts are of documents.

    in_store: whose text is stored. in_store_by_tokens: whose tokens are, expected from a sample. repeats: of others in
    the corpus itself, by text or tokens. near, drift, bound: matches expected, and what they would be off by, as a mean
    over all results; near_from says how that is known. computed: what is left for the model.
    margin: half of the 95 % interval of the hit rate, for what was drawn by chance; what was counted adds nothing.
    seconds, uncached_seconds: of the run with and without the cache, without loading the model. cost_from: how the
    model's cost is known. new_bytes, total_bytes: that the run will write, and the store have then.
    pass_seconds: what the forecast itself took.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Plan:
        """What `to_json` gave. ConfigError when it is something else."""
        try:
            if raw["version"] > VERSION:
                raise ConfigError(f"the plan has version {raw['version']}, this LLMCache reads up to {VERSION}")
            known = {one.name for one in fields(cls)}
            given = {name: value for name, value in raw.items() if name in known}
            return cls(**{**given, "advice": tuple(Advice(**one) for one in raw["advice"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"this is not a plan of `llmcache plan`: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Plan:
        """A plan that `llmcache plan -o` wrote. ConfigError when the file is none."""
        try:
            return cls.from_json(json.loads(path.read_bytes()))
        except OSError as error:
            raise ConfigError(f"the plan {path} cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not a plan of `llmcache plan`: {error}") from None

    def compared(self, documents: int, computed: int, seconds: float) -> ForecastError:
        """How the run went beside this forecast. seconds: of the model and of the cache."""
        return ForecastError(self, documents, computed, seconds)


@dataclass(frozen=True, slots=True)
class ForecastError:
    """A forecast beside what came. points: by which the hit rate was higher; time: the run's over the forecast's."""

    plan: Plan
    documents: int
    computed: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        return 1 - self.computed / self.documents if self.documents else 0.0

    @property
    def points(self) -> float:
        return 100 * (self.hit_rate - self.plan.hit_rate)

    @property
    def time(self) -> float:
        return self.seconds / self.plan.seconds if self.plan.seconds else float("inf")

    def as_dict(self) -> dict[str, float]:
        return {
            "forecast_documents": self.plan.documents, "documents": self.documents,
            "forecast_hit_rate": self.plan.hit_rate, "hit_rate": self.hit_rate, "points": self.points,
            "forecast_seconds": self.plan.seconds, "seconds": self.seconds, "time": self.time,
        }  # fmt: skip

    def __str__(self) -> str:
        said = (
            f"forecast {self.plan.hit_rate:.1%} hits, was {self.hit_rate:.1%}; "
            f"{seconds_said(self.plan.seconds)}, was {seconds_said(self.seconds)}"
        )
        if self.documents != self.plan.documents:
            said += f" (planned for {self.plan.documents:,} documents, met {self.documents:,})"
        return said


def seconds_said(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
