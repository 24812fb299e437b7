"""Which keys lead to the entries of a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

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

    prompts: others that texts were encoded with. Returns uint64 [texts * roles * prompts, 2]. Needs no model: its
    identity is in the manifest. ConfigError: no such namespace, or another secret.
    """
    space = store.namespace(checked_name(namespace))
    if space is None:
        known = ", ".join(sorted(store.manifest.namespaces)) or "none"
        raise ConfigError(f"the store has no namespace {namespace!r}; it has {known}")
    admit(space, namespace, secret)
    identity, listed = Identity.from_json(space.identity), list(texts)
    before = {None, *(text for _, text in identity.prompts), *prompts}
    seeds = [key_seed(identity.digest, "text", role, one, secret) for role in (None, *ROLES) for one in before]
    return np.concatenate([text_keys(seed, listed).view(np.uint64) for seed in seeds])
