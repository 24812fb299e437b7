"""Language-model jobs: generate an answer for each record, score choices, or classify."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from llmcache.cache import LLMCache
from llmcache.decoders.generation import run_plainly
from llmcache.decoders.likelihoods import CountedRow, Likelihoods
from llmcache.decoders.prefix_order import prefix_order
from llmcache.decoders.prompts import Rendered, whole_ids
from llmcache.decoders.scoring import choice_rows
from llmcache.decoders.templates import PromptTemplate, TooLong, fit_all
from llmcache.document import Document
from llmcache.encoding.call import Progress, nothing
from llmcache.errors import ConfigError
from llmcache.pipeline.batches import DocumentBatch, parts
from llmcache.pipeline.checkpoints import Resumption
from llmcache.pipeline.job_files import job_writer
from llmcache.pipeline.job_plan import JobPlan, planned
from llmcache.pipeline.job_rows import ClassifiedRow, Columns, GeneratedRow, ScoredRow, tier_of
from llmcache.pipeline.job_settings import check_choices, check_generation, choices_in, context_of, job_template
from llmcache.pipeline.task import PlacedResults, Write
from llmcache.pipeline.writers import Form
from llmcache.records import MOST_CHARACTERS, FieldSpec, Taken

TASKS = ("generate", "score", "classify")
"""Names of the tasks."""
By: TypeAlias = Literal["total", "token", "character"]
_NEW_TOKENS = 64  # most tokens of an answer, where neither the job nor the model says otherwise
_WINDOW = 4096  # records that are ordered by their beginnings together
_WINDOW_CHARACTERS = 1 << 22


@dataclass(frozen=True, slots=True)
class ChoicePrompt:
    """Prompt of a record with choices. texts: of the choices. rows: a row of tokens for each choice."""

    texts: tuple[str, ...]
    rows: list[CountedRow]


class LanguageJob:
    """Task of a language model: a prompt is made of each record by a template, and answered.

    Up to 4,096 records (4 million characters) are ordered by the beginnings of their prompts, so that each shared
    beginning is computed once, and answered in batches. Results come in the order of the records.
    """

    form: Form = "rows"
    width = 1

    def __init__(
        self,
        cache: LLMCache,
        task: str,
        *,
        template: str | PromptTemplate,
        system: str | None = None,
        chat: bool | None = None,
        examples: Sequence[Mapping[str, Any]] = (),
        answer: str = "answer",
        syntax: Literal["format", "jinja"] = "format",
        choices: Sequence[str] | None = None,
        choices_field: str | None = None,
        separator: str | None = None,
        by: By = "total",
        too_long: TooLong = "refuse",
        provenance: bool = True,
        batch_size: int = 32,
        id_field: str = "id",
        max_characters: int = MOST_CHARACTERS,
        progress: Progress = nothing,
        **generation: Any,
    ) -> None:
        """cache: of a causal model or, for "generate", an encoder-decoder, with its tokenizer.

        task: "generate" writes the answer of `model.generate`; "score" the log-likelihood of each choice as the
            continuation of the prompt; "classify" the most likely choice, so that the result is always one of them.
        template, system, chat, examples, answer, syntax: see `PromptTemplate`. A template is a text with the names of
            the records' fields in braces, such as "Topic of this text: {text}". Values of fields that are no texts are
            written as JSON.
        choices: texts that every record is scored with. choices_field: name of the field with the choices of each
            record, a list of texts, instead.
        separator: text between a prompt and a choice. None: one blank, or nothing where the prompt ends or the choice
            begins with white space, and in chats.
        by: score that decides which choice is best: "total" log-likelihood, mean per "token", or per "character".
        too_long: reaction to a prompt beyond the model's context: "refuse" the record, or cut its longest field on the
            "left" or the "right".
        provenance: False leaves out the columns that say where a row came from (tier, restored, reused), so that a
            repeated job writes the same bytes.
        batch_size: prompts, or for choices rows of tokens, in a batch of the model.
        id_field, max_characters, progress: as of `Pipeline`.
        generation: for `model.generate`, such as max_new_tokens (64 where neither the job nor the model's generation
            configuration says otherwise) or num_beams.
        ConfigError for settings that do not fit together or the model.
        """
        if task not in TASKS:
            raise ConfigError(f"task is one of embed, {', '.join(TASKS)}, got {task!r}")
        template = job_template(template, system, chat, examples, answer, syntax)
        model, tokenizer = cache.decoder(causal=task != "generate")
        if task == "generate":
            check_generation(generation, choices, choices_field)
        else:
            check_choices(task, choices, choices_field, generation)
        if separator is not None and (task == "generate" or not isinstance(separator, str)):
            raise ConfigError(f"separator is the text between a prompt and a choice, got {separator!r}")
        if by not in get_args(By):
            raise ConfigError(f"by is one of {', '.join(get_args(By))}, got {by!r}")
        if too_long not in get_args(TooLong):
            raise ConfigError(f"too_long is one of {', '.join(get_args(TooLong))}, got {too_long!r}")
        self._cache, self._task, self._template, self._by, self._too_long = cache, task, template, by, too_long
        self._tokenizer = tokenizer  # a private copy, which tokenises in several threads without padding
        self._separator = separator
        self._choices = None if choices is None else tuple(choices)
        self._batch_size, self._progress = batch_size, progress
        self._whole = bool(getattr(model.config, "is_encoder_decoder", False))
        self._context = context_of(model)
        usual = getattr(model.generation_config, "max_new_tokens", None) or _NEW_TOKENS
        new = generation.get("max_new_tokens") or usual
        if type(new) is not int or new < 1:
            raise ConfigError(f"max_new_tokens is a whole number from 1 on, got {new!r}")
        if task == "generate":
            generation = {"max_new_tokens": new, **generation}
        self._most = self._context - (new if task == "generate" and not self._whole else 1)
        self._new = new
        if self._most < 1:
            raise ConfigError(
                f"the model reads {self._context:,} tokens, and max_new_tokens={new:,} leaves none for a prompt; "
                "generate fewer tokens"
            )
        self._generation = generation
        if task == "generate":
            cache.check_generation(generation, rows=min(2, batch_size))
        row = {"generate": GeneratedRow, "score": ScoredRow, "classify": ClassifiedRow}[task]
        self.columns = Columns.of(row, provenance=provenance)
        names = (*template.fields, *([] if choices_field is None else [choices_field]))
        if choices_field in template.fields:
            names = template.fields
        self._names, self._choices_field = names, choices_field
        self.fields = FieldSpec(names[0] if len(names) == 1 else names, id_field, max_characters, as_json=True)
        self.facts: dict[str, Any] = json.loads(json.dumps({
            "model": cache.identity.digest.hex(), "namespace": cache.namespace, "task": task,
            "template": template.description, "choices": self._choices, "choices_field": choices_field,
            "separator": separator, "by": by,
            "too_long": too_long, "columns": self.columns.names, "batch_size": batch_size, "id_field": id_field,
            "max_characters": max_characters, "generation": generation,
        }, default=repr))  # fmt: skip

    # -- prompts --------------------------------------------------------------------------------------------

    def parts(self, records: Iterable[Taken], *, digests: bool) -> Iterator[DocumentBatch]:
        """Split records into windows, and make their prompts."""
        return parts(records, _WINDOW, None, prepare=self._prompts, most_characters=_WINDOW_CHARACTERS, digests=digests)

    def _prompts(self, documents: Sequence[Document]) -> list[Any]:
        """Return the prompt of each document: token ids, or a `ChoicePrompt`; or the reason why there is none."""
        values = [self._values(document) for document in documents]
        fitted = fit_all(self._template, self._tokenizer, values, self._most, self._too_long)
        if self._task != "generate":
            return self._with_choices(values, fitted)
        if not self._whole:
            return [each if isinstance(each, str) else each[1] for each in fitted]
        return [each if isinstance(each, str) else whole_ids(self._tokenizer, each[0]) for each in fitted]

    def _values(self, document: Document) -> dict[str, str]:
        texts = (document.text,) if isinstance(document.text, str) else document.text
        return dict(zip(self._names, texts, strict=True))

    def _with_choices(
        self, values: Sequence[Mapping[str, str]], fitted: Sequence[tuple[Rendered, list[int]] | str]
    ) -> list[ChoicePrompt | str]:
        """Return the rows of tokens of each record's choices, or the reason why there are none."""
        found: list[ChoicePrompt | str] = []
        asked: list[tuple[int, Rendered, tuple[str, ...]]] = []
        for i, (of_record, prompt) in enumerate(zip(values, fitted, strict=True)):
            choices = self._choices or choices_in(of_record, str(self._choices_field))
            if isinstance(prompt, str) or isinstance(choices, str):
                found.append(prompt if isinstance(prompt, str) else str(choices))
                continue
            found.append("")
            asked.append((i, prompt[0], choices))
        joined = [[self._separated(text, choice) for choice in choices] for _, text, choices in asked]
        rows = choice_rows(self._tokenizer, [text for _, text, _ in asked], joined)
        for (i, _, choices), each in zip(asked, rows, strict=True):
            longest = 0 if isinstance(each, str) else max(len(ids) for ids, _ in each)
            if isinstance(each, str):
                found[i] = f"has choices that cannot be scored: {each}"
            elif longest > self._context:
                found[i] = (
                    f"has a prompt that takes {longest:,} tokens with its longest choice, and the model reads "
                    f"{self._context:,}; shorten it"
                )
            else:
                found[i] = ChoicePrompt(choices, each)
        return found

    def _separated(self, prompt: Rendered, choice: str) -> str:
        """Return a choice with what stands between it and the prompt."""
        if self._separator is not None:
            return self._separator + choice
        blank = prompt.special and not prompt.text[-1:].isspace() and not choice[:1].isspace()
        return f" {choice}" if blank else choice

    # -- answers --------------------------------------------------------------------------------------------

    def answer(self, part: DocumentBatch, done: Collection[int] = ()) -> Iterator[PlacedResults]:
        """Yield the rows of a window: those whose answers are stored first, then batch by batch.

        Equal prompts are answered once. done: places of documents that are answered already.
        """
        prompts = part.prompts or []
        places = [i for i in range(len(prompts)) if i not in done]
        if not places:
            return
        known = self._answers([prompts[i] for i in places], stored_only=True)
        answered = {i: each for i, each in zip(places, known, strict=True) if each is not None}
        if answered:
            yield self._rows(part, answered, computed=0)
        for batch in self._batches(prompts, {i for i in places if i not in answered}):
            firsts = [same[0] for same in batch]
            found = self._answers([prompts[i] for i in firsts], stored_only=False)
            pairs = zip(batch, found, strict=True)
            yield self._rows(part, {i: each for same, each in pairs for i in same}, computed=len(firsts))

    def _batches(self, prompts: Sequence[Any], wanted: Collection[int]) -> Iterator[list[list[int]]]:
        """Yield batches of wanted places with equal prompts, ordered by the beginnings of the prompts.

        The order is that of all prompts of the window, so the batches that are left after a stop are the same.
        """
        equal: dict[tuple[Any, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            several = isinstance(prompt, ChoicePrompt)
            key = tuple((*ids, counted) for ids, counted in prompt.rows) if several else tuple(prompt)
            equal.setdefault(key, []).append(i)
        groups = list(equal.values())
        batch, filled = list[list[int]](), 0
        for i in prefix_order([_beginning(prompts[same[0]]) for same in groups]):
            same = [place for place in groups[i] if place in wanted]
            if not same:
                continue
            prompt = prompts[same[0]]
            rows = len(prompt.rows) if isinstance(prompt, ChoicePrompt) else 1
            if batch and filled + rows > self._batch_size:
                yield batch
                batch, filled = [], 0
            batch, filled = [*batch, same], filled + rows
        if batch:
            yield batch

    def _answers(self, prompts: Sequence[Any], *, stored_only: bool) -> list[Any]:
        """Return the answer of each prompt: values of the columns after the id; None where none is stored."""
        if self._task == "generate":
            found = self._cache.answers(prompts, self._generation, batch_size=self._batch_size, stored_only=stored_only)
            return [
                None if each is None else _generated(each, text, finish)
                for each, text, finish in zip(found.answers, found.texts, found.finish, strict=True)
            ]
        rows = [prompt.rows for prompt in prompts]
        scores = self._cache.likelihoods(rows, batch_size=self._batch_size, stored_only=stored_only)
        return [
            None if each is None else self._scored(prompt, each) for prompt, each in zip(prompts, scores, strict=True)
        ]

    def _scored(self, prompt: ChoicePrompt, found: Likelihoods) -> Mapping[str, Any]:
        """Return the columns of a prompt's choices."""
        totals = np.array([values.sum() for values in found.values])
        tokens = np.array(list(map(len, found.values)))
        lengths = {"total": 1, "token": tokens, "character": np.array(list(map(len, prompt.texts)))}[self._by]
        scores = totals / lengths
        best = int(scores.argmax())
        columns: dict[str, Any] = {
            "log_likelihoods": tuple(totals.tolist()), "tokens": tuple(tokens.tolist()), "restored": found.restored,
            "reused": found.reused, "tier": tier_of(found.reused, found.restored),
        }  # fmt: skip
        if self._task == "score":
            return columns | {"best": best}
        probabilities = _softmax(scores)
        return columns | {
            "label": prompt.texts[best], "probability": float(probabilities[best]),
            "probabilities": tuple(probabilities.tolist()),
        }  # fmt: skip

    def _rows(self, part: DocumentBatch, found: Mapping[int, Mapping[str, Any]], computed: int) -> PlacedResults:
        """Return the rows of answered documents, by place. computed: number of prompts that the model answered."""
        kind = self.columns.kind
        self._progress(len(found), computed)
        return [(i, kind(id=part.documents[i].id, **columns)) for i, columns in sorted(found.items())]

    def plan(self, records: Iterable[Taken]) -> JobPlan:
        """Forecast the job: stored answers, shared tokens, seconds and bytes. A sample of prompts is computed."""
        model, tokenizer = self._cache.decoder()

        def measure(rows: Sequence[list[int]], new: int) -> None:
            run_plainly(model, tokenizer, rows, new)

        def rows_of(prompt: Any) -> list[list[int]]:
            return [ids for ids, _ in prompt.rows] if isinstance(prompt, ChoicePrompt) else [prompt]

        return planned(
            self.parts(records, digests=False),
            rows_of,
            lambda prompts: [each is not None for each in self._answers(prompts, stored_only=True)],
            self._cache.known_prefixes,
            measure,
            new=self._new if self._task == "generate" else 0,
            batch_size=self._batch_size,
        )

    # -- results --------------------------------------------------------------------------------------------

    def write(self, path: Path) -> AbstractContextManager[Write]:
        """Open the result file, as a context that gives a function which writes rows; see `job_writer`."""

        @contextmanager
        def opened() -> Iterator[Write]:
            with job_writer(path, self.columns) as writer:
                yield lambda rows: writer.write(map(self.columns.values, rows))

        return opened()

    def record(self, resumption: Resumption, part: DocumentBatch, answered: PlacedResults, done: int) -> None:
        """Write a batch of rows to the journal of a run."""
        rows = [(place, row.tier, self.columns.values(row)) for place, row in answered]
        resumption.take_rows(rows, done)


def _generated(answer: Any, text: str, finish: str) -> Mapping[str, Any]:
    """Return the columns of a generated answer."""
    sequence = answer.sequences[0]
    reused = answer.reused / max(1, answer.tokens)
    return {
        "text": text, "finish": finish, "tokens": tuple(sequence.ids.tolist()),
        "log_likelihoods": tuple(map(float, sequence.likelihoods)), "tier": tier_of(reused, answer.restored),
        "restored": answer.restored, "reused": reused,
    }  # fmt: skip


def _beginning(prompt: Any) -> Sequence[int]:
    """Return the token ids of a prompt, without those of its choices."""
    if not isinstance(prompt, ChoicePrompt):
        ids: Sequence[int] = prompt
        return ids
    first, counted = prompt.rows[0]
    return first[: max(1, len(first) - counted)]


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities
