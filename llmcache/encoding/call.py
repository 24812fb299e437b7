"""One encode call: its arguments, and the arrays of documents that its steps pass on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from llmcache.arrays import Floats32
from llmcache.document import Text
from llmcache.indexes.format.marks import Marks
from llmcache.indexes.format.rows import Keys
from llmcache.model.prompts import ROLES
from llmcache.model.tokens import TokenRows

Places: TypeAlias = NDArray[np.int64]
"""Positions of documents in a call, or indices into such positions; int64."""

Progress: TypeAlias = Callable[[int, int], None]
"""Callback with the number of documents answered since the last one, and how many of these the model computed."""


def nothing(answered: int, computed: int) -> None:
    """No-op progress callback."""


@dataclass(frozen=True, slots=True)
class EncodeCall:
    """Arguments of one encode call.

    ids: of the documents, stored with new entries as their source; or None. tensor: True if the outputs are wanted as a
    tensor on the model's device. wanted: False if the call only fills the store; its hits then count as no saving.
    """

    texts: Sequence[Text]
    ids: Sequence[str] | None = None
    prompt: str | None = None
    role: str | None = None
    batch_size: int = 32
    progress: Progress = nothing
    tensor: bool = False
    wanted: bool = True


@dataclass(frozen=True, slots=True)
class OpenDocuments:
    """Distinct documents of a window that have no exact match.

    places: int64 [n], positions in the call. keys: token keys, uint64 [n, 2]. copies: int64 [n], requests of the call
    that each document answers. window: tokens of the whole window; chosen: int64 [n], indices of the documents in the
    window. drawn: features, float32 [n, width], on the model's device; raw: the same on the host. scope: near scope of
    the call, uint64; see `Executor.scope`.
    """

    places: Places
    keys: Keys
    copies: Places
    window: TokenRows
    chosen: Places
    drawn: torch.Tensor
    raw: Floats32
    scope: int

    def token_ids(self) -> list[NDArray[np.int32]]:
        """Return the token ids of each document."""
        return [self.window.ids[i] for i in self.chosen]

    def tokens(self) -> TokenRows:
        """Return the tokenised inputs of the documents."""
        return self.window.take(self.chosen.tolist())


@dataclass(frozen=True, slots=True)
class Misses:
    """Documents that the model has to compute, and what is stored with them. Every array has one row per document.

    places: int64 [n], positions in the call. text_keys, keys: uint64 [n, 2]. sources: ids. features: float32
    [n, feature width]. marks: marks for near reuse; None for none, or where they are made batch by batch.
    """

    places: Places
    text_keys: Keys
    keys: Keys
    tokens: TokenRows
    sources: list[str]
    features: Floats32
    marks: Marks | None = None

    def take(self, chosen: Sequence[int]) -> Misses:
        """Return some of the documents, by their indices."""
        entry = self.entry(chosen)
        return Misses(
            self.places[chosen], self.text_keys[chosen], self.keys[chosen], self.tokens.take(chosen),
            entry["sources"], entry["features"], entry["marks"],
        )  # fmt: skip

    def entry(self, chosen: Sequence[int]) -> dict[str, Any]:
        """Return arguments of `Bank.put` for some of the documents, by their indices: all but keys, values and cost."""
        return {
            "tokens": [self.tokens.ids[i] for i in chosen],
            "sources": [self.sources[i] for i in chosen],
            "features": self.features[chosen],
            "marks": None if self.marks is None else self.marks[chosen],
        }


@dataclass(frozen=True, slots=True)
class GivenTexts:
    """Inputs of a call as given. texts: as a list. single: True if one text was given. inputs: for the model itself."""

    texts: list[Any]
    single: bool
    inputs: Any


def texts_argument(inputs: Any, others: dict[str, Any]) -> Any:
    """Return the texts of an `encode` call, which sentence-transformers also accepts as `sentences` (removed here).

    A one-dimensional array or series of texts becomes a list. TypeError when there are no texts.
    """
    former = others.pop("sentences", None)
    texts = former if inputs is None else inputs
    if texts is None:
        raise TypeError("encode() needs inputs: a text or a list of texts")
    if isinstance(texts, torch.Tensor | list | tuple | str):
        return texts
    for name in ("tolist", "to_list", "to_pylist"):  # pandas and NumPy, polars, Arrow
        if hasattr(texts, name) and getattr(texts, "ndim", 1) == 1:
            values = getattr(texts, name)()
            return values if values and all(isinstance(text, str) for text in values) else texts
    return texts


def bypass_reason(
    texts: Sequence[Any], role: Any, device: Any, output_value: Any, pool: Any, others: Mapping[str, Any]
) -> str | None:
    """Return why the output bank cannot answer an `encode` call; None if it can."""
    if pool is not None or isinstance(device, list):
        return "it computes in a pool of processes"
    if output_value not in ("sentence_embedding", "token_embeddings"):
        return f"output_value={output_value!r} is not kept"
    if role is not None and role not in ROLES:
        return f"task={role!r} is not known"
    if others:
        return f"the argument {min(others)!r} is not known"
    if not all(isinstance(text, str) for text in texts):
        return "its inputs are not all texts"
    return None
