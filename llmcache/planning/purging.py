"""Purging documents by text, id, source or key; and which keys and token ids lead to the entries of a text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.namespaces import admit, checked_name
from llmcache.errors import ConfigError
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.maintenance.purge import Doomed, Purged, purge
from llmcache.indexes.store import Store
from llmcache.model.identity import Identity
from llmcache.model.keys import key_seed, text_keys
from llmcache.model.prompts import ROLES

_KEY = re.compile(r"[0-9a-fA-F]{32}")


def purge_documents(
    path: str | os.PathLike[str],
    *,
    namespace: str = "default",
    texts: Sequence[str] = (),
    ids: Sequence[str] = (),
    sources: Sequence[str] = (),
    keys: Sequence[str] = (),
    prompts: Sequence[str] = (),
    reader: Any = None,
    unfinished: Sequence[str | os.PathLike[str]] = (),
    secret: bytes = b"",
    key: bytes | None = None,
    dry_run: bool = False,
) -> Purged:
    """Remove documents from all banks of a namespace, with every file that could hold them, as `llmcache purge` does.

    path: of the store. ids: of documents, with their chunks. sources: what ids begin with. keys: of entries, 32
    hexadecimal digits; not together with texts. prompts: others than the model's that texts were encoded with.
    reader: the model or tokenizer that reads the texts, to find also what was stored without an entry. unfinished:
    folders or result files of unfinished runs that the store was not told of. secret: of the namespace. key: of a
    signed store. dry_run: count only.
    ConfigError: nothing is named, or no such namespace. Busy: a run is at work, or another process maintains the store.
    """
    if texts and keys:
        raise ConfigError("one purge takes texts or keys; call it once for each")
    opened = Store.open(path, trust="own", key=key)
    try:
        doomed = Doomed(
            namespace, keys=keys_of(keys) if keys else None, ids=ids, sources=sources,
            unfinished=[Path(one) for one in unfinished],
        ) if keys or ids or sources else None  # fmt: skip
        if texts:
            doomed = doomed or Doomed(namespace, unfinished=[Path(one) for one in unfinished])
            doomed = with_texts(opened, doomed, texts, secret=secret, prompts=prompts, reader=reader)
        if doomed is None:
            raise ConfigError("say what to purge: texts, ids, sources or keys")
        return purge(opened, doomed, dry_run=dry_run)
    finally:
        opened.close()


def with_texts(
    store: Store, doomed: Doomed, texts: Sequence[str], *, secret: bytes, prompts: Sequence[str], reader: Any = None
) -> Doomed:
    """Extend a purge target by the documents with these texts; the target has to name its namespace."""
    namespace = str(doomed.namespace)
    keys = keys_of_texts(store, namespace, texts, secret=secret, prompts=prompts)
    tokens: list[NDArray[np.int32]] = []
    if reader is not None:
        identity = Identity.from_json(store.manifest.namespaces[namespace].identity)
        tokens = tokens_of_texts(reader, texts, all_prompts(identity, prompts))
    return replace(doomed, keys=keys, texts=len(texts), tokens=tokens)


def keys_of(given: Sequence[str]) -> Keys:
    """Keys written as 32 hexadecimal digits each; uint64 [n, 2]."""
    wrong = [one for one in given if not _KEY.fullmatch(one)]
    if wrong:
        raise ConfigError(f"a key is 32 hexadecimal digits, got {wrong[0]!r}")
    return np.frombuffer(bytes.fromhex("".join(given)), np.uint64).reshape(-1, 2)


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
    """Candidate prompts: none, each prompt of the model, and the ones given."""
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
            from llmcache.model.tokens import tokenise

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

    from llmcache.model.loading import packaged_model

    folder = name if os.path.exists(name) else packaged_model(name) or name
    try:
        return SentenceTransformer(folder)
    except (OSError, ValueError, ImportError):
        pass
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the model {name!r} cannot be loaded to read the texts with: {reason}") from error
