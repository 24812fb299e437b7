"""`llmcache bench gpu`: all measurements on a GPU, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.bench.command import BenchRecord, Columns, say
from llmcache.cli.shared import output as printing


def gpu(
    out: Annotated[Path | None, typer.Option(help="JSON file, rewritten after every part.")] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Time limit: parts that would start later are left out.")
    ] = 8.0,
    only: Annotated[
        str,
        typer.Option(help="Parts, separated by commas: bandwidth, search, minilm, bert-base, llama-1b, near, prefix."),
    ] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial without meaningful times.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny sizes, for a trial without meaningful times.")] = False,
) -> BenchRecord:
    """Measure hits from device memory, pinned memory and disk, misses, near look-ups, long prefixes, and search.

    Each is compared with the model alone. Models have seeded weights of known shapes; nothing is downloaded.
    `python -m llmcache.bench.gpu` does the same without FAISS and the libraries of the command line.
    """
    from llmcache.bench.gpu.runner import measured

    printing.quiet()
    return measured(out, minutes=minutes, only=only, device=device, tiny=tiny, say=say)


def failed(record: BenchRecord) -> list[str]:
    """List the parts that ended with an error."""
    from llmcache.bench.gpu.runner import failed

    return failed(record)


_TABLES = {
    "search": {
        "fingerprints": "rows", "dtype": "dtype", "queries": "queries", "ms": "milliseconds:.3g",
        "ms to read them": "floor_milliseconds:.3g", "of that floor": "of_floor:.2f", "difference": "difference:.1e",
    },
    "near": {
        "entries": "entries", "queries": "queries", "ms each": "device_milliseconds:.3g",
        "ms on the host": "host_milliseconds:.3g", "ms of the model": "model_milliseconds:.3g",
        "of the model": "of_model:.1%", "difference": "difference:.1e",
    },
    "prefix": {
        "tokens known": "tokens", "recompute s": "recompute:.3g", "from": "level", "s": "median:.3g",
        "x": "times_as_fast:.2f", "difference": "relative_difference:.1e",
    },
    "bandwidth": {"": "name", "per second": "per_second:.3g"},
}  # fmt: skip
_HITS = {"docs/s": "documents_per_second:,.0f", "x model": "times_as_fast:.2f", "difference": "difference:.1e"}


def show(record: BenchRecord) -> None:
    """Print a table for each part, and the reason for a part without results."""
    for name, part in record["parts"].items():
        if problem := part.get("error") or part.get("skipped"):
            typer.echo(f"{name}: {problem}\n")
        found = part.get("result")
        if not found:
            continue
        if name == "bandwidth":
            found = [{"name": what, **one} for what, one in found.items()]
        elif name == "prefix":
            levels = ("disk", "pinned memory", "device memory")
            found = [
                {**one[level], "tokens": one["tokens"], "recompute": one["recompute"]["median"], "level": level}
                for one in found
                for level in levels
            ]
        if name in _TABLES:
            Columns(_TABLES[name]).show({"rows": found})
            continue
        hits = [{"name": what, **one} for what, one in found.get("hits", {}).items()]
        Columns({name: "name", **_HITS}).show({"rows": hits})
        if misses := found.get("misses"):
            typer.echo(
                f"Empty cache: {misses['overhead']:+.1%} of the model's time, "
                f"{misses['overhead_with_commit']:+.1%} with the commit; difference {misses['difference']:.1e}.\n"
            )
