"""`llmcache bench gpu`: all measurements on a GPU, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.cli.shared import options
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
    json: options.Json = False,
) -> None:
    """Measure hits from device memory, pinned memory and disk, misses, near look-ups, long prefixes, and search.

    Each is compared with the model alone. Models have seeded weights of known shapes; nothing is downloaded.
    `python -m llmcache.bench.gpu` does the same without FAISS and the libraries of the command line.
    """
    from llmcache.bench.gpu.runner import failed, measured

    printing.quiet()
    found = measured(
        out, minutes=minutes, only=only, device=device, tiny=tiny, say=lambda line: typer.echo(line, err=True)
    )
    if json:
        printing.as_json(found)
    else:
        _tables(found["parts"])
        printing.facts([(name, value) for name, value in found.items() if name != "parts"])
    if failed(found):
        raise typer.Exit(1)


def _tables(parts: dict[str, Any]) -> None:
    for name, part in parts.items():
        if problem := part.get("error") or part.get("skipped"):
            typer.echo(f"{name}: {problem}\n")
        found = part.get("result")
        if not found:
            continue
        if name == "bandwidth":
            printing.table(["", "per second"], [[what, f"{one['per_second']:.3g}"] for what, one in found.items()])
        elif name == "search":
            printing.table(
                ["fingerprints", "dtype", "queries", "ms", "ms to read them", "of that floor", "difference"],
                [
                    [one["rows"], one["dtype"], one["queries"], f"{one['milliseconds']:.3g}",
                     f"{one['floor_milliseconds']:.3g}", f"{one['of_floor']:.2f}", f"{one['difference']:.1e}"]
                    for one in found
                ],
            )  # fmt: skip
        elif name == "near":
            printing.table(
                ["entries", "queries", "ms each", "ms on the host", "ms of the model", "of the model", "difference"],
                [
                    [one["entries"], one["queries"],
                     *(f"{one[f'{what}_milliseconds']:.3g}" for what in ("device", "host", "model")),
                     f"{one['of_model']:.1%}", f"{one['difference']:.1e}"]
                    for one in found
                ],
            )  # fmt: skip
        elif name == "prefix":
            printing.table(
                ["tokens known", "recompute s", "from", "s", "x", "difference"],
                [
                    [one["tokens"], f"{one['recompute']['median']:.3g}", level, f"{one[level]['median']:.3g}",
                     f"{one[level]['times_as_fast']:.2f}", f"{one[level]['relative_difference']:.1e}"]
                    for one in found
                    for level in ("disk", "pinned memory", "device memory")
                ],
            )  # fmt: skip
        else:
            _tiers(name, found)


def _tiers(name: str, found: dict[str, Any]) -> None:
    printing.table(
        [name, "docs/s", "x model", "difference"],
        [
            [what, f"{one['documents_per_second']:,.0f}", f"{one['times_as_fast']:.2f}", f"{one['difference']:.1e}"]
            for what, one in found.get("hits", {}).items()
        ],
    )
    misses = found.get("misses")
    if misses is None:
        return
    typer.echo(
        f"Empty cache: {misses['overhead']:+.1%} of the model's time, {misses['overhead_with_commit']:+.1%} with the "
        f"commit; difference {misses['difference']:.1e}.\n"
    )
