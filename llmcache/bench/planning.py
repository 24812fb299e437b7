"""Measurement of forecasts of `llmcache plan` beside the runs that follow, and of the time a forecast takes."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression

from llmcache.bench.near import labelled_texts
from llmcache.cache import LLMCache
from llmcache.errors import ConfigError
from llmcache.pipeline.chunking import chunks

_POLICIES = 8  # policies to cut into chunks; all of them take a quarter of an hour without a cache
LOGS = ("Apache", "HDFS", "Linux", "Zookeeper")


@dataclass(frozen=True, slots=True)
class Case:
    """One case. known: texts in the store. labels: of these, to calibrate with, or None. asked: texts of the run."""

    name: str
    known: Sequence[str] = field(repr=False)
    asked: Sequence[str] = field(repr=False)
    labels: Sequence[str] | None = field(default=None, repr=False)


def cases(data: Path) -> Iterator[Case]:
    """Yield the corpora of a data folder, each with a known part."""
    train, test = labelled_texts(data / "cls-banking77")
    yield Case("BANKING77, test, nothing known", [], [text for text, _ in test])
    every = [text for text, _ in (*train, *test)]
    order = np.random.default_rng(0).permutation(len(every)).tolist()
    yield Case("BANKING77, half known", [every[i] for i in order[::2]], [every[i] for i in order[: len(order) // 2]])
    yield Case(
        "BANKING77, train known, calibrated", [text for text, _ in train], [text for text, _ in test],
        [label for _, label in train],
    )  # fmt: skip
    revisions = _revisions(data / "dup-site-policy-revisions" / "revisions.jsonl.xz")
    middle = len(revisions) // 2
    texts = [one["text"] for one in revisions]
    yield Case("policies, nothing known", [], texts)
    yield Case("policies, older half known", texts[:middle], texts[middle:])
    few = sorted({one["doc"] for one in revisions})[:_POLICIES]
    cut = [[part.text for part in chunks(one["text"])] for one in revisions if one["doc"] in few]
    half = len(cut) // 2
    parts = [[text for one in side for text in one] for side in (cut[:half], cut[half:])]
    yield Case("policies in chunks, older half known", parts[0], parts[1])
    logs = [_lines(data / "dup-loghub" / f"{name}_2k.log.gz") for name in LOGS]
    yield Case("logs, nothing known", [], [line for one in logs for line in one])
    yield Case(
        "logs, half known", [line for one in logs for line in one[:1000]], [line for one in logs for line in one]
    )


def _revisions(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise ConfigError(f"the policy revisions are not at {path}; give the folder with dup-site-policy-revisions")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        revisions = [json.loads(line) for line in file]
    return sorted(revisions, key=lambda revision: str(revision["date"]))


def _lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\r\n") for line in file if line.strip()]


def measured(
    model: SentenceTransformer, data: Path, *, repeats: int = 3, wanted: str = "", limit: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure all cases. Returns a row per case, with medians over the repeats.

    wanted: only cases whose names contain this. limit: most texts known, and asked.
    """
    rows = []
    for case in cases(data):
        if wanted not in case.name:
            continue
        with tempfile.TemporaryDirectory(prefix="llmcache-plan-") as folder:
            runs = [run for _ in range(repeats) for run in _measured(model, _cut(case, limit), Path(folder), repeats)]
        rows.append(_row(case, runs))
        say(f"{case.name}: {rows[-1]['said']}")
    return rows


def _cut(case: Case, limit: int | None) -> Case:
    return Case(case.name, case.known[:limit], case.asked[:limit], case.labels and case.labels[:limit])


def _measured(model: SentenceTransformer, case: Case, folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    known = folder / "known"
    if not known.exists():
        _filled(model, case, known)
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(known, store)
    began = time.perf_counter()
    model.encode(list(case.asked), batch_size=32)
    uncached = time.perf_counter() - began
    with LLMCache.open(store, model) as cache:
        began = time.perf_counter()
        plan = cache.plan(case.asked)
        passed = time.perf_counter() - began
        computed = sum(result.tier == "miss" for result in cache.run(case.asked))
        counters = cache.stats().counters
        compared = plan.compared(len(case.asked), computed, counters.model_seconds + counters.overhead_seconds)
    yield {**compared.as_dict(), "uncached": uncached, "forecast_uncached": plan.uncached_seconds, "pass": passed,
           "cost_from": plan.cost_from, "near_from": plan.near_from, "new_bytes": plan.new_bytes,
           "said": str(compared)}  # fmt: skip


def _filled(model: SentenceTransformer, case: Case, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        if not len(case.known):
            return
        outputs = np.stack([result.output for result in cache.run(case.known)])
        if case.labels is not None:
            head = LogisticRegression(C=10, max_iter=300).fit(outputs, list(case.labels))
            cache.calibrate(budget=0.005, head=head)


def _row(case: Case, repeats: list[dict[str, Any]]) -> dict[str, Any]:
    def middle(name: str) -> float:
        return float(median(one[name] for one in repeats))

    return {
        "case": case.name, "documents": len(repeats) and repeats[0]["documents"], "known": len(case.known),
        **{name: middle(name) for name in ("forecast_hit_rate", "hit_rate", "points", "forecast_seconds", "seconds",
                                           "time", "uncached", "forecast_uncached", "pass", "new_bytes")},
        "pass_share": median(one["pass"] / one["uncached"] for one in repeats),
        "uncached_time": median(one["uncached"] / one["forecast_uncached"] for one in repeats),
        "cost_from": repeats[-1]["cost_from"], "near_from": repeats[-1]["near_from"], "said": repeats[-1]["said"],
        "repeats": repeats,
    }  # fmt: skip
