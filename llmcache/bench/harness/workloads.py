"""Workloads: texts from a folder of public data sets, and seeded streams that draw from them."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def _lines(path: Path) -> Iterator[str]:
    """Iterate over the lines of a text file, plain or compressed, split at newlines only."""
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "rt", encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _objects(path: Path) -> Iterator[Any]:
    return (json.loads(line) for line in _lines(path) if line)


def _csv(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from (row["text"] for row in csv.DictReader(file))


def _agnews(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        yield from (f"{title}. {text}" for _, title, text in csv.reader(file))


def _after(mark: str) -> Callable[[Path], Iterator[str]]:
    """Read the text after a label and this separator."""
    return lambda path: (line.partition(mark)[2] for line in _lines(path))


def _questions(path: Path) -> Iterator[str]:
    for pair in _objects(path):
        yield from pair[1:3]


def _logs(path: Path) -> Iterator[str]:
    """Read the lines of all systems in turn, as a log collector receives them."""
    files = [list(_lines(file)) for file in sorted(path.glob("*_2k.log.gz"))]
    for at in range(max(map(len, files), default=0)):
        yield from (lines[at] for lines in files if at < len(lines))


def _paragraphs(path: Path) -> Iterator[str]:
    """Read the paragraphs of all revisions in order; unchanged paragraphs repeat."""
    for revision in _objects(path):
        yield from (part.strip() for part in revision["text"].split("\n\n"))


def _squad(path: Path) -> Iterator[str]:
    articles = json.loads("\n".join(_lines(path)))["data"]
    yield from (paragraph["context"] for article in articles for paragraph in article["paragraphs"])


def _openbookqa(path: Path) -> Iterator[str]:
    """Read each stem with each of its choices."""
    for row in _objects(path):
        asked = row["question"]
        yield from (f"{asked['stem']} {choice['text']}" for choice in asked["choices"])


def _windows(path: Path) -> Iterator[str]:
    words = " ".join(_lines(path)).split()
    for start in range(0, max(1, len(words) - WINDOW + 1), STRIDE):
        yield " ".join(words[start : start + WINDOW])


WORKLOADS = {
    "banking77": Workload("cls-banking77/test.csv", "bank queries of about 12 tokens, all different", _csv),
    "banking77-train": Workload("cls-banking77/train.csv", "bank queries of about 12 tokens", _csv),
    "snips": Workload("cls-snips/train.tsv", "voice commands", _after("\t")),
    "qqp": Workload("pair-qqp/qqp.jsonl.gz", "questions, pair by pair", _questions),
    "agnews": Workload("cls-agnews-test/test.csv.gz", "news items", _agnews),
    "sst2": Workload("cls-sst2/train.txt", "film sentences; hardly anything repeats", _after(" ")),
    "logs": Workload("dup-loghub", "log lines of four systems", _logs),
    "licences": Workload(
        "dup-licenses/licenses.jsonl.gz", "licence texts, half of them twins", lambda path: _field(path, "text")
    ),
    "policies": Workload(
        "dup-site-policy-revisions/revisions.jsonl.xz", "paragraphs of policies, revision after revision", _paragraphs
    ),
    "squad": Workload("qa-squad2-dev/dev-v2.0.json.gz", "paragraphs of about 150 tokens", _squad),
    "openbookqa": Workload("qa-openbookqa/test_original_form.jsonl", "stems, each with its four choices", _openbookqa),
    "wikitext": Workload("text-wikitext2-valid/valid.txt.gz", "windows of 128 words that overlap by half", _windows),
}


def _field(path: Path, name: str) -> Iterator[str]:
    return (row[name] for row in _objects(path))


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
