"""Workloads: texts from a folder of public data sets, and seeded streams that draw from them."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmcache.bench.harness.datasets import (
    BANKING77,
    LOGS,
    OPENBOOKQA,
    POLICIES,
    QQP,
    SQUAD,
    labelled_file,
    lines,
    log_lines,
    objects,
    openbook_questions,
    squad_paragraphs,
)
from llmcache.errors import ConfigError

WINDOW, STRIDE = 128, 64
"""Words of a window over running text, and words from one window to the next."""

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Workload:
    """A corpus. path: file below the data folder. texts: reads the texts in the order of the file, with repeats."""

    path: str
    about: str
    texts: Callable[[Path], Iterator[str]]


def read(data: Path, name: str, limit: int | None = None) -> list[str]:
    """Read the first non-empty texts of a workload. ConfigError when its file is missing, or has no text."""
    workload = WORKLOADS[name]
    path = data / workload.path
    if not path.exists():
        raise ConfigError(f"{data} has no {workload.path}; --data names the folder that holds it")
    texts = list(islice((text for text in workload.texts(path) if text.strip()), limit))
    if not texts:
        raise ConfigError(f"{path} holds no text; download it again")
    return texts


# -- files ----------------------------------------------------------------------------------------------------


def _texts(path: Path) -> Iterator[str]:
    """Read the texts of a file of labelled texts."""
    return (text for text, _ in labelled_file(path))


def _agnews(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        yield from (f"{title}. {text}" for _, title, text in csv.reader(file))


def _logs(path: Path) -> Iterator[str]:
    """Read the lines of all systems in turn, as a log collector receives them."""
    return (line for some in zip_longest(*log_lines(path)) for line in some if line is not None)


def _paragraphs(path: Path) -> Iterator[str]:
    """Read the paragraphs of all revisions in order; unchanged paragraphs repeat."""
    for revision in objects(path):
        yield from (part.strip() for part in revision["text"].split("\n\n"))


def _openbookqa(path: Path) -> Iterator[str]:
    """Read each stem with each of its choices."""
    return (f"{stem} {choice}" for stem, choices, _ in openbook_questions(path) for choice in choices)


def _windows(path: Path) -> Iterator[str]:
    words = " ".join(lines(path)).split()
    for start in range(0, max(1, len(words) - WINDOW + 1), STRIDE):
        yield " ".join(words[start : start + WINDOW])


WORKLOADS = {
    "banking77": Workload(f"{BANKING77}/test.csv", "bank queries of about 12 tokens, all different", _texts),
    "banking77-train": Workload(f"{BANKING77}/train.csv", "bank queries of about 12 tokens", _texts),
    "snips": Workload("cls-snips/train.tsv", "voice commands", _texts),
    "qqp": Workload(
        str(QQP), "questions, pair by pair", lambda path: (text for pair in objects(path) for text in pair[1:3])
    ),
    "agnews": Workload("cls-agnews-test/test.csv.gz", "news items", _agnews),
    "sst2": Workload("cls-sst2/train.txt", "film sentences; hardly anything repeats", _texts),
    "logs": Workload(str(LOGS), "log lines of four systems", _logs),
    "licences": Workload(
        "dup-licenses/licenses.jsonl.gz", "licence texts, half of them twins",
        lambda path: (row["text"] for row in objects(path)),
    ),
    "policies": Workload(str(POLICIES), "paragraphs of policies, revision after revision", _paragraphs),
    "squad": Workload(
        str(SQUAD), "paragraphs of about 150 tokens",
        lambda path: (paragraph["context"] for paragraph in squad_paragraphs(path)),
    ),
    "openbookqa": Workload(str(OPENBOOKQA), "stems, each with its four choices", _openbookqa),
    "wikitext": Workload("text-wikitext2-valid/valid.txt.gz", "windows of 128 words that overlap by half", _windows),
}  # fmt: skip


# -- streams --------------------------------------------------------------------------------------------------


def uniform(pool: int, length: int, seed: int) -> Places:
    """Draw indices into a pool of texts uniformly; int64 [length]."""
    return np.random.default_rng(seed).integers(0, pool, length)


def zipf(pool: int, length: int, seed: int, exponent: float = 1.0) -> Places:
    """Draw indices by Zipf's law: the k-th most frequent has a weight of k ** -exponent."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, pool + 1, dtype=np.float64) ** -exponent
    ranks = random.choice(pool, length, p=weights / weights.sum())
    return random.permutation(pool)[ranks]


def drifting(pool: int, length: int, seed: int, window: float = 0.1) -> Places:
    """Draw indices from a window of this share of the pool, which moves from the first texts to the last."""
    random = np.random.default_rng(seed)
    width = max(1, int(window * pool))
    starts = np.linspace(0, pool - width, length).astype(np.int64)
    return starts + random.integers(0, width, length)


STREAMS: dict[str, Callable[[int, int, int], Places]] = {"uniform": uniform, "zipf": zipf, "drifting": drifting}
