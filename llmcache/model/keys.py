"""Keys: the one place where what is looked up becomes 128 bits.

A key is sha256 over fields that each carry their length, cut to 16 bytes. With a secret it is HMAC-SHA256,
and only who knows the secret can tell which key a document has. Never xxhash and never `hash`: whoever can
choose documents could make two of them share a key.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Sequence
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
    # one after the other, not a list of encodings, which would be a second copy of the texts
    try:
        return _keys(seed, map(str.encode, texts))
    except UnicodeEncodeError:
        return _keys(seed, (text.encode("utf-8", "surrogatepass") for text in texts))


def token_keys(seed: Seed, rows: Sequence[bytes]) -> NDArray[np.uint8]:
    """A key per row of token bytes (ids, and whatever else goes into the model with them), uint8 [n, 16]."""
    return _keys(seed, rows)


def _keys(seed: Seed, fields: Iterable[bytes]) -> NDArray[np.uint8]:
    copy, length, digests = seed.copy, _length, list[bytes]()
    for field in fields:
        one = copy()
        one.update(length(len(field)))
        one.update(field)  # by itself: in front of a long text, eight bytes would cost a copy of it
        digests.append(one.digest())
    whole = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    return np.ascontiguousarray(whole[:, :KEY_BYTES])


def _hashed(data: bytes, secret: bytes) -> Seed:
    return hmac.new(secret, data, "sha256") if secret else hashlib.sha256(data)
