"""Sharding of a corpus by text. Equal texts are in the same shard, so each shard can have a store of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError


def shard_of(texts: Sequence[str], shards: int) -> NDArray[np.int64]:
    """Assign a shard to every text. Returns int64 [n], from 0 to shards - 1; equal on every machine and version.

    The shard is the first 8 bytes of the text's sha256 modulo `shards`, so shards have equal sizes up to chance.
    ConfigError when shards < 1.
    """
    if shards < 1:
        raise ConfigError(f"there is at least one shard, got {shards}")
    digests = b"".join(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8] for text in texts)
    return (np.frombuffer(digests, ">u8") % np.uint64(shards)).astype(np.int64)
