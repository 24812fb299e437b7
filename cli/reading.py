"""Documents of the command line's corpora, with progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from llmcache.corpus import Document, Reading, documents
from llmcache.errors import CorpusError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sources:
    """Corpora and how to read them, as the options say."""

    corpora: list[str]
    text_field: str = "text"
    id_field: str = "id"
    unit: str = "line"
    skip_bad: bool = False
    stdin_format: str = "jsonl"

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


class _Left(ProgressColumn):
    """Time left, from the share of bytes that have been read."""

    def render(self, task: Task) -> Text:
        if not task.total or not task.completed or task.elapsed is None:
            return Text("")
        left = task.elapsed * (task.total / task.completed - 1)
        return Text(f"{int(left // 60)}:{int(left % 60):02d} left")


def progressing(results: Iterable[T], reading: Reading, total: int | None, hits: object) -> Iterator[T]:
    """The same results, while standard error shows documents, documents per second, hit rate and time left.

    total: bytes of all corpora, None when unknown. hits: an object whose `hit_rate` is the share so far.
    """
    columns = (TextColumn("{task.fields[said]}"), BarColumn(), _Left())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=total, said="")
        began = shown = time.monotonic()
        for count, result in enumerate(results, 1):
            yield result
            now = time.monotonic()
            if now - shown > 0.2:
                rate = count / (now - began)
                said = f"{count:,} documents, {rate:,.0f}/s, {100 * getattr(hits, 'hit_rate', 0.0):.0f} % hits"
                bar.update(task, completed=reading.bytes, said=said)
                shown = now


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
