"""Options that several commands share, spelt once."""

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
SecretFile = Annotated[
    str | None, typer.Option(help="File with the namespace's secret, at least 32 bytes: openssl rand -hex 32.")
]
KeyFile = Annotated[str | None, typer.Option(help="File with the key that signs the store, at least 32 bytes.")]
KeyVariable = Annotated[str | None, typer.Option(help="Environment variable with that key, for example LLMCACHE_KEY.")]
AllowUntrusted = Annotated[
    bool, typer.Option("--allow-untrusted", help="Read a store that nobody vouches for: equal tokens only, no writing.")
]
ReadOnly = Annotated[
    bool, typer.Option("--read-only", help="Write nothing below the store: what it lacks is computed and not kept.")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="A forecast of `llmcache plan -o`, to be compared with what comes.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; compute and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for scripts.")]


@dataclass(frozen=True, slots=True)
class Access:
    """The options that say who vouches for a store, and what its namespace's secret is."""

    secret_file: str | None = None
    key_file: str | None = None
    key_variable: str | None = None
    allow_untrusted: bool = False

    def of_store(self) -> dict[str, Any]:
        """Keyword arguments of `Store.open`."""
        return {"key": signing_key(self.key_file, self.key_variable), "allow_untrusted": self.allow_untrusted}

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `LLMCache.open`."""
        return {**self.of_store(), "secret_file": self.secret_file}


def signing_key(file: str | None, variable: str | None) -> bytes | None:
    """The key that one of the two options names, None without one."""
    what = "the key that signs a store"
    if file is not None and variable is not None:
        raise ConfigError("--key-file and --key-variable were both given; give one of them")
    if variable is not None:
        return secret_from_variable(variable, what)
    return None if file is None else secret_from_file(file, what)
