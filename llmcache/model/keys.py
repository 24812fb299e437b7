"""Keys of 128 bits, by which entries are looked up.

A key is a sha256 over fields, each with its length, cut to 16 bytes. With a secret it is an HMAC-SHA256, and only
owners of the secret can compute the key of a document. xxhash and `hash` would be unsafe: an attacker who chooses
documents could make two of them share a key.
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
    """A hash object of hashlib or hmac that has been updated with all fields but the last. Copied, never changed."""

    def copy(self) -> Seed: ...
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


def framed(*fields: bytes) -> bytes:
    """Concatenate fields, each after its length (8 bytes, little-endian).

    Different lists of fields give different bytes, so ("ab", "c") and ("a", "bc") are different keys.
    """
    return b"".join(_length(len(field)) + field for field in fields)


def key(identity: bytes, kind: str, *fields: bytes, secret: bytes = b"") -> bytes:
    """Return the key of these fields under this identity, 16 bytes.

    identity: digest of the model (`Identity.digest`) or of a layer (`Identity.up_to`).
    kind: of the fields, "text" or "tokens"; keys of different kinds differ.
    secret: salt of a namespace; b"" is none.
    """
    return _hashed(framed(identity, kind.encode(), *fields), secret).digest()[:KEY_BYTES]


def key_seed(identity: bytes, kind: str, role: str | None, prompt: str | None, secret: bytes = b"") -> Seed:
    """Return the seed of all keys of one call, for `text_keys` and `token_keys`.

    role: "query", "document", or None. prompt: the text before each document; None and "" give different keys.
    `key(identity, kind, optional(role), optional(prompt), last, secret=secret)` returns a single one of these keys.
    """
    return _hashed(framed(identity, kind.encode(), optional(role), optional(prompt)), secret)


def optional(text: str | None) -> bytes:
    """Return the field of an optional text: b"" for None, "=" and UTF-8 for a text."""
    return b"" if text is None else b"=" + text.encode("utf-8", "surrogatepass")


def text_keys(seed: Seed, texts: Sequence[str]) -> NDArray[np.uint8]:
    """Return a key per text, uint8 [n, 16]. Lone surrogates are allowed."""
    # encoded one by one: a list of encodings would be a second copy of the texts
    try:
        return _keys(seed, map(str.encode, texts))
    except UnicodeEncodeError:
        return _keys(seed, (text.encode("utf-8", "surrogatepass") for text in texts))


def pair_keys(seed: Seed, pairs: Sequence[tuple[str, str]]) -> NDArray[np.uint8]:
    """Return a key per ordered pair of texts, uint8 [n, 16]. Each distinct text is hashed once."""
    digests: dict[str, bytes] = {}
    rows = []
    for pair in pairs:
        for text in pair:
            if text not in digests:
                digests[text] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        rows.append(digests[pair[0]] + digests[pair[1]])
    return _keys(seed, rows)


def token_keys(seed: Seed, rows: Sequence[bytes]) -> NDArray[np.uint8]:
    """Return a key per row, uint8 [n, 16]. rows: bytes of token ids and of the other model inputs."""
    return _keys(seed, rows)


def _keys(seed: Seed, fields: Iterable[bytes]) -> NDArray[np.uint8]:
    copy, length, digests = seed.copy, _length, list[bytes]()
    for field in fields:
        hashed = copy()
        hashed.update(length(len(field)))
        hashed.update(field)  # separately: prepending the length would copy a long text
        digests.append(hashed.digest())
    whole = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    return np.ascontiguousarray(whole[:, :KEY_BYTES])


def _hashed(data: bytes, secret: bytes) -> Seed:
    return hmac.new(secret, data, "sha256") if secret else hashlib.sha256(data)
