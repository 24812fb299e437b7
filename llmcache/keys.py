"""Keys: the one place where what is looked up becomes 128 bits.

A key is sha256 over fields that each carry their length, cut to 16 bytes. With a secret it is HMAC-SHA256,
and only who knows the secret can tell which key a document has. Never xxhash and never `hash`: whoever can
choose documents could make two of them share a key.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
_length = struct.Struct("<Q").pack


class Seed(Protocol):
    """A hash that has taken in all fields but the last: of hashlib or hmac. It is copied, never changed."""

    def copy(self) -> Seed: ...
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


def framed(*fields: bytes) -> bytes:
    """The fields one after the other, each behind its length in bytes (8 bytes, little-endian).

    No two lists of fields give the same bytes, so ("ab", "c") and ("a", "bc") are different keys.
    """
    return b"".join(_length(len(field)) + field for field in fields)


def key(identity: bytes, kind: str, *fields: bytes, secret: bytes = b"") -> bytes:
    """16 bytes that stand for these fields under this identity.

    identity: digest of the model (`Identity.digest`) or of a layer (`Identity.up_to`).
    kind: what the fields are, "text" or "tokens"; keys of different kinds never meet.
    secret: salt of a namespace; b"" is none.
    """
    return _hashed(framed(identity, kind.encode(), *fields), secret).digest()[:KEY_BYTES]


def key_seed(identity: bytes, kind: str, role: str | None, prompt: str | None, secret: bytes = b"") -> Seed:
    """What all keys of one call have in common, for `text_keys` and `token_keys`.

    role: "query", "document", or None; prompt: the text put before each document. None and "" are different.
    `key(identity, kind, optional(role), optional(prompt), last, secret=secret)` gives the same keys singly.
    """
    return _hashed(framed(identity, kind.encode(), optional(role), optional(prompt)), secret)


def optional(text: str | None) -> bytes:
    """A field that may be missing: b"" for None, "=" and UTF-8 for a text."""
    return b"" if text is None else b"=" + text.encode("utf-8", "surrogatepass")


def text_keys(seed: Seed, texts: Sequence[str]) -> NDArray[np.uint8]:
    """A key per text, uint8 [n, 16]. Lone surrogates are allowed."""
    # a loop of its own, not token_keys over a list of encodings, which would be a second copy of the texts
    copy, digests = seed.copy, bytearray()
    for text in texts:
        field = text.encode("utf-8", "surrogatepass")
        one = copy()
        one.update(_length(len(field)) + field)
        digests += one.digest()
    return _cut(digests)


def token_keys(seed: Seed, rows: Sequence[bytes]) -> NDArray[np.uint8]:
    """A key per row of token bytes (ids, and whatever else goes into the model with them), uint8 [n, 16]."""
    copy, digests = seed.copy, bytearray()
    for row in rows:
        one = copy()
        one.update(_length(len(row)) + row)
        digests += one.digest()
    return _cut(digests)


def _hashed(data: bytes, secret: bytes) -> Seed:
    return hmac.new(secret, data, "sha256") if secret else hashlib.sha256(data)


def _cut(digests: bytearray) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.frombuffer(digests, np.uint8).reshape(-1, 32)[:, :KEY_BYTES])
