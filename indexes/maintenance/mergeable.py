"""Check that two stores can be merged: same models, same namespace secrets, banks of the same dtype and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmcache.indexes.errors import ModelMismatch
from llmcache.indexes.format.manifest import BankFacts, NamespaceFacts
from llmcache.indexes.maintenance.snapshot import banks
from llmcache.indexes.store import Store

SHOWN = frozenset({"name", "revision", "versions"})
"""Fields of an identity that describe a model's origin; equal models may differ in them."""


def check_same(stores: Sequence[Store]) -> None:
    """Check that the namespaces and banks of these stores can be merged. ModelMismatch when they cannot."""
    seen: dict[str, tuple[Store, NamespaceFacts]] = {}
    shapes: dict[tuple[str, str], tuple[Store, BankFacts]] = {}
    for store in stores:
        for name, space in store.manifest.namespaces.items():
            first, known = seen.setdefault(name, (store, space))
            if not same_identity(known, space):
                one, other = _title(known), _title(space)
                raise ModelMismatch(
                    f"the namespace {name!r} of {first.folder.path} was made with {one}, that of {store.folder.path} "
                    f"with {other}; different are {', '.join(_different(known, space))}; merge stores of one model, or "
                    "give them namespaces of their own"
                )
        for place, facts in banks(store.manifest).items():
            other_store, old = shapes.setdefault(place, (store, facts))
            if _shape(old) != _shape(facts):
                raise ModelMismatch(
                    f"the bank {'/'.join(place)} of {other_store.folder.path} holds {_shape(old)}, that of "
                    f"{store.folder.path} {_shape(facts)}; merge stores that were made with the same settings"
                )


def same_identity(one: NamespaceFacts, other: NamespaceFacts) -> bool:
    """Return whether two namespaces have the same model identity and the same secret."""
    return not _different(one, other)


def _different(one: NamespaceFacts, other: NamespaceFacts) -> list[str]:
    names = (set(one.identity) | set(other.identity)) - SHOWN
    named = sorted(name for name in names if one.identity.get(name) != other.identity.get(name))
    empty: Mapping[str, Any] = {}
    rest = [replace(space, identity=empty, config=empty, banks={}) for space in (one, other)]
    return named + (["the secret of its keys"] if rest[0] != rest[1] else [])


def _title(space: NamespaceFacts) -> str:
    return repr(space.identity.get("name") or space.identity.get("model") or "an unnamed model")


def _shape(facts: BankFacts) -> str:
    return f"{facts.dtype} x {facts.width} (rank {facts.rank}, {facts.feature_width} features)"
