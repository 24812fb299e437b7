"""Tokenise texts to rows of token ids without padding, and pad chosen rows to batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer

from llmcache.errors import ConfigError
from llmcache.model.private_tokenizer import private_copy

_TOKENISE = 256  # texts that are tokenised in one call
_COMPARED = 8  # first texts of a call, which are tokenised in both ways
_KNOWN = {"input_ids", "attention_mask", "token_type_ids"}


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Tokenised documents without padding.

    fields: for each model input ("input_ids", ...) one int32 array [tokens] per document.
    shared: inputs that are the same for every row, such as the length of the prompt.
    """

    fields: Mapping[str, list[NDArray[np.int32]]]
    shared: Mapping[str, Any]

    @property
    def ids(self) -> list[NDArray[np.int32]]:
        """Token ids of each document."""
        return self.fields["input_ids"]

    def like(self, ids: Sequence[NDArray[np.int32]]) -> TokenRows:
        """Return rows of other token ids with the same fields: all tokens visible, all of one segment.

        ConfigError when the model has an input besides ids, mask and token types.
        """
        plain: dict[str, Callable[[NDArray[np.int32]], NDArray[np.int32]]] = {
            "input_ids": np.array,
            "attention_mask": np.ones_like,
            "token_type_ids": np.zeros_like,
        }
        if odd := sorted(set(self.fields) - set(plain)):
            raise ConfigError(
                f"the model has the input {odd[0]!r} beside token ids, so states of near texts cannot be reused"
            )
        return TokenRows({name: [plain[name](row) for row in ids] for name in self.fields}, self.shared)

    def key_bytes(self) -> list[bytes]:
        """Return all model inputs of each row as bytes; equal only for rows with equal inputs."""
        columns = [self.fields[name] for name in sorted(self.fields)]
        if len(columns) == 1:
            return [field.tobytes() for field in columns[0]]
        return [
            b"".join(len(field).to_bytes(4, "little") + field.tobytes() for field in row)
            for row in zip(*columns, strict=True)
        ]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each document, int64 [n]."""
        return np.array([len(row) for row in self.ids], np.int64)

    def take(self, chosen: Sequence[int]) -> TokenRows:
        """Return the chosen rows, in this order."""
        return TokenRows({name: [rows[i] for i in chosen] for name, rows in self.fields.items()}, self.shared)


def check_inputs(model: BaseModel) -> None:
    """Raise ConfigError unless a transformers tokenizer turns each text into one row of token ids and a mask."""
    first = type(model[0]).__name__
    if not hasattr(model.tokenizer, "init_kwargs"):
        raise ConfigError(
            f"{first} has a {type(model.tokenizer).__name__} and no tokenizer of transformers; LLMCache needs one, "
            "and a model of word vectors alone is faster than any cache"
        )
    try:
        with private_copy(model) as reader:
            features = reader.preprocess(["a text", "another"])
    except ConfigError:  # the tokenizer cannot be copied
        raise
    except Exception as error:
        raise ConfigError(
            f"{first} cannot turn texts into model inputs ({type(error).__name__}: {error}); LLMCache embeds texts"
        ) from error
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor) or ids.ndim != 2:
        raise ConfigError(
            f"{first} turns texts into {sorted(features)}; LLMCache needs input_ids and a mask "
            "of shape [batch, tokens]. Static embeddings are faster than any cache; for flash attention set "
            "model[0].unpad_inputs = False"
        )


def tokenise(model: BaseModel, texts: Sequence[Any], prompt: str | None, role: str | None) -> TokenRows:
    """Return the token rows of texts, in their order. Texts of similar length should be neighbours: they share padding.

    The rows are those of the model's own `preprocess`, run with a private copy of the tokenizer, so that other users of
    the model's tokenizer change nothing here. Of more than a few plain texts, `preprocess` gets only the first ones, if
    the `tokenizers` library gives the same rows for these; the library then tokenises the rest. Four fifths of the time
    of `preprocess` go to padding, to a search for images in every text, and to unused lists.
    """
    with private_copy(model) as reader:
        return _tokenised(reader, texts, prompt, role)


def _tokenised(model: BaseModel, texts: Sequence[Any], prompt: str | None, role: str | None) -> TokenRows:
    """Tokenise with a model that no other thread uses at the moment; see `tokenise`."""
    by_library = len(texts) > _COMPARED and not (prompt or role) and _reads_text(model)
    first = _preprocessed(model, texts[:_COMPARED] if by_library else texts, prompt, role)
    if not by_library:
        return first
    longest = _agreed(first, _ids(model.tokenizer, texts[:_COMPARED]))
    plain = [i for i in range(_COMPARED, len(texts)) if longest and not _MAYBE_MEDIA(texts[i])]
    ids = dict(zip(plain, _ids(model.tokenizer, [texts[i] for i in plain]), strict=True))
    short = {i: row for i, row in ids.items() if len(row) <= longest}
    rest = [i for i in range(_COMPARED, len(texts)) if i not in short]
    parts = [(rest, _preprocessed(model, [texts[i] for i in rest], None, None))]
    if short:
        parts.append(([*short], first.like([*short.values()])))
    fields = {name: [*rows, *rows[:1] * (len(texts) - len(rows))] for name, rows in first.fields.items()}
    for places, part in parts:
        for name, rows in part.fields.items():
            for place, row in zip(places, rows, strict=True):
                fields[name][place] = row
    return TokenRows(fields, first.shared)


def _preprocessed(model: BaseModel, texts: Sequence[Any], prompt: str | None, role: str | None) -> TokenRows:
    """Return the token rows of texts as the model's `preprocess` makes them."""
    fields: dict[str, list[NDArray[np.int32]]] = {}
    shared: dict[str, Any] = {}
    for start in range(0, len(texts), _TOKENISE):
        part = list(texts[start : start + _TOKENISE])
        padded, shared = _split(model.preprocess(part, prompt=prompt, **({"task": role} if role else {})))
        for name, rows in _unpadded(padded).items():
            fields.setdefault(name, []).extend(rows)
    return TokenRows(fields or {"input_ids": []}, shared)


_MAYBE_MEDIA = re.compile(r"://|^data:|\.[a-z0-9]{2,4}$", re.IGNORECASE).search
"""Find texts that `preprocess` may take for an address of an image, sound or video."""


def _reads_text(model: BaseModel) -> bool:
    """Return whether the `tokenizers` library may replace the model's `preprocess`."""
    if not isinstance(model, (SentenceTransformer, SparseEncoder)):  # pairs, or token vectors by task
        return False
    first = model[0]
    fast = bool(getattr(model.tokenizer, "is_fast", False))
    return type(first) is Transformer and fast and not getattr(first, "do_lower_case", False)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Return token ids from the `tokenizers` library inside a fast tokenizer, which is four times as fast."""
    if not texts:
        return []
    tokenizer(texts[0], padding=False, truncation=True)  # sets the library's padding and truncation
    library = tokenizer.backend_tokenizer
    batches = (library.encode_batch_fast(list(texts[i : i + _TOKENISE])) for i in range(0, len(texts), _TOKENISE))
    return [np.array(encoding.ids, np.int32) for encodings in batches for encoding in encodings]


def _agreed(rows: TokenRows, ids: Sequence[NDArray[np.int32]]) -> int:
    """Return the tokens of the longest row if all rows equal `rows.like(ids)`, else 0."""
    if set(rows.fields) - _KNOWN:
        return 0
    others = rows.like(ids).fields
    same = all(
        np.array_equal(one, other)
        for name, column in rows.fields.items()
        for one, other in zip(column, others[name], strict=True)
    )
    return max(map(len, ids)) if same else 0


def _split(features: Mapping[str, Any]) -> tuple[dict[str, NDArray[np.int32]], dict[str, Any]]:
    """Split model inputs into tables [rows, columns] and inputs that all rows share."""
    shape = features["input_ids"].shape
    padded, shared = {}, {}
    for name, value in features.items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            padded[name] = value.numpy().astype(np.int32)
        elif isinstance(value, torch.Tensor):
            raise ConfigError(
                f"the model input {name!r} has shape {tuple(value.shape)}, not {tuple(shape)} like input_ids"
            )
        else:
            shared[name] = value
    return padded, shared


def _unpadded(padded: Mapping[str, NDArray[np.int32]]) -> dict[str, list[NDArray[np.int32]]]:
    """Cut the padding off tables [rows, columns]; returns one array per row for each model input."""
    mask = padded["attention_mask"]
    lengths = mask.sum(axis=1)
    positions = np.arange(mask.shape[1])
    if set(padded) - _KNOWN:  # the padding of an unknown input may matter: rows stay whole
        spans = [(0, mask.shape[1])] * len(mask)
    elif (mask == (positions < lengths[:, None])).all():
        spans = [(0, n) for n in lengths.tolist()]
    elif (mask == (positions >= mask.shape[1] - lengths[:, None])).all():
        spans = [(mask.shape[1] - n, mask.shape[1]) for n in lengths.tolist()]
    else:
        spans = [(0, mask.shape[1])] * len(mask)
    # copies: a view would keep the whole padded batch in memory
    return {
        name: [table[i, start:end].copy() for i, (start, end) in enumerate(spans)] for name, table in padded.items()
    }


def in_vocabulary(ids: Sequence[NDArray[np.int32]], size: int) -> NDArray[np.bool_]:
    """Return a mask of the rows whose token ids a model with an embedding of this size can look up; bool [n].

    Rows of a store may have other ids if its files were forged.
    """
    return np.fromiter((not len(row) or (row.min() >= 0 and row.max() < size) for row in ids), np.bool_, len(ids))


def tokenise_plainly(tokenizer: Any, texts: Sequence[str], limit: int | None) -> TokenRows:
    """Tokenise texts with a private copy of a transformers tokenizer, cut to `limit` tokens; returns their rows."""
    fields: dict[str, list[NDArray[np.int32]]] = {}
    options: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {"truncation": False}
    with private_copy(tokenizer) as own:
        for start in range(0, len(texts), _TOKENISE):
            columns = own(list(texts[start : start + _TOKENISE]), padding=False, **options)
            for name, rows in columns.items():
                fields.setdefault(name, []).extend(np.array(row, np.int32) for row in rows)
    return TokenRows(fields or {"input_ids": []}, {})


def batch(tokenizer: Any, device: torch.device, rows: TokenRows, chosen: Sequence[int]) -> dict[str, Any]:
    """Return model inputs for the chosen rows: int64 [chosen, longest row] on the device, and the shared inputs."""
    pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    left = getattr(tokenizer, "padding_side", "right") == "left"
    inputs: dict[str, Any] = dict(rows.shared)
    for name, column in rows.fields.items():
        table = _padded([column[i] for i in chosen], pads.get(name) or 0, left)
        inputs[name] = torch.from_numpy(table).to(device)
    return inputs


def _padded(rows: Sequence[NDArray[np.int32]], pad: int, left: bool) -> NDArray[np.int64]:
    width = max(map(len, rows))
    table = np.full((len(rows), width), pad, np.int64)
    for i, row in enumerate(rows):
        if left:
            table[i, width - len(row) :] = row
        else:
            table[i, : len(row)] = row
    return table
