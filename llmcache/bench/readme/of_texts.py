"""What README.md says about texts and their vectors: a passage for each record, or for several."""

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
from llmcache.bench.readme.markdown import (
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
    said = {
        "model alone": "`SentenceTransformer.encode`",
        "all miss": "cache, nothing known",
        "half hit": "cache, half known",
        "all hit": "cache, all known",
        "each text 3 times": "cache, every text three times in one call",
    }
    shown = [(text, by(rows, name=name)) for name, text in said.items()]
    cells = [
        [text, rate(row["rate"]), "1" if name == "model alone" else times(row["ratio"])]
        for (text, row), name in zip(shown, said, strict=True)
    ]
    return "\n\n".join(
        [
            f"BANKING77, {rows[0]['documents']:,} short queries (`llmcache bench encode --data test.csv`; "
            "`encode-banking77.json`):",
            table(["", "documents per second", "times the model alone"], cells),
            prose(
                f"""The largest difference to the model's own vectors is
                {max(row["difference"] for _, row in shown):.1e}; another batch size alone makes
                {by(rows, name="other batch size")["difference"]:.1e}. Hits are the stored bits."""
            ),
        ]
    )


EXACT = ("miss-banking77", "miss-squad", "hit-banking77", "hit-squad")


def exact(records: Records) -> str:
    """Beside other caches; for those of the four records that are there."""
    known = [name for name in EXACT if name in records]
    if not known:
        return ""
    rivals = (ALONE, SORTED, OURS, DISKCACHE, DISKCACHE_RAW, GPTCACHE)
    found = {name: {row["name"]: row for row in records[name]["rows"]} for name in known}
    apart = max(found[name][OURS]["difference"] for name in known)

    def cell(name: str, rival: str) -> str:
        row = found[name].get(rival, {"skipped": ""})
        return "not measured" if "skipped" in row else f"{rate(row['per_second'])} ({times(row['ratio'])})"

    return "\n\n".join(
        [
            prose(
                f"""Beside other caches that give the same vectors, texts per second and times
                `SentenceTransformer.encode`, nothing known (what is new is stored, durably, in the time) and all
                known (`llmcache bench run {" ".join(known)}`):"""
            ),
            table(["", *known], ([rival, *(cell(name, rival) for name in known)] for rival in rivals)),
            f"The largest difference of LLMCache to the uncached vectors is {apart:.1e}.",
        ]
    )


def off(records: Records) -> str:
    rows = {row["name"]: row for row in records["off-sst2"]["rows"]}
    aside, noted = rows[ASIDE], rows[ASIDE]["noted"]
    return prose(
        f"""Where near reuse does not pay it gets out of the way. A cache that was calibrated to a drift which hardly
        any neighbour keeps looked {noted["looked_up"]:,} of {noted["asked"]:,} new sentences of SST-2 up, and
        answered them {times(aside["ratio"])} times as fast as `SentenceTransformer.encode`, storing included;
        {times(rows[OURS]["ratio"])} times without near reuse, {times(rows[SORTED]["ratio"])} times by the model
        sorted by tokens (`llmcache bench run off-sst2 --repeats {len(aside["seconds"])}`)."""
    )


def workloads(records: Records) -> str:
    """From an empty store; for those of the records that are there."""
    known = [name for name in records if name.startswith(("stream-", "corpus-"))]
    if not known:
        return ""

    def cells(name: str) -> list[str]:
        found = {row["name"]: row for row in records[name]["rows"]}
        ours, near = found[OURS], found.get(NEAR, {"skipped": ""})
        rivals = (found.get(rival, {"skipped": ""}) for rival in (SORTED, DISKCACHE_RAW))
        said = ["not measured" if "skipped" in row else times(row["ratio"]) for row in (*rivals, ours, near)]
        apart = "" if "skipped" in near else f" ({near['mean_1_minus_cosine']:.3f})"
        texts, repeated = f"{ours['documents']:,}", percent(1 - ours["computed"] / ours["documents"])
        return [name, texts, str(len(ours["seconds"])), repeated, *said[:3], said[3] + apart]

    columns = ["", "texts, N", "rounds, R", "repeated", SORTED, DISKCACHE_RAW, OURS, f"{NEAR} (mean 1 - cosine)"]
    return "\n\n".join(
        [
            prose(
                """Corpora and streams of texts from an empty store, in calls of 256, times `SentenceTransformer.encode`
                (`llmcache bench run 'stream-*' 'corpus-*' --repeats R --limit N`, N and R from the table; where R is
                1, a tenth more or less says nothing):"""
            ),
            table(columns, map(cells, known)),
        ]
    )
