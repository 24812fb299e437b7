"""Corpora named on the command line, read with a progress bar on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llmcache.document import PAIR_FIELDS, Document, TextFields
from llmcache.errors import ConfigError, CorpusError
from llmcache.pipeline.files import CorpusReading, documents

DEFAULT = "text"
"""Field of a text where no option names another. The default of a CrossEncoder is `PAIR_FIELDS`."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Corpora and the options for reading them.

    text_field: `DEFAULT` where no option names fields. as_json: take values that are no texts as JSON, for templates.
    """

    corpora: list[str]
    text_field: TextFields = DEFAULT
    id_field: str = "id"
    unit: str = "line"
    skip_bad: bool = False
    stdin_format: str = "jsonl"
    as_json: bool = False

    def read_by(self, encoder: str) -> Sources:
        """Return the corpora with the fields that a model reads: those of a pair of texts for a CrossEncoder.

        encoder: name of the model's class. ConfigError as `check`.
        """
        self.check(encoder)
        return replace(self, text_field=PAIR_FIELDS) if encoder == "CrossEncoder" and self._default else self

    @property
    def _default(self) -> bool:
        return self.text_field == DEFAULT

    def check(self, encoder: str) -> None:
        """ConfigError unless a model reads the fields named: those of pairs for a CrossEncoder, else of single texts.

        encoder: name of the model's class.
        """
        pairs = not isinstance(self.text_field, str)
        if encoder == "CrossEncoder" and not pairs and not self._default:
            raise ConfigError(
                f"--text-field {self.text_field} names one field, and this model is a CrossEncoder, which scores pairs "
                f"of texts; name their two fields with --pair-fields (by default {','.join(PAIR_FIELDS)})"
            )
        if encoder != "CrossEncoder" and pairs:
            raise ConfigError(f"--pair-fields is for a CrossEncoder, and this model is a {encoder}; use --text-field")

    @property
    def name(self) -> str:
        """Name of the corpora in the record of runs."""
        names = [Path(corpus).name or corpus for corpus in self.corpora]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    def documents(self, reading: CorpusReading) -> Iterator[Document]:
        """Iterate over the documents. Reads the first at once, so an unreadable corpus fails before any work.

        CorpusError when there are no documents.
        """
        stream = documents(
            self.corpora,
            text_field=self.text_field,
            id_field=self.id_field,
            unit=self.unit,
            skip_bad=self.skip_bad,
            stdin_format=self.stdin_format,
            reading=reading,
            as_json=self.as_json,
        )
        first = next(stream, None)
        if first is None:
            raise CorpusError(f"there are no documents in {', '.join(self.corpora)}; nothing was done")
        return chain([first], stream)


def fields_of(text_field: str, pair_fields: str | None) -> TextFields:
    """Return the names of the text fields that --text-field or --pair-fields give. ConfigError for other than two."""
    if pair_fields is None:
        return text_field
    names = [name.strip() for name in pair_fields.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ConfigError(f"--pair-fields is two names, such as {','.join(PAIR_FIELDS)}, got {pair_fields!r}")
    if text_field != DEFAULT:
        raise ConfigError("--text-field and --pair-fields were both given; give one of them")
    return names[0], names[1]


@contextmanager
def progress(reading: CorpusReading, total: int | None) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error: documents, documents per second, hit rate, time left.

    reading: counts of the corpus reader. total: bytes of all corpora, None when unknown; with `reading` it gives the
    estimated number of documents. Yields a function that takes newly answered documents, and those of them computed.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("reading", total=None, left="")
        began = time.monotonic()
        answered = computed = 0

        def advance(new: int, new_computed: int) -> None:
            nonlocal answered, computed
            answered, computed = answered + new, computed + new_computed
            seconds = time.monotonic() - began
            estimated = reading.documents * total / reading.bytes if total and reading.bytes else None
            bar.update(
                task,
                description=f"{answered:,} documents, {answered / max(seconds, 1e-9):,.0f}/s, "
                f"{100 * (1 - computed / max(answered, 1)):.0f} % hits",
                total=estimated,
                completed=answered,
                left=f"{seconds * max(0.0, estimated / answered - 1):,.0f} s left" if estimated and answered else "",
            )

        yield advance


def bytes_of(corpora: Iterable[str]) -> int | None:
    """Sum the bytes of all files of the corpora. None when one of them is standard input."""
    total = 0
    for corpus in corpora:
        if corpus == "-":
            return None
        path = Path(corpus)
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total
