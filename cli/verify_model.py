"""`llmcache verify-model`: check that a model gives the same results cold and warm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from llmcache.cli.shared import jobs, options
from llmcache.cli.shared import output as printing
from llmcache.cli.shared.corpora import Sources, fields_of
from llmcache.pipeline.files import CorpusReading


def verify_model(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Name or folder of a model of sentence-transformers, or of any transformers model."
        ),
    ],
    data: Annotated[list[str], typer.Option("--data", "-d", help="Corpora, as for `build`.")],
    layers: Annotated[str, typer.Option(help='Layers to store: "output", "all", or numbers such as 4,8.')] = "all",
    limit: Annotated[int, typer.Option(min=1, help="Compare at most this many documents, from the first on.")] = 200,
    kind: options.Kind = None,
    text_field: options.TextField = "text",
    pair_fields: options.PairFields = None,
    id_field: options.IdField = "id",
    unit: options.Unit = "line",
    batch_size: options.BatchSize = 32,
    task: jobs.TaskOption = jobs.EMBED,
    template: jobs.Template = None,
    template_file: jobs.TemplateFile = None,
    syntax: jobs.Syntax = "format",
    system: jobs.System = None,
    chat: jobs.Chat = False,
    examples: jobs.Examples = None,
    answer: jobs.AnswerField = "answer",
    choice: jobs.Choice = None,
    choices_field: jobs.ChoicesField = None,
    separator: jobs.Separator = None,
    too_long: jobs.TooLongOption = "refuse",
    max_new_tokens: jobs.MaxNewTokens = None,
    setting: jobs.Setting = None,
    json: options.Json = False,
) -> None:
    """Run the same documents uncached, cold, warm, and warm after a reload. Exit code 1 when a result differs.

    Differences are printed beside those that other batch sizes alone cause. A cross-encoder is run on pairs of texts.
    With --task generate, score or classify the answers of a language model are compared, and differences are of
    log-likelihoods in nats.
    """
    from itertools import islice

    from llmcache.cli.build import layer_numbers
    from llmcache.model.loading import load_any
    from llmcache.verification import verify_job
    from llmcache.verification import verify_model as checks

    printing.quiet()
    job = jobs.JobOptions(
        task, template, template_file, syntax, system, chat, examples, answer, choice or [], choices_field,
        too_long=too_long, max_new_tokens=max_new_tokens, settings=setting or [],
        separator=separator,
    )  # fmt: skip
    sources = Sources(data, fields_of(text_field, pair_fields), id_field, unit, False, "jsonl")
    language = job.check({
        "--layers": layers != "all", "--kind": kind, "--pair-fields": pair_fields, "--text-field": text_field != "text",
    })  # fmt: skip
    loaded, tokenizer = load_any(model, kind)
    with TemporaryDirectory() as folder:
        store = Path(folder, "store")
        if language:
            arguments = job.arguments()
            sources = replace(sources, text_field=job.read_fields(arguments["template"]), as_json=True)
            records = list(islice(sources.documents(CorpusReading()), limit))
            results = list(verify_job(loaded, tokenizer, records, store, arguments, batch_size=batch_size))
        else:
            documents = sources.read_by(type(loaded).__name__).documents(CorpusReading())
            texts = [document.text for document in islice(documents, limit)]
            results = list(checks(loaded, tokenizer, texts, store, layers=layer_numbers(layers), batch_size=batch_size))
    failed = [check for check in results if not check.passed]
    if json:
        printing.as_json({"checks": [check.as_dict() for check in results], "passed": not failed})
    else:
        printing.table(
            ["tier", "run", "documents", "reused", "difference", "allowed", "same bits", ""],
            [
                [check.tier, check.run, check.documents, check.reused, f"{check.difference:.2e}", f"{check.limit:.2e}",
                 {None: "", True: "yes", False: "no"}[check.same], "" if check.passed else "DIFFERS"]
                for check in results
            ],
        )  # fmt: skip
        if any(check.tier not in ("output", "model", "answers") for check in results):
            printing.facts([("not compared", "positions hidden by the attention mask, which are not stored")])
    if failed:
        raise typer.Exit(1)
