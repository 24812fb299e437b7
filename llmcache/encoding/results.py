"""Results with their provenance: what became of each document, and whose entry served it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import isnan
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmcache.document import Document
from llmcache.encoding.answers import MISS, TIERS, Answers
from llmcache.errors import CorpusError
from llmcache.indexes.bank import Bank
from llmcache.layers.layer_banks import bank_name
from llmcache.records import FieldSpec, RejectedRecord, intake

Source: TypeAlias = str | Document | Mapping[str, Any]
"""A document as callers give it: a text, a Document, or a mapping with "text" and perhaps "id"."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one document.

    output: float32 [width]. tier: "exact", "near" or "miss". layer: the bank that answered, None for a miss; where it
        is not "output" the layers after it were computed.
    source: id of the document whose entry was used (its key in hexadecimal where it had no id), None for a miss.
    similarity: cosine of the fingerprints, 1.0 for exact, None for a miss. audited: computed although a neighbour's
        output could have been given, to see how far that would have been; an exact hit that was recomputed to check the
        store is given as stored, and is not marked. consensus: of a calibrated near hit, how far
        the other neighbours agree with the nearest: mean cosine of their outputs to its own.
    """

    id: str
    output: NDArray[np.float32]
    tier: str
    layer: str | None
    source: str | None
    similarity: float | None
    audited: bool = False
    consensus: float | None = None


def results(
    documents: Iterable[Source],
    answer: Callable[[Sequence[str], Sequence[str]], Answers],
    bank: Callable[[], Bank],
    layer: str,
    chunk: int,
    *,
    calls: AbstractContextManager[Any] | None = None,
) -> Iterator[Result]:
    """One Result per document, in order; `chunk` documents are read, answered and given out at a time.

    bank: the bank that answers at the moment. calls: entered to answer a chunk, and left before documents are read or
    results are given out: whoever takes the results, or makes the documents, may use the cache meanwhile.
    """
    stream = documents_of(documents)

    def answered() -> Iterator[Result]:
        while part := list(islice(stream, chunk)):
            ids = [document.id for document in part]
            with calls or nullcontext():
                answers = answer([document.text for document in part], ids)
                # all at once: rows may have other numbers after a reload between two results
                answered_part = list(_results(ids, answers, bank(), layer))
            yield from answered_part

    return answered()


def documents_of(sources: Any) -> Iterator[Document]:
    """The documents of an iterable, a frame, a table or a data set, as `llmcache.records.intake` reads them.

    A document without an id gets its place. ConfigError, at once, for a single text, mapping or path where many
    documents are meant; CorpusError, when it is reached, for a record that is no document.
    """
    return map(_accepted, intake(sources, FieldSpec(most=sys.maxsize)))


def _accepted(taken: Document | RejectedRecord) -> Document:
    if isinstance(taken, RejectedRecord):
        raise CorpusError(f"document {taken.place} {taken.reason}; Pipeline answers the others and collects such")
    return taken


def _results(ids: Sequence[str], answers: Answers, bank: Bank, layer: str) -> Iterator[Result]:
    # lists: single numbers out of arrays would take most of the time of a hit
    columns = (answers.tier, answers.row, answers.duplicate_of, answers.layer, answers.similarity, answers.consensus)
    places = zip(ids, *(column.tolist() for column in columns), answers.audited.tolist(), strict=True)
    names = iter(bank.sources(answers.row[answers.row >= 0]))
    for i, (id, tier, row, twin, reused, similarity, consensus, audited) in enumerate(places):
        name = next(names) if row >= 0 else ""
        if tier == MISS:
            yield Result(id, answers.outputs[i], "miss", None, None, None, audited)
            continue
        source = ids[twin] if twin >= 0 else answers.entry.get(i)
        if row >= 0:
            source = name or bank.key(row)
        yield Result(
            id, answers.outputs[i], TIERS[tier], bank_name(reused) if reused >= 0 else layer, source, similarity,
            consensus=None if isnan(consensus) else consensus,
        )  # fmt: skip
