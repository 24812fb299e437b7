"""Bank: one layer's FAISS index over fingerprints, paired with the memory-mapped store of its activations."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmcache.indexes.files.folder import Folder
from llmcache.indexes.format.key_table import KeyTable
from llmcache.indexes.format.manifest import BankFacts, SegmentFacts
from llmcache.indexes.format.marks import Marks
from llmcache.indexes.format.pending import FlushBatch, alias_records, encode_rows, payload_bytes, sealed_bytes
from llmcache.indexes.format.reading import Reading, states, vectors
from llmcache.indexes.format.rows import ALIAS, Keys, Rows, seconds32
from llmcache.indexes.format.segment import Segment, Tombstone
from llmcache.indexes.format.segment_writer import PendingRows, seal
from llmcache.indexes.format.segments import SegmentList, opened
from llmcache.indexes.format.shelf import Shelf
from llmcache.indexes.search.bank_index import BankIndex, NearChoice, half
from llmcache.indexes.search.scopes import ScopedSearch
from llmcache.indexes.stats.counters import use_files
from llmcache.indexes.stats.usage import UsageCounter, UseTable, read_uses, use_records

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("llmcache")


class Bank:
    """Rows of one layer, with look-ups by key and by similarity.

    Rows are numbered from 0: sealed rows first, segment after segment, then pending rows. A row keeps its number when
    it is sealed; only `follow`, which moves the bank to a newer generation, renumbers. Evicted rows keep their
    numbers: no look-up returns them, and `len` does not count them.
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
        """trust: of the store, "own", "signed" or "untrusted". strong: seal with checksums that cannot be forged."""
        self._folder = folder
        self.facts = facts
        self._trust, self._strong = trust, strong
        segments, self.lost = opened(folder, facts, {}, trust)
        self.pieces = SegmentList(segments)
        self._aliases: list[tuple[Keys, Keys]] = []
        self._rows, self._texts = KeyTable(), KeyTable()
        self._damaged: set[int] = set()
        self._shelf = Shelf()
        self._spare_shelf: Shelf | None = None
        self.pending_bytes = 0  # of activations that are neither sealed nor being written by the background writer
        self._dead = np.zeros(0, np.int64)  # evicted rows, in order
        self.near = BankIndex(folder, facts, self.pieces, choice, read_index=trust != "untrusted")
        self._search = ScopedSearch(self.near, self.pieces, choice)
        self.uses = UsageCounter(self.pieces.rows)
        self.renumberings = 0
        """Number of times that rows were renumbered."""
        self._clock = 0  # latest time seen: a clock that is set back must not make new rows look old
        self._load_keys()

    def __len__(self) -> int:
        return self.pieces.rows - len(self._dead)

    @property
    def has_pending(self) -> bool:
        """Return whether rows or aliases are pending."""
        return bool(self.pieces.pending or self._aliases)

    def _load_keys(self) -> None:
        """Build the key tables and the list of dead rows from the sealed segments."""
        self._rows, self._texts = KeyTable(), KeyTable()
        dead, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        keys, aliases = [np.zeros((0, 2), np.uint64)], [np.zeros(0, ALIAS)]
        # a later copy of an entry overrides an earlier one, which may be the damaged copy that it replaced
        for piece, start in self.pieces.placed():
            if isinstance(piece, Tombstone):
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
        self.near.mark_deleted(self._dead)
        if self._trust == "untrusted":  # a text key could lead to any row, so rows are found by token ids only
            return
        pairs = np.concatenate(aliases)
        alias_rows = self._rows.find(pairs["row"])
        existing = alias_rows >= 0  # an alias may remain after its row was evicted
        self._texts.extend(pairs["text"][existing], alias_rows[existing])

    def _add_pending(self) -> None:
        """Add pending rows and aliases to key tables that were just built."""
        for piece, start in self.pieces.placed():
            if isinstance(piece, PendingRows):
                self._rows.add(piece.keys, np.arange(start, start + len(piece)))
        for texts, keys in self._aliases:
            alias_rows = self._rows.find(keys)
            self._texts.add(texts[alias_rows >= 0], alias_rows[alias_rows >= 0])

    def forget(self, facts: BankFacts, evicted: Container[str]) -> None:
        """Drop the segments with ids in `evicted`, and the rows that are dead in `facts`, of a newer manifest.

        Dropping unmaps the segments' files, which take up disk space while they are mapped. A segment that is missing
        in `facts` and not in `evicted` was rewritten, and stays in use.
        """
        changed = self.pieces.forget(facts, evicted)
        self.facts = facts
        if not changed:
            return
        self._load_keys()
        self._add_pending()

    # -- another generation ---------------------------------------------------------------------------------

    def opened(self, facts: BankFacts) -> tuple[list[Segment], int]:
        """Open the segments of a newer generation, reusing those that are open already.

        Returns the segments, and how many could not be opened.
        """
        known = {piece.facts: piece for piece in self.pieces if isinstance(piece, Segment)}
        return opened(self._folder, facts, known, self._trust)

    def follow(self, facts: BankFacts, segments: Sequence[Segment], lost: int) -> None:
        """Move to a newer generation, whose segments `opened` returned. Pending rows stay pending, after all others."""
        moved = self.pieces.follow(segments)
        self.renumberings += 1
        self.facts, self.lost = facts, lost
        self._damaged = {int(moved[row]) for row in self._damaged if moved[row] >= 0}
        self.uses = self.uses.moved(moved, self.pieces.rows)
        self.near.follow(facts, moved)
        self._search.forget()
        self._load_keys()
        self._add_pending()

    # -- looking up -----------------------------------------------------------------------------------------

    def find(self, keys: Keys) -> Rows:
        """Look up rows by key. keys: uint64 [n, 2]. Returns the row of each key, int64 [n], -1 for a miss."""
        return self._without_damaged(self._rows.find(keys))

    def find_text(self, keys: Keys) -> Rows:
        """Look up rows by text key (alias). text keys: uint64 [n, 2]. Returns int64 [n], -1 for a miss."""
        return self._without_damaged(self._texts.find(keys))

    def nearest(
        self, features: NDArray[np.float32] | Tensor, k: int, *, scope: int | None = None, least: float = -np.inf
    ) -> tuple[Rows, NDArray[np.float32]]:
        """Find the k nearest rows by fingerprint.

        features: raw as in `put`, float [n, feature width], an array, or a tensor where `near.takes_tensors`.
        scope: find only rows with this scope in their marks; None: rows of all scopes.
        least: similarity below which rows may be left out.
        Returns rows, int64 [n, k], nearest first, -1 for none; and similarities, float32 [n, k], -inf for none.
        """
        unusable = self._dead
        if self._damaged:
            unusable = np.union1d(unusable, np.fromiter(self._damaged, np.int64))
        return self._search.nearest(features, k, unusable, scope=scope, least=least)

    def _without_damaged(self, rows: Rows) -> Rows:
        if self._damaged:
            rows[np.isin(rows, np.fromiter(self._damaged, np.int64))] = -1
        return rows

    # -- reading --------------------------------------------------------------------------------------------

    def read(self, rows: Rows, *, count: bool = True) -> Reading:
        """Read the activations of rows and check each against its checksum. rows: int64 [n], all >= 0.

        count: count a use of each row, for eviction. A row that fails its checksum is logged, and no later look-up of
        this bank returns it.
        """
        if count:
            self.used(rows)
        values, intact = (vectors if self.facts.rank == 1 else states)(self.pieces, self.facts, rows)
        if self._trust == "untrusted":  # `put` stores finite numbers only, the writer of an untrusted store may not
            intact &= np.array([bool(np.isfinite(row).all()) for row in values], np.bool_)
            if isinstance(values, np.ndarray):
                values[~intact] = 0
        if not intact.all():
            self._report(rows[~intact])
        return Reading(values, intact)

    def used(self, rows: Rows) -> None:
        """Count a use of each of these rows, int64 [n]."""
        self.uses.count(rows, self._now())

    def _report(self, rows: Rows) -> None:
        self._damaged.update(rows.tolist())
        log.warning("%d stored rows do not match their checksums; they are computed again", len(rows))

    def _now(self) -> int:
        self._clock = max(self._clock, seconds32(self._folder.now()))
        return self._clock

    def audit(self, rows: Rows, drift: NDArray[np.float32]) -> None:
        """Record the drift of rows, their distance from a fresh computation, float32 [n] in [0, 1]."""
        self.uses.drift[rows], self.uses.last[rows] = drift, self._now()

    def divergent(self, limit: float) -> Rows:
        """Return the rows whose last audit, by any writer, found a drift above the limit; int64, in order."""
        records = UseTable.of(read_uses(self._folder, use_files(self._folder))).records
        audited_elsewhere = self._rows.find(records["key"][records["drift"] > limit])
        drift = self.uses.drift
        audited_elsewhere = audited_elsewhere[audited_elsewhere >= 0]
        return np.union1d(audited_elsewhere[np.isnan(drift[audited_elsewhere])], np.flatnonzero(drift > limit))

    @property
    def dead(self) -> Rows:
        """Rows that were evicted or dropped, int64, in order. The array is replaced whenever it changes."""
        return self._dead

    def use_records(self) -> NDArray[np.void]:
        """Return records (usage.USE) of the rows that were read or audited since the bank was opened."""
        return use_records(self.uses, self.pieces)

    def sealed_bytes(self) -> int:
        """Estimate from above the bytes that `seal` writes: activations, records, tokens, features and aliases."""
        return sealed_bytes(self.pieces.pending, self._aliases)

    @property
    def pending(self) -> tuple[int, int]:
        """Numbers of pending batches and of pending alias lists, a mark for `drop_pending`."""
        return len(self.pieces.pending), len(self._aliases)

    def drop_pending(self, after: tuple[int, int] = (0, 0)) -> int:
        """Drop pending rows. Returns how many. Their numbers are not used again.

        after: an earlier value of `pending`; rows that were pending then are kept.
        """
        rows = self.pieces.drop_pending(after[0])
        self._aliases = self._aliases[: after[1]]
        self._count_pending()
        if not self.pieces.pending:
            self._shelf.clear()
        self._load_keys()
        self._add_pending()
        return rows

    @property
    def damaged(self) -> int:
        """Number of rows that failed their checksum since the bank was opened."""
        return len(self._damaged)

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Return the token ids of a row, int32 [tokens]; empty when they cannot be read."""
        return self.pieces.tokens(row)

    def tokens_of(self, rows: Rows) -> list[NDArray[np.int32]]:
        """Return `tokens` of each row; much faster than row by row."""
        return self.pieces.tokens_of(rows)

    def source(self, row: int) -> str:
        """Return the id of the document that a row was computed from; empty when it cannot be read."""
        return self.pieces.source(row)

    def sources(self, rows: Rows) -> list[str]:
        """Return `source` of each row; much faster than row by row."""
        return self.pieces.sources(rows)

    def keys(self, rows: Rows) -> Keys:
        """Return the keys of rows, uint64 [n, 2]; zeros for rows of evicted segments."""
        return self.pieces.keys(rows)

    def created(self, rows: Rows) -> Rows:
        """Return when rows were put, int64 [n], seconds since the epoch; 0 for rows of evicted segments."""
        return self.pieces.created(rows)

    def marks(self, rows: Rows) -> Marks:
        """Return the marks of rows, [n], which tell the near matches they may answer; zeros if unknown."""
        return self.pieces.marks(rows)

    def in_scope(self, scope: int) -> Rows:
        """Return the live rows of a scope, int64, in order."""
        return self._search.rows_of(scope, self._dead)

    def key(self, row: int) -> str:
        """Return the key of a row in hexadecimal; empty if its segment was evicted."""
        return self.pieces.key(row)

    def cost(self, rows: Rows) -> float:
        """Return the seconds that the model took to compute these rows."""
        return self.pieces.cost(rows)

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
        marks: Marks | None = None,
    ) -> NDArray[np.bool_]:
        """Add activations to the pending rows, where look-ups find them at once, until `seal` writes them.

        keys: uint64 [n, 2]. values: float32 [n, width], or n arrays [tokens, width] for a bank of rank 2.
        tokens: token ids of each row, int32. sources: document ids. features: raw, float [n, feature width].
        cost: seconds of the model, float32 [n]. marks: tell which near matches the rows may answer; None: none.
        Returns which rows were added, bool [n]. Values that are not finite or exceed the range of the stored dtype
        are not added.
        """
        kept, payload, scale = encode_rows(values, self.facts.dtype, self._shelf.place)
        if not kept.any():
            return kept
        chosen = np.flatnonzero(kept)
        entries = PendingRows(
            keys=keys[chosen],
            payload=payload,
            scale=scale,
            cost=cost[chosen],
            tokens=[tokens[i] for i in chosen.tolist()],
            sources=[sources[i] for i in chosen.tolist()],
            features=half(features[chosen]),
            created=np.full(len(chosen), self._now(), np.uint32),
            marks=None if marks is None else marks[chosen],
        )
        rows = self.pieces.append(entries)
        self.pending_bytes += payload_bytes(payload)
        self.uses.grow(self.pieces.rows)
        self._rows.add(entries.keys, rows)
        return kept

    def alias(self, text_keys: Keys, keys: Keys, *, stored: bool = False) -> None:
        """Let text keys find the rows of these keys. Keys without a row are skipped. Both uint64 [n, 2].

        stored: True if another process has committed them, so that `seal` must not write them.
        """
        rows = self.find(keys)
        existing = rows >= 0
        if existing.any():
            self._texts.add(text_keys[existing], rows[existing])
            if not stored:
                self._aliases.append((text_keys[existing], keys[existing]))

    def flush_batches(self) -> list[FlushBatch]:
        """Split the pending rows into batches of consecutive row numbers, one per future segment."""
        runs = self.pieces.runs()
        return [FlushBatch(run, [] if n else list(self._aliases)) for n, run in enumerate(runs or [[]])]

    def begin_flush(self) -> FlushBatch:
        """Return the first of `flush_batches`, to be sealed while further rows are put, which use other memory."""
        flush = self.flush_batches()[0]
        if len(flush.batches) == len(self.pieces.pending):
            flush, self._shelf = replace(flush, shelf=self._shelf), self._spare_shelf or Shelf()
            self._spare_shelf = None
        self.pending_bytes -= sum(payload_bytes(batch.payload) for batch in flush.batches)
        return flush

    def seal(self, id: str, flush: FlushBatch) -> SegmentFacts:
        """Write a batch as one durable segment with this id. It takes effect when a manifest names it (`sealed`).

        May run in a thread, concurrently with any other use of the bank.
        """
        return seal(
            self._folder, id, flush.batches, alias_records(flush.aliases), self.facts.feature_width, strong=self._strong
        )

    def sealed(self, facts: BankFacts, segment: SegmentFacts, flush: FlushBatch) -> None:
        """Replace pending rows by the segment that holds them, after the newest manifest names it."""
        self.facts = facts
        self._aliases = self._aliases[len(flush.aliases) :]
        try:
            self.pieces.seal(Segment.open(self._folder, segment), flush.batches)
        except BaseException:  # the rows stay pending, in memory
            self._aliases = [*flush.aliases, *self._aliases]
            self._count_pending()
            raise
        if flush.shelf is not None:
            flush.shelf.clear()
            self._spare_shelf = flush.shelf
        elif not self.pieces.pending:
            self._shelf.clear()
        self._count_pending()
        self._rows.settle()
        self._texts.settle()

    def _count_pending(self) -> None:
        self.pending_bytes = sum(payload_bytes(batch.payload) for batch in self.pieces.pending)
