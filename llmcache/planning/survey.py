"""Survey of a corpus in one pass at hashing speed: repeats, lengths, and samples for slower measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.document import Text, characters
from llmcache.indexes.bank import Bank
from llmcache.indexes.format.rows import Keys

_BLOCK = 4096  # documents that are hashed together
LONG = 16  # characters per token that texts practically never exceed on average
_USUAL = 6  # characters per token that most texts do not exceed on average
_WORD = 100  # characters, longer than a word: tokens this far before a cut do not depend on it
_SHORT = 2  # characters per token: a text with fewer than this times the limit is practically never truncated
_CHECKED = 50_000  # most long texts that are tokenised to find where the model truncates them

Ends: TypeAlias = tuple[int | None, ...]
"""For each side of a document the end of the part that the model reads, in characters; None: it reads all."""


@dataclass(slots=True)
class Sample:
    """Uniform random sample of at most `size` texts, or pairs of texts, of a stream."""

    size: int
    texts: list[Text] = field(default_factory=list)
    _priority: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def offer(self, texts: Sequence[Text], random: np.random.Generator) -> None:
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
    """Counts of a corpus that need no model. Its documents are texts or pairs of texts.

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
        self._folds: dict[int, dict[tuple[Ends, int], str]] = {}
        self._checked = 0

    def __call__(self, text: Text) -> Text:
        """Return the fold of a text or of a pair of texts, which is of the same type."""
        if self._limit is not None and characters(text) > _SHORT * self._limit:
            return self._fold_long(text)
        return self._plain(text) if isinstance(text, str) else (self._plain(text[0]), self._plain(text[1]))

    def _plain(self, text: str) -> str:
        if self._normal is not None:
            text = self._normal(text)
        return " ".join(text.split()) if self._spaces else text

    def _fold_long(self, text: Text) -> Text:
        """Return the token ids that the model reads of a long text or pair, as a string or a pair of strings.

        Texts that are equal as far as the model reads share the result, so that only the first one is tokenised.
        """
        assert self._limit is not None
        sides = (text,) if isinstance(text, str) else text
        start = _SHORT * self._limit
        known = self._folds.setdefault(hash(tuple(side[:start] for side in sides)), {})
        for ends, read in known:
            if _hash_of(sides, ends) == read:
                return _as(text, known[ends, read])
        if self._checked >= _CHECKED:
            return text
        self._checked += 1
        ids, ends = self._read(sides, self._limit)
        fold = "tokens " + " ".join(map(str, ids))
        known[ends, _hash_of(sides, ends)] = fold
        return _as(text, fold)

    def _read(self, sides: Sequence[str], limit: int) -> tuple[list[int], Ends]:
        """Return the token ids that the model reads of the sides of a document, and where it ends to read each side."""
        ids: list[int] = []
        lasts: list[int] = []
        parts: list[str] = []
        for most in (_USUAL * limit, LONG * limit):
            # of two long sides the longer one is read one token further, so it has to stay the longer one
            cuts = [2 * most if longer else most for longer in _longer(sides)]
            parts = [side[:end] for side, end in zip(sides, cuts, strict=True)]
            parts[0] = self._prompt + parts[0]
            tokens = self._tokenizer(*parts, truncation=True, max_length=limit, return_offsets_mapping=True)
            ids, places = tokens["input_ids"], list(zip(tokens.sequence_ids(), tokens["offset_mapping"], strict=True))
            lasts = [max((end for side, (_, end) in places if side == i), default=0) for i in range(len(parts))]
            whole = [len(side) <= end for side, end in zip(sides, cuts, strict=True)]
            if all(done or last < len(part) - _WORD for done, last, part in zip(whole, lasts, parts, strict=True)):
                break
        lasts[0] -= len(self._prompt)
        # with the character after the end, which may belong to the last word
        ends = [None if end >= len(side.rstrip()) else max(0, end) + 1 for end, side in zip(lasts, sides, strict=True)]
        return ids, tuple(ends)


def _hash_of(sides: Sequence[str], ends: Ends) -> int:
    """Return a hash of the parts of the sides of a document that end there, and of which side is the longer one."""
    return hash((*(side[:end] for side, end in zip(sides, ends, strict=True)), *_longer(sides)))


def _longer(sides: Sequence[str]) -> list[bool]:
    """Return for each side whether it has more characters than the other one."""
    return [all(len(side) > len(other) for other in (*sides[:i], *sides[i + 1 :])) for i, side in enumerate(sides)]


def cut(text: Text, most: int) -> Text:
    """Return a text, or each side of a pair, cut to at most this many characters."""
    return text[:most] if isinstance(text, str) else (text[0][:most], text[1][:most])


def _as(text: Text, fold: str) -> Text:
    """Return a fold as a value of the type of a text."""
    return fold if isinstance(text, str) else (fold, "")


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def survey(
    texts: Iterable[Text],
    keys_of: Callable[[Sequence[Any]], Keys],
    fold: Callable[[Text], Text],
    bank: Bank | None,
    *,
    every: int = 256,
    unknown: int = 4096,
    random: np.random.Generator | None = None,
) -> Survey:
    """Survey a corpus in one pass.

    keys_of: returns the text keys of documents, uint64 [n, 2]. fold: see `Folding`. bank: of outputs, or None. every,
    unknown: sizes of the samples.
    Needs memory for the samples, and 5 bytes per document and 200 per distinct one. Returns the survey.
    """
    drawn = random or np.random.default_rng(0)
    seen: set[bytes] = set()
    folds: set[bytes] = set()
    chars, open_ = [np.zeros(0, np.uint32)], [np.zeros(0, np.bool_)]
    in_store = repeats = folded = new = 0
    samples = Sample(every), Sample(unknown)
    stream = iter(texts)
    while block := list(islice(stream, _BLOCK)):
        keys = keys_of(block)
        known = np.zeros(len(block), np.bool_) if bank is None else bank.find_text(keys) >= 0
        is_open = np.zeros(len(block), np.bool_)
        for i, (key, stored) in enumerate(zip(map(bytes, keys), known.tolist(), strict=True)):
            if stored:
                in_store += 1
            elif key in seen:
                repeats += 1
            else:
                seen.add(key)
                new += characters(block[i])
                digest = bytes(keys_of([fold(block[i])])[0])
                repeats += (repeated := digest in folds)
                folded += repeated
                folds.add(digest)
                is_open[i] = not repeated
        samples[0].offer(block, drawn)
        samples[1].offer(list(compress(block, is_open.tolist())), drawn)
        chars.append(np.fromiter(map(characters, block), np.uint32, len(block)))
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
