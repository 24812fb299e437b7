"""Identity of an attached trunk, which decides the keys of its states and prefixes."""

from __future__ import annotations

import logging

from llmcache.model.description.watch import ModelWatch
from llmcache.model.digests import sha

log = logging.getLogger("llmcache")


class TrunkIdentity:
    """Identity of an attached trunk, renewed whenever the model has changed."""

    def __init__(self, watch: ModelWatch) -> None:
        """watch: of the trunk's module."""
        self._watch, self._identity = watch, watch.identity()

    def digest(self, mode: str) -> bytes:
        """Return the digest of everything that decides the trunk's output. mode: see `running_mode`."""
        return sha(self._identity.digest, mode.encode()) if mode else self._identity.digest

    def up_to(self, layer: int) -> bytes:
        """Return the digest of everything that decides a layer's output."""
        layers = len(self._identity.layers)  # fewer than the layers that run where a block is used several times
        return self._identity.up_to(min(layer, layers - 1)) if layers else self._identity.digest

    def renew(self) -> None:
        """Take the identity of the model as it is now. Entries of its former states are no longer found."""
        identity, changes = self._watch.identity(), self._watch.changes()
        if identity.digest != self._identity.digest:
            log.warning(
                "the attached model has changed: only results of the model as it is now are reused (%s)",
                changes or "it is as it was first",
            )
        self._identity = identity
