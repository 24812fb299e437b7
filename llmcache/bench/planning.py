"""Measurement of forecasts of `llmcache plan` beside the runs that follow, and of the time a forecast takes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression

from llmcache.bench.harness.datasets import BANKING77, LOGS, POLICIES, labelled_texts, log_lines, objects
from llmcache.bench.harness.turns import Action, Row, Turn, in_turn, steady
from llmcache.cache import LLMCache
from llmcache.pipeline.chunking import chunks

_POLICIES = 8  # policies to cut into chunks; all of them take a quarter of an hour without a cache


@dataclass(frozen=True, slots=True)
class Case:
    """One case. known: texts in the store. labels: of these, to calibrate with, or None. asked: texts of the run."""

    name: str
    known: Sequence[str] = field(repr=False)
    asked: Sequence[str] = field(repr=False)
    labels: Sequence[str] | None = field(default=None, repr=False)


def cases(data: Path) -> Iterator[Case]:
    """Yield the corpora of a data folder, each with a known part."""
    train, test = labelled_texts(data / BANKING77)
    yield Case("BANKING77, test, nothing known", [], [text for text, _ in test])
    every = [text for text, _ in (*train, *test)]
    order = np.random.default_rng(0).permutation(len(every)).tolist()
    yield Case("BANKING77, half known", [every[i] for i in order[::2]], [every[i] for i in order[: len(order) // 2]])
    yield Case(
        "BANKING77, train known, calibrated", [text for text, _ in train], [text for text, _ in test],
        [label for _, label in train],
    )  # fmt: skip
    revisions = sorted(objects(data / POLICIES), key=lambda revision: str(revision["date"]))
    middle = len(revisions) // 2
    texts = [one["text"] for one in revisions]
    yield Case("policies, nothing known", [], texts)
    yield Case("policies, older half known", texts[:middle], texts[middle:])
    few = sorted({one["doc"] for one in revisions})[:_POLICIES]
    cut = [[part.text for part in chunks(one["text"])] for one in revisions if one["doc"] in few]
    half = len(cut) // 2
    parts = [[text for one in side for text in one] for side in (cut[:half], cut[half:])]
    yield Case("policies in chunks, older half known", parts[0], parts[1])
    logs = [[line for line in some if line.strip()] for some in log_lines(data / LOGS)]
    yield Case("logs, nothing known", [], [line for one in logs for line in one])
    yield Case(
        "logs, half known", [line for one in logs for line in one[:1000]], [line for one in logs for line in one]
    )


def measured(
    model: SentenceTransformer, data: Path, *, repeats: int = 3, wanted: str = "", limit: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:  # fmt: skip
    """Measure all cases. Returns a row per case, with medians over the repeats.

    wanted: only cases whose names contain this. limit: most texts known, and asked.
    """
    rows = []
    for case in cases(data):
        if wanted in case.name:
            asked, labels = case.asked[:limit], case.labels and case.labels[:limit]
            rows.append(_measured(model, Case(case.name, case.known[:limit], asked, labels), repeats))
            say(f"{case.name}: {rows[-1]['said']}")
    return rows


def _measured(model: SentenceTransformer, case: Case, repeats: int) -> Row:
    runs: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="llmcache-plan-") as name:
        known, store = Path(name) / "known", Path(name) / "store"
        _filled(model, case, known)

        @contextmanager
        def forecast(_: int) -> Iterator[Action]:
            shutil.copytree(known, store)
            plans = []
            with LLMCache.open(store, model) as cache:
                yield lambda: plans.append(cache.plan(case.asked))
                computed = sum(result.tier == "miss" for result in cache.run(case.asked))
                counters = cache.stats().counters
            plan = plans[-1]
            compared = plan.compared(len(case.asked), computed, counters.model_seconds + counters.overhead_seconds)
            runs.append({
                **compared.as_dict(), "forecast_uncached": plan.uncached_seconds, "cost_from": plan.cost_from,
                "near_from": plan.near_from, "new_bytes": plan.new_bytes, "said": str(compared),
            })  # fmt: skip
            shutil.rmtree(store)

        count = len(case.asked)
        turns = [
            Turn("uncached", count, steady(lambda: model.encode(list(case.asked), batch_size=32))),
            Turn("pass", count, forecast, "uncached"),
        ]
        made = in_turn(turns, repeats, warm=0, rotating=False)
    times = zip(runs, *(made[kind].seconds for kind in ("uncached", "pass")), strict=True)
    return _row(case, [{**run, "uncached": uncached, "pass": passed} for run, uncached, passed in times])


def _filled(model: SentenceTransformer, case: Case, store: Path) -> None:
    with LLMCache.open(store, model) as cache:
        if not len(case.known):
            return
        outputs = np.stack([result.output for result in cache.run(case.known)])
        if case.labels is not None:
            head = LogisticRegression(C=10, max_iter=300).fit(outputs, list(case.labels))
            cache.calibrate(budget=0.005, head=head)


def _row(case: Case, repeats: list[Row]) -> Row:
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
