"""Measurement of language-model jobs of a pipeline, beside transformers in batches, on real texts.

Contenders take turns in one process. Look-up, restoring, storing, committing and writing the result file are in the
time; opening the store is measured beside it. Every ratio stands beside the one that the token counts allow: tokens
that plain transformers must compute over tokens whose beginnings are not known, those of generated texts included.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmcache.bench.competitors.transformers_jobs import Batched
from llmcache.bench.harness.datasets import OPENBOOKQA, openbook_questions
from llmcache.bench.harness.recording import Say
from llmcache.bench.harness.turns import Action, Measurement, Row, Turn, in_turn, steady
from llmcache.bench.job_texts import CHOICES, NEW, Job, Records, asked_job, documents, few_shot, new_tokens
from llmcache.cache import LLMCache
from llmcache.config import CacheConfig
from llmcache.decoders.templates import PromptTemplate
from llmcache.errors import ConfigError
from llmcache.pipeline.pipeline import Pipeline

PLAIN = "transformers, batched"
_ENDS = ("", " ", "\n")
"""Ends of the prompts of OpenBookQA."""
_STEM = "Question: {stem}\nAnswer:"
_COMPUTE = "tokens that transformers computes / tokens whose beginning is not stored, with generated ones"


@dataclass(frozen=True, slots=True)
class JobSizes:
    """Sizes of the measurement.

    paragraphs: short documents of about `short` tokens. long_paragraphs: documents of about `long` tokens. groups:
    paragraphs with five questions each. classified: short documents to classify after a prompt with examples of about
    `shots` tokens; transformers scores `classified_plain` of them. questions: of OpenBookQA.
    """

    paragraphs: int = 48
    long_paragraphs: int = 12
    groups: int = 16
    classified: int = 100
    classified_plain: int = 10
    questions: int = 51
    short: int = 180
    long: int = 800
    shots: int = 320
    batch_size: int = 32


class Measured:
    """Rows and exactness of the jobs of one model. Stores are in `folder`.

    rows: one for each job, with the seconds of its base. generated: tokens that the model was given one by one.
    ratio_without_audits: ratio if the first hits of the opening were not recomputed, which takes as long for any number
    of documents; from the last round. needed: tokens of prompts (and choices) whose beginning is not stored.
    exactness: one for each comparison.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path, batch_size: int, say: Say) -> None:
        self._model, self._tokenizer, self.folder, self._batch_size = model, tokenizer, folder, batch_size
        self.say, self.plain = say, Batched(model, tokenizer, batch_size)
        self.rows: list[Row] = []
        self.exactness: list[Row] = []

    # -- contenders -----------------------------------------------------------------------------------------

    def run(self, cache: LLMCache, job: Job) -> bytes:
        """Run a job, commit, and return the bytes of its result file."""
        out = self.folder / "results.jsonl"
        pipeline = Pipeline(
            cache, task=job.task, template=job.template, provenance=False, batch_size=self._batch_size, **job.settings
        )
        pipeline.write(job.records, out)
        cache.commit()
        if pipeline.refused:
            raise ConfigError(f"the model refuses a prompt: it {pipeline.errors[0].reason}; choose smaller sizes")
        return out.read_bytes()

    def cached(
        self, job: Job, facts: Row, *, store: str = "", keep: str = ""
    ) -> Callable[[int], AbstractContextManager[Action]]:
        """Return the `prepared` of a job that runs in a new opening of a copy of a store, or of an empty store.

        facts: filled with what the opening counts. keep: name under which the store stays afterwards; the last round's.
        """

        @contextmanager
        def prepared(_: int) -> Iterator[Action]:
            work = self.folder / "work"
            if store:
                shutil.copytree(self.folder / store, work)
            began = time.perf_counter()
            with self._open(work) as cache:
                facts["open_seconds"] = time.perf_counter() - began
                yield lambda: self.run(cache, job)
                facts.update(_counted(cache))
            if keep:
                shutil.rmtree(self.folder / keep, ignore_errors=True)
                work.rename(self.folder / keep)
            else:
                shutil.rmtree(work)

        return prepared

    def _open(self, folder: Path) -> LLMCache:
        return LLMCache.open(folder, self._model, tokenizer=self._tokenizer, config=CacheConfig(answers=True))

    def alone(self, job: Job) -> Callable[[int], AbstractContextManager[Action]]:
        """Return the `prepared` of a job with transformers alone."""
        prompts = job.prompts
        if job.task == "generate":
            return steady(lambda: self.plain.generate(prompts, NEW))
        choices = job.choices
        return steady(lambda: self.plain.score(prompts, choices))

    # -- tokens ---------------------------------------------------------------------------------------------

    def tokens(self, job: Job) -> list[list[int]]:
        """Return the rows of tokens that transformers computes for a job, without those of generated texts."""
        if job.task == "generate":
            return self.plain.ids(job.prompts)
        return [ids[:-1] for rows in self.plain.scored_ids(job.prompts, job.choices) for ids, _ in rows]

    # -- results --------------------------------------------------------------------------------------------

    def add(self, part: str, run: Measurement, asked: float | None = None, **facts: Any) -> None:
        """Add the row of a job. asked: least ratio that it should have."""
        base, ratio = run.against, run.ratio
        last, audits = run.seconds[-1], run.facts["audit_seconds"]  # both of the last round
        without = None if base is None else run.ratios[-1] * last / max(last - audits, 1e-3)
        self.rows.append({
            "name": part, "documents": run.documents, "seconds": run.seconds, "base": run.base,
            "base_documents": base.documents if base else None, "base_seconds": run.base_seconds,
            "per_document": 1 / run.rate, "base_per_document": 1 / base.rate if base else None, "ratio": ratio,
            "ratio_without_audits": without,
            "asked": asked, "met": None if asked is None or ratio is None else ratio >= asked, **run.facts, **facts,
        })  # fmt: skip
        times = "" if ratio is None else f", {ratio:.2f} times as fast"
        self.say(f"  {part}: {1 / run.rate:.3f} s a document{times}")

    def compare_texts(self, name: str, texts: Sequence[str], result: bytes) -> None:
        """Compare generated texts with those of a result file."""
        equal = sum(one == row["text"] for one, row in zip(texts, _rows(result), strict=True))
        self.exactness.append({
            "name": f"{name}: texts", "items": len(texts), "prompts": len(texts), "equal": equal, "difference": None,
        })  # fmt: skip

    def compare_scores(self, name: str, scores: Sequence[Any], result: bytes) -> None:
        """Compare log-likelihoods with those of a result file, and the choices that they decide."""
        ours = [np.array(row["log_likelihoods"]) for row in _rows(result)][: len(scores)]
        pairs = list(zip(ours, scores, strict=True))
        self.exactness.append({
            "name": f"{name}: choices", "items": sum(map(len, scores)), "prompts": len(scores),
            "equal": sum(int(one.argmax()) == int(other.argmax()) for one, other in pairs),
            "difference": max(float(np.abs(one - other).max()) for one, other in pairs),
        })  # fmt: skip


def _counted(cache: LLMCache) -> Row:
    """Return what an opening counted: prompt tokens by origin, and seconds."""
    counters = cache.stats().counters
    prefix = counters.prefix
    return {
        "tokens": prefix.tokens, "restored": prefix.restored, "shared": prefix.shared, "computed": prefix.computed,
        "answers_stored": counters.answers_stored, "model_seconds": prefix.model_seconds,
        "lookup_seconds": prefix.lookup_seconds, "store_seconds": prefix.store_seconds,
        "audit_seconds": counters.exact_audit_seconds,
    }  # fmt: skip


def _rows(result: bytes) -> list[Any]:
    return [json.loads(line) for line in result.split(b"\n") if line]


def _steps(result: bytes, places: Sequence[int] | None = None) -> int:
    """Return the number of generated tokens that the model was given, of all rows or of those at these places."""
    rows = _rows(result)
    return sum(max(0, len(row["tokens"]) - 1) for row in (rows if places is None else [rows[i] for i in places]))


# -- measurements ----------------------------------------------------------------------------------------------


def measured(model: Any, tokenizer: Any, data: Path, sizes: JobSizes, repeats: int, say: Say) -> Row:
    """Measure all jobs. model: causal model, float32. data: folder of the data sets. Returns a record.

    ConfigError when a data set is missing, or has too few texts for these sizes.
    """
    with tempfile.TemporaryDirectory(prefix="llmcache-bench-") as name:
        made = Measured(model, tokenizer, Path(name), sizes.batch_size, say)
        short = documents(data, tokenizer, sizes.short, sizes.paragraphs + -(-sizes.paragraphs // 10))
        long = documents(data, tokenizer, sizes.long, sizes.long_paragraphs)
        say("trial forwards of the model, before the clock")
        _warm_up(made, short[:2])
        _repeated(made, short, sizes.paragraphs, repeats)
        _known(made, "short", sizes.short, short[: sizes.paragraphs], (3.5, 5), repeats)
        with made.cached(asked_job(long, 0), {}, keep="long")(0) as action:
            action()
        _known(made, "long", sizes.long, long, (6, 10), repeats)
        _five(made, short[: sizes.groups], repeats)
        _classified(made, data, sizes, repeats)
        _openbookqa(made, data, sizes.questions)
    return {
        "batch_size": sizes.batch_size, "new_tokens": NEW, "repeats": repeats, "possible_is": _COMPUTE,
        "before_the_clock": "a first opening and its trial forwards, all contenders; those of later ones are timed",
        "rows": made.rows, "exactness": made.exactness,
    }  # fmt: skip


def _warm_up(made: Measured, texts: Records) -> None:
    facts: Row = {}
    for job in (asked_job(texts, 0), asked_job(texts, 1, CHOICES)):
        for prepared in (made.alone(job), made.cached(job, facts)):
            with prepared(0) as action:
                action()


def _repeated(made: Measured, texts: Records, count: int, repeats: int) -> None:
    """Measure a job, the same again, and the same with every tenth document replaced."""
    part = "same job again"
    made.say(part)
    job, facts = asked_job(texts[:count], 0), [Row(), Row(), Row()]
    rows = made.tokens(job)
    begun = in_turn(
        [Turn("first run, empty store", count, made.cached(job, facts[0], keep="short"), facts=facts[0])],
        1, warm=0, keep=1,
    )["first run, empty store"]  # fmt: skip
    again = in_turn([Turn(part, count, made.cached(job, facts[1], store="short"), facts=facts[1])], 3, warm=0)[part]
    made.add("first run", begun, needed=new_tokens(rows), generated=_steps(begun.outputs[0]))
    begun.seconds, first = begun.seconds * len(again.seconds), begun.outputs[0]
    again.against = begun
    opened = (begun.median + facts[0]["open_seconds"]) / (again.median + facts[1]["open_seconds"])
    made.add(part, again, 100, ratio_with_opening=opened, equal_files=all(each == first for each in again.outputs))
    part = "10 % changed"
    made.say(part)
    places = list(range(0, count, 10))
    changed = texts[:count]
    for place, text in zip(places, texts[count:], strict=True):
        changed[place] = text
    job = asked_job(changed, 0)
    asked = made.tokens(job)
    plain, ours = _pair(made, part, job, facts[2], "short", repeats)
    possible = (sum(map(len, asked)) + _steps(ours.outputs[0])) / max(
        1, new_tokens(asked, rows) + _steps(ours.outputs[0], places)
    )
    made.add(part, ours, 1 / 0.15, possible=possible, needed=new_tokens(asked, rows),
             generated=_steps(ours.outputs[0], places), base_tokens=sum(map(len, asked)))  # fmt: skip
    made.compare_texts(part, plain.outputs[0], ours.outputs[0])


def _pair(made: Measured, name: str, job: Job, facts: Row, store: str, repeats: int) -> tuple[Measurement, Measurement]:
    """Measure transformers and a job on a copy of a store, in turn."""
    turns = [
        Turn(PLAIN, len(job.records), made.alone(job), PLAIN),
        Turn(name, len(job.records), made.cached(job, facts, store=store), PLAIN, facts=facts),
    ]
    found = in_turn(turns, repeats, warm=0, keep=1)
    return found[PLAIN], found[name]


def _known(made: Measured, store: str, tokens: int, texts: Records, asked: tuple[float, float], repeats: int) -> None:
    """Measure another question about documents whose first question a store has: generate, and score choices."""
    known = made.tokens(asked_job(texts, 0))
    for number, (what, job, least) in enumerate(
        (("generate", asked_job(texts, 1), asked[0]), ("score", asked_job(texts, 2, CHOICES), asked[1]))
    ):
        part = f"{what}, known {tokens} tokens"
        made.say(part)
        facts: Row = {}
        plain, ours = _pair(made, "known documents", job, facts, store, repeats)
        rows = made.tokens(job)
        steps = 0 if number else _steps(ours.outputs[0])
        every, needed = sum(map(len, rows)), new_tokens(rows, known)
        made.add(
            part, ours, least, possible=(every + steps) / max(1, needed + steps), needed=needed, generated=steps,
            base_tokens=every,
        )  # fmt: skip
        (made.compare_scores if number else made.compare_texts)(part, plain.outputs[0], ours.outputs[0])
    shutil.rmtree(made.folder / store)


def _five(made: Measured, texts: Records, repeats: int) -> None:
    """Measure five questions about each paragraph with an empty store: in the order of the paragraphs, and shuffled."""
    part = "five questions a paragraph"
    made.say(part)
    jobs = [asked_job(texts, number) for number in range(5)]
    ordered = [job.records[i] for i in range(len(texts)) for job in jobs]
    order = np.random.default_rng(0).permutation(len(ordered)).tolist()
    by_name = {"shuffled": [ordered[i] for i in order], "sorted": ordered}
    facts: dict[str, Row] = {name: {} for name in by_name}
    jobs = [Job("generate", jobs[0].template, records, jobs[0].settings) for records in by_name.values()]
    turns = [Turn(PLAIN, len(order), made.alone(jobs[0]), PLAIN)]
    for (name, own), job in zip(facts.items(), jobs, strict=True):
        turns.append(Turn(name, len(order), made.cached(job, own), PLAIN, facts=own))
    found = in_turn(turns, repeats, warm=0, keep=1)
    result = found["shuffled"].outputs[0]
    rows, steps = made.tokens(jobs[0]), _steps(result)
    every, needed = sum(map(len, rows)), new_tokens(rows)
    shared = {name: 1 - own["computed"] / own["tokens"] for name, own in facts.items()}
    for name in by_name:
        made.add(
            f"{part}, {name}", found[name], 2.2 if name == "shuffled" else None,
            possible=(every + steps) / (needed + steps), needed=needed, generated=steps, base_tokens=every,
            shared_share=shared[name], of_sorted=shared[name] / shared["sorted"],
        )  # fmt: skip
    made.compare_texts(part, found[PLAIN].outputs[0], result)


def _classified(made: Measured, data: Path, sizes: JobSizes, repeats: int) -> None:
    """Measure labels of short documents after a prompt with examples, with an empty store.

    transformers scores every choice of a part of the documents by itself; its time is taken per document.
    """
    part = "few-shot classification"
    made.say(part)
    job = few_shot(data, made.plain, sizes.shots, sizes.classified)
    few = min(sizes.classified_plain, len(job.records))
    places = range(0, len(job.records), len(job.records) // few)[:few]
    some = Job(job.task, job.template, [job.records[i] for i in places], job.settings)
    facts: Row = {}
    turns = [
        Turn(PLAIN, len(some.records), made.alone(some), PLAIN),
        Turn("classify", len(job.records), made.cached(job, facts), PLAIN, facts=facts),
    ]
    found = in_turn(turns, repeats, warm=0, keep=1)
    plain, ours = found[PLAIN], found["classify"]
    every, needed = sum(map(len, made.tokens(some))) / len(some.records), new_tokens(made.tokens(job))
    made.add(
        part, ours, 5, possible=every * len(job.records) / needed, needed=needed, base_tokens=every * len(some.records)
    )
    written = ours.outputs[0].split(b"\n")
    made.compare_scores(part, plain.outputs[0], b"\n".join(written[i] for i in places))


def _openbookqa(made: Measured, data: Path, count: int) -> None:
    """Compare log-likelihoods of choices with those of prompt and choice tokenised together, for three prompt ends."""
    made.say("OpenBookQA")
    asked = openbook_questions(data / OPENBOOKQA)[:count]
    for number, end in enumerate(_ENDS):
        records = [{"stem": stem, "choices": choices} for stem, choices, _ in asked[number :: len(_ENDS)]]
        if not records:
            continue
        job = Job("score", PromptTemplate(f"{_STEM}{end}"), records, {"choices_field": "choices"})
        with made.cached(job, {})(0) as action:
            result = action()
        said = {"": "no white space", " ": "a blank", "\n": "a line end"}[end]
        made.compare_scores(f"OpenBookQA, {said} at the end", made.plain.score(job.prompts, job.choices), result)
