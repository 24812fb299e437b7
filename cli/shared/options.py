"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.errors import ConfigError
from llmcache.indexes.commits.signatures import secret_from_file, secret_from_variable

Corpus = Annotated[
    list[str],
    typer.Argument(help="Files or folders: .jsonl .csv .tsv .txt .parquet, also gzipped; - is standard input."),
]
StorePath = Annotated[str, typer.Option("--store", "-s", help="Folder of the store.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder of the store.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Name or path of a model of sentence-transformers.")]
Kind = Annotated[
    str | None,
    typer.Option(
        help="Kind of the model: sentence-transformer, cross-encoder, sparse-encoder or multi-vector-encoder. "
        "By default its folder says."
    ),
]
TextField = Annotated[str, typer.Option(help="Field or column of the text.")]
PairFields = Annotated[
    str | None,
    typer.Option(help="Two fields or columns of a pair of texts, for a cross-encoder; by default query,document."),
]
IdField = Annotated[str, typer.Option(help="Field or column of the id; records without it get file and line number.")]
Unit = Annotated[str, typer.Option(help="Unit of a document in .txt files: line or paragraph.")]
StdinFormat = Annotated[str, typer.Option(help="Format of standard input: jsonl, csv, tsv or txt.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip and count unreadable records instead of stopping.")]
Namespace = Annotated[str, typer.Option(help="Namespace of the store; one model each.")]
Role = Annotated[str | None, typer.Option(help="query or document, for models that distinguish them.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Documents in a batch of the model.")]
Tau = Annotated[
    float | None,
    typer.Option(help="Reuse a neighbour's output from this cosine similarity on. By default only repeats are reused."),
]
SecretFile = Annotated[
    str | None, typer.Option(help="File with the namespace's secret, at least 32 bytes: openssl rand -hex 32.")
]
KeyFile = Annotated[str | None, typer.Option(help="File with the key that signs the store, at least 32 bytes.")]
KeyVariable = Annotated[
    str | None, typer.Option(help="Environment variable with the signing key, for example LLMCACHE_KEY.")
]
AllowUntrusted = Annotated[
    bool,
    typer.Option(
        "--allow-untrusted",
        help="Read a store that is neither yours nor signed: exact matches of tokens only, no writing.",
    ),
]
ReadOnly = Annotated[
    bool, typer.Option("--read-only", help="Write nothing to the store: missing documents are computed and not stored.")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="File of `llmcache plan -o`, to compare the forecast with this run.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; compute and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, slots=True)
class Access:
    """Options for trust and secrets: signing key, secret of the namespace, and whether to read untrusted stores."""

    secret_file: str | None = None
    key_file: str | None = None
    key_variable: str | None = None
    allow_untrusted: bool = False

    def of_store(self) -> dict[str, Any]:
        """Keyword arguments for `Store.open`."""
        return {"key": signing_key(self.key_file, self.key_variable), "allow_untrusted": self.allow_untrusted}

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments for `LLMCache.open`."""
        return {**self.of_store(), "secret_file": self.secret_file}


def signing_key(file: str | None, variable: str | None) -> bytes | None:
    """Read the key that --key-file or --key-variable names. None without either; ConfigError when both are given."""
    purpose = "the key that signs a store"
    if file is not None and variable is not None:
        raise ConfigError("--key-file and --key-variable were both given; give one of them")
    if variable is not None:
        return secret_from_variable(variable, purpose)
    return None if file is None else secret_from_file(file, purpose)
