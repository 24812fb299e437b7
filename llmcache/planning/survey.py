"""One pass over a corpus at the speed of hashing: repeats, lengths, and samples for what costs more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.bank import Bank
from llmcache.model.keys import Seed, text_keys

_BLOCK = 4096
LONG = 16  # characters a token, from which on a text has certainly more tokens than its characters over this
_USUAL = 6  # and most texts do
_WORD = 100  # characters that hardly a word has: what stands so far before a cut is not changed by it
_SHORT = 2  # and below which a text of so many characters a token is certainly not cut
_CHECKED = 50_000  # long texts that are tokenised to see where the model stops reading them


@dataclass(slots=True)
class Sample:
    """Texts drawn evenly from a stream, at most `size`. chars: of each, places: in the stream."""

    size: int
    texts: list[str] = field(default_factory=list)
    _priority: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def offer(self, texts: Sequence[str], random: np.random.Generator) -> None:
        """Take some of these in place of others."""
        drawn = random.random(len(texts))
        if len(self.texts) == self.size:  # most of a long stream cannot come in any more
            good = drawn < self._priority.max(initial=0.0)
            texts, drawn = list(compress(texts, good.tolist())), drawn[good]
        priority = np.concatenate([self._priority, drawn])
        every = [*self.texts, *texts]
        kept = np.sort(np.argsort(priority)[: self.size])
        self.texts, self._priority = [every[i] for i in kept.tolist()], priority[kept]


@dataclass(slots=True)
class Survey:
    """What is known of a corpus without the model.

    documents, characters: in all. in_store: documents whose text is in the store, repeats of such ones included.
    repeats: documents that come again in the corpus and are not in the store; folded: of these, those whose text
    differs and whose tokens do not. new_characters: of the texts that are not in the store, each text once.
    chars: uint32 [documents]; open: bool [documents], is in neither of both. every, unknown: samples of all documents,
    and of those that are open.
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
    """Texts to what a tokenizer makes equal: letters it does not tell apart, white space, and ends it does not read.

    A text's fold is no promise; it says what the tokens will most likely say, for a tenth of the time.
    """

    def __init__(self, tokenizer: Any, limit: int | None, prompt: str | None) -> None:
        """limit: tokens that the model reads, None for all. tokenizer: of transformers."""
        self._limit = limit if getattr(tokenizer, "is_fast", False) else None
        self._tokenizer, self._prompt = tokenizer, prompt or ""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normal = getattr(getattr(backend, "normalizer", None), "normalize_str", None)
        self._spaces = backend is not None and _ids(tokenizer, " a  b ") == _ids(tokenizer, "a b")
        self._begun: dict[int, dict[tuple[int, int], str]] = {}
        self._checked = 0

    def __call__(self, text: str) -> str:
        if self._limit is not None and len(text) > _SHORT * self._limit:
            return self._read(text)
        if self._normal is not None:
            text = self._normal(text)
        return " ".join(text.split()) if self._spaces else text

    def _read(self, text: str) -> str:
        """What stands for the tokens that the model reads of a long text. They are made where no text before began
        with the same part as far as it was read.
        """
        assert self._limit is not None
        known = self._begun.setdefault(hash(text[: _SHORT * self._limit]), {})
        for end, begin in known:
            if hash(text[:end]) == begin:
                return known[end, begin]
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
    found: list[int] = tokenizer(text)["input_ids"]
    return found


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
    """Go once through a corpus. seed: of its text keys; bank: of the outputs, None where there is none.

    every, unknown: sizes of the samples. Memory: 5 bytes a document, 200 a distinct one, and the samples.
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
        state = np.zeros(len(block), np.bool_)
        for i, (key, here) in enumerate(zip(map(bytes, keys), known.tolist(), strict=True)):
            if here:
                in_store += 1
            elif key in seen:
                repeats += 1
            else:
                seen.add(key)
                new += len(block[i])
                same = fold(block[i])
                digest = bytes(text_keys(seed, [same])[0])
                repeats += (again := digest in folds)
                folded += again
                folds.add(digest)
                state[i] = not again
        samples[0].offer(block, drawn)
        samples[1].offer(list(compress(block, state.tolist())), drawn)
        chars.append(np.fromiter(map(len, block), np.uint32, len(block)))
        open_.append(state)
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
