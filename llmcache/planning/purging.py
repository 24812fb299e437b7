"""Purge documents by text, id, source or key, and find the keys and token ids of a text's entries."""

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
from llmcache.planning.purged_pairs import tokens_of_pairs
from llmcache.planning.purged_parts import tokens_of_parts

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
    """Remove documents from all banks of a namespace, with every file that may contain them, as `llmcache purge` does.

    path: of the store. ids: of documents; their chunks are included. sources: prefixes of ids. keys: of entries, 32
    hexadecimal digits each; not together with texts. prompts: prompts of the texts, in addition to the model's. reader:
    model or tokenizer for the texts, to find also layer states and KV blocks without an entry; needed for the pairs of
    a CrossEncoder, of which all with one of the texts on a side are removed. unfinished: folders or result files of
    unfinished runs that the store does not know. secret: of the namespace. key: of a signed store.
    dry_run: count only.
    Returns the numbers of removed rows and files. ConfigError when nothing is named, or there is no such namespace;
    Busy while a run or a maintenance process uses the store.
    """
    for name, value in {"texts": texts, "ids": ids, "sources": sources, "keys": keys, "prompts": prompts}.items():
        if isinstance(value, str):
            raise ConfigError(f"{name} is a list of texts, got one text: {value!r:.60}; give [...]")
    if texts and keys:
        raise ConfigError("one purge takes texts or keys; call it once for each")
    opened = Store.open(path, trust="own", key=key)
    try:
        doomed = Doomed(
            namespace, keys=keys_of(keys) if keys else None, ids=ids, sources=sources,
            unfinished=[Path(run) for run in unfinished],
        ) if keys or ids or sources else None  # fmt: skip
        if texts:
            doomed = doomed or Doomed(namespace, unfinished=[Path(run) for run in unfinished])
            doomed = with_texts(opened, doomed, texts, secret=secret, prompts=prompts, reader=reader)
        if doomed is None:
            raise ConfigError("say what to purge: texts, ids, sources or keys")
        return purge(opened, doomed, dry_run=dry_run)
    finally:
        opened.close()


def with_texts(
    store: Store, doomed: Doomed, texts: Sequence[str], *, secret: bytes, prompts: Sequence[str], reader: Any = None
) -> Doomed:
    """Return the purge target extended by documents with these texts, or by the pairs that contain one of them.

    The target must name its namespace. ConfigError for a namespace of pairs without a reader.
    """
    namespace = str(doomed.namespace)
    keys = keys_of_texts(store, namespace, texts, secret=secret, prompts=prompts)
    tokens: list[NDArray[np.int32]] = []
    identity = Identity.from_json(store.manifest.namespaces[namespace].identity)
    if identity.encoder == "CrossEncoder":
        if reader is None:
            raise ConfigError(
                f"namespace {namespace!r} has pairs of texts; to find those with these texts, give its model "
                "(reader= in Python, --model on the command line)"
            )
        tokens = tokens_of_pairs(store, namespace, reader, texts, all_prompts(identity, prompts))
    elif reader is not None:
        tokens = tokens_of_texts(reader, texts, all_prompts(identity, prompts))
        if not identity.encoder:
            read = reader([*texts], add_special_tokens=False, padding=False, truncation=False)["input_ids"]
            tokens += tokens_of_parts(store, namespace, [np.array(ids, np.int32) for ids in read])
    return replace(doomed, keys=keys, texts=len(texts), tokens=tokens)


def keys_of(given: Sequence[str]) -> Keys:
    """Parse keys of 32 hexadecimal digits each. Returns uint64 [n, 2]. ConfigError for anything else."""
    wrong = [key for key in given if not _KEY.fullmatch(key)]
    if wrong:
        raise ConfigError(f"a key is 32 hexadecimal digits, got {wrong[0]!r}")
    return np.frombuffer(bytes.fromhex("".join(given)), np.uint64).reshape(-1, 2)


def keys_of_texts(
    store: Store, namespace: str, texts: Iterable[str], *, secret: bytes = b"", prompts: Sequence[str] = ()
) -> Keys:
    """Return all text keys that entries of these texts can have: for every role and every prompt of the model.

    prompts: further prompts. Returns uint64 [roles * prompts * texts, 2]; key i is of text i % len(texts), as
    `Doomed.texts` expects. No model is needed, since its identity is in the manifest. ConfigError when there is no such
    namespace, or the secret is another.
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
    """Return the candidate prompts: none, the model's prompts, and `more`."""
    return [*dict.fromkeys([None, *(text for _, text in identity.prompts), *more])]


def tokens_of_texts(
    reader: Any, texts: Sequence[str], prompts: Sequence[str | None] = (None,)
) -> list[NDArray[np.int32]]:
    """Return the token ids of each text with each prompt, to find states whose entry was removed.

    reader: a model of sentence-transformers, which truncates texts as in `encode`, or a transformers tokenizer, whose
    ids are returned with and without special tokens, and without those after the text.
    Returns distinct int32 [tokens] arrays.
    """
    from sentence_transformers.base.model import BaseModel
    from torch.nn import Module

    if isinstance(reader, Module) and not isinstance(reader, BaseModel):
        raise ConfigError(f"texts are read by a tokenizer, and this is a {type(reader).__name__}; give its tokenizer")
    distinct: dict[bytes, NDArray[np.int32]] = {}
    for prompt in prompts:
        if isinstance(reader, BaseModel):
            from llmcache.model.tokens import tokenise

            rows = [ids for role in (None, *ROLES) for ids in tokenise(reader, texts, prompt, role).ids]
        else:
            prompted = [(prompt or "") + text for text in texts]
            rows = [
                np.array(ids, np.int32)
                for special in (True, False)
                for ids in reader(prompted, add_special_tokens=special, padding=False)["input_ids"]
            ]
            rows += [_without_end(ids, reader.all_special_ids) for ids in rows]
        distinct |= {row.tobytes(): np.ascontiguousarray(row, np.int32) for row in rows if len(row)}
    return list(distinct.values())


def _without_end(ids: NDArray[np.int32], special: Sequence[int]) -> NDArray[np.int32]:
    """Return token ids without special tokens after the last other one; none if all are special."""
    others = np.flatnonzero(~np.isin(ids, special))
    return ids[: int(others[-1]) + 1] if len(others) else ids[:0]


def kind_of(store: Store, namespace: str) -> str | None:
    """Return the kind of a namespace's model, a name in `KINDS`; None if there is none."""
    from llmcache.model.loading import KINDS

    space = store.namespace(checked_name(namespace))
    encoder = "" if space is None else Identity.from_json(space.identity).encoder
    return next((kind for kind, name in KINDS.items() if name == encoder), None)


def is_decoder(store: Store, namespace: str) -> bool:
    """Return whether a namespace belongs to a model that is none of sentence-transformers."""
    space = store.namespace(checked_name(namespace))
    return space is not None and not Identity.from_json(space.identity).encoder


def reader_of(name: str, kind: str | None = None, *, tokenizer: bool = False) -> Any:
    """Load the model of sentence-transformers with this name or path, or else the tokenizer.

    kind: see `llmcache.model.loading.encoder_class`. tokenizer: True to load the tokenizer in any case.
    ConfigError if there is neither, or for an unknown kind.
    """
    from transformers import AutoTokenizer

    from llmcache.model.loading import encoder_class, packaged_model

    folder = name if os.path.exists(name) else packaged_model(name) or name
    if not tokenizer:
        loads = encoder_class(folder, kind)
        try:
            return loads(folder)
        except (OSError, ValueError, ImportError):
            pass
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the model {name!r} cannot be loaded to read the texts with: {reason}") from error
