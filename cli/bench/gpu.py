"""`llmcache bench gpu`: everything that is measured on a GPU, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def gpu(
    out: Annotated[Path | None, typer.Option(help="Write the JSON here, anew after every part.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Parts that would begin after these are left out.")] = 8.0,
    only: Annotated[
        str, typer.Option(help="Of bandwidth, search, minilm, bert-base, llama-1b, near, prefix; with commas between.")
    ] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it out.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Almost nothing of everything, to try it out.")] = False,
    json: options.Json = False,
) -> None:
    """Hits from device memory, pinned memory and disk beside the model alone, misses, near look-ups, long beginnings,
    and search.

    Models have seeded weights of known shapes; nothing is downloaded. `python -m llmcache.bench.gpu` does the same
    where FAISS and the libraries of the command line are not installed.
    """
    from llmcache.bench.gpu.gpu import failed, measured

    printing.quiet()
    found = measured(
        out, minutes=minutes, only=only, device=device, tiny=tiny, said=lambda line: typer.echo(line, err=True)
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
    lost = found.get("misses")
    if lost is None:
        return
    typer.echo(
        f"Nothing known: {lost['overhead']:+.1%} of the model's time, {lost['overhead_with_commit']:+.1%} with the "
        f"commit; difference {lost['difference']:.1e}.\n"
    )
