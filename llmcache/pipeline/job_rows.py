"""Rows of language-model jobs: what a job writes for each record."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeAlias

PROVENANCE = ("tier", "restored", "reused")
"""Columns that say where a row came from. They differ between a first run and a repetition."""


@dataclass(frozen=True, slots=True)
class GeneratedRow:
    """Generated answer of one record.

    text: without special tokens. finish: "end" if the answer ended with an end token, "length" if it reached
        max_new_tokens, "stop" if something else ended it.
    tokens: ids of the new tokens. log_likelihoods: of each of them, in nats.
    tier: "exact" if the whole answer was stored, "prefix" if a part of the prompt was restored or of the answer reused,
        "miss" if all was computed. restored: share of the prompt's tokens that were not computed. reused: share of
        the new tokens that were stored.
    """

    id: str
    text: str
    finish: str
    tokens: tuple[int, ...]
    log_likelihoods: tuple[float, ...]
    tier: str
    restored: float
    reused: float


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """Scores of the choices of one record.

    best: number of the choice with the highest score. log_likelihoods: of each choice as the continuation of the
        prompt, in nats. tokens: number of tokens of each choice.
    tier, restored, reused: as of `GeneratedRow`, where `reused` is the share of the choices whose scores were stored.
    """

    id: str
    best: int
    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    tier: str
    restored: float
    reused: float


@dataclass(frozen=True, slots=True)
class ClassifiedRow:
    """Label of one record.

    label: the choice with the highest score. probability: of this label among the choices. probabilities: of each
        choice, the softmax of the scores. Other fields are those of `ScoredRow`.
    """

    id: str
    label: str
    probability: float
    probabilities: tuple[float, ...]
    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    tier: str
    restored: float
    reused: float


JobRow: TypeAlias = GeneratedRow | ScoredRow | ClassifiedRow


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of the result file of a job. kind: class of the rows. names: of the columns, in order."""

    kind: type[Any]
    names: tuple[str, ...]

    @classmethod
    def of(cls, kind: type[Any], *, provenance: bool) -> Columns:
        """Return the columns of a class of rows. provenance: False leaves out where a row came from."""
        names = [field.name for field in fields(kind)]
        return cls(kind, tuple(name for name in names if provenance or name not in PROVENANCE))

    def values(self, row: Any) -> list[Any]:
        """Return the values of a row, in the order of the columns."""
        return [getattr(row, name) for name in self.names]

    def arrow_schema(self) -> Any:
        """Return the schema of a Parquet file."""
        import pyarrow as pa

        kinds = {
            "str": pa.string(), "int": pa.int32(), "float": pa.float64(), "tuple[int, ...]": pa.list_(pa.int32()),
            "tuple[float, ...]": pa.list_(pa.float64()),
        }  # fmt: skip
        types = {field.name: kinds[str(field.type)] for field in fields(self.kind)}
        return pa.schema([pa.field(name, types[name], nullable=False) for name in self.names])


def tier_of(reused: float, restored: float) -> str:
    """Return the tier of a row, see `GeneratedRow`."""
    if reused == 1:
        return "exact"
    return "prefix" if reused or restored else "miss"
