"""Changes of a manifest's namespaces: declare one, and drop a bank of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from llmcache.indexes.format.manifest import Manifest, NamespaceFacts

Change: TypeAlias = Callable[[Manifest], Manifest]


def declared(namespace: str, identity: Mapping[str, Any], config: Mapping[str, Any], secret_check: str) -> Change:
    """Return a change that records a namespace's identity and settings. An existing secret_check stays as it is."""

    def change(base: Manifest) -> Manifest:
        old = base.namespaces.get(namespace)
        banks, check = (old.banks, old.secret_check) if old else ({}, secret_check)
        new = NamespaceFacts(identity, config, banks, check)
        return replace(base, namespaces={**base.namespaces, namespace: new})

    return change


def dropped(namespace: str, name: str) -> Change:
    """Return a change that removes a bank from a namespace, where there is one."""

    def change(base: Manifest) -> Manifest:
        space = base.namespaces.get(namespace)
        if space is None or name not in space.banks:
            return base
        banks = {other: facts for other, facts in space.banks.items() if other != name}
        return replace(base, namespaces={**base.namespaces, namespace: replace(space, banks=banks)})

    return change
