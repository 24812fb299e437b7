"""What the experiments read: documents a cache is warmed with, and other ones that are asked of it afterwards."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmcache.bench.near import labelled_texts
from llmcache.errors import ConfigError

WINDOW = 48
"""Words of a window of WikiText; about 64 tokens."""
LONGEST = 90
"""Words of the longest paragraph of SQuAD that is taken, so that a question about it fits the model whole."""

One = TypeVar("One")


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Texts that are known and others that are asked, with the right answer to each where there is one.

    about: how the asked ones are like the known ones, for people.
    """

    name: str
    about: str
    known: list[str] = field(repr=False)
    asked: list[str] = field(repr=False)
    known_labels: list[str] = field(repr=False)
    asked_labels: list[str] = field(repr=False)

    def some(self, known: int, asked: int) -> Workload:
        """At most so many of both, evenly drawn."""
        one, other = spread(len(self.known), known), spread(len(self.asked), asked)
        return Workload(
            self.name, self.about, [self.known[i] for i in one], [self.asked[i] for i in other],
            [self.known_labels[i] for i in one], [self.asked_labels[i] for i in other],
        )  # fmt: skip

    def whole(self, known: int, asked: int) -> Workload:
        """Of labels that are drawn evenly all that is known, at most so much; and at most so many that are asked."""
        labels = list(dict.fromkeys(self.known_labels))
        counts = Counter(self.known_labels)
        for most in range(len(labels), 0, -1):
            chosen = {labels[i] for i in spread(len(labels), most)}
            if sum(counts[one] for one in chosen) <= known:
                break
        one, other = (
            [i for i, label in enumerate(part) if label in chosen] for part in (self.known_labels, self.asked_labels)
        )
        return Workload(
            self.name, self.about, [self.known[i] for i in one], [self.asked[i] for i in other],
            [self.known_labels[i] for i in one], [self.asked_labels[i] for i in other],
        ).some(known, asked)  # fmt: skip


def spread(count: int, most: int) -> list[int]:
    """Places of at most so many of `count`, evenly, in order."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def wikitext(data: Path) -> Workload:
    """Windows of articles, next to each other: the first four fifths of each are known. Labels: the article."""
    known, asked = [], []
    for number, (title, words) in enumerate(_articles(_lines(data / "text-wikitext2-valid" / "valid.txt.gz"))):
        windows = [" ".join(words[at : at + WINDOW]) for at in range(0, len(words) - WINDOW + 1, WINDOW)]
        cut = len(windows) * 4 // 5
        known += [(text, f"{number} {title}") for text in windows[:cut]]
        asked += [(text, f"{number} {title}") for text in windows[cut:]]
    return _workload("WikiText-2", "later windows of the articles whose beginnings are known", known, asked)


def squad(data: Path) -> Workload:
    """Paragraphs with a question behind: two questions about each are asked, the others known. Labels: the paragraph.

    The same paragraph stands before all its questions, so that every one asked is like some that are known.
    """
    known, asked = [], []
    for paragraph in squad_paragraphs(data):
        if len(paragraph["context"].split()) > LONGEST:
            continue
        texts = [f"{paragraph['context']}\nQuestion: {one['question']}\nAnswer:" for one in paragraph["qas"]]
        known += [(text, paragraph["context"]) for text in texts[:-2]]
        asked += [(text, paragraph["context"]) for text in texts[-2:] if len(texts) > 2]
    return _workload("SQuAD v2", "other questions about the paragraphs that are known", known, asked)


def squad_questions(data: Path, most: int) -> tuple[Workload, list[str]]:
    """Questions alone, of which every other is asked; and at most so many paragraphs, evenly drawn, which they are
    about. Labels: the place of the paragraph.
    """
    every = squad_paragraphs(data)
    paragraphs = [every[i] for i in spread(len(every), most)]
    pairs = [(one["question"], str(place)) for place, each in enumerate(paragraphs) for one in each["qas"]]
    about = "other questions about the same paragraphs"
    return _workload("SQuAD v2", about, pairs[::2], pairs[1::2]), [one["context"] for one in paragraphs]


def squad_paragraphs(data: Path) -> list[dict[str, Any]]:
    """Each with its context and its qas, as in the file."""
    articles = json.loads("\n".join(_lines(data / "qa-squad2-dev" / "dev-v2.0.json.gz")))["data"]
    return [paragraph for article in articles for paragraph in article["paragraphs"]]


def openbookqa(data: Path) -> Workload:
    """Stems, each with one of its four choices: the fourth is asked, the others known. Labels: the stem."""
    known, asked = [], []
    for stem, choices, _ in openbook_questions(data):
        pairs = [(f"{stem} {text}", stem) for text in choices]
        known += pairs[:-1]
        asked += pairs[-1:]
    return _workload("OpenBookQA", "the last choices of questions whose other choices are known", known, asked)


def openbook_questions(data: Path) -> list[tuple[str, list[str], int]]:
    """Stem, choices, and the place of the right one."""
    rows = [json.loads(line) for line in _lines(data / "qa-openbookqa" / "test_original_form.jsonl") if line]
    found = []
    for row in rows:
        choices = row["question"]["choices"]
        place = [one["label"] for one in choices].index(row["answerKey"])
        found.append((row["question"]["stem"], [one["text"] for one in choices], place))
    return found


def openbook_facts(data: Path) -> list[str]:
    """The book of facts."""
    lines = _lines(data / "qa-openbookqa" / "openbook_facts.jsonl")
    return [json.loads(line)["text"] for line in lines if line.strip()]


def labelled(data: Path, folder: str, name: str) -> Workload:
    """A labelled set: train is known, test is asked, both in an order drawn by chance."""
    if not (data / folder).is_dir():
        raise ConfigError(f"{data} has no {folder}; --data names the folder that holds it")
    parts = [list(part) for part in labelled_texts(data / folder)]
    random = np.random.default_rng(0)
    known, asked = ([part[i] for i in random.permutation(len(part)).tolist()] for part in parts)
    return _workload(name, "the test split, where the train split is known", known, asked)


READERS = {"WikiText-2": wikitext, "SQuAD v2": squad, "OpenBookQA": openbookqa}
"""The paper's three corpora, or what of them is at hand."""


def _workload(name: str, about: str, known: Sequence[tuple[str, str]], asked: Sequence[tuple[str, str]]) -> Workload:
    """Without the asked texts that are known letter for letter: those are no measure of near reuse."""
    known, seen = list(dict(known).items()), {text for text, _ in known}
    asked = [(text, label) for text, label in dict(asked).items() if text not in seen]
    return Workload(
        name, about, [text for text, _ in known], [text for text, _ in asked],
        [label for _, label in known], [label for _, label in asked],
    )  # fmt: skip


def _articles(lines: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Title and words of each article; headings are left out."""
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        heading = re.fullmatch(r" = ([^=].*) = ", line)
        if heading:
            found.append((heading[1], []))
        elif found and not line.startswith(" = "):
            found[-1][1].extend(line.split())
    return found


def _lines(path: Path) -> list[str]:
    if not path.exists():
        raise ConfigError(f"{path.parent.parent} has no {path.parent.name}/{path.name}; --data names its folder")
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            return file.read().split("\n")
    return path.read_text(encoding="utf-8").split("\n")
