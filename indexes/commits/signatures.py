"""Signatures of manifests: HMAC-SHA256 over a manifest's bytes, in a separate file.

The signature must exist before the manifest does; otherwise readers and other writers would take the newest manifest
for an unsigned one. But a writer does not know its generation N before it has won the race for N. So the signature is
first written under a name with the digest of the manifest, `m-N-<32 hex digits>.sig`, which writers that lose the race
do not use. Then the manifest is linked, and then the file is renamed to `m-N.sig`. A process that tries the first name
and then the second finds the signature at any time, also after a crash at any call. `openssl dgst -sha256 -hmac`
computes the same value.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from contextlib import suppress
from pathlib import Path

from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.write_once import write_whole

LEAST = 32
"""Minimum length of a key or secret in bytes."""
_LIMIT = 4096
_NAME = re.compile(r"m-(\d{12})(-[0-9a-f]{32})?\.sig")


def signature_name(generation: int) -> str:
    """Return the final file name of a generation's signature."""
    return f"m-{generation:012d}.sig"


def _candidate(generation: int, data: bytes) -> str:
    return f"m-{generation:012d}-{hashlib.sha256(data).hexdigest()[:32]}.sig"


def _line(key: bytes, data: bytes) -> bytes:
    return b"hmac-sha256:" + hmac.new(key, data, "sha256").hexdigest().encode() + b"\n"


def announce(folder: Folder, generation: int, data: bytes, key: bytes) -> str:
    """Write the signature of a manifest durably, before the manifest is linked. Returns the file's name.

    OSError when it cannot be written.
    """
    name = _candidate(generation, data)
    write_whole(folder, name, [_line(key, data)])
    folder.sync_folder("")  # after a power loss the manifest must not exist without its signature
    return name


def sign(folder: Folder, generation: int, data: bytes, key: bytes) -> None:
    """Sign an existing manifest. OSError when the signature cannot be written."""
    folder.replace(announce(folder, generation, data, key), signature_name(generation))
    folder.sync_folder("")


def is_signed(folder: Folder, generation: int, data: bytes, key: bytes) -> bool:
    """Return whether these bytes of a manifest are signed with this key."""
    wanted = _line(key, data)
    for name in (_candidate(generation, data), signature_name(generation)):  # the order matters, see the module
        with suppress(OSError, SnapshotDamaged):
            if hmac.compare_digest(folder.read(name, _LIMIT), wanted):
                return True
    return False


def signatures(folder: Folder) -> dict[str, int]:
    """List the signature files of a folder, by name, with their generations."""
    return {name: int(match[1]) for name in folder.names() if (match := _NAME.fullmatch(name))}


# -- keys and secrets ---------------------------------------------------------------------------------------


def checked_secret(secret: bytes, what: str) -> bytes:
    """Check the length of a key or secret and return it. ConfigError when it is too short.

    what: name of the secret in the message.
    """
    if not isinstance(secret, bytes) or len(secret) < LEAST:
        actual = f"{len(secret)} bytes" if isinstance(secret, bytes) else type(secret).__name__
        raise ConfigError(f"{what} has at least {LEAST} bytes, got {actual}; make one: openssl rand -hex 32 > FILE")
    return secret


def secret_from_file(path: str | os.PathLike[str], what: str) -> bytes:
    """Read a secret from a file, without the last line end of a text, so that it can equal a variable's value.

    what: name of the secret in messages. ConfigError when the file cannot be read or the secret is too short.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"{what} cannot be read from {os.fspath(path)}: {error.strerror}") from None
    if len(data) > _LIMIT:
        raise ConfigError(f"{what} has at most {_LIMIT:,} bytes, and {os.fspath(path)} has more; is it the right file?")
    text = data.removesuffix(b"\n").removesuffix(b"\r")
    return checked_secret(text if text.isascii() and text.decode("ascii").isprintable() else data, what)


def secret_from_variable(name: str, what: str) -> bytes:
    """Read a secret from an environment variable. ConfigError when it is not set or too short."""
    text = os.environ.get(name)
    if text is None:
        raise ConfigError(f"{what} should be in the variable {name}, which is not set; export it, or give a file")
    return checked_secret(os.fsencode(text), what)
