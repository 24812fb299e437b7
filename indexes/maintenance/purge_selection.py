"""Select the rows of documents to purge, in every bank and under every key.

An entry is named by its key, by a text key (alias), by the id of its document, or by its token ids. All rows of the
namespace with the same token ids contain the same document, in any bank (states of layers, outputs of heads,
predictions), and are selected with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.errors import ConfigError, SnapshotDamaged
from llmcache.indexes.eviction.dependents import holds_chains
from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.manifest import BankFacts, Manifest, NamespaceFacts, SegmentFacts
from llmcache.indexes.format.rows import Keys
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.chains import Chains
from llmcache.indexes.maintenance.derived import (
    DISTILLED,
    FITTED,
    calibrated_bank,
    calibrations,
    fitted_keys,
    may_hold,
    without,
)

log = logging.getLogger("llmcache")

Mask: TypeAlias = NDArray[np.bool_]
_NONE: Mask = np.zeros(0, np.bool_)
Place: TypeAlias = tuple[str, str]  # namespace and bank

_CONTINUED = ("answers", "likelihoods")  # banks whose rows may continue a document: a prompt, and what follows it
_SOURCE_BYTES = 1024  # bytes of a source id that a sealed segment stores
_SPAN = re.compile(r"#\d*(-\d*)?")  # suffix that chunking appends to a document id


@dataclass(frozen=True, slots=True)
class Doomed:
    """Target of a purge: a whole namespace, all segments of one writer, or named documents, in one namespace or in all.

    keys: uint64 [n, 2], of rows or of texts. ids: of documents, including their chunks. sources: prefixes of ids.
    tokens: token ids of documents, each int32 [tokens]. texts: number of texts of the keys: key i belongs to text
    i % texts; 0: each key belongs to a different document. unfinished: folders of unfinished runs, or their result
    files, to discard in addition to the registered runs.
    """

    namespace: str | None = None
    writer: str | None = None
    keys: Keys | None = None
    ids: Sequence[str] = ()
    sources: Sequence[str] = ()
    tokens: Sequence[NDArray[np.int32]] = ()
    texts: int = 0
    unfinished: Sequence[Path] = ()

    def __post_init__(self) -> None:
        for name in ("ids", "sources"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is a list of texts, got one text: {getattr(self, name)!r:.60}; give [...]")
        if self.writer == "" or (self.namespace is None and self.writer is None and not self.names_documents):
            raise ConfigError("say what to purge: a namespace, a writer, keys, texts, ids or sources")
        if "" in self.ids or "" in self.sources:
            raise ConfigError("an id or source to purge is empty; name a document, or a namespace to purge it all")

    @property
    def names_documents(self) -> bool:
        """Return whether single documents are to be purged, rather than a namespace or the segments of a writer."""
        return self.keys is not None or bool(self.ids or self.sources or len(self.tokens))

    @property
    def whole(self) -> str | None:
        """Return the namespace to remove as a whole, None if it is not removed as a whole."""
        return self.namespace if self.writer is None and not self.names_documents else None


def clipped(source: str) -> str:
    """Return a source id as a sealed segment returns it, cut to 1024 bytes."""
    return source.encode("utf-8", "surrogatepass")[:_SOURCE_BYTES].decode("utf-8", "replace")


class Documents:
    """Documents to purge, and the keys, tokens and ids of them that the selection finds.

    rows: keys of their rows. texts: the given keys, which may be text keys. tokens: their token ids, as bytes.
    names: ids of documents whose rows were selected.
    """

    def __init__(self, doomed: Doomed) -> None:
        self.doomed = doomed
        keys = np.zeros((0, 2), np.uint64) if doomed.keys is None else doomed.keys
        self.texts = KeySet(keys)
        self.rows = KeySet(keys)
        self.tokens: set[bytes] = {np.ascontiguousarray(ids, "<i4").tobytes() for ids in doomed.tokens} - {b""}
        self.names: set[str] = set()
        self._ids = {clipped(document) for document in doomed.ids}
        self._prefixes = tuple(clipped(source).rstrip("\ufffd") for source in doomed.sources)
        groups = np.arange(len(keys)) % doomed.texts if doomed.texts else np.arange(len(keys))
        self._group = {key.tobytes(): int(group) for key, group in zip(np.ascontiguousarray(keys), groups, strict=True)}
        self._groups_found: set[int] = set()
        self._named_found: set[str] = set()

    def note_keys(self, keys: Keys) -> None:
        """Record keys that the store has, to find out which of the given documents exist."""
        self._groups_found |= {self._group[key.tobytes()] for key in keys if key.tobytes() in self._group}

    def named(self, source: str) -> bool:
        """Return whether this source id belongs to a document that was named by id."""
        if not source:
            return False
        if source in self._ids:
            self._named_found.add(source)
            return True
        if self._prefixes and source.startswith(self._prefixes):
            self._named_found |= {prefix for prefix in self._prefixes if source.startswith(prefix)}
            return True
        stem, mark, span = source.rpartition("#")
        if mark and stem in self._ids and _SPAN.fullmatch(mark + span):
            self._named_found.add(stem)
            return True
        return False

    @property
    def by_name(self) -> bool:
        return bool(self._ids or self._prefixes)

    @property
    def all_found(self) -> bool:
        """Return whether an entry was found for every named document."""
        return (
            len(self._groups_found) == len(set(self._group.values()))
            and len(self._named_found) == len({*self._ids, *self._prefixes})
            and not len(self.doomed.tokens)
        )


class KeySet:
    """Set of 128-bit keys with vectorised membership tests."""

    def __init__(self, keys: Keys) -> None:
        self._known: set[bytes] = set()
        self._firsts = np.zeros(0, np.uint64)
        self.add(keys)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, keys: Keys) -> None:
        new = {key.tobytes() for key in np.ascontiguousarray(keys)} - self._known
        if new:
            self._known |= new
            self._firsts = np.unique(np.frombuffer(b"".join(self._known), np.uint64).reshape(-1, 2)[:, 0])

    def among(self, keys: Keys) -> Mask:
        """Return which keys, uint64 [n, 2], are in the set, bool [n]."""
        known = np.isin(keys[:, 0], self._firsts)
        places = np.flatnonzero(known)
        known[places] = [keys[i].tobytes() in self._known for i in places.tolist()]
        return known


def among(keys: Keys, wanted: Keys) -> Mask:
    """Return which keys are in another set of keys, bool [n]. Both are uint64 [n, 2]."""
    return KeySet(wanted).among(keys)


@dataclass(slots=True)
class Part:
    """Rows and aliases of one segment to remove.

    segment: None if it cannot be read or is removed whole. rows, aliases: masks over its rows and aliases, empty if
    there is no segment.
    """

    facts: SegmentFacts
    segment: Segment | None
    rows: Mask
    aliases: Mask
    whole: bool = False

    @property
    def goes(self) -> bool:
        """Return whether anything of the segment is removed."""
        return self.whole or self.segment is None or bool(self.rows.any() or self.aliases.any())


@dataclass(slots=True)
class Selection:
    """Everything to remove from one generation. parts: by namespace and bank. settings: calibrations, by namespace."""

    parts: dict[Place, list[Part]] = field(default_factory=dict)
    settings: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def going(self) -> list[Part]:
        """Return the parts of which anything is removed."""
        return [part for parts in self.parts.values() for part in parts if part.goes]

    def __bool__(self) -> bool:
        return bool(self.going or any(self.settings.values()))

    def earliest(self, place: Place) -> int | None:
        """Return when the first selected entry of a bank was put, seconds since the epoch; None if none is selected."""
        times = [
            0 if part.segment is None else int(part.segment.rows["created"][part.rows | part.whole].min())
            for part in self.parts.get(place, ())
            if part.segment is None or part.rows.any() or (part.whole and len(part.segment))
        ]
        return min(times, default=None)


def select(folder: Folder, manifest: Manifest, doomed: Doomed, documents: Documents) -> Selection:
    """Select what to remove from this generation. documents: filled with the keys and ids found, for the next round."""
    selection = Selection()
    spaces = {name: one for name, one in manifest.namespaces.items() if doomed.namespace in {None, name}}
    if doomed.whole is not None:
        for name, space in spaces.items():
            for bank, facts in space.banks.items():
                selection.parts[name, bank] = [_whole(segment) for segment in facts.segments]
        return selection
    for name, space in spaces.items():
        _select_in_namespace(folder, name, space, doomed, documents, selection)
    for name, space in spaces.items():
        selection.settings[name] = _affected(name, space, doomed, documents, selection)
        _select_derived(folder, name, space, selection)
    return selection


def _whole(facts: SegmentFacts) -> Part:
    return Part(facts, None, _NONE, _NONE, whole=True)


def _select_in_namespace(
    folder: Folder, name: str, space: NamespaceFacts, doomed: Doomed, documents: Documents, selection: Selection
) -> None:
    """Select rows in the banks of one namespace, except data that is derived from the namespace as a whole."""
    parts: dict[str, list[Part]] = {}
    for bank, facts in space.banks.items():
        if bank != FITTED:
            parts[bank] = selection.parts[name, bank] = _parts(folder, bank, facts, doomed)
    if not doomed.names_documents:
        return
    all_parts = [part for bank in parts.values() for part in bank]
    for part in _readable(all_parts):
        found_texts = documents.texts.among(part.segment.aliases["text"])  # type: ignore[union-attr]
        documents.note_keys(part.segment.aliases["text"][found_texts])  # type: ignore[union-attr]
        documents.rows.add(part.segment.aliases["row"][found_texts])  # type: ignore[union-attr]
    for bank, bank_parts in parts.items():
        if not holds_chains(bank):
            for part in _readable(bank_parts):
                _record_rows(part, documents)
    for bank, bank_parts in parts.items():
        if not holds_chains(bank):
            for part in _readable(bank_parts):
                _add_equal_tokens(part, documents, continued=bank in _CONTINUED)
    for bank, bank_parts in parts.items():
        blocks = _blocks(bank_parts, documents) if holds_chains(bank) else None
        for part in _readable(bank_parts):
            segment = part.segment
            assert segment is not None
            part.rows |= (documents.rows if blocks is None else blocks).among(segment.rows["key"])
            part.aliases |= documents.rows.among(segment.aliases["row"])
            part.aliases |= documents.texts.among(segment.aliases["text"])


def _parts(folder: Folder, bank: str, bank_facts: BankFacts, doomed: Doomed) -> list[Part]:
    """Return the parts of a bank, with segments opened if they are searched for documents."""
    parts = []
    for facts in bank_facts.segments:
        part = Part(facts, None, _NONE, _NONE)
        part.whole = facts.writer == doomed.writer
        if doomed.names_documents or part.whole or bank.startswith(DISTILLED):
            try:
                part.segment = Segment.open(folder, facts)
                part.segment.tokens_of(np.zeros(0, np.int64))  # raises where token ids and sources are damaged
                # allocated after the check: a manifest may claim far more rows than its files have
                part.rows, part.aliases = np.zeros(facts.rows, np.bool_), np.zeros(facts.aliases, np.bool_)
            except (SnapshotDamaged, FileNotFoundError) as error:  # other OSErrors propagate: the file may be intact
                part.segment = None
                log.warning("segment %s cannot be read, so it is removed too: %s", facts.id, error)
            parts.append(part)
    return parts


def _readable(parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if part.segment is not None and not part.whole]


def _mark_unreadable(part: Part, error: SnapshotDamaged) -> None:
    log.warning("segment %s cannot be read, so it is removed too: %s", part.facts.id, error)
    part.segment = None


def _record_rows(part: Part, documents: Documents) -> None:
    """Record keys, ids and token ids of the rows of a segment that belong to the documents."""
    segment = part.segment
    assert segment is not None
    documents.note_keys(segment.rows["key"][documents.texts.among(segment.rows["key"])])
    chosen = documents.rows.among(segment.rows["key"])
    try:
        if documents.by_name:
            sources = segment.sources(np.arange(len(segment)))
            chosen |= np.fromiter(map(documents.named, sources), np.bool_, len(sources))
        places = np.flatnonzero(chosen)
        if not len(places):
            return
        documents.rows.add(segment.rows["key"][places])
        documents.tokens |= {ids.tobytes() for ids in segment.tokens_of(places)} - {b""}
        documents.names |= set(segment.sources(places)) - {""}
    except SnapshotDamaged as error:
        _mark_unreadable(part, error)


def _add_equal_tokens(part: Part, documents: Documents, *, continued: bool) -> None:
    """Record the keys of the rows of a segment that have, or if `continued` begin with, token ids of a document."""
    segment = part.segment
    lengths = {len(ids) // 4 for ids in documents.tokens}
    if segment is None or not lengths:
        return
    counts = segment.rows["tokens"]
    possible = counts >= min(lengths) if continued else np.isin(counts, np.fromiter(lengths, np.int64, len(lengths)))
    places = np.flatnonzero(possible)
    if not len(places):
        return
    try:
        rows = [ids.tobytes() for ids in segment.tokens_of(places)]
        equal = [ids.startswith(tuple(documents.tokens)) if continued else ids in documents.tokens for ids in rows]
        places = places[np.array(equal, np.bool_)]
        documents.names |= set(segment.sources(places)) - {""}
    except SnapshotDamaged as error:
        _mark_unreadable(part, error)
        return
    documents.rows.add(segment.rows["key"][places])


def _blocks(parts: Sequence[Part], documents: Documents) -> KeySet:
    """Return the keys of the KV blocks to purge with the documents."""
    for part in _readable(parts):
        try:
            part.segment.tokens_of(np.arange(part.facts.rows))  # type: ignore[union-attr]
        except SnapshotDamaged as error:
            _mark_unreadable(part, error)
    purged = Chains(part.segment for part in _readable(parts) if part.segment is not None).of(documents.tokens)
    return KeySet(np.frombuffer(b"".join(sorted(purged)), np.uint64).reshape(-1, 2))


def _affected(
    name: str, space: NamespaceFacts, doomed: Doomed, documents: Documents, selection: Selection
) -> frozenset[str]:
    """Return the calibrations to which a selected entry, or one that was named and not found, may have contributed."""
    unknown = doomed.names_documents and not documents.all_found
    return frozenset(
        setting
        for setting, raw in calibrations(space.config).items()
        if unknown or may_hold(raw, selection.earliest((name, calibrated_bank(setting))))
    )


def _select_derived(folder: Folder, name: str, space: NamespaceFacts, selection: Selection) -> None:
    """Select the fitted arrays that no remaining calibration uses, and the predictions made with them.

    Fitted arrays of replaced calibrations remain in the bank, and contain features of entries.
    """
    config, dropped = without(space, selection.settings[name])
    for bank in dropped:
        selection.parts[name, bank] = [_whole(segment) for segment in space.banks[bank].segments]
    keys_removed: set[bytes] = set()
    for (namespace, bank), parts in selection.parts.items():
        if namespace == name and not bank.startswith(DISTILLED):
            for part in parts:
                if part.segment is not None and part.whole:
                    keys_removed |= {key.tobytes() for key in np.ascontiguousarray(part.segment.rows["key"])}
    removed_keys = KeySet(np.frombuffer(b"".join(sorted(keys_removed)), np.uint64).reshape(-1, 2))
    for bank in space.banks:
        if bank.startswith(DISTILLED) and bank not in dropped:
            for part in _readable(selection.parts.get((name, bank), ())):
                part.rows |= removed_keys.among(part.segment.rows["key"])  # type: ignore[union-attr]
    if FITTED in space.banks and (selection.going or selection.settings[name]):
        used_keys = [bytes.fromhex(key) for key in fitted_keys(config)]
        used = KeySet(np.frombuffer(b"".join(used_keys), np.uint64).reshape(-1, 2))
        parts = [Part(segment, None, _NONE, _NONE) for segment in space.banks[FITTED].segments]
        for part in parts:
            try:
                part.segment = Segment.open(folder, part.facts)
                part.rows = ~used.among(part.segment.rows["key"])
                part.aliases = np.zeros(part.facts.aliases, np.bool_)
            except (SnapshotDamaged, FileNotFoundError) as error:
                log.warning("segment %s cannot be read, so it is removed too: %s", part.facts.id, error)
        selection.parts[name, FITTED] = parts
