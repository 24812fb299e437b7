"""Which keys and token ids lead to the entries of a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.identity import Identity
from llmcache.indexes.records import Keys
from llmcache.indexes.store import Store
from llmcache.keys import key_seed, text_keys
from llmcache.namespace import admit, checked_name
from llmcache.prompts import ROLES


def keys_of_texts(
    store: Store, namespace: str, texts: Iterable[str], *, secret: bytes = b"", prompts: Sequence[str] = ()
) -> Keys:
    """Text keys under which entries of these texts may be known: in every role, with every prompt of the model.

    prompts: others that texts were encoded with. Returns uint64 [roles * prompts * texts, 2]; key i is of text
    i % len(texts), as `Doomed.texts` expects. Needs no model: its identity is in the manifest.
    ConfigError: no such namespace, or another secret.
    """
    space = store.namespace(checked_name(namespace))
    if space is None:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(f"the store has no namespace {namespace!r}; it has {known}")
    admit(space, namespace, secret)
    identity, listed = Identity.from_json(space.identity), list(texts)
    seeds = [
        key_seed(identity.digest, "text", role, prompt, secret)
        for role in (None, *ROLES)
        for prompt in all_prompts(identity, prompts)
    ]
    return np.concatenate([text_keys(seed, listed).view(np.uint64) for seed in seeds])


def all_prompts(identity: Identity, more: Sequence[str] = ()) -> list[str | None]:
    """What may be put before a text: nothing, each prompt of the model, and more."""
    return [*dict.fromkeys([None, *(text for _, text in identity.prompts), *more])]


def tokens_of_texts(
    reader: Any, texts: Sequence[str], prompts: Sequence[str | None] = (None,)
) -> list[NDArray[np.int32]]:
    """Token ids of each text behind each prompt, by which states are found whose entry is gone.

    reader: a SentenceTransformer, which cuts long texts as it does when it encodes, or a tokenizer of transformers,
    whose ids are given with and without special tokens. Returns int32 [tokens] arrays, each once.
    """
    from sentence_transformers import SentenceTransformer

    found: dict[bytes, NDArray[np.int32]] = {}
    for prompt in prompts:
        if isinstance(reader, SentenceTransformer):
            from llmcache.tokens import tokenise

            rows = [ids for role in (None, *ROLES) for ids in tokenise(reader, texts, prompt, role).ids]
        else:
            whole = [(prompt or "") + text for text in texts]
            rows = [
                np.array(ids, np.int32)
                for special in (True, False)
                for ids in reader(whole, add_special_tokens=special, padding=False)["input_ids"]
            ]
        found |= {row.tobytes(): np.ascontiguousarray(row, np.int32) for row in rows if len(row)}
    return list(found.values())


def reader_of(name: str) -> Any:
    """The SentenceTransformer, or else the tokenizer, of this name or path. ConfigError when it has neither."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    try:
        return SentenceTransformer(name)
    except (OSError, ValueError, ImportError):
        pass
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the model {name!r} cannot be loaded to read the texts with: {reason}") from error
