"""Namespaces: parts of a store with segments, indexes and keys of their own, and the secret that goes into the keys."""

from __future__ import annotations

import hmac
import os

from llmcache.errors import ConfigError
from llmcache.indexes.commits.signatures import checked_secret, secret_from_file
from llmcache.indexes.format.manifest import NamespaceFacts

_WHAT = "the secret of a namespace"
_LONGEST = 200


def checked_name(name: str) -> str:
    """The same name. ConfigError when it is empty, too long, or not printable. It comes from the host application,
    never from what is asked: who can choose a namespace reads what is in it."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST or not name.isprintable():
        raise ConfigError(
            f"a namespace is a name of 1 to {_LONGEST} printable characters, got {name!r:.60}; or leave it out"
        )
    return name


def resolved_secret(secret: bytes | None, secret_file: str | os.PathLike[str] | None) -> bytes:
    """The secret that was given in one of two ways, b"" for none."""
    if secret is not None and secret_file is not None:
        raise ConfigError("secret and secret_file were both given; give one of them")
    if secret_file is not None:
        return secret_from_file(secret_file, _WHAT)
    return b"" if secret is None else checked_secret(secret, _WHAT)


def secret_check(secret: bytes) -> str:
    """What a store keeps to tell this secret from another: 16 hexadecimal digits, "" for no secret."""
    return hmac.digest(secret, b"llmcache secret check 1", "sha256").hex()[:16] if secret else ""


def admit(space: NamespaceFacts, name: str, secret: bytes) -> None:
    """ConfigError unless this is the secret that the namespace's keys were made with."""
    if hmac.compare_digest(space.secret_check.encode(), secret_check(secret).encode()):
        return
    if not secret:
        raise ConfigError(f"the namespace {name!r} has a secret; give it (secret=, secret_file=, --secret-file)")
    if not space.secret_check:
        raise ConfigError(f"the namespace {name!r} was made without a secret; leave it out, or start another namespace")
    raise ConfigError(f"this is not the secret of the namespace {name!r}; give the one that it was made with")
