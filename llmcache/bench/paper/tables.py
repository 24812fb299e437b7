"""Markdown tables of the records: one function per experiment, and the paper's claims beside the measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from llmcache.bench.harness.turns import Row

RULE = "LLMCache, the paper's rule"
WORDS = {"seeded": "seeded weights", "real": "real weights"}


def table(columns: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in body)])


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """Format a difference of shares in percentage points."""
    return f"{100 * value:+.1f}"


def _times(row: Row, kind: str = "") -> str:
    if f"{kind}ratio" not in row:
        return "-"
    least, most = row[f"{kind}ratio_least"], row[f"{kind}ratio_most"]
    return f"{row[f'{kind}ratio']:.2f} ({least:.2f}-{most:.2f})"


def _agreed(row: Row) -> str:
    of_hits = row.get("agreement_of_hits")
    return percent(row["agreement"]) + ("" if of_hits is None else f", {percent(of_hits)}")


def latency(rows: Sequence[Row]) -> str:
    """Format latency by model, corpus and method."""
    columns = [
        "model", "corpus, tokens", "method", "ms a document", "times the model alone", "the same again", "hits",
        "agreement, of hits", "difference of what was computed",
    ]  # fmt: skip
    return table(columns, [
        [
            f"{row['model']}, {WORDS[row['weights']]}", f"{row['data']}, {row['tokens']:.0f}",
            row["method"] + (f" ({row['written']} tokens)" if "written" in row else ""), f"{row['ms']:.1f}",
            _times(row), _times(row, "again_"),
            percent(row["hits"]) if "hits" in row else f"{percent(row['restored_tokens'])} of tokens",
            _agreed(row),
            f"{row['difference_of_computed']:.0e}" if "difference_of_computed" in row else "-",
        ]
        for row in rows
    ])  # fmt: skip


def layers(rows: Sequence[Row]) -> str:
    """Format hits and wrong hits of each layer, in both readings."""
    columns = [
        "model, corpus", "layer", "tau", "hits by the input", "wrong of these", "hits by its state",
        "wrong of these", "similarity of states, median",
    ]  # fmt: skip
    return table(columns, [
        [
            f"{row['model']}, {row['data']}", f"{row['layer'] + 1} of {row['of']}", f"{row['input_tau']:.3f}",
            percent(row["input_hits"]), percent(row["input_wrong_of_hits"]), percent(row["state_hits"]),
            percent(row["state_wrong_of_hits"]), f"{row['state_similarity']:.3f}",
        ]
        for row in rows
    ])  # fmt: skip


def accuracy(rows: Sequence[Row]) -> str:
    """Format accuracy with real weights."""
    columns = ["corpus: what is answered", "method", "accuracy", "lost, points", "answers changed", "near hits"]
    return table(columns, [
        [
            f"{row['data']}: {row['metric']}", row["method"], percent(row["accuracy"]), points(row["drop"]),
            percent(row["flips"]), percent(row["hits"]),
        ]
        for row in rows
    ])  # fmt: skip


def memory(rows: Sequence[Row]) -> str:
    """Format bytes by kind of store, beside hits by number of known documents."""
    counts = list(dict.fromkeys(row["known"] for row in rows))
    hits = {row["known"]: row["hits"] for row in rows}
    by = {(row["kept"], row["known"]): row for row in rows}
    kinds = list(dict.fromkeys(row["kept"] for row in rows))
    columns = ["kept of a document", *(f"{n:,} known: {percent(hits[n])} hits" for n in counts), "bytes a document",
               "difference of stored outputs"]  # fmt: skip
    return table(columns, [
        [
            kept, *(f"{by[kept, n]['bytes'] / 2**20:,.1f} MiB" for n in counts),
            f"{by[kept, counts[-1]]['bytes_per_document']:,.0f}", f"{by[kept, counts[-1]]['difference']:.0e}",
        ]
        for kept in kinds
    ])  # fmt: skip


def tau(rows: Sequence[Row]) -> str:
    """Format one line per tau, with the corpora side by side."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    by = {(row["data"], row["tau"]): row for row in rows}
    names = ["hits", "answers changed", "wrong of hits", "accuracy lost, points", "times the model alone"]
    columns = ["tau", *(f"{data}: {name}" for data in sets for name in names)]
    body = []
    for value in sorted({row["tau"] for row in rows}):
        cells = [f"{value:.2f}"]
        for data in sets:
            row = by[data, value]
            cells += [
                percent(row["hits"]), percent(row["flips"]), percent(row["wrong_of_hits"]), points(row["drop"]),
                _times(row),
            ]  # fmt: skip
        body.append(cells)
    return table(columns, body)


def fingerprints(rows: Sequence[Row]) -> str:
    """Format one line per fingerprint and corpus."""
    columns = [
        "corpus",
        "fingerprint",
        "nearest decided alike",
        "hits",
        "labels changed",
        "tau",
        "us a document",
        "bytes",
    ]
    return table(columns, [
        [
            row["data"], row["fingerprint"], percent(row["agreement"]), percent(row["hits"]), percent(row["flips"], 2),
            "-" if row["tau"] is None else f"{row['tau']:.3f}", f"{row['us']:.0f}", row["bytes"],
        ]
        for row in rows
    ])  # fmt: skip


def eviction(rows: Sequence[Row]) -> str:
    """Format one line per policy: hits by budget, for repeats alone and with near hits, and in a real store."""
    replays = [row for row in rows if row["kind"] == "replay"]
    rooms = list(dict.fromkeys(row["room"] for row in replays))
    by = {(row["policy"], row["room"], row["tau"]): row for row in replays}
    kept = {row["policy"]: row for row in rows if row["kind"] == "store"}
    near = next((row["tau"] for row in replays if row["tau"] is not None), None)
    columns = ["policy", *(f"hits with room for {share:.0%}" for share in rooms)]
    columns += [f"with near hits, {share:.0%} (wrong of near)" for share in rooms]
    columns += ["hits in a store (largest of its budget)"]
    body = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        cells = [policy]
        if replays:
            cells += [percent(by[policy, share, None]["hits"]) for share in rooms]
            with_near = [by[policy, share, near] for share in rooms]
            cells += [f"{percent(row['hits'])} ({percent(row['wrong_of_near'])})" for row in with_near]
        row = kept.get(policy)
        cells.append("-" if row is None else f"{percent(row['hits'])} ({row['largest'] / row['budget']:.1%})")
        body.append(cells)
    if replays:
        bound = {row["room"]: row["bound"] for row in replays}
        body.append(["furthest next use", *(percent(bound[share]) for share in rooms), *["-"] * (len(rooms) + 1)])
    return table(columns, body)


BLOCKS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "latency": latency, "layers": layers, "accuracy": accuracy, "memory": memory, "tau": tau,
    "fingerprints": fingerprints, "eviction": eviction,
}  # fmt: skip
