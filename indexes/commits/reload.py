"""Reload: open the segments of the newest generation for banks that are open already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.bank_commit import Place
from llmcache.indexes.commits.create import prepared
from llmcache.indexes.commits.generations import generations
from llmcache.indexes.commits.trust import Trust, judged
from llmcache.indexes.errors import ModelMismatch
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts, Manifest
from llmcache.indexes.format.segment import Segment

_RELOADS = 3  # attempts of a reader when segment files are removed while it opens them

Opened: TypeAlias = tuple[BankFacts, list[Segment], int]
"""A bank's facts in a newer generation, its segments, and how many of them could not be opened."""


def outdated(folder: Folder, manifest: Manifest) -> bool:
    """Return whether the folder has a newer generation than this one."""
    try:
        return generations(folder)[:1] > [manifest.generation]
    except OSError:  # a folder that cannot be listed cannot be reloaded either
        return False


def newest_segments(
    folder: Folder, current: Manifest, banks: Mapping[Place, Bank], trust: Trust, key: bytes | None
) -> tuple[Manifest, dict[Place, Opened]]:
    """Read the newest manifest and open the segments that it names for these banks.

    The banks themselves do not change. current: the manifest that they follow. Returns the new manifest and, for each
    bank, its facts, its segments and the number of segments that could not be opened. Errors as `Store.reload`.
    """
    for attempt in range(_RELOADS):
        prepared(folder)
        _, manifest, _ = judged(folder, trust, key, allow_untrusted=trust == "untrusted")
        for namespace, name in banks:
            _check_same(folder, current, manifest, namespace, name, banks[namespace, name].facts)
        opened = {place: _reopened(manifest, *place, bank) for place, bank in banks.items()}
        newest = generations(folder)[:1] <= [manifest.generation]
        if newest or attempt == _RELOADS - 1 or not any(lost for _, _, lost in opened.values()):
            break
    return manifest, opened


def _reopened(manifest: Manifest, namespace: str, name: str, bank: Bank) -> Opened:
    space = manifest.namespaces.get(namespace)
    empty = replace(bank.facts, segments=(), projection=None, index=None)
    facts = space.banks.get(name, empty) if space else empty
    return facts, *bank.opened(facts)


def _check_same(
    folder: Folder, current: Manifest, manifest: Manifest, namespace: str, name: str, bank: BankFacts
) -> None:
    """ModelMismatch when the namespace belongs to another model or secret in the new manifest, or the bank has
    another dtype or shape there."""
    old, new = current.namespaces.get(namespace), manifest.namespaces.get(namespace)
    other = new.banks.get(name, bank) if new else bank
    shape, other_shape = ((facts.dtype, facts.width, facts.rank, facts.feature_width) for facts in (bank, other))
    remade = old and new and (old.identity, old.secret_check) != (new.identity, new.secret_check)
    if remade or shape != other_shape:
        raise ModelMismatch(
            f"the namespace {namespace!r} of {folder.path} was replaced by one of another model, or with another "
            "secret; open it again"
        )
