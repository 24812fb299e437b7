"""Forecast the exact hits of a corpus before computing anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from llmcache.banks.lookup import first_occurrences
from llmcache.banks.namespaces import admit, checked_name
from llmcache.document import Document
from llmcache.indexes.bank import Bank
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from llmcache.model.identity import Identity
from llmcache.model.keys import key_seed, pair_keys, text_keys
from llmcache.model.prompts import resolve

_BLOCK = 65_536  # documents that are hashed together


@dataclass(frozen=True, slots=True)
class Forecast:
    """Exact hits by text that a run would have. distinct: different texts; known: distinct texts that are stored."""

    documents: int
    distinct: int
    known: int

    @property
    def repeats(self) -> int:
        """Documents whose text occurred earlier in the corpus."""
        return self.documents - self.distinct


def forecast(
    documents: Iterable[Document],
    bank: Bank | None,
    digest: bytes,
    role: str | None,
    prompt: str | None,
    secret: bytes = b"",
) -> Forecast:
    """Look up a corpus in a bank by text, without tokenising, computing or writing.

    documents: all of one text, or all pairs of texts. digest: of the model's identity. Other texts may still hit by
    their token ids, so `known` is a lower bound. Needs 16 bytes of memory per document. Returns the counts.
    """
    seed = key_seed(digest, "text", role, prompt, secret)
    stream = iter(documents)
    blocks = [np.zeros((0, 2), np.uint64)]
    while texts := [document.text for document in islice(stream, _BLOCK)]:
        keys_of: Any = text_keys if isinstance(texts[0], str) else pair_keys  # a corpus has texts or pairs, not both
        blocks.append(keys_of(seed, texts).view(np.uint64))
    keys = np.concatenate(blocks)
    distinct, _ = first_occurrences(keys)
    known = int((bank.find_text(keys[distinct]) >= 0).sum()) if bank is not None else 0
    return Forecast(len(keys), len(distinct), known)


def forecast_against(
    store: Store | None, namespace: str, role: str | None, documents: Iterable[Document], secret: bytes = b""
) -> Forecast:
    """Like `forecast`, for the output bank of a store. Without a store or the namespace, no text is known."""
    space = store.namespace(checked_name(namespace)) if store else None
    if space is not None:
        admit(space, namespace, secret)
    if store is None or space is None or "output" not in space.banks:
        return forecast(documents, None, b"", role, None)
    identity = Identity.from_json(space.identity)
    prompt = resolve(dict(identity.prompts), identity.default_prompt_name, role=role)
    bank = store.bank(namespace, "output", lambda: space.banks["output"], NearChoice())
    return forecast(documents, bank, identity.digest, role, prompt, secret)
