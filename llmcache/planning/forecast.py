"""Forecast the hits, seconds and bytes of a run, by one pass at hashing speed and a few samples."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.history import records
from llmcache.document import Text, as_text, characters
from llmcache.encoding.call import EncodeCall
from llmcache.encoding.executor import Executor
from llmcache.encoding.results import Source, documents_of
from llmcache.errors import CorpusError
from llmcache.indexes.eviction.garbage import disk_bytes
from llmcache.indexes.store import Store
from llmcache.model.encoders import TokenVectors, text_fields
from llmcache.model.features import features
from llmcache.model.keys import token_keys
from llmcache.model.private_tokenizer import PrivateCopy
from llmcache.model.tokens import TokenRows
from llmcache.near.matcher import NearMatcher
from llmcache.near.neighbors.bank_entries import MOST
from llmcache.near.neighbors.near_matches import TAKEN
from llmcache.planning.advice import (
    RunContext,
    RunForecast,
    advised,
    bytes_of,
)
from llmcache.planning.cost_model import Cost, MatrixRows, Sizes, probed, recorded, recorded_rows
from llmcache.planning.plan import Plan
from llmcache.planning.survey import (
    LONG,
    Folding,
    Survey,
    cut,
    survey,
)

_SHARE = 0.006  # of the uncached run's time, limit of probes; tokenising a sample may take half of it
_ANSWERED, _STORED = 7e-6, 3e-5  # seconds per answered and per stored document, without the steps measured here
_REFRESH, _LOOK_UP = 2.5e-5, 1e-4  # seconds per entry to load the neighbour index, and per document to search it
_LATEST = 3  # latest run records that forecast near matches
_FEWEST = 400  # documents needed to measure a share of near matches
_CHARACTERS = 100_000  # most characters tokenised to estimate lengths, but at least _FEWEST_TOKENISED documents
_FEWEST_TOKENISED = 8
_TOKENISED = 64  # documents tokenised to estimate lengths and exact hits by tokens, if _CHARACTERS allows


def planned(
    execution: Executor, documents: Iterable[Source], call: EncodeCall, store: Store, namespace: str, model: Any
) -> Plan:
    """Make the plan of `LLMCache.plan`. call: role, prompt, batch size of the run. model: of sentence-transformers."""
    settings: Any = getattr(getattr(model, "transformers_model", None), "config", None)
    calibration = execution.reuse.calibration if execution.reuse is not None and not execution.reuse.off else None
    around = RunContext(
        model=type(model).__name__ if settings is None else str(getattr(settings, "name_or_path", "") or ""),
        namespace=namespace,
        encoder=type(model).__name__,
        config=execution.config,
        layers=int(getattr(settings, "num_hidden_layers", 0) or 0),
        hidden=int(getattr(settings, "hidden_size", 0) or 0),
        store_bytes=disk_bytes(store.folder),
        free=shutil.disk_usage(store.folder.path).free,
        calibrated=None if calibration is None else calibration.threshold,
        recent=(0, 0) if calibration is None else _recent(store, namespace),
    )
    texts = (document.text for document in documents_of(documents, text_fields(model)))
    uses = deepcopy(execution.bank.uses)
    try:
        tokenizer = PrivateCopy().of(model.tokenizer)  # since the iterable of documents may use the model's tokenizer
        return plan(execution, texts, call, tokenizer=tokenizer, limit=_limit(model, call.role), around=around)
    finally:
        execution.bank.uses = uses  # lookups of a forecast do not count as uses


def _limit(model: Any, role: str | None) -> int | None:
    """Return the number of tokens that a model reads of a document of this role; None for no limit."""
    limits = [getattr(model, "max_seq_length", None)]
    if role is not None:  # some models read less of a query
        limits.append(getattr(model[0], f"{role}_length", None))
    return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class _Shares:
    """Shares of the documents whose text is not stored.

    tokens: share with stored token ids. near: share of the others that are near hits. seen: number of documents that
    were looked up to measure it; 0 if the share was not measured. source: of the near share. drift, bound: mean over
    these others. similar: see `RunForecast`. seconds: of the near lookups of the run.
    """

    tokens: float = 0.0
    near: float = 0.0
    seen: int = 0
    source: str = "near reuse is off"
    drift: float | None = None
    bound: float | None = None
    similar: float | None = None
    seconds: float = 0.0


def _recent(store: Store, namespace: str) -> tuple[int, int]:
    """Return the number of documents that the latest runs looked up near, and how many of these were near hits."""
    runs = [run for run in records(store) if run.get("namespace") == namespace and "asked" in run and "near" in run]
    asked, near = (sum(sum(run[name]) for run in runs[-_LATEST:]) for name in ("asked", "near"))
    return asked, near


def plan(
    execution: Executor,
    texts: Iterable[Text],
    call: EncodeCall,
    *,
    tokenizer: Any,
    limit: int | None,
    around: RunContext,
) -> Plan:
    """Forecast a run with these texts or pairs of texts. limit: maximum number of tokens of the model.

    CorpusError without texts.
    """
    began = time.perf_counter()
    bank = execution.bank
    text_keys = partial(execution.model.keys, execution.seed("text", call))
    corpus = survey(texts, text_keys, Folding(tokenizer, limit, call.prompt), bank)
    if not corpus.documents:
        raise CorpusError("there are no documents; nothing can be planned")
    count = max(_TOKENISED, corpus.documents // 50)
    count = max(_FEWEST_TOKENISED, min(count, _CHARACTERS * corpus.documents // max(1, corpus.characters)))
    sampled = corpus.every.texts[:: max(1, len(corpus.every.texts) // count)]
    rows, rate = _tokenised(execution, sampled, call)
    lengths = expected_lengths(corpus.chars, sampled, rows.lengths, limit)
    cost, sizes = _cost(execution, rows, lengths, call)
    uncached = float(cost(lengths).sum()) + rate * corpus.characters
    shares = _shares(execution, corpus, call, uncached, rate, around.recent, limit)
    missing = int(corpus.open.sum())
    by_tokens = round(shares.tokens * missing)
    near = round(shares.near * (missing - by_tokens))
    computed = missing - by_tokens - near
    model_seconds = float(cost(lengths[corpus.open]).sum()) * computed / max(1, missing)
    own = rate * corpus.new_characters + shares.seconds + _ANSWERED * corpus.documents + _STORED * computed
    hits = 1 - computed / corpus.documents
    others = (missing - by_tokens) / corpus.documents
    amounts = RunForecast(
        documents=corpus.documents, computed=computed, known=len(bank), tokens=int(lengths.sum()), hit_rate=hits,
        uncached=uncached, saved=uncached - model_seconds, near=near / corpus.documents, similar=shares.similar,
        new_tokens=float(lengths[corpus.open].mean()) if missing else None,
        matrix_rows=_matrix_rows(execution, sizes).mean(lengths[corpus.open]) if execution.model.matrices else None,
    )  # fmt: skip
    new, total = bytes_of(amounts, bank.facts, around)
    return Plan(
        documents=corpus.documents, characters=corpus.characters, tokens=amounts.tokens, in_store=corpus.in_store,
        in_store_by_tokens=by_tokens, repeats=corpus.repeats, near=near, near_from=shares.source,
        drift=None if shares.drift is None else shares.drift * others,
        bound=None if shares.bound is None else shares.bound * others,
        computed=computed, hit_rate=hits, margin=_margin(shares.near, shares.seen) * others,
        seconds=model_seconds + own, uncached_seconds=uncached, model_seconds=model_seconds, cost_from=cost.source,
        new_bytes=new, total_bytes=total, pass_seconds=time.perf_counter() - began, model=around.model,
        namespace=around.namespace, created=time.time(), advice=advised(amounts, bank.facts, around),
    )  # fmt: skip


def _margin(share: float, seen: int) -> float:
    """Return half of the 95 % interval of a share that was measured on `seen` documents."""
    return 1.96 * float(np.sqrt(share * (1 - share) / seen)) if seen else 0.0


def _matrix_rows(execution: Executor, sizes: Sizes) -> MatrixRows:
    """Return the rows of output matrices by length: those of the entries, or of the documents computed for the cost."""
    tokens, rows = np.array(sizes, np.int64).T
    return recorded_rows(execution.bank) or MatrixRows.fit(tokens, rows)


def _tokenised(execution: Executor, texts: Sequence[Text], call: EncodeCall) -> tuple[TokenRows, float]:
    """Tokenise texts in order of length. Returns the rows, and the seconds per character."""
    began = time.perf_counter()
    rows = execution.model.tokenise(sorted(texts, key=characters), call.prompt, call.role)
    return rows, (time.perf_counter() - began) / max(1, sum(map(characters, texts)))


def expected_lengths(
    chars: NDArray[np.uint32], texts: Sequence[Text], tokens: NDArray[np.int64], limit: int | None
) -> NDArray[np.int64]:
    """Estimate the number of tokens of each document from its characters, by a line through a sample.

    chars: uint32 [n], characters of the documents. texts, tokens: a sample, and its numbers of tokens in order of
    length. Returns int64 [n].
    """
    known = np.sort(np.fromiter(map(characters, texts), np.int64))
    whole = tokens < (limit or np.iinfo(np.int64).max)
    if not whole.any():
        return np.full(len(chars), int(tokens.max()))
    least, first = int(tokens.min()), float(known.min())
    ratio = max(0.0, float((tokens[whole] - least).sum()) / max(1.0, float((known[whole] - first).sum())))
    return np.clip(np.rint(least + ratio * (chars.astype(np.float64) - first)), 1, limit).astype(np.int64)


def _cost(execution: Executor, seen: TokenRows, lengths: NDArray[np.int64], call: EncodeCall) -> tuple[Cost, Sizes]:
    """Return the cost of a document, and the sizes of the matrices that were computed to measure it."""

    def allowed(cost: Cost) -> float:
        return _SHARE * float(cost(lengths).sum())

    known = recorded(execution.bank)
    return probed(execution.model, seen, seen.lengths, call.batch_size, allowed, known, call.role)


def _shares(
    execution: Executor,
    corpus: Survey,
    call: EncodeCall,
    uncached: float,
    rate: float,
    recent: tuple[int, int],
    limit: int | None,
) -> _Shares:
    """Look up a sample of the documents whose text is not stored. rate: seconds per character of tokenising."""
    texts, bank = corpus.unknown.texts, execution.bank
    if not len(bank) or not texts:
        return _Shares()
    looked_up = execution.reuse is None and execution.config.tau is not None and execution.config.reuse == "deepest"
    affordable = int(
        (_SHARE if looked_up else _SHARE / 2) * uncached / max(1e-9, rate * sum(map(characters, texts)) / len(texts))
    )
    texts = texts[:: max(1, len(texts) // max(_TOKENISED, affordable))]
    if limit is not None:  # the model truncates the rest
        texts = [cut(text, LONG * limit) for text in texts]
    texts = sorted(texts, key=characters)
    rows, _ = _tokenised(execution, texts, call)
    keys = token_keys(execution.seed("tokens", call), rows.key_bytes()).view(np.uint64)
    known = execution.reader.lookup(keys, rows.ids) >= 0
    rest = rows.take(np.flatnonzero(~known).tolist())
    reuse, config, missing = execution.reuse, execution.config, int(corpus.open.sum())
    by_tokens = float(known.mean())
    if reuse is not None:
        if reuse.off:
            return _Shares(by_tokens, source=f"near reuse is off: {reuse.off}")
        if reuse.scope != execution.scope(call):
            return _Shares(by_tokens, source="near reuse is calibrated for another role or prompt")
        rest_texts = [as_text(texts[i]) for i in np.flatnonzero(~known).tolist()]
        return _calibrated(execution, reuse, rest, rest_texts, by_tokens, uncached, missing, recent)
    if config.tau is None or not looked_up:
        unknown = bank.facts.index is None or isinstance(execution.model, TokenVectors)
        similar = None if unknown else _share_at(execution, rest, 0.9, execution.scope(call))
        return _Shares(by_tokens, similar=similar)
    share = _share_at(execution, rest, config.tau, execution.scope(call))
    return _Shares(
        by_tokens, share, len(rest.ids), f"{len(rest.ids):,} documents looked up at tau {config.tau:g}",
        seconds=_LOOK_UP * missing,
    )  # fmt: skip


def _share_at(execution: Executor, rows: TokenRows, tau: float, scope: int) -> float:
    """Return the share of documents with a neighbour of this scope at similarity `tau` or above."""
    raw = features(execution.embedding, rows.ids, execution.config.fingerprint)
    _, similarity = execution.bank.nearest(raw, 1, scope=scope, least=tau)
    return float((similarity[:, 0] >= tau).mean()) if len(raw) else 0.0


def _calibrated(
    execution: Executor,
    reuse: NearMatcher,
    rows: TokenRows,
    texts: Sequence[str],
    by_tokens: float,
    uncached: float,
    missing: int,
    recent: tuple[int, int],
) -> _Shares:
    """Estimate the share of near hits: from the calibration, from the latest runs, or from lookups of the sample.

    Lookups are used if the time allows enough of them.
    """
    calibration, entries = reuse.calibration, min(len(execution.bank.in_scope(reuse.scope)), MOST)
    served = 1 - reuse.audits.share  # the others are computed, as audits
    seconds = _LOOK_UP * missing + _REFRESH * entries
    share, seen, source = calibration.hits, 0, f"as calibrated on {calibration.samples:,} documents"
    if recent[0] >= _FEWEST:
        share, source = recent[1] / recent[0], f"as in the latest runs, {recent[0]:,} documents"
    count = min(len(rows.ids), int((2 * _SHARE * uncached - _REFRESH * entries) / _LOOK_UP))
    if count >= _FEWEST:
        chosen = range(0, len(rows.ids), max(1, len(rows.ids) // count))
        rows, texts = rows.take(chosen), [texts[i] for i in chosen]
        raw = features(execution.embedding, rows.ids, execution.config.fingerprint)
        share, seen = float((reuse.look_up(raw, rows.ids, texts).gate == TAKEN).mean()), len(rows.ids)
        source = f"{seen:,} documents looked up as calibrated"
    return _Shares(
        by_tokens, share * served, seen, source, calibration.expected, calibration.bound, seconds=seconds
    )  # fmt: skip
