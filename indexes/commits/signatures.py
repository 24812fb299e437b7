"""Signatures of manifests: HMAC-SHA256 over a manifest's bytes, in a file beside it.

A writer cannot know its number before it has won it, and the signature must be there before the manifest is: else a
reader, or worse a writer, would take the newest manifest for a stranger's. So a signature is first written under a name
that holds the manifest's own digest, `m-N-<32 hex digits>.sig`, where losers of the race for N cannot meet it; then the
manifest is linked; then the file is renamed to `m-N.sig`. Whoever looks under the first name, then under the second,
finds it at any moment, and after a crash at any call. `openssl dgst -sha256 -hmac` computes the same number.
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
"""Bytes that a key or a secret must have."""
_LIMIT = 4096
_NAME = re.compile(r"m-(\d{12})(-[0-9a-f]{32})?\.sig")


def signature_name(generation: int) -> str:
    return f"m-{generation:012d}.sig"


def _candidate(generation: int, data: bytes) -> str:
    return f"m-{generation:012d}-{hashlib.sha256(data).hexdigest()[:32]}.sig"


def _line(key: bytes, data: bytes) -> bytes:
    return b"hmac-sha256:" + hmac.new(key, data, "sha256").hexdigest().encode() + b"\n"


def announce(folder: Folder, generation: int, data: bytes, key: bytes) -> str:
    """Make the signature of a manifest durable before the manifest is linked; the file's name. OSError: it was not."""
    name = _candidate(generation, data)
    write_whole(folder, name, [_line(key, data)])
    folder.sync_folder("")  # the manifest's entry must not survive a power loss that this one does not
    return name


def sign(folder: Folder, generation: int, data: bytes, key: bytes) -> None:
    """Sign a manifest that is there already. OSError: it was not done."""
    folder.replace(announce(folder, generation, data, key), signature_name(generation))
    folder.sync_folder("")


def is_signed(folder: Folder, generation: int, data: bytes, key: bytes) -> bool:
    """Whether these bytes of a manifest are signed with this key."""
    wanted = _line(key, data)
    for name in (_candidate(generation, data), signature_name(generation)):  # in this order: see above
        with suppress(OSError, SnapshotDamaged):
            if hmac.compare_digest(folder.read(name, _LIMIT), wanted):
                return True
    return False


def signatures(folder: Folder) -> dict[str, int]:
    """The signature files of one listing, with the generations they are for."""
    return {name: int(match[1]) for name in folder.names() if (match := _NAME.fullmatch(name))}


# -- keys and secrets ---------------------------------------------------------------------------------------


def checked_secret(secret: bytes, what: str) -> bytes:
    """The same bytes. ConfigError when they are too few to be one; what: how people know it."""
    if not isinstance(secret, bytes) or len(secret) < LEAST:
        found = f"{len(secret)} bytes" if isinstance(secret, bytes) else type(secret).__name__
        raise ConfigError(f"{what} has at least {LEAST} bytes, got {found}; make one: openssl rand -hex 32 > FILE")
    return secret


def secret_from_file(path: str | os.PathLike[str], what: str) -> bytes:
    """What is in a file. A text's last line end does not count, so that a file and a variable can say the same."""
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
    """What is in an environment variable."""
    text = os.environ.get(name)
    if text is None:
        raise ConfigError(f"{what} should be in the variable {name}, which is not set; export it, or give a file")
    return checked_secret(os.fsencode(text), what)
