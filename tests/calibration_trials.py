"""Whether the bound of near reuse is one: many calibrations, each compared with the drift of what then answers.

    python -m tests.calibration_trials --trials 400 [--corpora DATA --embeddings FOLDER] [--out FILE.json]

A trial draws documents, puts some into a store, calibrates near reuse there, looks other documents up through
`NearMatcher.look_up` of that store, as a cache does, and compares what would be given with the true outputs. A
calibration exceeds its budget when the mean drift over those documents is above it. At confidence 0.95 that may
happen in at most
one calibration of twenty: a table says how often it did, with an interval.

Documents come from a known law, without end, or from embedded corpora, split anew in each trial.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from llmcache.bench.near import fitted_head
from llmcache.config import CacheConfig
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.format.marks import scoped
from llmcache.indexes.search.bank_index import half
from llmcache.indexes.store import Store
from llmcache.near.calibration.drift import cosine_drift, label_drift
from llmcache.near.calibration.risk_control import least_samples
from llmcache.near.calibration_store import CalibrationStore
from llmcache.near.marks import FieldDigests
from llmcache.near.matcher import NearMatcher
from llmcache.near.neighbors.linear_head import LinearHead
from llmcache.near.neighbors.near_matches import TAKEN
from llmcache.near.repeats import NearAnswers

CONFIDENCE = 0.95
SCOPE = 1
SETTINGS = ((70, 0.05), (160, 0.02), (160, 0.05), (300, 0.01), (300, 0.02), (600, 0.005), (600, 0.01))
"""Documents that the drift is measured on, and budgets."""
LARGE_SAMPLES, LARGE_CACHES = ((2000, 0.005), (1000, 0.01)), ((1000, 0.005),)
"""Others, one for each round of those above: to fit to many entries takes long."""
LEAST_ENTRIES, MOST_ENTRIES = 160, 400
"""Of a cache that a sample is given to."""
CORPORA = ("cls-banking77", "cls-snips", "cls-sst2")

Floats = NDArray[np.float32]
Draw = Callable[[np.random.Generator, int], "Documents"]
"""Draws so many documents, all different and none twice."""


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """features: float16 [n, width]; outputs: float32 [n, out], unit norm; tokens: ids of each document.

    head: the classifier of outputs that decides, for drift of labels. labels: the right answers, where there are any.
    """

    features: NDArray[np.float16] = field(repr=False)
    outputs: Floats = field(repr=False)
    tokens: list[NDArray[np.int32]] = field(repr=False)
    head: Any
    labels: NDArray[np.str_] | None = field(default=None, repr=False)

    def take(self, places: NDArray[np.int64]) -> Documents:
        tokens = [self.tokens[place] for place in places.tolist()]
        labels = None if self.labels is None else self.labels[places]
        return Documents(self.features[places], self.outputs[places], tokens, self.head, labels)


@dataclass(frozen=True, slots=True)
class Trial:
    """One calibration and what came of it.

    measured: documents that the drift was measured on, of which so many drifted. hits, drift: shares of the fresh
    documents, looked up in the cache that answers. requests, requests_once: drift of all requests where popularity
    follows Zipf's law: with any number of near answers for each document, and with one, see `CacheConfig.near_repeats`.
    """

    source: str
    sample: bool
    head: str
    drift_kind: str
    measured: int
    budget: float
    drifted: int
    calibrated_hits: float
    bound: float
    hits: float
    drift: float
    requests: float
    requests_once: float

    def exceeds(self, measure: str = "drift") -> bool:
        """Whether "drift", "requests" or "requests_once" is above the budget."""
        return bool(getattr(self, measure) > self.budget)


# -- documents ----------------------------------------------------------------------------------------------


def law(noise: float, curve: float = 6.0, classes: int = 4, width: int = 12, out: int = 6) -> Draw:
    """Documents whose outputs are a smooth function of their features and noise that no feature tells.

    curve: larger is nearer to linear, so that fewer results drift.
    """
    fixed = np.random.default_rng(7)
    one, two = fixed.standard_normal((width, 16)), fixed.standard_normal((16, out))
    head = LinearHead(fixed.standard_normal((classes, out)).astype(np.float32), np.zeros(classes, np.float32))

    def draw(random: np.random.Generator, n: int) -> Documents:
        features = half(random.standard_normal((n, width)))
        outputs = curve * np.tanh(features.astype(np.float64) @ one / curve) @ two / 6
        outputs += noise * random.exponential(size=(n, 1)) * random.standard_normal((n, out))
        outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
        tokens = list(random.integers(1000, 30_000, (n, 6)).astype(np.int32))
        return Documents(features, outputs.astype(np.float32), tokens, head)

    return draw


def corpus(folder: Path, name: str) -> Draw:
    """Documents of an embedded corpus, see `embed`, drawn without replacement; the head has seen a third of them, which
    are never drawn.
    """
    arrays = np.load(folder / f"{name}.npz")
    tokens = np.split(arrays["tokens"].astype(np.int32), np.cumsum(arrays["lengths"])[:-1])
    seen = len(tokens) // 3
    head = fitted_head(arrays["outputs"][:seen], arrays["labels"][:seen])
    pool = Documents(arrays["features"], arrays["outputs"].astype(np.float32), tokens, head, arrays["labels"])

    def draw(random: np.random.Generator, n: int) -> Documents:
        return pool.take(seen + random.permutation(len(tokens) - seen)[:n])

    return draw


def embed(data: Path, folder: Path, name: str) -> None:
    """Write features, outputs, labels and tokens of a labelled corpus to an .npz file, unless it is there."""
    from llmcache.bench.harness.datasets import labelled_texts
    from llmcache.bench.near import embedded
    from llmcache.demo import demo_model

    if (folder / f"{name}.npz").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    known, asked = labelled_texts(data / name)
    pairs = list(dict(known + asked).items())
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    found = embedded(demo_model(), [pairs[i] for i in order])
    lengths = [len(ids) for ids in found.entries.tokens]
    np.savez(
        folder / f"{name}.npz", features=found.entries.features, outputs=found.entries.outputs, labels=found.labels,
        lengths=lengths, tokens=np.concatenate(found.entries.tokens),
    )  # fmt: skip


# -- one trial ----------------------------------------------------------------------------------------------


def put(bank: Bank, documents: Documents) -> None:
    """Store documents as a cache does that has computed them."""
    n = len(documents.outputs)
    keys = np.random.default_rng(len(bank)).integers(1, 2**63, (n, 2)).astype(np.uint64)
    bank.put(
        keys, documents.outputs, tokens=documents.tokens, sources=[""] * n,
        features=documents.features.astype(np.float32), cost=np.full(n, 1e-3, np.float32), marks=scoped(n, SCOPE),
    )  # fmt: skip


def trial(
    draw: Draw,
    source: str,
    *,
    seed: int,
    measured: int,
    budget: float,
    sample: bool,
    drift: str,
    fresh: int,
    head: str = "unseen",
) -> Trial:
    """Calibrate once and look fresh documents up. measured: documents of the sample, or entries without one.

    drift: "label", or "cosine". head: "unseen", trained on other documents, or "trained" on the entries.
    """
    random = np.random.default_rng(seed)
    entries = min(max(LEAST_ENTRIES, measured // 2), MOST_ENTRIES) if sample else max(LEAST_ENTRIES, measured)
    every = draw(random, entries + (measured if sample else 0) + fresh)
    places = np.arange(len(every.outputs))
    known, rest = every.take(places[:entries]), places[entries:]
    facts = BankFacts("float32", known.outputs.shape[1], 1, known.features.shape[1])
    config = CacheConfig(recalibrate=False, audit_share=0.0)
    with tempfile.TemporaryDirectory() as folder, closing(Store.open(Path(folder) / "store", create=True)) as store:
        store.declare("trial", {}, {})
        bank = store.bank("trial", "output", lambda: facts, config.near)
        put(bank, known)
        rows = bank.near.live()
        if sample:
            put(bank, every.take(rest[:measured]))
            rest = rest[measured:]
        near = CalibrationStore(store, "trial", config, "output", bank, FieldDigests())
        if head == "trained":
            assert known.labels is not None
            every = replace(every, head=fitted_head(known.outputs, known.labels))
        settings: dict[str, Any] = {"head": every.head} if drift == "label" else {}
        found = near.calibrate(
            rows if sample else None, SCOPE, commit=store.commit, budget=budget, drift=drift, confidence=CONFIDENCE,
            guarded=False, seed=seed, **settings,
        )  # fmt: skip
        saved = near.saved()
        assert saved is not None
        asked = every.take(rest)
        hit, moved = answered(saved, asked, drift)
    drifted = round(found.curve[-1][2] * found.samples) if found.curve else 0
    return Trial(
        source, sample, head, drift, found.samples, budget, drifted, found.hits, found.bound, float(hit.mean()),
        float(moved.mean()), *(drift_of_requests(hit, moved, most, seed) for most in (None, 1)),
    )  # fmt: skip


def answered(reuse: NearMatcher, asked: Documents, drift: str) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which documents a cache would answer near, and their drift by the head's own decisions or the true cosine."""
    if reuse.off:
        return np.zeros(len(asked.outputs), np.bool_), np.zeros(len(asked.outputs))
    near = reuse.look_up(asked.features.astype(np.float32), asked.tokens, [""] * len(asked.tokens))
    hit, given = near.gate == TAKEN, np.asarray(near.results)
    measure = label_drift(asked.head) if drift == "label" else cosine_drift
    moved = measure(asked.outputs, given)
    return hit, np.where(hit, moved, 0.0)


def drift_of_requests(
    hit: NDArray[np.bool_], moved: NDArray[np.float64], most: int | None, seed: int, call: int = 64
) -> float:
    """Mean drift of requests for documents, three for each, whose popularity follows Zipf's law.

    hit, moved: of each document. They come in calls of so many; a document that is computed is stored, and exact after.
    """
    random = np.random.default_rng(seed + 1)
    weight = 1 / np.arange(1, len(hit) + 1)
    asked = random.permutation(len(hit))[random.choice(len(hit), 3 * len(hit), p=weight / weight.sum())]
    answers, stored, total = NearAnswers(most), ~hit, 0.0
    for start in range(0, len(asked), call):
        documents, copies = np.unique(asked[start : start + call], return_counts=True)
        documents, copies = documents[~stored[documents]], copies[~stored[documents]]
        keys = np.stack([documents, documents], axis=1).astype(np.uint64)
        near = answers.allowed(keys, copies)
        answers.add(keys[near], copies[near])
        total += float((moved[documents] * copies)[near].sum())
        stored[documents[~near]] = True
    return total / len(asked)


# -- many trials --------------------------------------------------------------------------------------------


def trials(
    draws: dict[str, Draw],
    count: int,
    *,
    sample: bool,
    drift: str,
    settings: Sequence[tuple[int, float]] = SETTINGS,
    large: Sequence[tuple[int, float]] | None = None,
    fresh: int = 4000,
    seed: int = 0,
    head: str = "unseen",
) -> Iterator[Trial]:
    """So many trials, their sources and settings in turn; without settings under which no calibration could pass."""
    possible = [
        (n, budget) for n, budget in settings if n >= max(least_samples(budget, CONFIDENCE), 0 if sample else 128)
    ]
    if large is None:
        large = LARGE_SAMPLES if sample else LARGE_CACHES
    sources, many = sorted(draws), len(possible) + bool(large)
    for number in range(count):
        turn, place = divmod(number, many)
        measured, budget = possible[place] if place < len(possible) else large[turn % len(large)]
        source = sources[turn % len(sources)]
        yield trial(
            draws[source], source, seed=seed + number, measured=measured, budget=budget, sample=sample, drift=drift,
            fresh=fresh, head=head,
        )  # fmt: skip


def interval(exceeding: int, count: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a share at 0.95, two-sided."""
    low = float(beta.ppf(0.025, exceeding, count - exceeding + 1)) if exceeding else 0.0
    high = float(beta.ppf(0.975, exceeding + 1, count - exceeding)) if exceeding < count else 1.0
    return low, high


def row(name: str, found: Sequence[Trial], measure: str = "drift") -> str:
    """A line of the table. measure: see `Trial.exceeds`."""
    exceeding = sum(one.exceeds(measure) for one in found)
    low, high = interval(exceeding, len(found))
    on = [one for one in found if one.calibrated_hits]
    hits = np.mean([one.hits for one in on]) if on else 0.0
    return (
        f"| {name} | {len(found)} | {len(on)} | {exceeding} | {exceeding / max(1, len(found)):.1%} "
        f"({low:.1%} to {high:.1%}) | {hits:.1%} |"
    )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400, help="calibrations of each line of the table")
    parser.add_argument("--corpora", type=Path, help="folder with cls-banking77, cls-snips and cls-sst2")
    parser.add_argument("--embeddings", type=Path, default=Path("embeddings"), help="where embedded corpora are kept")
    parser.add_argument("--without-law", action="store_true", help="calibrate on the corpora only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every trial to this file as JSON")
    given = parser.parse_args()
    groups: dict[str, dict[str, Draw]] = {}
    if not given.without_law:
        groups["known law"] = {"few drift": law(0.03, 24.0, classes=2), "some": law(0.1), "many": law(0.4)}
    if given.corpora:
        for name in CORPORA:
            embed(given.corpora, given.embeddings, name)
        groups["corpora"] = {name: corpus(given.embeddings, name) for name in CORPORA}
    _say("| documents | calibrations | near reuse on | above the budget | share (0.95 interval) | near hits |")
    _say("|---|---|---|---|---|---|")
    every: list[Trial] = []
    for group, draws in groups.items():
        heads = ("unseen", "trained") if group == "corpora" else ("unseen",)
        for drift, sample, head in itertools.product(("label", "cosine"), (True, False), heads):
            if head == "trained" and (sample or drift == "cosine"):
                continue
            found = list(trials(draws, given.trials, sample=sample, drift=drift, seed=given.seed, head=head))
            name = f"{group}, {drift}, {'a sample' if sample else 'own entries'}"
            _say(row(name + (", head trained on them" if head == "trained" else ""), found))
            every += found
            few = [one for one in found if 1 <= one.drifted <= 7]
            if few and drift == "label":
                _say(row("of these with 1 to 7 drifted documents", few))
            if sample and drift == "label":
                _say(row("the same, over requests, each document answered near once", found, "requests_once"))
                _say(row("the same, over requests, near answers without end", found, "requests"))
    if given.out:
        given.out.write_text(json.dumps([asdict(one) for one in every], indent=0))


if __name__ == "__main__":
    main()
