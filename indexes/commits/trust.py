"""Levels of trust in a store, by the owner of its files and the signature of its manifest.

own        all files belong to this user, and nobody else may write them
signed     the newest manifest has a signature made with the given key; manifests without one do not count
untrusted  everything else: its files never reach FAISS, a row is a hit only when its token ids are equal, and nothing
           is written to the store
"""

from __future__ import annotations

from typing import Literal, get_args

from llmcache.indexes.commits.generations import generations, newest
from llmcache.indexes.commits.signatures import checked_secret, signatures
from llmcache.indexes.errors import ConfigError, SnapshotDamaged, StoreFenced, UntrustedSnapshot
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import Manifest

Trust = Literal["auto", "own", "signed", "untrusted"]
_ROUNDS = 3  # attempts of a reader when manifests are removed while it reads


def check_asked(trust: str, key: bytes | None) -> None:
    """Check the arguments `trust` and `key` of an opening. ConfigError when a store cannot be opened with them."""
    if trust not in get_args(Trust):
        raise ConfigError(f"trust is one of {', '.join(get_args(Trust))}, got {trust!r}")
    if key is not None:
        checked_secret(key, "the key that signs a store")
    elif trust == "signed":
        raise ConfigError("a signature is checked with its key: give key=... (on the command line --key-file)")


def judged(
    folder: Folder, trust: Trust, key: bytes | None, *, allow_untrusted: bool = False
) -> tuple[Trust, Manifest, list[int]]:
    """Determine the level of trust of a store.

    trust: "auto" checks the signature if there is a key, else the owner. Any other level is required: a store that
    does not meet it is untrusted.
    Returns the level, the newest manifest at that level, and the newer generations that were skipped.
    UntrustedSnapshot when the store is untrusted, unless `allow_untrusted`.
    """
    reason = "it was opened as untrusted"
    if trust == "signed" or (trust == "auto" and key is not None):
        try:
            newest_signed = latest(folder, key)
            folder.private = folder.exposed() is not None
            return "signed", *newest_signed
        except UntrustedSnapshot as error:
            reason = str(error)
    elif trust != "untrusted":
        exposed = folder.exposed()
        if exposed is None:
            return "own", *latest(folder, None)
        reason = _exposed_message(exposed)
    if not allow_untrusted:
        raise UntrustedSnapshot(
            f"{folder.path}: {reason}. To read it nevertheless, give allow_untrusted=True (--allow-untrusted): then "
            "only exact token matches count"
        )
    folder.private = True  # other users may write to the folder while it is open
    return "untrusted", *latest(folder, None)


def check_own(folder: Folder) -> None:
    """Check that only this user can write to the folder. UntrustedSnapshot when others can."""
    exposed = folder.exposed()
    if exposed is not None:
        raise UntrustedSnapshot(f"{folder.path}: {_exposed_message(exposed)}")


def _exposed_message(exposed: str) -> str:
    return f"{exposed}, so its content cannot be trusted; if the content is yours: chmod -R go-w, chown -R"


def latest(folder: Folder, key: bytes | None) -> tuple[Manifest, list[int]]:
    """Read the newest manifest of the folder, see `generations.newest`; an empty one if there is none.

    A manifest may be removed after the folder was listed and before it is read; the folder is then listed again.
    """
    for _ in range(_ROUNDS - 1):
        listed = generations(folder)
        try:
            result = newest(folder, listed, key) if listed else (Manifest(), [])
        except (SnapshotDamaged, StoreFenced, UntrustedSnapshot):
            if generations(folder) == listed:
                raise
            continue
        if not result[1] or generations(folder) == listed:
            return result
    listed = generations(folder)
    return newest(folder, listed, key) if listed else (Manifest(), [])


def no_writing(folder: Folder, manifest: Manifest, trust: Trust, key: bytes | None) -> StoreFenced | None:
    """Return the error that forbids writing to a store that was just opened, None if writing is allowed."""
    where = folder.path
    if trust == "untrusted":
        return StoreFenced(f"{where} is not trusted, so it is read-only; make a store of your own to write to")
    if key is None and manifest.generation in signatures(folder).values():
        return StoreFenced(f"{where} is signed, so it is read-only without its key; give the key (--key-file)")
    return None
