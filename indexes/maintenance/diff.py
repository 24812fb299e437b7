"""Difference of two stores, by keys and checksums, without reading activations."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.commits.create import not_opened
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.format.manifest import NamespaceFacts
from llmcache.indexes.format.rows import ROW
from llmcache.indexes.format.segment import records_of
from llmcache.indexes.maintenance.snapshot import advised, banks
from llmcache.indexes.maintenance.transfer import living
from llmcache.indexes.store import Store


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of one bank in two stores, a and b. Keys are hexadecimal.

    same: number of equal entries. changed: keys in both stores with different bytes. settings: name, a's and b's value.
    """

    namespace: str
    bank: str
    same: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: tuple[str, ...]
    settings: tuple[tuple[str, Any, Any], ...]


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> list[Difference]:
    """Compare two stores, per namespace and bank. A bank that one of them lacks counts as empty."""
    with closing(Store.open(a, uses=False)) as store_a, closing(Store.open(b, uses=False)) as store_b:
        places = sorted({*banks(store_a.manifest), *banks(store_b.manifest)})
        return [_difference(place, store_a, store_b) for place in places]


def _difference(place: tuple[str, str], store_a: Store, store_b: Store) -> Difference:
    left, right = _rows(store_a, place), _rows(store_b, place)
    keys_a, keys_b = (np.ascontiguousarray(rows["key"]).view("V16").ravel() for rows in (left, right))
    _, in_a, in_b = np.intersect1d(keys_a, keys_b, return_indices=True)
    equal = (left["checksum"][in_a] == right["checksum"][in_b]).all(axis=1)
    equal &= left["scale"][in_a].view("u4") == right["scale"][in_b].view("u4")
    settings = _settings(place, store_a, store_b)
    if any(name == "dtype" for name, _, _ in settings):  # equal bytes then mean different numbers
        equal[:] = False
    return Difference(
        *place,
        same=int(equal.sum()),
        only_a=_hex(np.delete(keys_a, in_a)),
        only_b=_hex(np.delete(keys_b, in_b)),
        changed=_hex(keys_a[in_a[~equal]]),
        settings=settings,
    )


def _hex(keys: NDArray[Any]) -> tuple[str, ...]:
    return tuple(sorted(key.tobytes().hex() for key in keys))


def _rows(store: Store, place: tuple[str, str]) -> NDArray[Any]:
    """Return the records of ROW that a reader finds: the newest live row of each key."""
    facts = banks(store.manifest).get(place)
    parts = [np.zeros(0, ROW)]
    for segment in reversed(facts.segments) if facts else ():
        try:
            parts.append(records_of(store.folder, segment)[0][living(store.folder, segment)][::-1])
        except SnapshotDamaged as error:
            raise advised(error, store.folder) from error
        except OSError as error:
            raise not_opened(store.folder.path, error) from error
    rows = np.concatenate(parts)
    _, newest = np.unique(np.ascontiguousarray(rows["key"]).view("V16").ravel(), return_index=True)
    return rows[np.sort(newest)]


def _settings(place: tuple[str, str], store_a: Store, store_b: Store) -> tuple[tuple[str, Any, Any], ...]:
    left, right = _described(place, store_a), _described(place, store_b)
    missing = "-"
    return tuple(
        (name, left.get(name, missing), right.get(name, missing))
        for name in sorted({*left, *right})
        if left.get(name, missing) != right.get(name, missing)
    )


def _described(place: tuple[str, str], store: Store) -> dict[str, Any]:
    """Return identity, settings and shape of a bank as one flat mapping."""
    space: NamespaceFacts | None = store.manifest.namespaces.get(place[0])
    facts = banks(store.manifest).get(place)
    if space is None or facts is None:
        return {}
    shape = {name: getattr(facts, name) for name in ("dtype", "width", "rank", "feature_width")}
    identity = {f"model {name}": value for name, value in space.identity.items()}
    return {**identity, **{f"setting {name}": value for name, value in space.config.items()}, **shape}
