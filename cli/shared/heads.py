"""`llmcache run --head`: several heads on one trunk, with one result file each."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources, bytes_of, progress
from llmcache.cli.shared.fill import counts, warnings
from llmcache.errors import ConfigError
from llmcache.pipeline.files import CorpusReading
from llmcache.pipeline.writers import ResultWriter, result_writer

if TYPE_CHECKING:
    from llmcache.cache import LLMCache


def run_heads(
    cache: LLMCache, options: list[str], sources: Sources, out: Path, role: str | None, batch_size: int, json: bool
) -> None:
    """Write the outputs of every head for every document, and print how many rows reused the trunk.

    options: values of --head, NAME=FOLDER. ConfigError when two heads have the same name.
    """
    from llmcache.encoding.results import TierCounts
    from llmcache.model.loading import load_any

    folders = dict(named(option) for option in options)
    if len(folders) < len(options):
        raise ConfigError("two heads have the same name; give each its own name")
    heads = {name: load_any(folder)[0] for name, folder in folders.items()}
    reading = CorpusReading()
    tiers = {name: Counter[str]() for name in heads}
    files = {name: out.with_name(f"{out.stem}.{name}{out.suffix}") for name in heads}
    with ExitStack() as stack, progress(reading, bytes_of(sources.corpora)) as advance:
        writers: dict[str, ResultWriter] = {}
        for row in cache.run_heads(
            sources.documents(reading), heads, role=role, batch_size=batch_size, progress=advance
        ):
            for name, result in row.items():
                if name not in writers:  # the width is known with the first result
                    writer = result_writer(files[name], width=len(result.output))
                    writers[name] = stack.enter_context(writer)
                writers[name].write([result])
                tiers[name][result.tier] += 1
    tallies = {name: TierCounts.of(counted) for name, counted in tiers.items()}
    layers = {
        name: {"asked": one.asked, "hits": one.hits, "saved_seconds": one.saved_seconds}
        for name, one in cache.stats().counters.layers.items()
    }
    if json:
        shown = {name: {**tally.as_dict(), "out": str(files[name])} for name, tally in tallies.items()}
        printing.as_json({"heads": shown, "layers": layers, **counts(reading), "bad": reading.bad})
        return
    printing.table(
        ["head", "documents", "reused", "computed", "written to"],
        [[name, one.documents, one.exact + one.near, one.misses, files[name]] for name, one in tallies.items()],
    )
    printing.facts([("records read", reading.documents + reading.bad), ("refused", reading.bad)])
    printing.facts(
        [(f"{name} entered after", f"{one['hits']:,} of {one['asked']:,} rows") for name, one in layers.items()]
    )
    warnings(reading)


def named(option: str) -> tuple[str, str]:
    """Split NAME=FOLDER into name and folder. ConfigError for anything else."""
    name, equals, folder = option.partition("=")
    if not equals or not name.isidentifier() or not folder:
        raise ConfigError(f"--head is NAME=FOLDER, where NAME is a word, got {option!r}")
    return name, folder
