"""Find the stored pairs of a CrossEncoder that contain a text, for a purge by text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.store import Store

_PARTNER = "a"  # other side of the pairs that show whether a model's pairs can be searched


class _Sides:
    """Texts to find in pairs, by their token ids between the special tokens of a pair."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        kept = {tokenizer.unk_token_id, tokenizer.mask_token_id}
        self._ends = np.array(sorted({*tokenizer.all_special_ids} - kept), np.int32)
        rows = tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        ids = [np.array(row, "<i4") for row in rows if len(row)]
        self._whole = {row.tobytes() for row in ids}
        self._with_ends = [row.tobytes() for row in ids if np.isin(row, self._ends).any()]  # written out in the text

    def among(self, rows: Sequence[NDArray[np.int32]]) -> list[bool]:
        """Return for each pair whether a side is one of the texts, or may be one of them truncated.

        rows: token ids of pairs of one model. The longest ones may be truncated.
        """
        longest = max(map(len, rows), default=0)
        return [self._in(np.ascontiguousarray(row, "<i4"), truncated=len(row) == longest) for row in rows]

    def _in(self, row: NDArray[np.int32], *, truncated: bool) -> bool:
        places = np.flatnonzero(np.isin(row, self._ends))
        starts, ends = [0, *(places + 1).tolist()], [*places.tolist(), len(row)]
        parts = [row[start:end].tobytes() for start, end in zip(starts, ends, strict=True) if end > start]
        if not self._whole.isdisjoint(parts) or any(ids in row.tobytes() for ids in self._with_ends):
            return True
        return truncated and any(ids.startswith(part) or ids.endswith(part) for part in parts for ids in self._whole)


def tokens_of_pairs(
    store: Store, namespace: str, reader: Any, texts: Sequence[str], prompts: Sequence[str | None]
) -> list[NDArray[np.int32]]:
    """Return the token ids of the stored pairs in which one of these texts is a side, with or without a prompt.

    reader: the namespace's CrossEncoder, or its tokenizer. A pair whose tokens are as many as the longest stored pair's
    may be truncated: it is found when a side is the beginning or the end of a text. ConfigError when the tokens of a
    text depend on the other text of the pair.
    """
    prompted = [(prompt or "") + text for prompt in prompts for text in texts]
    sides = _Sides(getattr(reader, "tokenizer", reader), prompted)
    for text in texts:
        if not all(sides.among(_examples(reader, text))):
            raise ConfigError(
                "this model reads a text differently beside another text, so stored pairs cannot be searched for it; "
                "purge the whole namespace, or the pairs by key"
            )
    rows = [row for part in _stored(store, namespace) for row in part]
    return [row for row, found in zip(rows, sides.among(rows), strict=True) if found]


def _examples(reader: Any, text: str) -> list[NDArray[np.int32]]:
    """Return the token ids of two pairs, with this text as first and as second side; none for an empty text."""
    from sentence_transformers import CrossEncoder

    from llmcache.model.tokens import tokenise

    pairs = [(text, _PARTNER), (_PARTNER, text)] if text.strip() else []
    if isinstance(reader, CrossEncoder):
        return [row for pair in pairs for row in tokenise(reader, [pair], None, None).ids]
    tokenizer = getattr(reader, "tokenizer", reader)
    return [np.array(tokenizer(*pair, truncation=True)["input_ids"], np.int32) for pair in pairs]


def _stored(store: Store, namespace: str) -> Iterator[list[NDArray[np.int32]]]:
    """Yield the token ids of all rows, segment by segment. A purge removes unreadable segments as a whole."""
    for bank in store.latest().namespaces[namespace].banks.values():
        for facts in bank.segments:
            try:
                segment = Segment.open(store.folder, facts)
                yield segment.tokens_of(np.arange(len(segment)))
            except (SnapshotDamaged, FileNotFoundError):
                continue
