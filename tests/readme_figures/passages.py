"""Passages of docs/benchmarks.md and README.md about the recorded runs. Each takes its numbers from its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.readme_figures.markdown import (
    ReadRow,
    by,
    percent,
    prose,
    table,
    times,
)
from tests.readme_figures.text_passages import (
    encode,
    exact,
    off,
    workloads,
)

Records = Mapping[str, Any]


# -- encoders ---------------------------------------------------------------------------------------------------


def opening(_: Records) -> str:
    return prose(
        """Medians of the recorded runs in `data/bench/`: two cores of an x86 server, torch 2.13 on the CPU,
        all-MiniLM-L6-v2 with its real weights, contenders in turn in one process. Ratios carry over to other
        machines better than seconds."""
    )


def large_stores(records: Records) -> str:
    small, large = records["open-100000"], records["open-1000000"]

    def seconds(row: ReadRow) -> tuple[str, str]:
        return f"{row['seconds_to_first_hit']:.2f} s", f"{row['further_seconds_to_near_lookup']:.2f} s"

    def memory(row: ReadRow) -> tuple[str, str]:
        return f"{row['bytes_per_entry']:.0f}", f"{row['bytes_per_entry_with_index']:.0f}"

    (hit, near), (later, nearer) = seconds(small), seconds(large)
    (bare, indexed), (bare_large, indexed_large) = memory(small), memory(large)
    return prose(
        f"""A store of {small["entries"]:,} entries (`llmcache bench open`; `open-100000.json`) serves its first hit
        {hit} after opening, and is ready for near matches {near} later. It takes {bare} bytes of resident memory per
        entry, and {indexed} once the index is loaded. With {large["entries"]:,} entries (`open-1000000.json`) these
        are {later}, {nearer}, {bare_large} and {indexed_large} bytes."""
    )


# -- the store --------------------------------------------------------------------------------------------------


def store(records: Records) -> str:
    record = records["store"]
    large, small = 262144, 1536
    reads = (
        ("written; `pwrite` + fsync", "write", "", "put + commit"),
        ("read cold, mapped; `preadv`", "read", "cold", "store, mmap"),
        ("read cold, `preadv`; `preadv`", "read", "cold", "store, preadv"),
        ("read warm, mapped; memcpy", "read", "warm", "store, mmap"),
        ("read warm, `preadv`; `preadv`", "read", "warm", "store, preadv"),
    )
    merges = (
        ("merged by links; `cp -r` + syncfs", "merge, linked"),
        ("merged by copies; `cp -r` + syncfs", "merge, copied"),
        ("merged by copies, 1/8 in both stores; `cp -r` + syncfs", "merge, copied, 1/8 in both"),
    )

    def cells(row: ReadRow, value: str) -> list[str]:
        return [value, f"{row['ratio']:.2f}", f"{row['ratio_of_best']:.2f}"]

    rows = []
    for text, operation, cache, contender in reads:
        chosen = [
            by(record["rates"], row_bytes=size, operation=operation, cache=cache, order="stored", contender=contender)
            for size in (large, small)
        ]
        rows.append([text, *(cell for row in chosen for cell in cells(row, f"{row['rows_per_second']:,.0f} rows/s"))])
    for text, contender in merges:
        chosen = [by(record["merges"], row_bytes=size, contender=contender) for size in (large, small)]
        rows.append([text, *(cell for row in chosen for cell in cells(row, f"{row['mib_per_second']:,.0f} MiB/s"))])
    overhead, overhead_small = (by(record["overhead"], row_bytes=size) for size in (large, small))
    columns = [
        "operation; system calls",
        "256 KiB rows",
        "ratio",
        "of quickest",
        "1.5 KiB rows",
        "ratio",
        "of quickest",
    ]
    return "\n\n".join(
        [
            prose(
                f"""The store without a model, compared with bare system calls on the same bytes in the same run
                (`llmcache bench store --payload {record["payload"]}`; `store.json`, on an {record["file_system"]}
                disk). Rows are float32, with fingerprint, token ids, source and text key, and every read compares the
                checksum. The table has medians, and the ratio to the system calls for the median and for the quickest
                repeats:"""
            ),
            table(columns, rows),
            prose(
                f"""In addition to activations, fingerprints and token ids, a store takes
                {overhead["overhead_bytes_per_entry"]:.0f} bytes per entry ({percent(overhead["overhead_share"], 2)})
                with 256 KiB rows, and {overhead_small["overhead_bytes_per_entry"]:.0f} with 1.5 KiB rows."""
            ),
        ]
    )


# -- layers and decoders ----------------------------------------------------------------------------------------


def layers(records: Records) -> str:
    rows = records["layers-minilm"]["rows"]
    mixed, second, new = (by(rows, name=name) for name in ("mixed batch", "second head", "attached, all miss"))
    every, at_once = (by(rows, name=f"all layers stored, all miss{how}") for how in ("", ", no thread"))
    facts = mixed["facts"]
    entered = facts["entered"]
    known = (
        f"mixed batch of {mixed['documents']}: {entered['6']} stored at the output, {entered['3']} after layer 2, "
        f"{entered['0']} new; model time"
    )
    left = f"the remaining {facts['layer_rows']} of {facts['layer_rows_of_the_model']} layer-rows computed alone"
    cells = [
        [known, left, f"{facts['model_seconds_to_base']:.2f}", f"{mixed['difference']:.1e}"],
        [
            "second head on a trunk that shares 5 of 6 layers; throughput",
            "that head alone",
            f"{second['ratio']:.2f}",
            f"{second['difference']:.1e}",
        ],
        ["attached, empty store; throughput", "the plain model", f"{new['ratio']:.2f}", f"{new['difference']:.1g}"],
        [
            "the same, storing the states of all layers "
            f"({every['facts']['store_bytes'] / every['documents'] / 2**20:.1f} MiB a document)",
            "the plain model",
            f"{every['ratio']:.2f}, without the background writer {at_once['ratio']:.2f}",
            f"{every['difference']:.1g}",
        ],
    ]
    return "\n\n".join(
        [
            prose(
                f"""Layers of all-MiniLM-L6-v2, SQuAD paragraphs of {new["facts"]["tokens"]:.0f} tokens (`llmcache
                bench layers --data dev-v2.0.json.gz --limit 256`; `layers-minilm.json`):"""
            ),
            table(["", "against", "ratio", "largest difference"], cells),
        ]
    )


def decoding(records: Records) -> str:
    record = records["decoding-gpt2-small"]
    shown = (
        ("SQuAD prompts until the first token, empty store (5 questions a paragraph)", "squad", "first pass"),
        ("the same, paragraphs stored by another question", "squad", "known paragraphs"),
        ("OpenBookQA, 200 questions with four choices, empty store", "openbookqa", "first pass"),
        ("the same again", "openbookqa", "repeated"),
    )
    rows = [(text, by(record[task], name=name)) for text, task, name in shown]
    again = rows[-1][1]
    return "\n\n".join(
        [
            prose(
                """Decoders: a model of GPT-2-small's shape with seeded weights, and GPT-2's tokenizer (`llmcache bench
                decoding`; `decoding-gpt2-small.json`). The speed-up is over transformers with its own key/value cache
                for each request. Look-up, loading, storing and committing are in the time. Median over the batches,
                and speed-up over all batches together:"""
            ),
            table(
                ["", "median", "overall", "largest relative difference"],
                (
                    [
                        text,
                        f"{row['times_as_fast_median']:.2f}",
                        f"{row['times_as_fast_overall']:.2f}",
                        f"{row['relative_difference']:.0e}",
                    ]
                    for text, row in rows
                ),
            ),
            f"Of {again['questions']} chosen answers, {again['same_choices']} are those of the model alone.",
        ]
    )


# -- near matches -----------------------------------------------------------------------------------------------


def near(records: Records) -> str:
    record = records["near-banking77"]
    shown = {
        "paper: PCA, tau picked on test": "the paper's rule: PCA, plain reuse, tau chosen on the test queries",
        "plain, consensus": "plain reuse, ridge fingerprint, similarity and consensus",
        "exact kernel ridge": "corrected, exact kernel ridge, similarity",
        "corrected, similarity": "corrected, similarity",
        "corrected, gate": "**corrected, the gate in use**",
    }

    def cells(method: str, text: str) -> list[str]:
        row = by(record["summary"], method=method, drift_is="label")
        drift = f"{percent(row['drift'], 2)} ({percent(row['worst_drift'], 2)})"
        return [text, percent(row["hits"]), drift, "-" if row["seeds"] == 1 else str(row["seeds"])]

    cosine = [row for row in record["summary"] if row["drift_is"] == "cosine"]
    budgets = _listed([f"{row['budget']:g}" for row in cosine])
    recall = _listed([f"{row['recall_at_10']:.3f}" for row in cosine])
    return "\n\n".join(
        [
            prose(
                f"""Near matches: at most 0.5 % of all results may change their label, at confidence 0.95. Calibrated on
                the training queries of BANKING77 and reported on its test queries (`llmcache bench near --data
                cls-banking77 --seeds {record["seeds"]} --exact`; `near-banking77.json`):"""
            ),
            table(
                ["", "near hits", "labels changed, of all (worst seed)", "seeds"],
                (cells(method, text) for method, text in shown.items()),
            ),
            prose(
                f"""For retrieval, the budget limits the mean 1 - cosine over all results. With budgets of {budgets},
                near hits are {_listed([percent(row["hits"]) for row in cosine])}, and recall@10 over the returned
                vectors is {recall}."""
            ),
        ]
    )


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def reuse(records: Records) -> str:
    free, guarded = (records[name]["rows"][0] for name in ("reuse-banking77-no-guard", "reuse-banking77"))

    def cells(row: ReadRow) -> tuple[str, str, str]:
        return f"{row['ratio']:.1f} times", percent(row["hits"]), f"{100 * row['accuracy_drop']:.2f}"

    (fast, hits, drop), (slower, fewer, less) = cells(free), cells(guarded)
    return prose(
        f"""End to end: a cache that holds the training queries answers the test queries. Its budget is half a point of
        measured accuracy, and audits are on. Without the field guard it is {fast} as fast as the model alone, has
        {hits} near hits, and loses {drop} points of accuracy. With the guard these are {slower}, {fewer} and {less}
        points (`llmcache bench reuse --data cls-banking77`, `--no-guard`; `reuse-banking77.json`,
        `reuse-banking77-no-guard.json`; one seed)."""
    )


def kinds(records: Records) -> str:
    found = records["kinds"]["rows"]
    names = dict.fromkeys(row["kind"] for row in found)
    rows = []
    for name in names:
        if name not in ("100 x 50 pairs", "late chunks"):
            miss, hit = (by(found, kind=name, name=what) for what in ("all miss", "all hit"))
            different = max(miss["difference"], hit["difference"])
            rows.append([name, str(miss["documents"]), times(miss["ratio"]), times(hit["ratio"]), f"{different:.0e}"])
    grid, late = by(found, name="half stored"), by(found, name="late chunks, cut anew")
    columns = ["", "inputs", "all miss", "all hit", "largest difference"]
    return "\n\n".join([
        prose(
            """Every kind of model, beside the plain library: documents per second over those of the library, with an
            empty store (storing included) and with a store that has everything and was opened again. The CrossEncoder
            is MiniLM fine-tuned on question pairs (`python -m tests.fine_tune_pairs`), the SparseEncoder a SPLADE model
            of 4.4 million parameters; the MultiVectorEncoder is MiniLM with a new projection (`llmcache bench kinds`;
            `kinds.json`):"""
        ),
        table(columns, rows),
        prose(
            f"""A grid of 100 x 50 pairs of which half are stored takes {1 / grid["ratio"]:.2f} of the library's time.
            {late["documents"]} paragraphs cut anew with late chunks take 1/{late["ratio"]:.0f} of the time to encode
            them; the chunks differ from a direct computation by at most {late["difference"]:.0e}."""
        ),
    ])  # fmt: skip


def jobs(records: Records) -> str:
    record = records["jobs-smollm2-135m"]
    rows = []
    for row in record["rows"]:
        if row["base"]:
            ratios = [row.get(name) for name in ("ratio", "ratio_without_audits", "possible")]
            shown = ["-" if ratio is None else f"{ratio:.3g}" for ratio in ratios]
            rows.append([row["name"], str(row["documents"]), row["base"], *shown])
    return "\n\n".join([
        prose(
            f"""Language-model jobs: SmolLM2-135M with real weights in float32 on SQuAD, BANKING77 and OpenBookQA,
            {record["new_tokens"]} new tokens, beside transformers in batches sorted by length (`llmcache bench jobs
            --paragraphs 64 --groups 12 --classified 64 --classified-plain 6`;
            `jobs-smollm2-135m.json`). Times as fast per document; the same without the audits of an opening's first
            hits, whose time does not depend on the number of documents; and what the computed tokens allow:"""
        ),
        table(["job", "documents", "beside", "times as fast", "without audits", "by tokens"], rows),
    ])  # fmt: skip


def rivals(records: Records) -> str:
    def counts(name: str) -> list[str]:
        rows = records[name]["rows"]
        ours, fixed = rows[0], next(row for row in rows if "GPTCache" in row["method"])
        return [f"{number:,}" for row in (ours, fixed) for number in (row["hits"], row["wrong"])]

    (hits, wrong, many, often), (pairs, off, more, worse) = counts("rivals-banking77"), counts("rivals-qqp")
    return prose(
        f"""GPTCache's rule returns the nearest output at a fixed similarity of 0.8. On the same fingerprints and
        queries, ours has {hits} hits of which {wrong} are wrong, and this rule has {many} hits of which {often} are
        wrong. On pairs of QQP ours has {pairs} hits and {off} wrong ones, and this rule {more} and {worse} (`llmcache
        bench rivals`; `rivals-banking77.json`, `rivals-qqp.json`)."""
    )


# -- pipelines --------------------------------------------------------------------------------------------------


def pipeline(records: Records) -> str:
    short, long = records["pipeline"]["rows"]
    return prose(
        f"""A pipeline over {long["documents"]:,} documents with {long["distinct"]:,} distinct texts, from reading to
        the result file, takes {times(long["over_the_larger"])} times as long as the model takes for the documents that
        are computed ({times(short["over_the_larger"])} with {short["documents"]:,} documents). Its memory is
        {long["peak_mib"]:.0f} MiB ({short["peak_mib"]:.0f} with {short["documents"]:,} documents); the model alone
        takes {long["model_alone_mib"]:.0f} MiB in a batch of the longest texts (`llmcache bench pipeline --data DATA`;
        `pipeline.json`)."""
    )


def chunked(records: Records) -> str:
    record = records["chunks"]
    ours, words = (by(record["rows"], chunks_are=name) for name in ("structure", "windows of 180 words"))
    return prose(
        f"""Revised policies were cut by structure into chunks of {ours["mean_characters"]:.0f} characters on average.
        Of the text of later revisions, {percent(ours["repeated"])} is in chunks that occurred before; with windows of
        180 words it is {percent(words["repeated"])} (`llmcache bench chunks --histories 1`; `chunks.json`)."""
    )


def plans(records: Records) -> str:
    rows = records["plan"]["rows"]
    points = max(abs(row["points"]) for row in rows)
    off = max(max(row["time"], 1 / row["time"]) - 1 for row in rows)
    costs = sorted(row["pass_share"] for row in rows)
    return prose(
        f"""Over {len(rows)} runs of bank queries, policies and logs, the forecast of `llmcache plan` was off by at
        most {points:.1f} points of hits and {percent(off, 0)} of the seconds. Making it took {percent(costs[0])} to
        {percent(costs[-1])} of the time that the model alone takes for the corpus (`llmcache bench plan --data DATA
        --repeats 1`; `plan.json`)."""
    )


# -- indexes ----------------------------------------------------------------------------------------------------


def index(records: Records) -> str:
    rows = records["index-100000"]["rows"]
    cells = [
        [
            row["index"],
            f"{row['recall_noisy']:.3f}",
            f"{row['recall_fresh']:.3f}",
            f"{row['ms_per_query']:.3f}",
            f"{row['build_seconds']:.1f}",
            f"{row['bytes_per_vector']:.0f}",
        ]
        for row in rows
    ]
    return "\n\n".join(
        [
            prose(
                f"""FAISS indexes over {rows[0]["vectors"]:,} clustered vectors of {rows[0]["dim"]} components, queried
                in batches of 64 (`llmcache bench index`; `index-100000.json`). Recall@1 for slightly changed copies
                of stored vectors and for new vectors of the same clusters:"""
            ),
            table(["index", "copies", "new", "ms per query", "seconds to build", "bytes a vector"], cells),
        ]
    )


Passages = Sequence[tuple[tuple[str, ...], Callable[[Records], str]]]

PASSAGES: Passages = (
    ((), opening),
    (("encode-banking77",), encode),
    ((), exact),
    (("off-sst2",), off),
    ((), workloads),
    (("open-100000", "open-1000000"), large_stores),
    (("store",), store),
    (("kinds",), kinds),
    (("layers-minilm",), layers),
    (("decoding-gpt2-small",), decoding),
    (("jobs-smollm2-135m",), jobs),
    (("near-banking77",), near),
    (("reuse-banking77", "reuse-banking77-no-guard"), reuse),
    (("rivals-banking77", "rivals-qqp"), rivals),
    (("pipeline",), pipeline),
    (("chunks",), chunked),
    (("plan",), plans),
    (("index-100000",), index),
)
"""Each passage with the records without which it is left out."""
