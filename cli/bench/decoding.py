"""`llmcache bench decoding`: prompts with common prefixes and multiple choice, against the model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def decoding(
    tokenizer: Annotated[Path, typer.Option(help="Folder of GPT-2's tokenizer.")],
    squad: Annotated[Path | None, typer.Option(help="Folder with SQuAD's dev-v2.0.json.gz.")] = None,
    openbookqa: Annotated[Path | None, typer.Option(help="Folder with OpenBookQA's test_original_form.jsonl.")] = None,
    paragraphs: Annotated[int, typer.Option(min=2, help="Paragraphs of SQuAD.")] = 40,
    questions: Annotated[
        int, typer.Option(min=2, help="Questions about each paragraph; the first fills the store.")
    ] = 5,
    asked: Annotated[int, typer.Option(min=2, help="Questions of OpenBookQA.")] = 200,
    rows: Annotated[int, typer.Option(min=1, help="Prompts in a batch of SQuAD.")] = 8,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Measure CPU seconds, for a busy machine.")] = False,
    json: options.Json = False,
) -> None:
    """Measure prompts until the first token and four-choice scoring with seeded weights of GPT-2-small's shape.

    Ratios are to transformers with its own key/value cache for each request, and include look-up, load, store and
    commit.
    """
    import time

    from llmcache.bench.decoding import choices, gpt2_small, prefill
    from llmcache.bench.decoding import openbookqa as asks
    from llmcache.bench.decoding import squad as reads
    from llmcache.bench.harness.conditions import conditions
    from llmcache.errors import ConfigError

    if squad is None and openbookqa is None:
        raise ConfigError("there are no data to measure with; give --squad, --openbookqa, or both")
    printing.quiet()
    clock = time.process_time if cpu_time else time.perf_counter
    model, words = gpt2_small(tokenizer)
    found = {}
    if squad is not None:
        found["squad"] = prefill(model, words, reads(squad, paragraphs, questions), rows=rows, clock=clock)
    if openbookqa is not None:
        found["openbookqa"] = choices(model, words, asks(openbookqa, asked), rows=64, clock=clock)
    if json:
        printing.as_json({**conditions(), "clock": clock.__name__, "rows": rows, **found})
        return
    for name, reports in found.items():
        printing.table(
            [name, "batches", "seconds", "x, median", "x, overall", "difference", "same"],
            [
                [one["name"], one["batches"], one["seconds"], f"{one['times_as_fast_median']:.2f}",
                 f"{one['times_as_fast_overall']:.2f}", f"{one['relative_difference']:.1e}",
                 one.get("same_choices", "")]
                for one in reports
            ],
        )  # fmt: skip
    printing.facts(conditions().items())
