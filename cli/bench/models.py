"""Benchmarks of models with a cache: encoders, layers, decoders, workers, pipelines, forecasts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcache.cli.bench.command import BenchCorpus, BenchRecord, Limit, ModelName, Repeats, loaded, say, texts
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def encode(
    data: BenchCorpus,
    model: ModelName = None,
    repeats: Repeats = 3,
    limit: Limit = None,
    batch_size: options.BatchSize = 32,
    text_field: options.TextField = "text",
    unit: options.Unit = "line",
) -> BenchRecord:
    """Compare the model alone with a cache that holds none, all and half of the corpus."""
    from llmcache.bench.encoding import encode

    found = encode(loaded(model), texts(data, limit, text_field, unit), repeats=repeats, batch_size=batch_size)
    return {"data": data, "batch_size": batch_size, "rows": found}


def show_encode(record: BenchRecord) -> None:
    """Print what repeats within one call cost."""
    by_name = {row["name"]: row for row in record["rows"]}
    thrice, once = (by_name[name]["documents"] / by_name[name]["rate"] for name in ("each text 3 times", "all miss"))
    typer.echo(f"Every text three times in one call takes {thrice / once:.2f} times as long as once.")


def kinds(
    data: BenchCorpus,
    paragraphs: Annotated[str, typer.Option(help="Longer documents: a corpus, or a file of SQuAD (.json.gz).")],
    model: ModelName = None,
    cross_encoder: Annotated[
        str | None, typer.Option(help="CrossEncoder; without it the model with a new, untrained head.")
    ] = None,
    sparse: Annotated[str | None, typer.Option(help="SparseEncoder; without it none is measured.")] = None,
    multi_vector: Annotated[
        str | None, typer.Option(help="MultiVectorEncoder; without it the model with a new, untrained projection.")
    ] = None,
    repeats: Repeats = 3,
    limit: Annotated[int, typer.Option(min=150, help="At most this many documents of each kind.")] = 512,
    late_limit: Annotated[int, typer.Option(min=2, help="At most this many documents with late chunks.")] = 1000,
    text_field: options.TextField = "text",
    unit: options.Unit = "line",
) -> BenchRecord:
    """Compare every kind of model alone with a cache that holds none and all of the inputs; late chunks, cut anew."""
    import torch
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

    from llmcache.bench.harness.datasets import squad_contexts
    from llmcache.bench.kinds import Kind, compared, grid, late, pairs_of
    from llmcache.demo import demo_model_path

    short = [*dict.fromkeys(texts(data, 2 * limit, text_field, unit))]
    squad = paragraphs.endswith(".json.gz")
    most = max(limit, late_limit)
    found = squad_contexts(Path(paragraphs), most) if squad else texts([paragraphs], most, text_field, unit)
    long = [*dict.fromkeys(found)]
    vectors, folder = loaded(model), model or str(demo_model_path())
    torch.manual_seed(0)  # of the new head and projection
    pairs: Any = CrossEncoder(cross_encoder or folder, **({} if cross_encoder else {"num_labels": 1}))
    compare = [
        Kind("vectors, short texts", vectors, short[:limit], "encode", {}),
        Kind("pairs of short texts", pairs, pairs_of(short, limit), "predict", {}),
        Kind("token vectors", MultiVectorEncoder(multi_vector or folder), long[:limit], "encode", {}),
        Kind("token embeddings", vectors, long[:limit], "encode", {"output_value": "token_embeddings"}),
    ]
    if sparse is not None:
        compare.append(Kind("sparse vectors", SparseEncoder(sparse), long[:limit], "encode", {}))
    rows = [row for one in compare for row in compared(one, repeats)]
    rows += [*grid(pairs, short, repeats), *late(vectors, long[:late_limit], repeats)]
    given = {"paragraphs": paragraphs, "sparse": sparse, "cross_encoder": cross_encoder, "multi_vector": multi_vector}
    names = {name: value and Path(value).name for name, value in given.items()}
    return {"data": [Path(name).name for name in data], **names, "rows": rows}


def fingerprint(
    data: Annotated[str, typer.Option("--data", help="Labelled documents to store.")],
    asked: Annotated[str, typer.Option("--asked", help="Labelled queries; nothing is fitted on them.")],
    label_field: Annotated[str, typer.Option(help="Field or column of the label.")] = "label",
    text_field: options.TextField = "text",
    model: ModelName = None,
) -> BenchRecord:
    """Measure how often the nearest neighbour has the same label, by fingerprint and projection."""
    from llmcache.bench.encoding import fingerprints
    from llmcache.pipeline.files import documents

    known, queries = (list(documents(path, text_field=text_field, id_field=label_field)) for path in (data, asked))
    return {"data": data, "asked": asked, "rows": fingerprints(loaded(model), known, queries)}


def layers(
    data: Annotated[list[str], typer.Option("--data", help="Paragraphs: a corpus, or a file of SQuAD (.json.gz).")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="BERT-like model to use instead of the demo extra's.")
    ] = None,
    repeats: Repeats = 5,
    limit: Annotated[int, typer.Option(min=64, help="At most this many documents.")] = 256,
    text_field: options.TextField = "text",
    unit: options.Unit = "line",
) -> BenchRecord:
    """Compare a mixed batch, a second head and an attached model with an empty store with their ideal times."""
    from llmcache.bench.harness.datasets import squad_contexts
    from llmcache.bench.layers import layers

    squad = data[0].endswith(".json.gz")
    paragraphs = squad_contexts(Path(data[0]), limit) if squad else texts(data, limit, text_field, unit)
    return {"data": [Path(name).name for name in data], "rows": layers(loaded(model), paragraphs, repeats=repeats)}


def show_layers(record: BenchRecord) -> None:
    """Print the facts of each row."""
    for row in record["rows"]:
        printing.facts((f"{row['name']}: {name.replace('_', ' ')}", value) for name, value in row["facts"].items())


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
) -> BenchRecord:
    """Measure prompts until the first token and four-choice scoring with seeded weights of GPT-2-small's shape.

    Ratios are to transformers with its own key/value cache for each request, and include look-up, load, store and
    commit.
    """
    import time

    from llmcache.bench.decoding import choices, gpt2_small, prefill
    from llmcache.bench.decoding import openbookqa as asks
    from llmcache.bench.decoding import squad as reads
    from llmcache.bench.harness.datasets import OPENBOOKQA, SQUAD
    from llmcache.errors import ConfigError

    if squad is None and openbookqa is None:
        raise ConfigError("there are no data to measure with; give --squad, --openbookqa, or both")
    printing.quiet()
    clock = time.process_time if cpu_time else time.perf_counter
    model, words = gpt2_small(tokenizer)
    found: BenchRecord = {"clock": clock.__name__, "rows": rows}
    if squad is not None:
        requests = reads(squad / SQUAD.name, paragraphs, questions)
        found["squad"] = prefill(model, words, requests, rows=rows, clock=clock)
    if openbookqa is not None:
        found["openbookqa"] = choices(model, words, asks(openbookqa / OPENBOOKQA.name, asked), rows=64, clock=clock)
    return found


def ray(
    data: BenchCorpus,
    model: ModelName = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the cluster.")] = 2,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many documents.")] = None,
    text_field: options.TextField = "text",
) -> BenchRecord:
    """Run one job in one process, on workers, and with a worker killed; compare seconds and results."""
    from llmcache.bench.distributed import spread
    from llmcache.demo import demo_model_path

    return {"data": data, "rows": spread(model or str(demo_model_path()), texts(data, limit, text_field), workers)}


def pipeline(
    data: Annotated[Path, typer.Option("--data", help="Folder with dup-loghub and cls-banking77.")],
    documents: Annotated[int, typer.Option(min=2000, help="Documents of the long corpus.")] = 100_000,
    distinct: Annotated[int, typer.Option(min=100, help="Distinct texts among them.")] = 10_000,
) -> BenchRecord:
    """Measure peak memory and overlap of a pipeline over a long corpus, and over a fifth of the corpus."""
    from llmcache.bench.pipelines import measured
    from llmcache.demo import demo_model_path

    return {"rows": measured(str(demo_model_path()), data, (documents // 5, documents), distinct)}


def show_pipeline(record: BenchRecord) -> None:
    """Print the rows one below the other."""
    for row in record["rows"]:
        printing.facts([*row.items(), ("", "")])


def chunks(
    data: Annotated[Path, typer.Option("--data", help="File revisions.jsonl.xz of dup-site-policy-revisions.")],
    histories: Annotated[int, typer.Option(min=1, help="Documents of which all revisions are encoded.")] = 6,
) -> BenchRecord:
    """Compare exact repeats in chunks by structure and in windows; revisions per second with and without cache."""
    from llmcache.bench.chunks import measured

    return {"histories": histories, **measured(loaded(), data, histories)}


def plan(
    data: Annotated[Path, typer.Option("--data", help="Folder with cls-banking77, the policies and the logs.")],
    repeats: Repeats = 3,
    only: Annotated[str, typer.Option(help="Cases whose names contain this.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=100, help="At most this many documents stored, and in the run.")
    ] = None,
) -> BenchRecord:
    """Compare hits and seconds forecast by `llmcache plan` with those of the run; measure the forecast's time."""
    from llmcache.bench.planning import measured

    return {"data": data.name, "rows": measured(loaded(), data, repeats=repeats, wanted=only, limit=limit, say=say)}


def jobs(
    data: Annotated[Path, typer.Option("--data", help="Folder with qa-squad2-dev, qa-openbookqa and cls-banking77.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Folder of a causal model with its tokenizer.")],
    repeats: Repeats = 1,
    paragraphs: Annotated[int, typer.Option(min=10, help="Short documents.")] = 48,
    long_paragraphs: Annotated[int, typer.Option(min=2, help="Long documents.")] = 12,
    groups: Annotated[int, typer.Option(min=2, help="Paragraphs with five questions each.")] = 16,
    classified: Annotated[int, typer.Option(min=2, help="Short documents to classify.")] = 100,
    classified_plain: Annotated[int, typer.Option(min=1, help="Of these, documents that the model alone scores.")] = 10,
    questions: Annotated[int, typer.Option(min=3, help="Questions of OpenBookQA.")] = 51,
    short: Annotated[int, typer.Option(min=16, help="Tokens of a short document.")] = 180,
    long: Annotated[int, typer.Option(min=16, help="Tokens of a long document.")] = 800,
    shots: Annotated[int, typer.Option(min=16, help="Tokens of the examples before a document to classify.")] = 320,
    batch_size: options.BatchSize = 32,
) -> BenchRecord:
    """Measure language-model jobs: repeated, changed, with other questions, shuffled, few-shot; beside transformers.

    transformers alone runs batches of prompts sorted by length. Results of both are compared. With the defaults and a
    model of 135 million parameters this takes some ten minutes on two processors.
    """
    from llmcache.bench.jobs import JobSizes, measured
    from llmcache.errors import ConfigError
    from llmcache.model.loading import load_any

    printing.quiet()
    module, tokenizer = load_any(model)
    if tokenizer is None or not hasattr(module, "generate"):
        raise ConfigError(f"{model} is no language model with a tokenizer; give --model with the folder of one")
    sizes = JobSizes(
        paragraphs, long_paragraphs, groups, classified, classified_plain, questions, short, long, shots, batch_size
    )
    return {"data": data.name, "model": model.name, **measured(module.float(), tokenizer, data, sizes, repeats, say)}


def job_facts(record: BenchRecord) -> list[tuple[str, object]]:
    """Return what the tables of jobs do not have: equal files, sharing of shuffled prompts, and how it was measured."""
    by_name = {row["name"]: row for row in record["rows"]}
    again, (shuffled,) = by_name["same job again"], (row for row in record["rows"] if row["name"].endswith("shuffled"))
    return [
        ("base", "the first run for the same job again; else transformers, batches of prompts sorted by length"),
        ("same job again", f"{'the same' if again['equal_files'] else 'OTHER'} bytes; "
         f"{again['ratio_with_opening']:.1f}x with the opening of the store"),
        ("sharing of shuffled prompts", f"{shuffled['of_sorted']:.1%} of sorted ones"),
        ("by tokens", record["possible_is"]),
        ("before the clock", record["before_the_clock"]),
        *((name, record[name]) for name in ("model", "batch_size", "new_tokens", "repeats")),
    ]  # fmt: skip
