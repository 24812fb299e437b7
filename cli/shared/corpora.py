"""Documents of the command line's corpora, with progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llmcache.document import Document
from llmcache.errors import CorpusError
from llmcache.pipeline.files import Reading, documents


@dataclass(frozen=True, slots=True)
class Sources:
    """Corpora and how to read them, as the options say."""

    corpora: list[str]
    text_field: str = "text"
    id_field: str = "id"
    unit: str = "line"
    skip_bad: bool = False
    stdin_format: str = "jsonl"

    @property
    def name(self) -> str:
        """What the corpora are called in the record of runs."""
        names = [Path(one).name or one for one in self.corpora]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    def documents(self, reading: Reading) -> Iterator[Document]:
        """The documents; the first is read at once: a corpus that cannot be read fails before anything is made."""
        found = documents(
            self.corpora,
            text_field=self.text_field,
            id_field=self.id_field,
            unit=self.unit,
            skip_bad=self.skip_bad,
            stdin_format=self.stdin_format,
            reading=reading,
        )
        first = next(found, None)
        if first is None:
            raise CorpusError(f"there are no documents in {', '.join(self.corpora)}; nothing was done")
        return chain([first], found)


@contextmanager
def progress(reading: Reading, total: int | None) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with documents, documents per second, hit rate and time left; gives what advances it.

    reading: what has been read, `total`: bytes of all corpora, None when unknown; both tell how far the documents read
    so far are from all.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("reading", total=None, left="")
        began = time.monotonic()
        answered = computed = 0

        def advance(more: int, by_model: int) -> None:
            nonlocal answered, computed
            answered, computed = answered + more, computed + by_model
            seconds = time.monotonic() - began
            everything = reading.documents * total / reading.bytes if total and reading.bytes else None
            bar.update(
                task,
                description=f"{answered:,} documents, {answered / max(seconds, 1e-9):,.0f}/s, "
                f"{100 * (1 - computed / max(answered, 1)):.0f} % hits",
                total=everything,
                completed=answered,
                left=f"{seconds * max(0.0, everything / answered - 1):,.0f} s left" if everything and answered else "",
            )

        yield advance


def bytes_of(corpora: Iterable[str]) -> int | None:
    """Bytes of all files of the corpora, None where one of them is standard input."""
    total = 0
    for corpus in corpora:
        if corpus == "-":
            return None
        path = Path(corpus)
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total
