"""Options that several commands share, spelt once."""

from __future__ import annotations

from typing import Annotated

import typer

Corpus = Annotated[
    list[str],
    typer.Argument(help="Files or folders: .jsonl .csv .tsv .txt .parquet, also gzipped; - is standard input."),
]
StorePath = Annotated[str, typer.Option("--store", "-s", help="Folder of the store.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder of the store.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Name or path of a SentenceTransformer.")]
TextField = Annotated[str, typer.Option(help="Field or column that holds the text.")]
IdField = Annotated[str, typer.Option(help="Field or column that holds the id; without it, file and line number.")]
Unit = Annotated[str, typer.Option(help="What a document is in a .txt file: line or paragraph.")]
StdinFormat = Annotated[str, typer.Option(help="Format of standard input: jsonl, csv, tsv or txt.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count records that cannot be read instead of stopping.")]
Namespace = Annotated[str, typer.Option(help="Namespace in the store; each model has its own.")]
Role = Annotated[str | None, typer.Option(help="query or document, for models that tell them apart.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Documents the model computes at a time.")]
Tau = Annotated[
    float | None,
    typer.Option(help="Give a neighbour's output from this similarity on. Without it only repeats are reused."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; compute and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for scripts.")]
