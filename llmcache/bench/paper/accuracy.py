"""Accuracy experiment, with real weights and labelled data: the model alone, the paper's rule, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from llmcache import snapshot
from llmcache.arrays import Floats32
from llmcache.bench.harness.datasets import OPENBOOKQA, openbook_questions
from llmcache.bench.harness.turns import Row
from llmcache.bench.near import Labels
from llmcache.bench.paper import texts
from llmcache.bench.paper.models import classifier
from llmcache.bench.paper.records import LABELLED, Work
from llmcache.bench.paper.texts import Workload, spread
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError
from llmcache.near.neighbors.linear_head import LinearHead

TAUS = (0.82, 0.85, 0.88)
BUDGET = 0.005
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A task with known answers.

    head: decides on one document's output, for `calibrate`. answers: maps the outputs of all queries to answers
    [questions]. right: correct answers. metric: description of an answer, for tables.
    """

    workload: Workload
    metric: str
    head: Any = field(repr=False)
    answers: Callable[[Floats32], Labels] = field(repr=False)
    right: Labels = field(repr=False)


def accuracy(
    model: SentenceTransformer, task: Callable[[Floats32], Task], workload: Workload, folder: Path
) -> list[Row]:
    """Measure all methods on a task. Returns one row per method.

    task: builds the task from the outputs of the known documents. hits: share of documents that a neighbour answered.
    flips: share of all answers that differ from the model's own. Every cache starts from a copy of one store with the
    known documents.
    """
    with LLMCache.open(folder / "known", model) as cache:
        known = np.asarray(cache.encode(workload.known, batch_size=64), np.float32)
    made = task(known)
    own = np.asarray(model.encode(workload.asked, batch_size=64), np.float32)
    answers = made.answers(own)
    base = float((answers == made.right).mean())
    facts = {
        "data": workload.name, "model": "MiniLM", "weights": "real", "judged_by": "labels", "metric": made.metric,
        "known": len(workload.known), "asked": len(workload.asked), "questions": len(made.right),
    }  # fmt: skip
    rows = [{**facts, "method": "NoCache", "accuracy": base, "drop": 0.0, "flips": 0.0, "hits": 0.0}]

    def measured(name: str, cache: LLMCache) -> Row:
        results = list(cache.run(workload.asked, batch_size=64))
        given = made.answers(np.array([result.output for result in results]))
        now = float((given == made.right).mean())
        near = np.array([result.tier == "near" for result in results])
        apart = np.abs(np.array([result.output for result in results]) - own)[~near]
        return {
            **facts, "method": name, "accuracy": now, "drop": base - now, "flips": float((given != answers).mean()),
            "hits": float(near.mean()),
            "difference_of_computed": float(apart.max(initial=0)),
        }  # fmt: skip

    for tau in TAUS:
        with _copy(model, folder, CacheConfig(tau=tau, stand_aside=False)) as cache:
            rows.append({**measured(f"the paper's rule, tau {tau}", cache), "tau": tau})
    with _copy(model, folder, CacheConfig(stand_aside=False)) as cache:
        rows.append(measured("ours, exact only", cache))
        rows[-1]["again_hits"] = float(np.mean([one.tier == "exact" for one in cache.run(workload.asked)]))
    with _copy(model, folder, CacheConfig(recalibrate=False)) as cache:
        try:
            reason = cache.calibrate(budget=BUDGET, confidence=CONFIDENCE, head=made.head).reason
        except ConfigError as error:  # too few documents: near reuse stays off
            reason = str(error)
        rows.append({**measured("ours, calibrated", cache), "budget": BUDGET, "reason": reason})
    return rows


def _copy(model: SentenceTransformer, folder: Path, config: CacheConfig) -> LLMCache:
    place = folder / f"copy-{len(list(folder.iterdir()))}"
    snapshot.save(folder / "known", place)
    return LLMCache.open(place, model, config=config)


# -- tasks --------------------------------------------------------------------------------------------------

KNOWN, ASKED = 2000, 600


def parts() -> dict[str, Callable[[Work], list[Row]]]:
    """Return one part per corpus."""

    def part(make: Callable[[Work], tuple[Workload, Callable[[Floats32], Task]]]) -> Callable[[Work], list[Row]]:
        def measure(work: Work) -> list[Row]:
            workload, task = make(work)
            with work.folder() as folder:
                return accuracy(work.model, task, workload, folder)

        return measure

    named = {name: part(lambda work, name=name: _labelled(work, name)) for name in LABELLED}  # type: ignore[misc]
    return {"WikiText-2": part(_wikitext), "SQuAD v2": part(_squad), "OpenBookQA": part(_openbookqa), **named}


def with_head(workload: Workload, metric: str) -> Callable[[Floats32], Task]:
    """Build a task whose labels come from a logistic head, fitted to the known documents."""

    def task(known: Floats32) -> Task:
        head = classifier(known, workload.known_labels)
        return Task(workload, metric, head, head.predict, np.array(workload.asked_labels))

    return task


def _labelled(work: Work, name: str) -> tuple[Workload, Callable[[Floats32], Task]]:
    workload = work.labelled(name, KNOWN, ASKED)
    return workload, with_head(workload, "label, by a logistic head")


def _wikitext(work: Work) -> tuple[Workload, Callable[[Floats32], Task]]:
    workload = texts.wikitext(work.data).whole(work.known(KNOWN), work.asked(ASKED))
    return workload, with_head(workload, "the article a window is from, by a logistic head")


def _squad(work: Work) -> tuple[Workload, Callable[[Floats32], Task]]:
    every, paragraphs = texts.squad_questions(work.data, max(40, work.known(KNOWN) // 3))
    workload = every.some(work.known(KNOWN), work.asked(ASKED))
    vectors = np.asarray(work.model.encode(paragraphs, batch_size=32), np.float32)
    head = LinearHead(vectors, np.zeros(len(vectors), np.float32))
    right = np.array([int(label) for label in workload.asked_labels])

    def task(known: Floats32) -> Task:
        return Task(workload, "the paragraph a question is about, by the nearest vector", head, _first(head), right)

    return workload, task


def _openbookqa(work: Work) -> tuple[Workload, Callable[[Floats32], Task]]:
    """Build the task of OpenBookQA: the last two choices are queries; the answer is the choice nearest to a fact."""
    questions = openbook_questions(work.data / OPENBOOKQA)
    questions = [questions[i] for i in spread(len(questions), max(8, work.known(2 * 250) // 2))]
    known = [f"{stem} {choice}" for stem, choices, _ in questions for choice in choices[:2]]
    asked = [f"{stem} {choice}" for stem, choices, _ in questions for choice in choices[2:]]
    blank = [""] * len(known)
    workload = Workload("OpenBookQA", "the other choices of the same questions", known, asked, blank, [""] * len(asked))
    every = texts.openbook_facts(work.data)
    book = [every[i] for i in spread(len(every), max(64, work.known(KNOWN)))]
    facts = np.asarray(work.model.encode(book, batch_size=64), np.float32)
    head = LinearHead(facts, np.zeros(len(facts), np.float32))
    right = np.array([place for *_, place in questions])

    def task(outputs: Floats32) -> Task:
        first = (outputs @ facts.T).max(axis=1).reshape(-1, 2)

        def answers(given: Floats32) -> Labels:
            scores = np.hstack([first, (given @ facts.T).max(axis=1).reshape(-1, 2)])
            return np.asarray(scores.argmax(axis=1))

        return Task(workload, "the right choice of four, by the nearest fact", head, answers, right)

    return workload, task


def _first(head: LinearHead) -> Callable[[Floats32], Labels]:
    return lambda outputs: np.asarray(head(outputs).argmax(axis=1))
