"""Results of documents with their provenance: tier, layer, and the entry that served them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from math import isnan
from typing import Any, Self, TypeAlias

from llmcache.arrays import Floats32
from llmcache.document import Document, Text, TextFields
from llmcache.encoding.answers import MISS, POOLED, TIERS, Answers
from llmcache.errors import CorpusError
from llmcache.indexes.bank import Bank
from llmcache.layers.layer_banks import bank_name
from llmcache.records import FieldSpec, RejectedRecord, intake

TOKENS = "tokens"
"""Name of the bank of a SentenceTransformer's token embeddings."""
Source: TypeAlias = str | tuple[str, str] | list[str] | Document | Mapping[str, Any]
"""A document as callers pass it: a text, a Document, or a mapping with "text" and optionally "id".

For a CrossEncoder: a tuple or list of two texts, a Document of one, or a mapping with "query" and "document".
"""


@dataclass(frozen=True, slots=True)
class Result:
    """Output and provenance of one document.

    output: float32 [width]. Of a CrossEncoder the logits as stored, float32 [labels], without an activation; of a
        SparseEncoder float32 [entries, 2], each row a dimension and its value; of a MultiVectorEncoder, and for
        `output_value="token_embeddings"`, the vectors of the tokens, float32 [tokens, width].
    tier: "exact", "near" or "miss".
    layer: name of the bank that answered; None for a miss. "output": of outputs. "tokens": of token embeddings, from
        which a sentence embedding was pooled. "layer-3": of a layer's states; the later layers were computed.
    source: id of the document whose entry was used, or the entry's key in hexadecimal if it has no id; None for a miss.
    similarity: cosine of the fingerprints; 1.0 for an exact hit, None for a miss.
    audited: True if the document was computed for an audit although it had a near match. Audits of exact hits are not
        marked: their stored output is returned.
    consensus: of a calibrated near hit, mean cosine of the other neighbours' outputs to the nearest one's.
    """

    id: str
    output: Floats32
    tier: str
    layer: str | None
    source: str | None
    similarity: float | None
    audited: bool = False
    consensus: float | None = None

    def __repr__(self) -> str:
        origin = "" if self.source is None else f", source={self.source!r}, similarity={self.similarity:.4g}"
        layer = "" if self.layer in (None, "output") else f", layer={self.layer!r}"
        audited = ", audited=True" if self.audited else ""
        values = f"{self.output.dtype}{list(self.output.shape)}"
        return f"Result(id={self.id!r}, tier={self.tier!r}{origin}{layer}{audited}, output={values})"


@dataclass(frozen=True, slots=True)
class TierCounts:
    """Numbers of documents by tier. documents = exact + near + misses.

    prefix: number of the misses of which a part was reused, in a language-model job.
    """

    documents: int
    exact: int
    near: int
    misses: int
    prefix: int = field(default=0, kw_only=True)

    @classmethod
    def of(cls, tiers: Mapping[str, int], **fields: Any) -> Self:
        """Make the counts. tiers: number of results by `Result.tier`. fields: further fields of a subclass, by name."""
        exact, near, misses, prefix = (tiers.get(tier, 0) for tier in ("exact", "near", "miss", "prefix"))
        misses += prefix
        return cls(exact + near + misses, exact, near, misses, prefix=prefix, **fields)

    @property
    def hit_rate(self) -> float:
        """Share of documents that the model did not compute."""
        return 1 - self.misses / self.documents if self.documents else 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the counts and the hit rate by name."""
        return {name: getattr(self, name) for name in ("documents", "exact", "near", "misses", "hit_rate")}


def results(
    documents: Iterable[Source],
    answer: Callable[[Sequence[Text], Sequence[str]], Answers],
    bank: Callable[[], Bank],
    layer: str,
    chunk: int,
    *,
    fields: TextFields = "text",
    calls: AbstractContextManager[Any] | None = None,
) -> Iterator[Result]:
    """Return an iterator over one Result per document, in order. `chunk` documents are read and answered at a time.

    bank: returns the current bank. fields: name or names of the text fields. calls: context entered to answer a chunk,
    and left before documents are read or results yielded, so that the consumer of results and the producer of documents
    may use the cache.
    """
    stream = documents_of(documents, fields)

    def answered() -> Iterator[Result]:
        while part := list(islice(stream, chunk)):
            ids = [document.id for document in part]
            with calls or nullcontext():
                answers = answer([document.text for document in part], ids)
                # all at once, since a reload between two results may renumber rows
                answered_part = list(_results(ids, answers, bank(), layer))
            yield from answered_part

    return answered()


def documents_of(sources: Any, fields: TextFields = "text") -> Iterator[Document]:
    """Iterate over the documents of an iterable, data frame, table or data set, read by `llmcache.records.intake`.

    fields: name of the text field, or names of the two fields of a pair.
    A document without an id gets its position as id. ConfigError, immediately, for a single text, mapping or path;
    CorpusError, when iteration reaches it, for a record that is not a document.
    """
    return map(_accepted, intake(sources, FieldSpec(fields, most=sys.maxsize)))


def _accepted(taken: Document | RejectedRecord) -> Document:
    """Return a document. CorpusError for a rejected record."""
    if isinstance(taken, RejectedRecord):
        raise CorpusError(f"document {taken.place} {taken.reason}; Pipeline answers the others and collects such")
    return taken


def _results(ids: Sequence[str], answers: Answers, bank: Bank, layer: str) -> Iterator[Result]:
    """Yield the results of answered documents. layer: name of the bank that answered."""
    # lists, since indexing arrays element by element would take most of the time of a hit
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
            id, answers.outputs[i], TIERS[tier], _bank_of(reused, layer), source, similarity,
            consensus=None if isnan(consensus) else consensus,
        )  # fmt: skip


def _bank_of(reused: int, layer: str) -> str:
    """Return the name of the bank that answered. reused: see `Answers.layer`. layer: name of the call's own bank."""
    if reused == POOLED:
        return TOKENS
    return bank_name(reused) if reused >= 0 else layer
