"""Which shard of a corpus a document belongs to: equal texts meet in one shard, so that one store each is enough."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError


def shard_of(texts: Sequence[str], shards: int) -> NDArray[np.int64]:
    """The shard of every text, int64 [n], from 0 to shards - 1; the same on every machine, in every version.

    From the first 8 bytes of the text's sha256, so shards are of equal size to within chance. ConfigError: shards < 1.
    """
    if shards < 1:
        raise ConfigError(f"there is at least one shard, got {shards}")
    digests = b"".join(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8] for text in texts)
    return (np.frombuffer(digests, ">u8") % np.uint64(shards)).astype(np.int64)
