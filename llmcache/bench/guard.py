"""Measurement of the field guard on pairs of texts that are labelled as the same or different.

`llmcache bench guard --data DATA` prints the rows. DATA holds dup-products, dup-site-policy-revisions, pair-qqp,
pair-mrpc, pair-gptcache-mock, cls-banking77, cls-snips and cls-sst2; missing data sets are left out.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.bench.harness.datasets import POLICIES, QQP, Pairs, labelled_texts, lines, objects
from llmcache.bench.harness.turns import Row
from llmcache.errors import ConfigError
from llmcache.near.guard.rules import KINDS, digests, refused

Encode: TypeAlias = Callable[[Sequence[str]], NDArray[np.float32]]
Bools: TypeAlias = NDArray[np.bool_]

QQP_PAIRS = 5000
# a capitalised word inside a sentence: an example of a user's pattern for names
NAMES = re.compile(r"(?<=[\w,;] )(?!I\b)[A-Z]\w+")


def measure(data: Path, encode: Encode) -> list[Row]:
    """Measure the guard. Returns one row per data set and similarity threshold.

    encode: texts to unit vectors, float32 [n, width]; used where pairs are compared by cosine. ConfigError when
    `data` has none of the data sets.
    """
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "dup-products": products,
        "dup-site-policy-revisions": revisions,
        "pair-gptcache-mock": rewordings,
        "pair-qqp": lambda folder: questions(folder, encode),
        "pair-mrpc": paraphrases,
        "cls-banking77": lambda folder: _nearest(*labelled_texts(folder), "cls-banking77", encode, (0.7, 0.8, 0.9)),
        "cls-snips": lambda folder: _nearest(*_samples(folder), "cls-snips", encode, (0.7, 0.8)),
        "cls-sst2": lambda folder: _nearest(*_samples(folder), "cls-sst2", encode, (0.5, 0.6)),
    }
    rows = [row for name, part in parts.items() if (data / name).is_dir() for row in part(data / name)]
    if not rows:
        raise ConfigError(f"{data} has none of {', '.join(parts)}; name the folder of the data sets")
    return rows


# -- data sets ------------------------------------------------------------------------------------------------


def products(folder: Path) -> list[Row]:
    """Measure products of two shops, the same or not, by word overlap."""
    every = objects(folder / "product_pairs.jsonl.gz")
    pairs = [(int(label), one, other) for _, _, label, one, other in every]
    same = np.array([label for label, _, _ in pairs]) == 1
    refusals, microseconds = _compared([one for _, one, _ in pairs], [other for _, _, other in pairs])
    overlap = np.array([_overlap(one, other) for _, one, other in pairs])
    rows = list(_rows("dup-products", "word overlap", overlap, same, refusals, (0.0, 0.3, 0.4, 0.5, 0.6)))
    texts, others = altered([one for _, one, _ in pairs])
    changed, _ = _compared(texts, others)
    row = {"data": "dup-products, one digit of a code changed", "pairs": len(texts), "wrong": int((changed < 0).sum())}
    return [*(each | {"microseconds_per_text": microseconds} for each in rows), row | {"refused_by": _by_kind(changed)}]


def altered(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Select texts with a code of letters and digits. Returns them, and copies with one digit of a code changed."""
    random = np.random.default_rng(0)
    ones, others = [], []
    for text in texts:
        codes = [match for match in re.finditer(r"\S*\d\S*", text) if re.search("[a-z]", match[0])]
        if codes:
            code = codes[random.integers(len(codes))]
            places = [place for place in range(*code.span()) if text[place].isdecimal()]
            place = places[random.integers(len(places))]
            ones.append(text)
            others.append(f"{text[:place]}{(int(text[place]) + random.integers(1, 10)) % 10}{text[place + 1 :]}")
    return ones, others


def revisions(folder: Path) -> list[Row]:
    """Measure consecutive revisions of policies. changed: pairs whose words with digits differ."""
    texts: dict[str, list[str]] = {}
    for fact in objects(folder / POLICIES.name):
        texts.setdefault(fact["doc"], []).append(fact["text"])
    pairs = [pair for history in texts.values() for pair in pairwise(history)]
    refusals, microseconds = _compared([one for one, _ in pairs], [other for _, other in pairs])
    words = re.compile(r"\w*\d\w*")
    changed = np.array([Counter(words.findall(one)) != Counter(words.findall(other)) for one, other in pairs])
    return [
        {
            "data": "dup-site-policy-revisions",
            "pairs": len(pairs),
            "accepted": int((refusals < 0).sum()),
            "changed": int(changed.sum()),
            "changed_accepted": int((changed & (refusals < 0)).sum()),
            "refused_by": _by_kind(refusals),
            "microseconds_per_text": microseconds,
        }
    ]


def rewordings(folder: Path) -> list[Row]:
    """Measure machine-written paraphrases: every refusal is a lost hit."""
    path = next(folder.glob("*.json"))
    pairs = json.loads(path.read_text(encoding="utf-8"))
    refusals, _ = _compared([pair["origin"] for pair in pairs], [pair["similar"] for pair in pairs])
    kept = {
        "accepted": int((refusals < 0).sum()),
        "good_kept": float((refusals < 0).mean()),
        "refused_by": _by_kind(refusals),
    }
    return [{"data": "pair-gptcache-mock", "pairs": len(pairs), **kept}]


def questions(folder: Path, encode: Encode) -> list[Row]:
    """Measure pairs of questions, duplicates or not, by cosine; a seeded random sample."""
    pairs = list(objects(folder / QQP.name))
    pairs = [pairs[place] for place in np.random.default_rng(0).permutation(len(pairs))[:QQP_PAIRS]]
    same = np.array([label for label, _, _ in pairs]) == 1
    ones, others = [one for _, one, _ in pairs], [other for _, _, other in pairs]
    similarity = np.sum(encode(ones) * encode(others), axis=1)
    refusals, _ = _compared(ones, others)
    named, _ = _compared(ones, others, NAMES)
    at = (0.8, 0.85, 0.9, 0.95)
    return [
        *_rows("pair-qqp", "cosine", similarity, same, refusals, at),
        *_rows("pair-qqp, names by pattern", "cosine", similarity, same, named, at),
    ]


def paraphrases(folder: Path) -> list[Row]:
    """Measure sentence pairs of MRPC, paraphrases or not."""
    names = ("train", "val", "test")
    every = [line.split("\t") for name in names for line in lines(folder / f"{name}.tsv", "utf-8-sig")]
    pairs = [row for row in every if len(row) == 5 and row[0] in ("0", "1")]
    refusals, _ = _compared([row[3] for row in pairs], [row[4] for row in pairs])
    same = np.array([row[0] == "1" for row in pairs])
    return list(_rows("pair-mrpc", "label", np.ones(len(pairs)), same, refusals, (1.0,)))


def _samples(folder: Path) -> tuple[Pairs, Pairs]:
    """Draw 5,000 known texts and 1,000 queries, each with its label."""
    known, asked = (
        [some[place] for place in np.random.default_rng(0).permutation(len(some))[:count]]
        for some, count in zip(labelled_texts(folder), (5000, 1000), strict=True)
    )
    return known, asked


def _nearest(known: Pairs, asked: Pairs, data: str, encode: Encode, thresholds: Sequence[float]) -> list[Row]:
    """Measure queries with their most similar known text; the same when the labels are equal."""
    entries = encode([text for text, _ in known])
    cosines = [block @ entries.T for block in np.array_split(encode([text for text, _ in asked]), 8)]
    similarity = np.concatenate([block.max(axis=1) for block in cosines])
    nearest = [known[place] for block in cosines for place in block.argmax(axis=1)]
    same = np.array([one[1] == other[1] for one, other in zip(asked, nearest, strict=True)])
    refusals, microseconds = _compared([text for text, _ in asked], [text for text, _ in nearest])
    speed = {
        "mean_characters": float(np.mean([len(text) for text, _ in [*asked, *nearest]])),
        "microseconds_per_text": microseconds,
    }
    return [row | speed for row in _rows(data, "cosine", similarity, same, refusals, thresholds)]


# -- comparing ------------------------------------------------------------------------------------------------


def _compared(
    ones: Sequence[str], others: Sequence[str], pattern: re.Pattern[str] | None = None
) -> tuple[NDArray[np.int8], float]:
    """Return the kind that refuses each pair (-1 for none), and the microseconds per text to read fields."""
    began = time.perf_counter()
    left, right = digests(ones, pattern), digests(others, pattern)
    seconds = time.perf_counter() - began
    return refused(left, right), 1e6 * seconds / (len(ones) + len(others))


def _overlap(one: str, other: str) -> float:
    words, others = set(one.split()), set(other.split())
    return len(words & others) / max(1, len(words | others))


def _rows(
    data: str,
    by: str,
    similarity: NDArray[np.floating],
    same: Bools,
    refusals: NDArray[np.int8],
    thresholds: Sequence[float],
) -> Iterator[Row]:
    """Yield, per threshold, counts with and without the guard, and the precision of a higher threshold alone."""
    ranked = same[np.argsort(-similarity, kind="stable")]
    for threshold in thresholds:
        near = similarity >= threshold
        accepted = near & (refusals < 0)
        count = int(accepted.sum())
        yield {
            "data": data,
            "by": by,
            "threshold": threshold,
            "without": int(near.sum()),
            "without_wrong": int((near & ~same).sum()),
            "without_precision": _share(same, near),
            "accepted": count,
            "wrong": int((accepted & ~same).sum()),
            "precision": _share(same, accepted),
            "higher_threshold_precision": float(ranked[:count].mean()) if count else None,
            "good_kept": _share(refusals < 0, near & same),
            "wrong_kept": _share(refusals < 0, near & ~same),
            "good_refused_by": _by_kind(refusals[near & same]),
            "wrong_refused_by": _by_kind(refusals[near & ~same]),
        }


def _share(chosen: Bools, among: Bools) -> float | None:
    return float(chosen[among].mean()) if among.any() else None


def _by_kind(refusals: NDArray[np.int8]) -> dict[str, int]:
    """Count the pairs that each kind refused first."""
    return {kind: int((refusals == place).sum()) for place, kind in enumerate(KINDS) if (refusals == place).any()}
