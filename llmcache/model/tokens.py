"""From texts to rows of token ids without padding, and from chosen rows to padded batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from llmcache.errors import ConfigError
from llmcache.model.private_tokenizer import private_copy

_TOKENISE = 256
_COMPARED = 8  # texts, the first ones of a call, that are tokenised in both ways
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
        """Rows of other token ids, all of them seen, all of one segment, as these rows have them for a plain text."""
        plain: dict[str, Callable[[NDArray[np.int32]], NDArray[np.int32]]] = {
            "input_ids": np.array,
            "attention_mask": np.ones_like,
            "token_type_ids": np.zeros_like,
        }
        if odd := sorted(set(self.fields) - set(plain)):
            raise ConfigError(
                f"the model takes {odd[0]!r} beside token ids: the state of a neighbour cannot be taken over"
            )
        return TokenRows({name: [plain[name](one) for one in ids] for name in self.fields}, self.shared)

    def key_bytes(self) -> list[bytes]:
        """What of each row the model sees, as bytes; equal only for rows that the model cannot tell apart."""
        columns = [self.fields[name] for name in sorted(self.fields)]
        if len(columns) == 1:
            return [one.tobytes() for one in columns[0]]
        return [
            b"".join(len(one).to_bytes(4, "little") + one.tobytes() for one in row)
            for row in zip(*columns, strict=True)
        ]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each document, int64 [n]."""
        return np.array([len(one) for one in self.ids], np.int64)

    def take(self, chosen: Sequence[int]) -> TokenRows:
        """Some of the rows, in this order."""
        return TokenRows({name: [rows[i] for i in chosen] for name, rows in self.fields.items()}, self.shared)


def check_inputs(model: SentenceTransformer) -> None:
    """ConfigError unless the model takes one row of token ids and a mask per text, from a tokenizer of transformers."""
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


def tokenise(model: SentenceTransformer, texts: Sequence[str], prompt: str | None, role: str | None) -> TokenRows:
    """Token rows of some texts, in their order. Texts of like length should be neighbours: they are padded together.

    What the model's own `preprocess` makes of them, with a private copy of its tokenizer: the model's is left alone,
    and whoever uses that one meanwhile changes nothing here. Of more than a few plain texts `preprocess` is asked for
    the first ones only, if the tokenizer's own library gives the same for these: padding, a look for pictures in every
    text, and making lists of what nobody asked for take four fifths of the time.
    """
    with private_copy(model) as reader:
        return _tokenised(reader, texts, prompt, role)


def _tokenised(model: SentenceTransformer, texts: Sequence[str], prompt: str | None, role: str | None) -> TokenRows:
    """As `tokenise`, by a model that nobody else tokenises with at the moment."""
    alone = len(texts) > _COMPARED and not (prompt or role) and _reads_text(model)
    first = _preprocessed(model, texts[:_COMPARED] if alone else texts, prompt, role)
    if not alone:
        return first
    longest = _agreed(first, _ids(model.tokenizer, texts[:_COMPARED]))
    plain = [i for i in range(_COMPARED, len(texts)) if longest and not _ODD(texts[i])]
    ids = dict(zip(plain, _ids(model.tokenizer, [texts[i] for i in plain]), strict=True))
    known = {i: row for i, row in ids.items() if len(row) <= longest}
    odd = [i for i in range(_COMPARED, len(texts)) if i not in known]
    parts = [(odd, _preprocessed(model, [texts[i] for i in odd], None, None))]
    if known:
        parts.append(([*known], first.like([*known.values()])))
    fields = {name: [*rows, *rows[:1] * (len(texts) - len(rows))] for name, rows in first.fields.items()}
    for places, found in parts:
        for name, rows in found.fields.items():
            for place, row in zip(places, rows, strict=True):
                fields[name][place] = row
    return TokenRows(fields, first.shared)


def _preprocessed(model: SentenceTransformer, texts: Sequence[str], prompt: str | None, role: str | None) -> TokenRows:
    fields: dict[str, list[NDArray[np.int32]]] = {}
    shared: dict[str, Any] = {}
    for start in range(0, len(texts), _TOKENISE):
        part = list(texts[start : start + _TOKENISE])
        padded, shared = _split(model.preprocess(part, prompt=prompt, **({"task": role} if role else {})))
        for name, rows in _unpadded(padded).items():
            fields.setdefault(name, []).extend(rows)
    return TokenRows(fields or {"input_ids": []}, shared)


_ODD = re.compile(r"://|^data:|\.[a-z0-9]{2,4}$", re.IGNORECASE).search  # may be taken for a picture, sound or film


def _reads_text(model: SentenceTransformer) -> bool:
    first = model[0]
    fast = bool(getattr(model.tokenizer, "is_fast", False))
    return type(first) is Transformer and fast and not getattr(first, "do_lower_case", False)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Token ids by the library below a fast tokenizer of transformers, which is four times as fast."""
    if not texts:
        return []
    tokenizer(texts[0], padding=False, truncation=True)  # the library pads and cuts as in the last call through here
    library = tokenizer.backend_tokenizer
    blocks = (library.encode_batch_fast(list(texts[i : i + _TOKENISE])) for i in range(0, len(texts), _TOKENISE))
    return [np.array(one.ids, np.int32) for block in blocks for one in block]


def _agreed(rows: TokenRows, ids: Sequence[NDArray[np.int32]]) -> int:
    """Tokens of the longest row if all rows are what `like` makes of these ids, else 0."""
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
    mask = padded["attention_mask"]
    lengths = mask.sum(axis=1)
    positions = np.arange(mask.shape[1])
    if set(padded) - _KNOWN:  # inputs whose padding may carry a meaning: rows stay whole
        spans = [(0, mask.shape[1])] * len(mask)
    elif (mask == (positions < lengths[:, None])).all():
        spans = [(0, n) for n in lengths.tolist()]
    elif (mask == (positions >= mask.shape[1] - lengths[:, None])).all():
        spans = [(mask.shape[1] - n, mask.shape[1]) for n in lengths.tolist()]
    else:
        spans = [(0, mask.shape[1])] * len(mask)
    # copies: a view would keep the whole padded batch alive
    return {
        name: [table[i, start:end].copy() for i, (start, end) in enumerate(spans)] for name, table in padded.items()
    }


def in_vocabulary(ids: Sequence[NDArray[np.int32]], size: int) -> NDArray[np.bool_]:
    """Mask of the rows whose token ids a model with an embedding of this size can look up; bool [n].

    Rows of a store may hold others where somebody made its files.
    """
    return np.fromiter((not len(one) or (one.min() >= 0 and one.max() < size) for one in ids), np.bool_, len(ids))


def tokenise_plainly(tokenizer: Any, texts: Sequence[str], limit: int | None) -> TokenRows:
    """Rows of what a tokenizer of transformers makes of these texts, cut to `limit` tokens.

    A private copy of the tokenizer is called.
    """
    fields: dict[str, list[NDArray[np.int32]]] = {}
    ways: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {"truncation": False}
    with private_copy(tokenizer) as own:
        for start in range(0, len(texts), _TOKENISE):
            columns = own(list(texts[start : start + _TOKENISE]), padding=False, **ways)
            for name, rows in columns.items():
                fields.setdefault(name, []).extend(np.array(row, np.int32) for row in rows)
    return TokenRows(fields or {"input_ids": []}, {})


def batch(tokenizer: Any, device: torch.device, rows: TokenRows, chosen: Sequence[int]) -> dict[str, Any]:
    """Model inputs for some of the rows: int64 [chosen, longest of them] on the device, and what is shared."""
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
