"""Workloads of the experiments: known documents that warm a cache, and queries."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmcache.bench.harness.datasets import (
    OPENBOOKQA,
    SQUAD,
    labelled_texts,
    lines,
    objects,
    openbook_questions,
    squad_paragraphs,
)
from llmcache.errors import ConfigError

WINDOW = 48
"""Words per window of WikiText, about 64 tokens."""
LONGEST = 90
"""Most words of a SQuAD paragraph, so that paragraph and question fit the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Known texts and queries, with the labels of each where there are any.

    about: description of how queries resemble the known texts.
    """

    name: str
    about: str
    known: list[str] = field(repr=False)
    asked: list[str] = field(repr=False)
    known_labels: list[str] = field(repr=False)
    asked_labels: list[str] = field(repr=False)

    def some(self, known: int, asked: int) -> Workload:
        """Draw evenly at most so many known texts and queries."""
        one, other = spread(len(self.known), known), spread(len(self.asked), asked)
        return self._of(one, other)

    def _of(self, known: Sequence[int], asked: Sequence[int]) -> Workload:
        return Workload(
            self.name, self.about, [self.known[i] for i in known], [self.asked[i] for i in asked],
            [self.known_labels[i] for i in known], [self.asked_labels[i] for i in asked],
        )  # fmt: skip

    def whole(self, known: int, asked: int) -> Workload:
        """Draw labels evenly and keep all their known texts, at most `known`; and at most `asked` of their queries."""
        labels = list(dict.fromkeys(self.known_labels))
        counts = Counter(self.known_labels)
        for most in range(len(labels), 0, -1):
            chosen = {labels[i] for i in spread(len(labels), most)}
            if sum(counts[one] for one in chosen) <= known:
                break
        one, other = (
            [i for i, label in enumerate(part) if label in chosen] for part in (self.known_labels, self.asked_labels)
        )
        return self._of(one, other).some(known, asked)


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` indices below `count`, evenly spaced, in order."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def wikitext(data: Path) -> Workload:
    """Read consecutive windows of articles: the first four fifths of each are known. Labels: the article."""
    known, asked = [], []
    for number, (title, words) in enumerate(_articles(lines(data / "text-wikitext2-valid" / "valid.txt.gz"))):
        windows = [" ".join(words[at : at + WINDOW]) for at in range(0, len(words) - WINDOW + 1, WINDOW)]
        cut = len(windows) * 4 // 5
        known += [(text, f"{number} {title}") for text in windows[:cut]]
        asked += [(text, f"{number} {title}") for text in windows[cut:]]
    return _workload("WikiText-2", "later windows of the articles whose beginnings are known", known, asked)


def squad(data: Path) -> Workload:
    """Read paragraphs, each followed by a question: two questions per paragraph are queries. Labels: the paragraph.

    Every query shares its paragraph with known texts.
    """
    known, asked = [], []
    for paragraph in squad_paragraphs(data / SQUAD):
        if len(paragraph["context"].split()) > LONGEST:
            continue
        texts = [f"{paragraph['context']}\nQuestion: {item['question']}\nAnswer:" for item in paragraph["qas"]]
        known += [(text, paragraph["context"]) for text in texts[:-2]]
        asked += [(text, paragraph["context"]) for text in texts[-2:] if len(texts) > 2]
    return _workload("SQuAD v2", "other questions about the paragraphs that are known", known, asked)


def squad_questions(data: Path, most: int) -> tuple[Workload, list[str]]:
    """Read questions alone, every other one a query, and their paragraphs, at most `most`, evenly drawn.

    Labels: index of the paragraph.
    """
    every = squad_paragraphs(data / SQUAD)
    paragraphs = [every[i] for i in spread(len(every), most)]
    pairs = [(item["question"], str(place)) for place, each in enumerate(paragraphs) for item in each["qas"]]
    about = "other questions about the same paragraphs"
    return _workload("SQuAD v2", about, pairs[::2], pairs[1::2]), [item["context"] for item in paragraphs]


def openbookqa(data: Path) -> Workload:
    """Read stems, each with one of its four choices: the fourth is a query. Labels: the stem."""
    known, asked = [], []
    for stem, choices, _ in openbook_questions(data / OPENBOOKQA):
        pairs = [(f"{stem} {text}", stem) for text in choices]
        known += pairs[:-1]
        asked += pairs[-1:]
    return _workload("OpenBookQA", "the last choices of questions whose other choices are known", known, asked)


def openbook_facts(data: Path) -> list[str]:
    """Read the book of facts."""
    return [fact["text"] for fact in objects((data / OPENBOOKQA).with_name("openbook_facts.jsonl"))]


def labelled(data: Path, folder: str, name: str) -> Workload:
    """Read a labelled set: train is known, test are the queries, both in random order. ConfigError when missing."""
    if not (data / folder).is_dir():
        raise ConfigError(f"{data} has no {folder}; --data names its folder")
    parts = [list(part) for part in labelled_texts(data / folder)]
    random = np.random.default_rng(0)
    known, asked = ([part[i] for i in random.permutation(len(part)).tolist()] for part in parts)
    return _workload(name, "the test split, where the train split is known", known, asked)


READERS = {"WikiText-2": wikitext, "SQuAD v2": squad, "OpenBookQA": openbookqa}
"""Readers of the paper's three corpora, or of the available parts of them."""


def _workload(name: str, about: str, known: Sequence[tuple[str, str]], asked: Sequence[tuple[str, str]]) -> Workload:
    """Build a workload without queries that equal a known text, which do not measure near reuse."""
    known, seen = list(dict(known).items()), {text for text, _ in known}
    asked = [(text, label) for text, label in dict(asked).items() if text not in seen]
    return Workload(
        name, about, [text for text, _ in known], [text for text, _ in asked],
        [label for _, label in known], [label for _, label in asked],
    )  # fmt: skip


def _articles(text: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Split lines into title and words of each article, without headings."""
    articles: list[tuple[str, list[str]]] = []
    for line in text:
        heading = re.fullmatch(r" = ([^=].*) = ", line)
        if heading:
            articles.append((heading[1], []))
        elif articles and not line.startswith(" = "):
            articles[-1][1].extend(line.split())
    return articles
