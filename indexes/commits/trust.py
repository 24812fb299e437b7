"""How far a store is trusted: whose its files are, and who signed its manifest.

own        this user's, and nobody else may write them
signed     the newest manifest that counts carries a signature made with the key given
untrusted  everything else: nothing of it reaches FAISS, only equal token ids are a match, nothing is written to it
"""

from __future__ import annotations

from typing import Literal, get_args

from llmcache.indexes.commits.generations import generations, newest
from llmcache.indexes.commits.signatures import checked_secret, signatures
from llmcache.indexes.errors import ConfigError, SnapshotDamaged, StoreFenced, UntrustedSnapshot
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import Manifest

Trust = Literal["auto", "own", "signed", "untrusted"]
_ROUNDS = 3  # times a reader looks again when manifests went away under it


def check_asked(trust: str, key: bytes | None) -> None:
    """ConfigError unless a store can be opened with these."""
    if trust not in get_args(Trust):
        raise ConfigError(f"trust is one of {', '.join(get_args(Trust))}, got {trust!r}")
    if key is not None:
        checked_secret(key, "the key that signs a store")
    elif trust == "signed":
        raise ConfigError("a signature is checked with its key: give key=... (on the command line --key-file)")


def judged(
    folder: Folder, trust: Trust, key: bytes | None, *, allow_untrusted: bool = False
) -> tuple[Trust, Manifest, list[int]]:
    """The level of trust a store gets, its newest manifest at that level, and the generations that were passed over.

    auto: with a key the signature decides, without one the owner. A level that is asked for by name is met, or the
    store is untrusted. UntrustedSnapshot when it is, unless that is allowed.
    """
    reason = "it was opened as untrusted"
    if trust == "signed" or (trust == "auto" and key is not None):
        try:
            found = latest(folder, key)
            folder.private = folder.exposed() is not None
            return "signed", *found
        except UntrustedSnapshot as error:
            reason = str(error)
    elif trust != "untrusted":
        exposed = folder.exposed()
        if exposed is None:
            return "own", *latest(folder, None)
        reason = _flawed(exposed)
    if not allow_untrusted:
        raise UntrustedSnapshot(
            f"{folder.path}: {reason}. To read it all the same, give allow_untrusted=True (--allow-untrusted): then "
            "only exact token matches count"
        )
    folder.private = True  # others may write to it while it is open
    return "untrusted", *latest(folder, None)


def check_own(folder: Folder) -> None:
    """UntrustedSnapshot unless the folder is this user's alone."""
    exposed = folder.exposed()
    if exposed is not None:
        raise UntrustedSnapshot(f"{folder.path}: {_flawed(exposed)}")


def _flawed(exposed: str) -> str:
    return f"{exposed}, so nobody vouches for it; if its content is yours: chmod -R go-w, chown -R"


def latest(folder: Folder, key: bytes | None) -> tuple[Manifest, list[int]]:
    """`manifest.newest` of the folder now, an empty one where there is none. Manifests that a listing shows may go
    before they are read: it is then looked again."""
    for _ in range(_ROUNDS - 1):
        listed = generations(folder)
        try:
            found = newest(folder, listed, key) if listed else (Manifest(), [])
        except (SnapshotDamaged, StoreFenced, UntrustedSnapshot):
            if generations(folder) == listed:
                raise
            continue
        if not found[1] or generations(folder) == listed:
            return found
    listed = generations(folder)
    return newest(folder, listed, key) if listed else (Manifest(), [])


def no_writing(folder: Folder, manifest: Manifest, trust: Trust, key: bytes | None) -> StoreFenced | None:
    """Why nothing may be written to a store that was just opened, if so."""
    where = folder.path
    if trust == "untrusted":
        return StoreFenced(f"{where} is not trusted, so nothing is written to it; make a store of your own for that")
    if key is None and manifest.generation in signatures(folder).values():
        return StoreFenced(f"{where} is signed, so nothing is stored without its key; give it (--key-file)")
    return None
