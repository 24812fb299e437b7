"""Passages of README.md about texts and their vectors, for one record or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcache.bench.competitors.names import (
    ALONE,
    ASIDE,
    DISKCACHE,
    DISKCACHE_RAW,
    GPTCACHE,
    NEAR,
    OURS,
    SORTED,
)
from tests.readme_figures.markdown import (
    by,
    percent,
    prose,
    rate,
    table,
    times,
)

Records = Mapping[str, Any]


def encode(records: Records) -> str:
    rows = records["encode-banking77"]["rows"]
    names = {
        "model alone": "`SentenceTransformer.encode`",
        "all miss": "cache, empty",
        "half hit": "cache, half of the texts stored",
        "all hit": "cache, all texts stored",
        "each text 3 times": "cache, every text three times in one call",
    }
    shown = [(text, by(rows, name=name)) for name, text in names.items()]
    cells = [
        [text, rate(row["rate"]), "1" if name == "model alone" else times(row["ratio"])]
        for (text, row), name in zip(shown, names, strict=True)
    ]
    return "\n\n".join(
        [
            f"BANKING77, {rows[0]['documents']:,} short queries (`llmcache bench encode --data test.csv`; "
            "`encode-banking77.json`):",
            table(["", "documents per second", "times the model alone"], cells),
            prose(
                f"""The largest difference to the model's own vectors is
                {max(row["difference"] for _, row in shown):.1e}; another batch size alone causes
                {by(rows, name="other batch size")["difference"]:.1e}. Hits return the stored bits."""
            ),
        ]
    )


EXACT = ("miss-banking77", "miss-squad", "hit-banking77", "hit-squad")


def exact(records: Records) -> str:
    """Comparison with other caches, from those of the four records that exist."""
    known = [name for name in EXACT if name in records]
    if not known:
        return ""
    rivals = (ALONE, SORTED, OURS, DISKCACHE, DISKCACHE_RAW, GPTCACHE)
    rows = {name: {row["name"]: row for row in records[name]["rows"]} for name in known}
    difference = max(rows[name][OURS]["difference"] for name in known)

    def cell(name: str, rival: str) -> str:
        row = rows[name].get(rival, {"skipped": ""})
        return "not measured" if "skipped" in row else f"{rate(row['per_second'])} ({times(row['ratio'])})"

    return "\n\n".join(
        [
            prose(
                f"""Other caches that return the same vectors: texts per second, and in brackets the ratio to
                `SentenceTransformer.encode`. In `miss-*` the cache is empty, and the time includes durable storing; in
                `hit-*` all texts are stored (`llmcache bench run {" ".join(known)}`):"""
            ),
            table(["", *known], ([rival, *(cell(name, rival) for name in known)] for rival in rivals)),
            f"The largest difference between vectors of LLMCache and uncached vectors is {difference:.1e}.",
        ]
    )


def off(records: Records) -> str:
    rows = {row["name"]: row for row in records["off-sst2"]["rows"]}
    aside, noted = rows[ASIDE], rows[ASIDE]["noted"]
    return prose(
        f"""Near reuse is suspended where it does not pay. A cache was calibrated to so small a drift that hardly any
        neighbour could be reused. It looked up {noted["looked_up"]:,} of {noted["asked"]:,} new sentences of SST-2, and
        answered them {times(aside["ratio"])} times as fast as `SentenceTransformer.encode`, storing included. Without
        near reuse this factor is {times(rows[OURS]["ratio"])}, and for the model alone with batches sorted by tokens it
        is {times(rows[SORTED]["ratio"])} (`llmcache bench run off-sst2 --repeats {len(aside["seconds"])}`)."""
    )


def workloads(records: Records) -> str:
    """Corpora and streams from an empty store, from those of the records that exist."""
    known = [name for name in records if name.startswith(("stream-", "corpus-"))]
    if not known:
        return ""

    def cells(name: str) -> list[str]:
        rows = {row["name"]: row for row in records[name]["rows"]}
        ours, near = rows[OURS], rows.get(NEAR, {"skipped": ""})
        rivals = (rows.get(rival, {"skipped": ""}) for rival in (SORTED, DISKCACHE_RAW))
        ratios = ["not measured" if "skipped" in row else times(row["ratio"]) for row in (*rivals, ours, near)]
        drift = "" if "skipped" in near else f" ({near['mean_1_minus_cosine']:.3f})"
        texts, repeated = f"{ours['documents']:,}", percent(1 - ours["computed"] / ours["documents"])
        return [name, texts, str(len(ours["seconds"])), repeated, *ratios[:3], ratios[3] + drift]

    columns = ["", "texts, N", "rounds, R", "repeated", SORTED, DISKCACHE_RAW, OURS, f"{NEAR} (mean 1 - cosine)"]
    return "\n\n".join(
        [
            prose(
                """Corpora and streams of texts in calls of 256, starting with an empty store: speed as a multiple of
                `SentenceTransformer.encode` (`llmcache bench run 'stream-*' 'corpus-*' --repeats R --limit N`, with N
                and R of the table; where R is 1, differences below a tenth are noise):"""
            ),
            table(columns, map(cells, known)),
        ]
    )
