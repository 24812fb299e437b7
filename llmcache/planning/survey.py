"""Survey of a corpus in one pass at hashing speed: repeats, lengths, and samples for slower measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.model.keys import Seed, text_keys

_BLOCK = 4096  # documents that are hashed together
LONG = 16  # characters per token that texts practically never exceed on average
_USUAL = 6  # characters per token that most texts do not exceed on average
_WORD = 100  # characters, longer than a word: tokens this far before a cut do not depend on it
_SHORT = 2  # characters per token: a text with fewer than this times the limit is practically never truncated
_CHECKED = 50_000  # most long texts that are tokenised to find where the model truncates them


@dataclass(slots=True)
class Sample:
    """Uniform random sample of at most `size` texts of a stream."""

    size: int
    texts: list[str] = field(default_factory=list)
    _priority: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def offer(self, texts: Sequence[str], random: np.random.Generator) -> None:
        """Draw from these texts too, replacing earlier ones."""
        drawn = random.random(len(texts))
        if len(self.texts) == self.size:  # most texts of a long stream cannot enter the sample
            eligible = drawn < self._priority.max(initial=0.0)
            texts, drawn = list(compress(texts, eligible.tolist())), drawn[eligible]
        priority = np.concatenate([self._priority, drawn])
        candidates = [*self.texts, *texts]
        chosen = np.sort(np.argsort(priority)[: self.size])
        self.texts, self._priority = [candidates[i] for i in chosen.tolist()], priority[chosen]


@dataclass(slots=True)
class Survey:
    """Counts of a corpus that need no model.

    documents, characters: totals. in_store: documents whose text is stored, including repeats. repeats: documents that
    repeat others of the corpus and are not stored; folded: repeats whose text differs but whose tokens are expected to
    be equal. new_characters: of distinct texts that are not stored. chars: uint32 [documents], lengths. open: bool
    [documents], True for documents that are neither stored nor repeats. every, unknown: samples of all documents, and
    of the open ones.
    """

    documents: int
    characters: int
    in_store: int
    repeats: int
    folded: int
    new_characters: int
    chars: NDArray[np.uint32] = field(repr=False)
    open: NDArray[np.bool_] = field(repr=False)
    every: Sample = field(repr=False)
    unknown: Sample = field(repr=False)


class Folding:
    """Fold of texts that are likely to get equal token ids: normalised letters, white space, and truncated ends.

    Equal folds do not guarantee equal tokens, but take a tenth of the time of tokenising.
    """

    def __init__(self, tokenizer: Any, limit: int | None, prompt: str | None) -> None:
        """tokenizer: of transformers. limit: maximum number of tokens of the model; None for no limit."""
        self._limit = limit if getattr(tokenizer, "is_fast", False) else None
        self._tokenizer, self._prompt = tokenizer, prompt or ""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normal = getattr(getattr(backend, "normalizer", None), "normalize_str", None)
        self._spaces = backend is not None and _ids(tokenizer, " a  b ") == _ids(tokenizer, "a b")
        self._folds: dict[int, dict[tuple[int, int], str]] = {}
        self._checked = 0

    def __call__(self, text: str) -> str:
        """Return the fold of a text."""
        if self._limit is not None and len(text) > _SHORT * self._limit:
            return self._fold_long(text)
        if self._normal is not None:
            text = self._normal(text)
        return " ".join(text.split()) if self._spaces else text

    def _fold_long(self, text: str) -> str:
        """Return the token ids that the model reads of a long text, as a string.

        Texts with a common prefix up to the truncation share the result, so that only the first one is tokenised.
        """
        assert self._limit is not None
        known = self._folds.setdefault(hash(text[: _SHORT * self._limit]), {})
        for end, prefix in known:
            if hash(text[:end]) == prefix:
                return known[end, prefix]
        if self._checked >= _CHECKED:
            return text
        self._checked += 1
        for characters in (_USUAL * self._limit, LONG * self._limit):
            part = self._prompt + text[:characters]
            tokens = self._tokenizer(part, truncation=True, max_length=self._limit, return_offsets_mapping=True)
            last = max((stop for _, stop in tokens["offset_mapping"]), default=0)
            if last < len(part) - _WORD:
                break
        end = max(1, last - len(self._prompt))
        fold = "tokens " + " ".join(map(str, tokens["input_ids"]))
        known[end, hash(text[:end])] = fold
        return fold


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def survey(
    texts: Iterable[str],
    seed: Seed,
    fold: Callable[[str], str],
    bank: Bank | None,
    *,
    every: int = 256,
    unknown: int = 4096,
    random: np.random.Generator | None = None,
) -> Survey:
    """Survey a corpus in one pass. seed: of text keys. fold: see `Folding`. bank: of outputs, or None.

    every, unknown: sizes of the samples. Needs memory for the samples, and 5 bytes per document and 200 per distinct
    one. Returns the survey.
    """
    drawn = random or np.random.default_rng(0)
    seen: set[bytes] = set()
    folds: set[bytes] = set()
    chars, open_ = [np.zeros(0, np.uint32)], [np.zeros(0, np.bool_)]
    in_store = repeats = folded = new = 0
    samples = Sample(every), Sample(unknown)
    stream = iter(texts)
    while block := list(islice(stream, _BLOCK)):
        keys = text_keys(seed, block)
        known = np.zeros(len(block), np.bool_) if bank is None else bank.find_text(keys.view(np.uint64)) >= 0
        is_open = np.zeros(len(block), np.bool_)
        for i, (key, stored) in enumerate(zip(map(bytes, keys), known.tolist(), strict=True)):
            if stored:
                in_store += 1
            elif key in seen:
                repeats += 1
            else:
                seen.add(key)
                new += len(block[i])
                digest = bytes(text_keys(seed, [fold(block[i])])[0])
                repeats += (repeated := digest in folds)
                folded += repeated
                folds.add(digest)
                is_open[i] = not repeated
        samples[0].offer(block, drawn)
        samples[1].offer(list(compress(block, is_open.tolist())), drawn)
        chars.append(np.fromiter(map(len, block), np.uint32, len(block)))
        open_.append(is_open)
    lengths = np.concatenate(chars)
    return Survey(
        len(lengths),
        int(lengths.sum(dtype=np.int64)),
        in_store,
        repeats,
        folded,
        new,
        lengths,
        np.concatenate(open_),
        *samples,
    )
