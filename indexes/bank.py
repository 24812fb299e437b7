"""A bank: one layer's FAISS index over fingerprints, paired with the memory-mapped store of its activations."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes import codec
from llmcache.indexes.errors import SnapshotDamaged
from llmcache.indexes.io import Folder
from llmcache.indexes.keytable import KeyTable
from llmcache.indexes.manifest import BankFacts, SegmentFacts
from llmcache.indexes.neighbours import NearChoice, Neighbours, half
from llmcache.indexes.segment import ALIAS, Entries, Keys, Segment, seal

log = logging.getLogger("llmcache")

Rows: TypeAlias = NDArray[np.int64]  # row numbers, [n]
Payload: TypeAlias = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]


@dataclass(slots=True)
class Reading:
    """What `Bank.read` gives. values: float32 [n, width] (rank 1), or one [tokens, width] per row (rank 2).

    intact: bool [n]; where it is False the row's bytes did not agree with their checksum and its values are zeros.
    """

    values: NDArray[np.float32] | list[NDArray[np.float32]]
    intact: NDArray[np.bool_]


class Bank:
    """Rows are numbered from 0: sealed ones first, segment after segment, then the pending ones.

    A row keeps its number for as long as the bank is open, also when it is sealed.
    """

    def __init__(
        self,
        folder: Folder,
        facts: BankFacts,
        choice: NearChoice,
        *,
        trust: str = "own",
        strong: bool = False,
    ) -> None:
        """trust: "own", "signed" or "untrusted", of the store. strong: seal with checksums that cannot be forged."""
        self._folder = folder
        self.facts = facts
        self._trust, self._strong = trust, strong
        self._pieces: list[Segment | Entries] = list(_opened(folder, facts, trust))
        self._starts = np.cumsum([0, *map(len, self._pieces)])
        self._aliases: list[tuple[Keys, Keys]] = []
        self._rows, self._texts = KeyTable(), KeyTable()
        self._damaged: set[int] = set()
        self.pending_bytes = 0  # activations that are not sealed yet
        self._load_keys()
        self.near = Neighbours(folder, facts, self._pieces, choice, read_index=trust != "untrusted")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def _pending(self) -> list[Entries]:
        return [piece for piece in self._pieces if isinstance(piece, Entries)]

    @property
    def has_pending(self) -> bool:
        return bool(self._pending or self._aliases)

    def _load_keys(self) -> None:
        segments = [piece for piece in self._pieces if isinstance(piece, Segment)]
        if not segments:
            return
        # newest first: of two copies of an entry the newer is believed, the older may be the damaged one it replaced
        keys = np.concatenate([segment.rows["key"] for segment in segments])
        self._rows.extend(keys, np.arange(len(keys)))
        if self._trust == "untrusted":  # a text key could lead to anything: only token ids are compared
            return
        aliases = np.concatenate([segment.aliases for segment in segments])
        rows = self._rows.find(aliases["row"])
        found = rows >= 0  # an alias may outlive its row
        self._texts.extend(aliases["text"][found], rows[found])

    # -- looking up -----------------------------------------------------------------------------------------

    def find(self, keys: Keys) -> Rows:
        """Row of each key, -1 where there is none. keys: uint64 [n, 2]; returns int64 [n]."""
        return self._without_damaged(self._rows.find(keys))

    def find_text(self, keys: Keys) -> Rows:
        """The same by text keys (aliases)."""
        return self._without_damaged(self._texts.find(keys))

    def nearest(self, features: NDArray[np.float32], k: int) -> tuple[Rows, NDArray[np.float32]]:
        """The k nearest rows by fingerprint, and their similarities, nearest first.

        features: float [n, feature width], raw, as `put` takes them. Returns int64 [n, k] (-1: none) and float32
        [n, k] (-inf there).
        """
        rows, similarity = self.near.nearest(features, k + len(self._damaged))
        lost = (rows >= 0) & (self._without_damaged(rows.ravel()).reshape(rows.shape) < 0)
        similarity[lost], rows[lost] = -np.inf, -1
        order = np.argsort(lost, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(similarity, order, axis=1)

    def _without_damaged(self, rows: Rows) -> Rows:
        if self._damaged:
            rows[np.isin(rows, np.fromiter(self._damaged, np.int64))] = -1
        return rows

    def _piece(self, row: int) -> tuple[Segment | Entries, int]:
        place = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._pieces[place], row - int(self._starts[place])

    def _groups(self, rows: Rows) -> Iterator[tuple[Segment | Entries, Rows, Rows]]:
        """The pieces that hold these rows, each with the places in `rows` it answers for and its own row numbers."""
        places = np.searchsorted(self._starts, rows, "right") - 1
        for place in np.unique(places):
            chosen = np.flatnonzero(places == place)
            yield self._pieces[place], chosen, rows[chosen] - self._starts[place]

    # -- reading --------------------------------------------------------------------------------------------

    def read(self, rows: Rows) -> Reading:
        """Stored activations of some rows, each checked against its checksum. rows: int64 [n], all >= 0.

        A row that fails the check is reported, and from then on no look-up of this bank returns it.
        """
        intact = np.zeros(len(rows), np.bool_)
        table = np.zeros((len(rows), self.facts.width), np.float32)
        states = [table[:0]] * len(rows)
        for piece, chosen, local in self._groups(rows):
            good, payload, scale = _stored(piece, local)
            if self._trust == "untrusted":
                good &= np.isfinite(scale)
            intact[chosen] = good
            if self.facts.rank == 1:
                table[chosen[good]] = self._vectors(payload, good, scale)
            else:
                for i in np.flatnonzero(good).tolist():
                    stored = np.ascontiguousarray(payload[i])[None]
                    numbers = codec.decode(stored, scale[i : i + 1], self.facts.dtype)
                    states[chosen[i]] = numbers.reshape(-1, self.facts.width)
        if self._trust == "untrusted":  # `put` keeps finite numbers only, a stranger may not
            finite = [bool(np.isfinite(one).all()) for one in (table if self.facts.rank == 1 else states)]
            intact &= np.array(finite, np.bool_)
            table[~intact] = 0
        if not intact.all():
            self._report(rows[~intact])
        return Reading(table if self.facts.rank == 1 else states, intact)

    def _vectors(self, payload: Payload, good: NDArray[np.bool_], scale: NDArray[np.float32]) -> NDArray[np.float32]:
        if not good.any():
            return np.zeros((0, self.facts.width), np.float32)
        if isinstance(payload, np.ndarray):
            block = payload if good.all() else payload[good]
        else:
            block = np.stack([payload[i] for i in np.flatnonzero(good).tolist()])
        return codec.decode(block, scale[good], self.facts.dtype)

    def _report(self, rows: Rows) -> None:
        self._damaged.update(rows.tolist())
        log.warning("%d stored rows did not agree with their checksums; they are computed again", len(rows))

    @property
    def damaged(self) -> int:
        """Rows that failed their checksum since the bank was opened."""
        return len(self._damaged)

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Token ids of a row; empty when they cannot be read."""
        piece, local = self._piece(row)
        if isinstance(piece, Entries):
            return piece.tokens[local]
        try:
            return piece.tokens(local)
        except SnapshotDamaged as error:
            log.warning("%s: its rows are found by text only", error)
            return np.zeros(0, np.int32)

    def source(self, row: int) -> str:
        """Id of the document that made a row; empty when it cannot be read."""
        piece, local = self._piece(row)
        if isinstance(piece, Entries):
            return piece.sources[local]
        try:
            return piece.source(local)
        except SnapshotDamaged as error:
            log.warning("%s: the sources of its rows are not known", error)
            return ""

    def key(self, row: int) -> str:
        """Key of a row, in hexadecimal."""
        piece, local = self._piece(row)
        keys = piece.keys if isinstance(piece, Entries) else piece.rows["key"]
        return bytes(keys[local].tobytes()).hex()

    def cost(self, rows: Rows) -> float:
        """Seconds the model took for these rows when they were computed."""
        total = 0.0
        for piece, _, local in self._groups(rows):
            cost = piece.cost if isinstance(piece, Entries) else piece.rows["cost"]
            total += float(cost[local].sum())
        return total

    # -- storing --------------------------------------------------------------------------------------------

    def put(
        self,
        keys: Keys,
        values: NDArray[np.float32] | Sequence[NDArray[np.float32]],
        *,
        tokens: Sequence[NDArray[np.int32]],
        sources: Sequence[str],
        features: NDArray[np.float32],
        cost: NDArray[np.float32],
    ) -> NDArray[np.bool_]:
        """Keep some activations in memory, found at once, until `seal` writes them. Returns which were kept, bool [n].

        keys: uint64 [n, 2]. values: float32 [n, width], or n arrays [tokens, width] for a bank of rank 2.
        features: float [n, feature width], raw. cost: seconds, float32 [n]. Values that are not finite, or do not
        fit the stored dtype, are not kept.
        """
        if isinstance(values, np.ndarray):
            kept = codec.representable(values, self.facts.dtype)
            stored, scale = codec.encode(values[kept], self.facts.dtype)
            payload = list(stored)
        else:
            flat = [one.reshape(1, -1) for one in values]
            kept = np.array([bool(codec.representable(one, self.facts.dtype)[0]) for one in flat], np.bool_)
            pairs = [codec.encode(flat[i], self.facts.dtype) for i in np.flatnonzero(kept)]
            payload = [one[0] for one, _ in pairs]
            scale = np.array([one[0] for _, one in pairs], np.float32)
        if not kept.any():
            return kept
        chosen = np.flatnonzero(kept)
        entries = Entries(
            keys=keys[chosen],
            payload=payload,
            scale=scale,
            cost=cost[chosen],
            tokens=[tokens[i] for i in chosen.tolist()],
            sources=[sources[i] for i in chosen.tolist()],
            features=half(features[chosen]),
        )
        rows = np.arange(len(entries)) + len(self)
        self._pieces.append(entries)
        self.pending_bytes += sum(part.nbytes for part in payload)
        self._starts = np.append(self._starts, len(self) + len(entries))
        self._rows.add(entries.keys, rows)
        return kept

    def alias(self, text_keys: Keys, keys: Keys) -> None:
        """Let these texts lead to the rows of these keys; keys that have no row are passed over. Both uint64 [n, 2]."""
        rows = self.find(keys)
        found = rows >= 0
        if found.any():
            self._texts.add(text_keys[found], rows[found])
            self._aliases.append((text_keys[found], keys[found]))

    def seal(self, id: str) -> SegmentFacts:
        """Write what is pending as one durable segment; it counts once a manifest names it (`sealed`)."""
        aliases = np.zeros(sum(len(text) for text, _ in self._aliases), ALIAS)
        if len(aliases):
            aliases["text"] = np.concatenate([text for text, _ in self._aliases])
            aliases["row"] = np.concatenate([row for _, row in self._aliases])
        return seal(self._folder, id, self._pending, aliases, self.facts.feature_width, strong=self._strong)

    def sealed(self, facts: BankFacts, segment: SegmentFacts) -> None:
        """Serve from the segment, which the newest manifest names, what was served from memory until now."""
        self.facts = facts
        self._aliases = []
        opened = Segment.open(self._folder, segment)  # may fail: what is pending is then still served
        self._pieces[:] = [piece for piece in self._pieces if isinstance(piece, Segment)]
        self._pieces.append(opened)
        self._starts = np.cumsum([0, *map(len, self._pieces)])
        self._aliases, self.pending_bytes = [], 0
        self._rows.settle()
        self._texts.settle()


def _opened(folder: Folder, facts: BankFacts, trust: str) -> list[Segment]:
    """Every segment that is whole; one that is not is a warning, and its entries are misses."""
    segments = []
    for one in facts.segments:
        try:
            segments.append(_fitting(Segment.open(folder, one), facts, trust))
        except (SnapshotDamaged, OSError) as error:
            log.warning("segment %s is left out, its %d entries are misses: %s", one.id, one.rows, error)
    return segments


def _fitting(segment: Segment, facts: BankFacts, trust: str) -> Segment:
    """The same segment. SnapshotDamaged when its rows cannot be of this bank, or should be signed and are not."""
    unit = facts.width * codec.DTYPES[facts.dtype]
    sizes = segment.rows["nbytes"]
    odd = not unit or bool((sizes != unit if facts.rank == 1 else sizes % unit).any())
    if odd or segment.feature_width != facts.feature_width:
        raise SnapshotDamaged("its rows are not as long as those of its bank")
    if trust == "signed" and not segment.strong:
        raise SnapshotDamaged(
            "it was written without a key, so its rows are not under the signature; `llmcache sign` writes it anew"
        )
    return segment


def _stored(piece: Segment | Entries, rows: Rows) -> tuple[NDArray[np.bool_], Payload, NDArray[np.float32]]:
    """bool [n]: intact; the stored bytes; float32 [n]: scale."""
    if isinstance(piece, Entries):
        return np.ones(len(rows), np.bool_), [piece.payload[i] for i in rows], piece.scale[rows]
    payload = piece.payload(rows)
    return piece.intact(rows, payload), payload, piece.rows["scale"][rows]
