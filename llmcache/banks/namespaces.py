"""Namespaces: isolated parts of a store with their own segments, indexes, keys, and a secret that keys the hashes."""

from __future__ import annotations

import hmac
import os

from llmcache.errors import ConfigError
from llmcache.indexes.commits.signatures import checked_secret, secret_from_file
from llmcache.indexes.format.manifest import NamespaceFacts

_SECRET_NAME = "the secret of a namespace"
_LONGEST = 200


def checked_name(name: str) -> str:
    """Return the name. ConfigError when it is empty, too long, or not printable.

    The name must come from the host application, never from a request: a caller who can choose the namespace can read
    its entries.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST or not name.isprintable():
        raise ConfigError(
            f"a namespace is a name of 1 to {_LONGEST} printable characters, got {name!r:.60}; or leave it out"
        )
    return name


def resolved_secret(secret: bytes | None, secret_file: str | os.PathLike[str] | None) -> bytes:
    """Return the secret from either argument, b"" for none. ConfigError when both are given."""
    if secret is not None and secret_file is not None:
        raise ConfigError("secret and secret_file were both given; give one of them")
    if secret_file is not None:
        return secret_from_file(secret_file, _SECRET_NAME)
    return b"" if secret is None else checked_secret(secret, _SECRET_NAME)


def secret_check(secret: bytes) -> str:
    """Return the digest that a store keeps to recognise this secret: 16 hexadecimal digits, "" for no secret."""
    return hmac.digest(secret, b"llmcache secret check 1", "sha256").hex()[:16] if secret else ""


def admit(space: NamespaceFacts, name: str, secret: bytes) -> None:
    """Check a namespace's secret. ConfigError unless the namespace's keys were made with it."""
    if hmac.compare_digest(space.secret_check.encode(), secret_check(secret).encode()):
        return
    if not secret:
        raise ConfigError(f"the namespace {name!r} has a secret; give it (secret=, secret_file=, --secret-file)")
    if not space.secret_check:
        raise ConfigError(f"the namespace {name!r} was made without a secret; leave it out, or start another namespace")
    raise ConfigError(f"this is not the secret of the namespace {name!r}; give the one that it was made with")
