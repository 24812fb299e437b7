"""Audits of stored prompt prefixes: compute tokens from the first one on and compare them with the stored records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from torch import nn

from llmcache.arrays import Floats32
from llmcache.banks.agreement import (
    Recomputations,
    compared,
    machine_epsilon,
    other_kernels,
)
from llmcache.banks.audits import Evidence
from llmcache.decoders.block_store import BlockRecords, BlockStore
from llmcache.decoders.kv_encoding import KVEncoding
from llmcache.decoders.rounded_agreement import compared_rounded
from llmcache.decoders.schedule import TokenSequence

_FIRST = 128
"""Tokens of a prefix that an audit computes before the first prefixes of an opening are used."""


class Recomputed(Protocol):
    """Function that computes records of the first tokens of some rows in one batch, float32 [tokens, record] each."""

    def __call__(
        self,
        rows: Sequence[TokenSequence],
        tokens: Sequence[int],
        *,
        split: bool = False,
        before: Floats32 | None = None,
    ) -> list[Floats32]:
        """split: compute each half of the columns in a forward of its own.

        before: records of the first tokens of the only row, after which the others are computed.
        """


def audit_prefixes(
    rows: Sequence[TokenSequence],
    records: BlockRecords,
    evidence: Evidence,
    trunk: nn.Module,
    encoding: KVEncoding,
    recomputed: Recomputed,
) -> None:
    """Audit a few of the prefixes that were found for a call, before they are used.

    rows: of the call, after the look-up. records: KV blocks that were read, by row number of the bank.
    encoding: stored form of the records. recomputed: computes records.
    ModelMismatch when stored keys, values or final states differ from those that the trunk computes.
    """
    hits = [row for row in rows if row.known]
    if not hits:
        return
    evidence.saved(np.unique(np.concatenate([np.array(row.chain, np.int64) for row in hits])))
    first = bool(evidence.open)
    places = evidence.chosen_among([np.array(row.chain, np.int64) for row in hits], [row.known for row in hits])
    if not places:
        return
    audited = [hits[place] for place in places]
    if first:  # before anything is served: a changed model shows in the first blocks, and random audits read all
        audited = [_beginning(row, records) for row in audited]
    _audit(audited, records, evidence, trunk, encoding, recomputed)


def _beginning(row: TokenSequence, records: BlockRecords) -> TokenSequence:
    """Return a row with at most `_FIRST` of its known tokens, in whole KV blocks."""
    tokens = blocks = 0
    while blocks < len(row.chain) and tokens < _FIRST:
        tokens += len(records[row.chain[blocks]])
        blocks += 1
    tokens = min(tokens, row.known)
    return replace(row, ids=row.ids[:tokens], chain=row.chain[:blocks], known=tokens, missing=[])


def audit_sample(store: BlockStore, evidence: Evidence, trunk: nn.Module, recomputed: Recomputed) -> None:
    """Audit a few first KV blocks of the bank, before new ones are stored.

    So a changed model does not add its KV blocks to those of the unchanged model.
    """
    sampled = evidence.sample(b"first blocks")
    rows = []
    for number, ids in zip(sampled.tolist(), store.bank.tokens_of(sampled), strict=True):
        row = TokenSequence(ids, 0, 0, chain=(number,), known=len(ids))
        if len(ids) == store.block and store.first_key(row).hex() == store.bank.key(number):
            rows.append(row)
    places = evidence.spread(np.ones(len(rows), np.bool_), lambda: np.arange(len(rows)))
    rows = [rows[place] for place in places.tolist()]
    reading = store.bank.read(np.array([row.chain[0] for row in rows], np.int64), count=False)
    records: BlockRecords = {
        row.chain[0]: values for row, values, intact in zip(rows, reading.values, reading.intact, strict=True) if intact
    }
    if records:
        audited = [row for row in rows if row.chain[0] in records]
        _audit(audited, records, evidence, trunk, store.encoding, recomputed)


def _audit(
    audited: Sequence[TokenSequence],
    records: BlockRecords,
    evidence: Evidence,
    trunk: nn.Module,
    encoding: KVEncoding,
    recomputed: Recomputed,
) -> None:
    """Compute the known tokens of these rows in several ways and compare them with the stored records."""
    known = [row.known for row in audited]

    def runs() -> Recomputations:
        """Yield records of the rows computed in one batch, each alone, in two steps, padded, and by other kernels."""
        yield recomputed(audited, known)
        if len(audited) > 1:
            yield [recomputed([row], [row.known])[0] for row in audited]
        yield recomputed(audited, known, split=True)
        yield recomputed([*audited, audited[0]], [*known, max(1, known[0] // 2)])[: len(audited)]
        with other_kernels():
            yield recomputed(audited, known)

    def after(i: int, before: Floats32) -> Floats32:
        return recomputed([audited[i]], [audited[i].known], before=before)[0]

    with evidence.recompute():
        stored = [_stored(row, records) for row in audited]
        epsilon, shape = machine_epsilon(trunk, next(trunk.parameters()).device), encoding.shape
        groups = [heads * dim for (heads, dim), planes in shape.kinds.items() for _ in planes] + [shape.width]
        if encoding.exact:
            agreement = compared(stored, runs(), epsilon, encoding.dtype, groups)
        else:
            restored, errors = [list(map(of, stored)) for of in (encoding.decode, encoding.errors)]
            block = len(records[audited[0].chain[0]])
            agreement = compared_rounded(restored, errors, runs(), after, encoding.rounded, epsilon, groups, block)
        chains = [np.array(row.chain, np.int64) for row in audited]
        evidence.conclude(np.array([chain[0] for chain in chains]), agreement, np.concatenate(chains))


def _stored(row: TokenSequence, records: BlockRecords) -> Floats32:
    """Return the known tokens of a row as stored, float32 [known, width]."""
    blocks = [records[number] for number in row.chain]
    arrays = [block if isinstance(block, np.ndarray) else block.float().cpu().numpy() for block in blocks]
    return np.concatenate(arrays)[: row.known]
