"""The form of every benchmark's command: options, a measurement that gives a record, and its tables or JSON."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.document import only_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BenchRecord: TypeAlias = dict[str, Any]
Cell: TypeAlias = str | Callable[[BenchRecord], object]
"""Content of a cell: a field of the row ("name"), one with a format ("ratio:.2f"), or a function of the row."""

BenchCorpus = Annotated[list[str], typer.Option("--data", help="Corpus to encode; repeatable.")]
Repeats = Annotated[int, typer.Option(min=1, help="Measured rounds.")]
Limit = Annotated[int | None, typer.Option(min=2, help="At most this many documents.")]
ModelName = Annotated[
    str | None, typer.Option("--model", "-m", help="Model to use instead of all-MiniLM-L6-v2 of the demo extra.")
]
Gpt2Folder = Annotated[Path | None, typer.Option(help="Folder of GPT-2's tokenizer, for the decoders.")]


@dataclass(frozen=True, slots=True)
class Columns:
    """Table of a record. cells: content by column title. rows: name of the rows in the record; none prints nothing."""

    cells: Mapping[str, Cell]
    rows: str = "rows"
    title: str | None = None

    def show(self, record: BenchRecord) -> None:
        """Print the table."""
        rows = record.get(self.rows)
        if rows:
            cells = ([_cell(row, cell) for cell in self.cells.values()] for row in rows)
            printing.table(list(self.cells), cells, title=self.title)


def _cell(row: BenchRecord, cell: Cell) -> object:
    if not isinstance(cell, str):
        return cell(row)
    name, _, form = cell.partition(":")
    value = row.get(name)
    if value is None:
        return ""
    return format(value, form) if form else value


@dataclass(frozen=True, slots=True)
class Command:
    """One benchmark.

    run: measures and returns a record; its parameters are the options, and its docstring is the help. tables: of the
    record. show: prints what no table has. facts: pairs printed before the conditions. conditions: False for a record
    that has its own, or depends on none. failed: True for a record with which the command ends with exit code 1.
    """

    name: str
    run: Callable[..., BenchRecord]
    tables: Sequence[Columns] = ()
    show: Callable[[BenchRecord], None] | None = None
    facts: Callable[[BenchRecord], Iterable[tuple[str, object]]] = lambda _: ()
    conditions: bool = True
    failed: Callable[[BenchRecord], object] = lambda _: False

    def add_to(self, app: typer.Typer) -> None:
        """Add the command to a Typer application, with the option --json."""
        signature = inspect.signature(self.run, eval_str=True)
        as_json = inspect.Parameter(
            "json", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=options.Json
        )

        def command(**given: Any) -> None:
            self(given.pop("json"), given)

        command.__doc__ = self.run.__doc__
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), as_json], return_annotation=None
        )
        command.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()} | {
            "json": options.Json
        }
        app.command(name=self.name)(command)

    def __call__(self, json: bool, given: Mapping[str, Any]) -> None:
        """Measure with these options, and print one JSON object, or tables, facts and conditions."""
        from llmcache.bench.harness.conditions import conditions

        record = self.run(**given)
        where = conditions() if self.conditions else {}
        if json:
            printing.as_json({**where, **record})
        else:
            for one in self.tables:
                one.show(record)
            if self.show is not None:
                self.show(record)
            printing.facts([*self.facts(record), *where.items()])
        if self.failed(record):
            raise typer.Exit(1)


def say(line: str) -> None:
    """Print a line of progress on standard error."""
    typer.echo(line, err=True)


def loaded(model: str | None = None) -> SentenceTransformer:
    """Load a model, or the demo's, without progress bars."""
    from sentence_transformers import SentenceTransformer

    from llmcache.demo import demo_model

    printing.quiet()
    return SentenceTransformer(model) if model else demo_model()


def texts(data: Sequence[str], limit: int | None, text_field: str = "text", unit: str = "line") -> list[str]:
    """Read at most `limit` texts of a corpus."""
    from llmcache.pipeline.files import documents

    return [*map(only_text, islice(documents(data, text_field=text_field, unit=unit), limit))]


def seconds(row: BenchRecord) -> str:
    """Format the quickest and the slowest round."""
    return f"{min(row['seconds']):.3f}-{max(row['seconds']):.3f}"
