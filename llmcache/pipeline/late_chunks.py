"""Late chunks: embed chunks by pooling the token embeddings of the whole document.

A chunk's vector is the mean of the token embeddings of its tokens, each computed with the whole document as context,
followed by the modules that the model has after its pooling. A document that is longer than the model's limit is read
in windows that overlap; in an overlap each token is taken from the window in which it lies further inside.

Source: Günther et al., "Late Chunking: Contextual Chunk Embeddings Using Long-Context Embedding Models", 2024,
https://arxiv.org/abs/2409.04701.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llmcache.arrays import Floats32
from llmcache.errors import ConfigError
from llmcache.model.token_states import Tail
from llmcache.pipeline.chunking import Chunk

OVERLAP = 4  # windows share a quarter of their tokens with the next one
_SHRUNK, _TRIES = 0.9, 8  # room of a window, after one had more tokens by itself than in its document


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a document that the model reads at once: text[start:end], in characters.

    ends: int64 [tokens], position in the document after the last character of each token of the window; -1 for special
    tokens, tokens of the prompt, and tokens that another window computes with more context.
    """

    start: int
    end: int
    ends: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens of a text. count: with special tokens and prompt. places: int64 [tokens]: numbers, among all tokens, of
    those that stand for characters of the text. starts, ends: their characters, int64 [tokens]."""

    count: int
    places: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class LateChunks:
    """Windows of documents, and vectors of chunks from the token embeddings of the windows."""

    def __init__(self, model: SentenceTransformer, prompt: str | None) -> None:
        """prompt: before each window. ConfigError for a model whose chunks cannot be pooled."""
        if not isinstance(model, SentenceTransformer):
            raise ConfigError(
                f"late chunks are pooled from token embeddings of a SentenceTransformer, this is a "
                f"{type(model).__name__}; leave out late=True"
            )
        self._tail = Tail(model)
        self._tail.check_mean()
        backend: Any = getattr(model.tokenizer, "backend_tokenizer", None)
        if backend is None or getattr(model[0], "do_lower_case", False):
            raise ConfigError(
                "late chunks need the characters of every token, which only fast tokenizers give (and no "
                "do_lower_case of the model); leave out late=True"
            )
        # a copy, since the pipeline's thread tokenises too
        self._tokenizer: Any = type(backend).from_str(backend.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._prompt = prompt or ""
        self._limit: int | None = model.max_seq_length

    def windows(self, texts: Sequence[str], chunks: Sequence[Sequence[Chunk]]) -> list[list[Window] | str]:
        """Return the windows of each text, or the reason why its chunks cannot be pooled.

        chunks: of each text.
        """
        return [
            self._checked(text, tokens, parts)
            for text, tokens, parts in zip(texts, self._tokens(texts), chunks, strict=True)
        ]

    def vectors(
        self,
        windows: Sequence[Sequence[Window]],
        states: Sequence[Sequence[Floats32]],
        chunks: Sequence[Sequence[Chunk]],
    ) -> list[Floats32]:
        """Return the vectors of the chunks of each document, float32 [chunks, width].

        windows: of each document. states: token embeddings of each window, float32 [tokens, width].
        ConfigError when a window has another number of token embeddings than of tokens.
        """
        means = [self._means(*document) for document in zip(windows, states, chunks, strict=True)]
        if not means:
            return []
        vectors = self._tail.of_means(np.concatenate(means))
        return np.split(vectors, np.cumsum([len(rows) for rows in means])[:-1])

    @staticmethod
    def _means(windows: Sequence[Window], states: Sequence[Floats32], chunks: Sequence[Chunk]) -> Floats32:
        """Return the means of the token embeddings of each chunk of a document, float32 [chunks, width]."""
        for window, state in zip(windows, states, strict=True):
            if len(state) != len(window.ends):
                raise ConfigError(
                    f"the model reads {len(state):,} tokens of a text for which its tokenizer gives "
                    f"{len(window.ends):,}, so tokens cannot be assigned to chunks; leave out late=True"
                )
        table = states[0] if len(states) == 1 else np.concatenate(states)
        ends = np.concatenate([window.ends for window in windows])
        starts = np.array([chunk.start for chunk in chunks])[:, None]
        stops = np.array([chunk.end for chunk in chunks])[:, None]
        inside = ((ends > starts) & (ends <= stops)).astype(np.float32)
        means: Floats32 = (inside @ table) / inside.sum(1, keepdims=True)
        return means

    def _checked(self, text: str, tokens: _Tokens, chunks: Sequence[Chunk]) -> list[Window] | str:
        windows = self._split(text, tokens)
        if isinstance(windows, str):
            return windows
        ends = np.sort(np.concatenate([window.ends for window in windows]))
        for chunk in chunks:
            if np.searchsorted(ends, chunk.start, "right") == np.searchsorted(ends, chunk.end, "right"):
                return (
                    f"has a chunk without tokens, {chunk.text[:20]!r} at character {chunk.start:,}, so its vector "
                    "cannot be pooled"
                )
        return windows

    def _tokens(self, texts: Sequence[str]) -> list[_Tokens]:
        before = len(self._prompt)
        encodings = self._tokenizer.encode_batch([self._prompt + text for text in texts])
        found = []
        for encoding in encodings:
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) - before
            special = np.array(encoding.special_tokens_mask, np.bool_)
            places = np.flatnonzero(~special & (offsets[:, 1] > np.maximum(offsets[:, 0], 0)))
            starts = np.maximum(offsets[places, 0], 0)  # a token may begin in the prompt
            found.append(_Tokens(len(special), places, starts, offsets[places, 1]))
        return found

    def _split(self, text: str, tokens: _Tokens) -> list[Window] | str:
        """Return one window if the model reads the text as a whole, else several that overlap."""
        if self._limit is None or tokens.count <= self._limit:
            return [_window(0, len(text), tokens, 0, 0, len(text))]
        room = self._limit - (tokens.count - len(tokens.places))
        for _ in range(_TRIES):
            if room < OVERLAP:
                break
            spans = _spans(tokens, room)
            read = self._tokens([text[start:end] for start, end, _ in spans])
            if all(part.count <= self._limit for part in read):
                borders = [0, *(border for *_, border in spans[1:]), len(text)]
                return [
                    _window(start, end, part, start, first, last)
                    for (start, end, _), part, first, last in zip(spans, read, borders[:-1], borders[1:], strict=True)
                ]
            room = int(room * _SHRUNK)
        return f"cannot be read in windows of max_seq_length={self._limit} tokens"


def _window(start: int, end: int, tokens: _Tokens, offset: int, first: int, last: int) -> Window:
    """Return a window. offset: of the tokens' characters. first, last: characters whose tokens the window has."""
    ends = np.full(tokens.count, -1, np.int64)
    own = tokens.ends + offset
    ends[tokens.places] = np.where((own > first) & (own <= last), own, -1)
    return Window(start, end, ends)


def _spans(tokens: _Tokens, room: int) -> list[tuple[int, int, int]]:
    """Return start, end, and first own character of windows of at most `room` tokens, which begin and end with words.

    A window begins before the end of the one before it, by a quarter of `room` tokens.
    """
    begins = np.concatenate([[True], tokens.starts[1:] > tokens.ends[:-1], [True]])  # of words, by token
    count, first, border = len(tokens.places), 0, 0
    spans: list[tuple[int, int, int]] = []
    while True:
        stop = min(count, first + room)
        if stop < count:
            stop = _word(begins, first + room // 2 + 1, stop)
        spans.append((int(tokens.starts[first]), int(tokens.ends[stop - 1]), border))
        if stop == count:
            return spans
        after = _word(begins, first + 1, max(first + 1, stop - room // OVERLAP))
        border = int(tokens.ends[(after + stop) // 2 - 1]) if after < stop else int(tokens.ends[stop - 1])
        first = after


def _word(begins: NDArray[np.bool_], least: int, most: int) -> int:
    """Return the last token from `least` to `most` that begins a word; `most` if none does."""
    at = np.flatnonzero(begins[least : most + 1])
    return int(at[-1]) + least if len(at) else most
