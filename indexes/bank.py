"""A bank: one layer's FAISS index over fingerprints, paired with the memory-mapped store of its activations."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
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
from llmcache.indexes.records import ALIAS, ROW, Keys
from llmcache.indexes.sealing import Entries, seal
from llmcache.indexes.segment import Gone, Segment
from llmcache.indexes.shelf import Shelf
from llmcache.indexes.usage import USE, Uses

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

    A row keeps its number until `follow` moves the bank to a newer generation, also when it is sealed. Rows that were
    evicted keep theirs too: no look-up gives them, and `len` does not count them.
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
        segments, self.lost = _opened(folder, facts, {}, trust)
        self._pieces: list[Segment | Entries | Gone] = list(segments)
        self._starts = np.cumsum([0, *map(len, self._pieces)])
        self._aliases: list[tuple[Keys, Keys]] = []
        self._rows, self._texts = KeyTable(), KeyTable()
        self._damaged: set[int] = set()
        self._shelf = Shelf()
        self.pending_bytes = 0  # activations that are not sealed yet
        self._dead = np.zeros(0, np.int64)  # rows that were evicted, in order
        self.near = Neighbours(folder, facts, self._pieces, choice, read_index=trust != "untrusted")
        self.uses = Uses(int(self._starts[-1]))
        self._clock = 0  # the latest time that was seen, so that a clock set back makes nothing look old
        self._load_keys()

    def __len__(self) -> int:
        return int(self._starts[-1]) - len(self._dead)

    @property
    def _pending(self) -> list[Entries]:
        return [piece for piece in self._pieces if isinstance(piece, Entries)]

    @property
    def has_pending(self) -> bool:
        return bool(self._pending or self._aliases)

    def _load_keys(self) -> None:
        """Make the tables of keys, and the list of rows that are dead, from the pieces."""
        self._rows, self._texts = KeyTable(), KeyTable()
        dead, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        keys, aliases = [np.zeros((0, 2), np.uint64)], [np.zeros(0, ALIAS)]
        # newest first: of two copies of an entry the newer is believed, the older may be the damaged one it replaced
        for piece, start in zip(self._pieces, self._starts.tolist(), strict=False):
            if isinstance(piece, Gone):
                dead.append(np.arange(start, start + len(piece)))
            elif isinstance(piece, Segment):
                live = piece.live()
                rows.append(live + start)
                keys.append(piece.rows["key"] if piece.alive is None else piece.rows["key"][live])
                aliases.append(piece.aliases)
                self._clock = max(self._clock, int(piece.rows["created"].max(initial=0)))
                if piece.alive is not None:
                    dead.append(np.flatnonzero(~piece.alive) + start)
        self._rows.extend(np.concatenate(keys), np.concatenate(rows))
        self._dead = np.concatenate(dead)
        self.near.bury(self._dead)
        if self._trust == "untrusted":  # a text key could lead to anything: only token ids are compared
            return
        pairs = np.concatenate(aliases)
        led = self._rows.find(pairs["row"])
        found = led >= 0  # an alias may outlive its row
        self._texts.extend(pairs["text"][found], led[found])

    def forget(self, facts: BankFacts, gone: Container[str]) -> None:
        """Let go of the segments whose ids are in `gone`, and of their files, which take up disk space for as long as
        they are mapped; and of the rows of others that are dead by these facts, of a newer manifest.

        A segment that is not there any more for another reason was rewritten, and goes on serving.
        """
        newer, changed = {one.id: one for one in facts.segments}, False
        for place, piece in enumerate(self._pieces):
            now = newer.get(piece.facts.id) if isinstance(piece, Segment) else None
            if not isinstance(piece, Segment):
                continue
            if piece.facts.id in gone:
                self._pieces[place], changed = Gone(len(piece)), True
            if now is None or piece.facts.alive == now.alive:
                continue
            changed = True
            try:
                piece.bury(now)
            except (SnapshotDamaged, OSError) as error:
                log.warning("segment %s is left out: %s", piece.facts.id, error)
                self._pieces[place] = Gone(len(piece))
        self.facts = facts
        if not changed:
            return
        self._load_keys()
        for piece, start in zip(self._pieces, self._starts.tolist(), strict=False):
            if isinstance(piece, Entries):
                self._rows.add(piece.keys, np.arange(start, start + len(piece)))
        for texts, keys in self._aliases:
            led = self._rows.find(keys)
            self._texts.add(texts[led >= 0], led[led >= 0])

    # -- another generation ---------------------------------------------------------------------------------

    def opened(self, facts: BankFacts) -> tuple[list[Segment], int]:
        """The segments of a newer generation, those already open as they are; how many had to be left out."""
        known = {piece.facts: piece for piece in self._pieces if isinstance(piece, Segment)}
        return _opened(self._folder, facts, known, self._trust)

    def follow(self, facts: BankFacts, segments: Sequence[Segment], lost: int) -> None:
        """Move to a newer generation, whose segments `opened` gave. What is pending stays pending, behind them."""
        places: dict[str | int, int] = {}
        pieces: list[Segment | Entries | Gone] = [*segments, *self._pending]
        starts = np.cumsum([0, *map(len, pieces)])
        for piece, start in zip(pieces, starts.tolist(), strict=False):
            places[_name(piece)] = start
        moved = np.full(int(self._starts[-1]), -1, np.int64)  # old row -> new row
        for piece, start in zip(self._pieces, self._starts.tolist(), strict=False):
            if _name(piece) in places:
                moved[start : start + len(piece)] = places[_name(piece)] + np.arange(len(piece))
        self.facts, self.lost = facts, lost
        self._damaged = {int(moved[row]) for row in self._damaged if moved[row] >= 0}
        self._pieces[:], self._starts = pieces, starts
        self.uses = self.uses.moved(moved, int(starts[-1]))
        self.near.follow(facts, moved)
        self._load_keys()
        for piece, start in zip(pieces, starts.tolist(), strict=False):
            if isinstance(piece, Entries):
                self._rows.add(piece.keys, np.arange(len(piece)) + start)
        for text, keys in self._aliases:
            rows = self._rows.find(keys)
            self._texts.add(text[rows >= 0], rows[rows >= 0])

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
        unusable = self._dead
        if self._damaged:
            unusable = np.union1d(unusable, np.fromiter(self._damaged, np.int64))
        best, value = np.full((len(features), k), -1), np.full((len(features), k), -np.inf, np.float32)
        open_, ask = np.arange(len(features)), k + min(len(unusable), 4 * k + 16)
        while len(open_):
            # damaged and evicted rows are still in the index: ask for more until k that live have come back
            rows, similarity = self.near.nearest(features[open_], ask)
            more = rows[:, -1] >= 0
            lost = np.isin(rows, unusable) & (rows >= 0)
            similarity[lost], rows[lost] = -np.inf, -1
            order = np.argsort(lost, axis=1, kind="stable")[:, :k]
            best[open_], value[open_] = np.take_along_axis(rows, order, 1), np.take_along_axis(similarity, order, 1)
            if ask >= k + len(unusable):
                break
            open_ = open_[more & (best[open_, -1] < 0)]
            ask = min(4 * ask, k + len(unusable))
        return best, value

    def _without_damaged(self, rows: Rows) -> Rows:
        if self._damaged:
            rows[np.isin(rows, np.fromiter(self._damaged, np.int64))] = -1
        return rows

    def _piece(self, row: int) -> tuple[Segment | Entries | Gone, int]:
        place = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._pieces[place], row - int(self._starts[place])

    def _groups(self, rows: Rows) -> Iterator[tuple[Segment | Entries | Gone, Rows, Rows]]:
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
        self.uses.count(rows, self._now())
        values, intact = self._vectors(rows) if self.facts.rank == 1 else self._states(rows)
        if self._trust == "untrusted":  # `put` keeps finite numbers only, a stranger may not
            intact &= np.array([bool(np.isfinite(one).all()) for one in values], np.bool_)
            if isinstance(values, np.ndarray):
                values[~intact] = 0
        if not intact.all():
            self._report(rows[~intact])
        return Reading(values, intact)

    def _vectors(self, rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """float32 [n, width], zeros where a row is not intact."""
        table, intact = np.empty((len(rows), self.facts.width), np.float32), np.zeros(len(rows), np.bool_)
        plain = self.facts.dtype == "float32"
        for piece, chosen, local in self._groups(rows):
            if not isinstance(piece, Segment):
                good, payload, scale = _stored(piece, local)
                if good.any():
                    table[chosen] = codec.decode(np.stack(list(payload)), scale, self.facts.dtype)
            elif plain:  # straight to where they are wanted
                there = table.view(np.uint8)
                every = len(chosen) == len(rows)
                good = np.array(piece.fetch(local, there if every else [there[i] for i in chosen.tolist()]), np.bool_)
            else:
                block = np.empty((len(local), self.facts.width * codec.DTYPES[self.facts.dtype]), np.uint8)
                good = np.array(piece.fetch(local, block), np.bool_)
                table[chosen[good]] = codec.decode(block[good], piece.rows["scale"][local[good]], self.facts.dtype)
            intact[chosen] = good
        if not intact.all():
            table[~intact] = 0
        return table, intact

    def _states(self, rows: Rows) -> tuple[list[NDArray[np.float32]], NDArray[np.bool_]]:
        """One float32 [tokens, width] per row, without tokens where the row is not intact."""
        states, intact = [np.zeros((0, self.facts.width), np.float32)] * len(rows), np.zeros(len(rows), np.bool_)
        for piece, chosen, local in self._groups(rows):
            good, payload, scale = _stored(piece, local)
            intact[chosen] = good
            for i in np.flatnonzero(good).tolist():
                stored = np.ascontiguousarray(payload[i])[None]
                numbers = codec.decode(stored, scale[i : i + 1], self.facts.dtype)
                states[chosen[i]] = numbers.reshape(-1, self.facts.width)
        return states, intact

    def _report(self, rows: Rows) -> None:
        self._damaged.update(rows.tolist())
        log.warning("%d stored rows did not agree with their checksums; they are computed again", len(rows))

    def _now(self) -> int:
        self._clock = max(self._clock, int(self._folder.now()))
        return self._clock

    def audit(self, rows: Rows, drift: NDArray[np.float32]) -> None:
        """Note how far these rows were from a fresh computation (1 - cosine), float32 [n], for `divergence`."""
        self.uses.drift[rows], self.uses.last[rows] = drift, self._now()

    def use_records(self) -> NDArray[np.void]:
        """Records (usage.USE) of the rows that were read or audited since the bank was opened."""
        rows = self.uses.touched()
        parts = [np.zeros(0, USE)]
        ends = np.searchsorted(rows, self._starts).tolist()
        for piece, start, low, high in zip(self._pieces, self._starts.tolist(), ends, ends[1:], strict=False):
            if high > low and not isinstance(piece, Gone):
                keys = piece.keys if isinstance(piece, Entries) else piece.rows["key"]
                parts.append(self.uses.records(rows[low:high], keys[rows[low:high] - start]))
        return np.concatenate(parts)

    def sealed_bytes(self) -> int:
        """About what `seal` will write, and not less: activations, records, tokens, features and aliases."""
        size = 4096 + 32 * sum(len(text) for text, _ in self._aliases)
        for one in self._pending:
            size += _nbytes(one.payload) + 64 * len(one) + one.features.nbytes + ROW.itemsize * len(one)
            size += sum(
                4 * len(ids) + min(1024, 4 * len(name)) for ids, name in zip(one.tokens, one.sources, strict=True)
            )
        return size

    def drop_pending(self) -> int:
        """Give up what was not sealed yet; returns how many rows that was. Their numbers are not used again."""
        rows = sum(map(len, self._pending))
        self._pieces[:] = [Gone(len(one)) if isinstance(one, Entries) else one for one in self._pieces]
        self._aliases, self.pending_bytes = [], 0
        self._shelf.clear()
        self._load_keys()
        return rows

    @property
    def damaged(self) -> int:
        """Rows that failed their checksum since the bank was opened."""
        return len(self._damaged)

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Token ids of a row; empty when they cannot be read."""
        piece, local = self._piece(row)
        if isinstance(piece, Entries):
            return piece.tokens[local]
        if isinstance(piece, Gone):
            return np.zeros(0, np.int32)
        try:
            return piece.tokens(local)
        except (SnapshotDamaged, OSError) as error:
            log.warning("%s: its rows are found by text only", error)
            return np.zeros(0, np.int32)

    def source(self, row: int) -> str:
        """Id of the document that made a row; empty when it cannot be read."""
        piece, local = self._piece(row)
        if isinstance(piece, Entries):
            return piece.sources[local]
        if isinstance(piece, Gone):
            return ""
        try:
            return piece.source(local)
        except (SnapshotDamaged, OSError) as error:
            log.warning("%s: the sources of its rows are not known", error)
            return ""

    def key(self, row: int) -> str:
        """Key of a row, in hexadecimal; empty where its segment was evicted."""
        piece, local = self._piece(row)
        if isinstance(piece, Gone):
            return ""
        keys = piece.keys if isinstance(piece, Entries) else piece.rows["key"]
        return bytes(keys[local].tobytes()).hex()

    def cost(self, rows: Rows) -> float:
        """Seconds the model took for these rows when they were computed."""
        total = 0.0
        for piece, _, local in self._groups(rows):
            if isinstance(piece, Gone):
                continue
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
            payload: Payload
            kept, payload, scale = codec.kept(values, self.facts.dtype, self._shelf.place)
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
            created=np.full(len(chosen), self._now(), np.uint32),
        )
        rows = np.arange(len(entries)) + self._starts[-1]
        self._pieces.append(entries)
        self.pending_bytes += _nbytes(payload)
        self._starts = np.append(self._starts, self._starts[-1] + len(entries))
        self.uses.grow(int(self._starts[-1]))
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
        self._pieces[:] = [piece for piece in self._pieces if not isinstance(piece, Entries)]
        self._pieces.append(opened)
        self._starts = np.cumsum([0, *map(len, self._pieces)])
        self._aliases, self.pending_bytes = [], 0
        self._shelf.clear()
        self._rows.settle()
        self._texts.settle()


def _nbytes(payload: Payload) -> int:
    return payload.nbytes if isinstance(payload, np.ndarray) else sum(part.nbytes for part in payload)


def _name(piece: Segment | Entries | Gone) -> str | int:
    return piece.facts.id if isinstance(piece, Segment) else id(piece)


def _opened(
    folder: Folder, facts: BankFacts, known: Mapping[SegmentFacts, Segment], trust: str
) -> tuple[list[Segment], int]:
    """Every segment that is whole, and how many are not; such a one is a warning, and its entries are misses."""
    segments, lost = [], 0
    for one in facts.segments:
        try:
            segments.append(known.get(one) or _fitting(Segment.open(folder, one), facts, trust))
        except (SnapshotDamaged, OSError) as error:
            lost += 1
            log.warning("segment %s is left out, its %d entries are misses: %s", one.id, one.rows, error)
    return segments, lost


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


def _stored(piece: Segment | Entries | Gone, rows: Rows) -> tuple[NDArray[np.bool_], Payload, NDArray[np.float32]]:
    """bool [n]: intact; the stored bytes; float32 [n]: scale."""
    if isinstance(piece, Gone):
        return np.zeros(len(rows), np.bool_), [np.zeros(0, np.uint8)] * len(rows), np.zeros(len(rows), np.float32)
    if isinstance(piece, Entries):
        return np.ones(len(rows), np.bool_), [piece.payload[i] for i in rows], piece.scale[rows]
    payload = piece.payload(rows)
    return piece.intact(rows, payload), payload, piece.rows["scale"][rows]
