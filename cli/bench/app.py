"""`llmcache bench`: repeatable measurements, among them the figures of README.md."""

from __future__ import annotations

import typer

from llmcache.cli.bench import gpu, models, near, paper, stores, suite
from llmcache.cli.bench.command import Columns, Command, seconds

app = typer.Typer(
    help="Measure on this machine: medians and ratios of contenders that run in turn in one process.",
    no_args_is_help=True,
)

_TIMES = {"x, median": "times_as_fast_median:.2f", "x, overall": "times_as_fast_overall:.2f",
          "difference": "relative_difference:.1e", "same": "same_choices"}  # fmt: skip

COMMANDS = (
    Command("list", suite.list_, show=suite.show_list, conditions=False),
    Command(
        "layers", models.layers,
        [Columns({"": "name", "against": "base", "docs": "documents", "ratio": "ratio:.2f", "seconds": seconds,
                  "max diff": "difference:.1e"})],
        models.show_layers,
    ),
    Command(
        "decoding", models.decoding,
        [Columns({name: "name", "batches": "batches", "seconds": "seconds", **_TIMES}, name)
         for name in ("squad", "openbookqa")],
    ),
    Command(
        "jobs", models.jobs,
        [
            Columns({"job": "name", "docs": "documents", "base s/doc": "base_per_document:.3f",
                     "s/doc": "per_document:.3f", "x": "ratio:.2f", "no audits": "ratio_without_audits:.2f",
                     "by tokens": "possible:.1f", "asked": "asked:.1f"}),
            Columns({"job": "name", "tokens": "tokens", "computed": "computed", "needed": "needed",
                     "open s": "open_seconds:.1f", "model": "model_seconds:.1f", "look-up": "lookup_seconds:.1f",
                     "store": "store_seconds:.1f", "audits": "audit_seconds:.1f"}, "rows", "tokens and seconds"),
            Columns({"results of both": "name", "prompts": "prompts", "same result": "equal", "compared": "items",
                     "max diff": "difference:.1e"},
                    "exactness"),
        ],
        facts=models.job_facts,
    ),
    Command(
        "near", near.near,
        [Columns({"method": "method", "drift of": "drift_is", "budget": "budget", "hits": "hits:.1%",
                  "drift": "drift:.3%", "worst": "worst_drift:.3%", "accuracy drop": "accuracy_drop:.2%"}, "summary")],
    ),
    Command(
        "reuse", near.reusing,
        [Columns({"seed": "seed", "hits": "hits:.1%", "flips": "flips:.2%", "accuracy drop": "accuracy_drop:.2%",
                  "times the model alone": "ratio:.2f", "with loading": "with_first:.2f",
                  "look-up ms": "look_up_milliseconds:.3f", "audits": lambda row: row["audits"][0]})],
        near.show_reusing,
    ),
    Command("rivals", near.rivals, show=near.show_rivals, facts=lambda record: [("asked", record["rows"][0]["asked"])]),
    Command(
        "ray", models.ray,
        [Columns({name: name for name in ("name", "workers", "threads", "documents", "seconds", "identical", "entries",
                                          "segments", "lost", "duplicates")})],
    ),
    Command(
        "roofline", stores.roofline,
        [
            Columns({"tier": "tier", "": "what", "us/doc": "microseconds_per_document:,.2f",
                     "floor us/doc": lambda row: f"{1e6 * row['floor_seconds'] / row['documents']:,.2f}",
                     "share of it": "share:.2f", "bound by": "bound"}),
            Columns({"entries": "entries", "model ms": "model_milliseconds:.3f",
                     "corrected ms": "corrected_milliseconds:.3f", "of the model": "corrected_share:.1%",
                     "plain ms": "plain_milliseconds:.3f", "plain, of the model": "plain_share:.1%"},
                    "near", "near look-ups, per query of 12 tokens"),
        ],
        facts=stores.limits,
    ),
    Command(
        "scale", stores.scale, [Columns({"": "quantity", "in all": lambda row: stores.shown(row["in all"]),
                                         "a shard": lambda row: stores.shown(row["a shard"])})],
        conditions=False,
    ),
    Command("guard", near.guarded, show=near.show_guarded),
    Command("pipeline", models.pipeline, show=models.show_pipeline),
    Command(
        "chunks", models.chunks,
        [
            Columns({"chunks are": "chunks_are", "chunks": "chunks", "mean characters": "mean_characters:.0f",
                     "exact repeats": "repeated:.1%"}),
            Columns({"": "name", "revisions": "documents", "per second": "documents_per_second:.1f",
                     "times": "times:.1f", "max diff": "difference:.1e"}, "rates"),
        ],
    ),
    Command(
        "plan", models.plan,
        [Columns({"": "case", "documents": "documents", "hits forecast": "forecast_hit_rate:.1%",
                  "hits": "hit_rate:.1%", "s forecast": "forecast_seconds:.1f", "s": "seconds:.1f",
                  "uncached s forecast": "forecast_uncached:.1f", "uncached s": "uncached:.1f",
                  "pass": "pass_share:.2%"})],
    ),
    Command(
        "gpu", gpu.gpu, show=gpu.show, failed=gpu.failed, conditions=False,
        facts=lambda record: [(name, value) for name, value in record.items() if name != "parts"],
    ),
    Command("paper", paper.paper, show=paper.show, conditions=False),
    Command(
        "encode", models.encode,
        [Columns({"": "name", "docs": "documents", "docs/s": "rate:,.0f", "x model": "ratio:.2f", "seconds": seconds,
                  "max diff": "difference:.1e"})],
        models.show_encode,
    ),
    Command(
        "kinds", models.kinds,
        [Columns({"kind": "kind", "": "name", "inputs": "documents", "per second": "rate:,.0f",
                  "x plain": "ratio:.2f", "seconds": seconds, "max diff": "difference:.1e"})],
    ),
    Command(
        "index", stores.index,
        [Columns({"index": "index", "vectors": "vectors", "build s": "build_seconds:.1f",
                  "recall@1": "recall_noisy:.4f", "fresh": "recall_fresh:.4f", "ms/query": "ms_per_query:.3f",
                  "bytes/vector": "bytes_per_vector:.0f"})],
    ),
    Command(
        "fingerprint", models.fingerprint,
        [Columns({"fingerprint": "fingerprint", "projection": "projection",
                  **{name: f"{name}:.4f" for name in ("agreement", "coverage_at_99", "coverage_at_95")}})],
    ),
    Command("store", stores.store, show=stores.show_store, facts=stores.place),
    Command("open", stores.open_, facts=lambda record: record.items()),
)  # fmt: skip
"""Every benchmark that gives one record."""

for one in COMMANDS:
    one.add_to(app)
    if one.name == "list":
        app.command()(suite.run)  # which prints each record when it is complete
