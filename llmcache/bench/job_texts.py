"""Language-model jobs on real texts: questions about paragraphs of SQuAD, and intents of bank queries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from llmcache.bench.competitors.transformers_jobs import Batched
from llmcache.bench.harness.datasets import BANKING77, SQUAD, labelled_texts, lines
from llmcache.decoders.templates import PromptTemplate
from llmcache.errors import ConfigError

Records: TypeAlias = list[dict[str, Any]]
"""Records of a job: texts (or lists of choices) by field."""
ASK = "Paragraph: {context}\nQuestion: {question}\nAnswer:"
CHOICES = ("Yes", "No", "It is not said")
NEW = 8
"""Tokens of a generated answer."""
_LABELS = 5


@dataclass(frozen=True, slots=True)
class Job:
    """One job: its task, template, records, and further settings of `Pipeline`."""

    task: str
    template: PromptTemplate
    records: Records
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """Text of the prompt of each record."""
        return [str(self.template.prompt(record)) for record in self.records]

    @property
    def choices(self) -> list[list[str]]:
        """Choices of each record."""
        name = self.settings.get("choices_field")
        return [list(record[name] if name else self.settings["choices"]) for record in self.records]


def asked_job(texts: Records, question: int, choices: Sequence[str] = ()) -> Job:
    """Return the job that asks each document one of its questions: generates, or scores choices."""
    records = [
        {"context": text["context"], "question": text["questions"][question % len(text["questions"])]} for text in texts
    ]
    if choices:
        return Job("score", PromptTemplate(ASK), records, {"choices": list(choices)})
    return Job("generate", PromptTemplate(ASK), records, {"max_new_tokens": NEW, "do_sample": False})


def new_tokens(rows: Sequence[Sequence[int]], known: Sequence[Sequence[int]] = ()) -> int:
    """Return the number of tokens that remain when each beginning is computed once, and those of `known` never."""
    tree: dict[int, Any] = {}

    def added(row: Sequence[int]) -> int:
        node, fresh = tree, 0
        for token in row:
            if token not in node:
                node[token], fresh = {}, fresh + 1
            node = node[token]
        return fresh

    for row in known:
        added(row)
    return sum(map(added, rows))


def documents(data: Path, tokenizer: Any, tokens: int, count: int) -> Records:
    """Read documents of about `tokens` tokens, with at least five questions each, evenly from SQuAD.

    Neighbouring paragraphs of an article are joined until they have four fifths of the tokens. What exceeds six fifths
    is cut after a token. ConfigError when there are too few.
    """
    found: Records = []
    for article in json.loads("\n".join(lines(data / SQUAD)))["data"]:
        parts: list[str] = []
        questions: list[str] = []
        for paragraph in article["paragraphs"]:
            parts.append(paragraph["context"])
            questions += [asked["question"] for asked in paragraph["qas"]]
            text = "\n".join(parts)
            read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            if 5 * len(read["input_ids"]) < 4 * tokens or len(questions) < 5:
                continue
            places = read["offset_mapping"][: 6 * tokens // 5]
            found.append({"context": text[: places[-1][1]], "questions": questions[:5]})
            parts, questions = [], []
    if len(found) < count:
        raise ConfigError(f"SQuAD has {len(found)} documents of {tokens} tokens, and {count} are needed; ask for fewer")
    return found[:: len(found) // count][:count]


def few_shot(data: Path, plain: Batched, tokens: int, count: int) -> Job:
    """Return the job that classifies bank queries into five intents, after examples of about `tokens` tokens."""
    train, test = labelled_texts(data / BANKING77)
    names = sorted({label for _, label in train})
    labels = names[:: len(names) // _LABELS][:_LABELS]

    def interleaved(pairs: Sequence[tuple[str, str]]) -> Records:
        by_label = [[text for text, label in pairs if label == wanted] for wanted in labels]
        return [
            {"text": texts[i], "answer": label.replace("_", " ")}
            for i in range(max(map(len, by_label)))
            for texts, label in zip(by_label, labels, strict=True)
            if i < len(texts)
        ]

    examples, template = interleaved(train), "Query: {text}\nIntent:"
    chosen, made = 0, PromptTemplate(template)
    while chosen < len(examples):
        chosen += 1
        made = PromptTemplate(template, examples=examples[:chosen])
        if len(plain.ids([str(made.prompt({"text": ""}))])[0]) >= tokens:
            break
    records = [{"text": one["text"]} for one in interleaved(test)][:count]
    if len(records) < count:
        raise ConfigError(
            f"BANKING77 has {len(records)} queries of these intents, and {count} are needed; ask for fewer"
        )
    return Job("classify", made, records, {"choices": [label.replace("_", " ") for label in labels]})
