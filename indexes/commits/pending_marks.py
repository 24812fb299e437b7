"""Marks of what is pending in open banks, so that a failed call can drop the rows it has put."""

from __future__ import annotations

from collections.abc import Mapping

from llmcache.indexes.bank import Bank
from llmcache.indexes.commits.bank_commit import Place


def last_batches(banks: Mapping[Place, Bank]) -> dict[Place, object]:
    """Return the last pending batch of each bank, None where no batch is pending."""
    return {place: bank.pieces.pending[-1] if bank.pieces.pending else None for place, bank in banks.items()}


def drop_since(banks: Mapping[Place, Bank], last: Mapping[Place, object]) -> int:
    """Drop the batches that were put after `last`, or all where `last` is not pending any more. Returns their rows."""
    lost = 0
    for place, bank in banks.items():
        waiting = [id(batch) for batch in bank.pieces.pending]
        batch = last.get(place)
        lost += bank.drop_pending((waiting.index(id(batch)) + 1 if id(batch) in waiting else 0, 0))
    return lost
