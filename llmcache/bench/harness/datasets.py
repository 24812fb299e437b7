"""Readers of public data sets, from a folder that holds them. Nothing is downloaded."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmcache.errors import ConfigError

SQUAD, OPENBOOKQA = Path("qa-squad2-dev/dev-v2.0.json.gz"), Path("qa-openbookqa/test_original_form.jsonl")
BANKING77, POLICIES = Path("cls-banking77"), Path("dup-site-policy-revisions/revisions.jsonl.xz")
LOGS, QQP = Path("dup-loghub"), Path("pair-qqp/qqp.jsonl.gz")

Pairs = list[tuple[str, str]]
"""Texts, each with its label."""


def lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Iterate over the lines of a text file, plain or compressed, split at newlines only.

    ConfigError when the file is missing.
    """
    if not path.exists():
        raise ConfigError(f"{path.parent.parent} has no {path.parent.name}/{path.name}; --data names its folder")
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "rt", encoding=encoding, errors="replace", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def objects(path: Path) -> Iterator[Any]:
    """Iterate over the objects of a file of JSON lines."""
    return (json.loads(line) for line in lines(path) if line)


def log_lines(folder: Path) -> list[list[str]]:
    """Read the log lines of each system."""
    return [list(lines(file)) for file in sorted(folder.glob("*_2k.log.gz"))]


def squad_paragraphs(path: Path) -> list[dict[str, Any]]:
    """Read the paragraphs of SQuAD, each with its `context` and its questions, `qas`."""
    articles = json.loads("\n".join(lines(path)))["data"]
    return [paragraph for article in articles for paragraph in article["paragraphs"]]


def squad_contexts(path: Path, limit: int) -> list[str]:
    """Read the first distinct paragraphs of SQuAD as texts."""
    return list(islice(dict.fromkeys(paragraph["context"] for paragraph in squad_paragraphs(path)), limit))


def openbook_questions(path: Path) -> list[tuple[str, list[str], int]]:
    """Read the questions of OpenBookQA: stem, four choices, and index of the correct choice."""
    questions = []
    for row in objects(path):
        choices = row["question"]["choices"]
        place = [choice["label"] for choice in choices].index(row["answerKey"])
        questions.append((row["question"]["stem"], [choice["text"] for choice in choices], place))
    return questions


def labelled_texts(folder: Path) -> tuple[Pairs, Pairs]:
    """Read (text, label) pairs of train.csv, train.tsv or train.txt, and of test in the same format.

    csv: columns text and category. tsv: label, text. txt: label, a space, text. With only test.csv.gz (class, title,
    description), a random three quarters are the train part. ConfigError when a part is missing.
    """
    for ending in ("csv", "tsv", "txt"):
        train, test = folder / f"train.{ending}", folder / f"test.{ending}"
        if train.exists() and test.exists():
            return labelled_file(train), labelled_file(test)
    packed = folder / "test.csv.gz"
    if not packed.exists():
        raise ConfigError(f"{folder} has no train and test as .csv, .tsv or .txt, and no test.csv.gz")
    with gzip.open(packed, "rt", encoding="utf-8") as file:
        every = [(f"{title}. {text}", label) for label, title, text in csv.reader(file)]
    order = np.random.default_rng(0).permutation(len(every)).tolist()
    cut = len(every) * 3 // 4
    return [every[i] for i in order[:cut]], [every[i] for i in order[cut:]]


def labelled_file(path: Path) -> Pairs:
    """Read the (text, label) pairs of one .csv, .tsv or .txt file."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [(row["text"], row["category"]) for row in csv.DictReader(file)]
    separator = "\t" if path.suffix == ".tsv" else " "
    return [(text, label) for label, _, text in (line.partition(separator) for line in lines(path) if line)]
