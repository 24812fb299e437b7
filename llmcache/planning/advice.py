"""Advice of a plan: cache or not, layers, index, dtype and tau, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmcache.config import CacheConfig
from llmcache.indexes.format.codec import DTYPES
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.search.vector_index import choose_kind

_PER_ROW = 72 + 32 + 64  # bytes: record, one alias, and a source id with alignment
_MARK = 64  # bytes of an entry of the output bank: scope and digests of guard fields
_CALIBRATES = 512  # entries needed for a calibration
_LEAST_SHARE = 0.01  # of documents; a tier with fewer hits does not pay for its lookups


@dataclass(frozen=True, slots=True)
class Advice:
    """Advice on one setting. about: its name. value: the advised value. why: the reason, with numbers."""

    about: str
    value: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForecast:
    """Forecast of a run. known: entries in the bank. tokens: of all documents. uncached, saved: seconds.

    near: share of documents that near reuse answers. similar: share of the documents not stored that have a neighbour
    at similarity 0.9; None if not measured. new_tokens: tokens per document that is not stored; None: those of all.
    matrix_rows: rows of the output matrix per document that is not stored; None for a model that gives vectors.
    """

    documents: int
    computed: int
    known: int
    tokens: int
    hit_rate: float
    uncached: float
    saved: float
    near: float
    similar: float | None = None
    new_tokens: float | None = None
    matrix_rows: float | None = None

    @property
    def mean_tokens(self) -> float:
        """Tokens per document to compute."""
        return self.tokens / self.documents if self.new_tokens is None else self.new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Context of a run: model, settings, store and disk.

    layers, hidden: number and width of the model's layers. store_bytes: present size of the store. free: bytes free on
    its disk. calibrated: threshold of near reuse; None if not calibrated, or without matches. recent: number of
    documents that the latest runs looked up near, and of near hits among them. encoder: class of the model.
    """

    model: str
    namespace: str
    config: CacheConfig
    layers: int
    hidden: int
    store_bytes: int
    free: int
    calibrated: float | None = None
    recent: tuple[int, int] = (0, 0)
    encoder: str = "SentenceTransformer"


def entry_bytes(amounts: RunForecast, bank: BankFacts) -> float:
    """Return the bytes on disk of an entry of the output bank."""
    output = _numbers(amounts, bank) * DTYPES[bank.dtype]
    return output + _PER_ROW + _MARK + 4 * amounts.mean_tokens + 2 * bank.feature_width


def _numbers(amounts: RunForecast, bank: BankFacts) -> float:
    """Return the numbers in an output."""
    return bank.width * (1 if amounts.matrix_rows is None else amounts.matrix_rows)


def bytes_of(amounts: RunForecast, bank: BankFacts, around: RunContext) -> tuple[int, int]:
    """Return the bytes that a run will write, and the size of the store after it, before eviction."""
    config = around.config
    each = entry_bytes(amounts, bank)
    if config.layers != "output":
        banks = around.layers if config.layers == "all" else len(config.layers)
        each += banks * (_states(amounts, bank, around) + _PER_ROW + 4 * amounts.mean_tokens)
    new = amounts.computed * each
    if config.tau is not None or around.calibrated is not None:
        new += 4 * config.dim * (amounts.computed + amounts.known)  # the index is rewritten as a whole
    return int(new), int(around.store_bytes + new)


def _states(amounts: RunForecast, bank: BankFacts, around: RunContext) -> float:
    """Return the bytes of one layer's states of one document."""
    return amounts.mean_tokens * around.hidden * DTYPES[bank.dtype]


def advised(amounts: RunForecast, bank: BankFacts, around: RunContext) -> tuple[Advice, ...]:
    """Return the advice on all settings."""
    return tuple(_each(amounts, bank, around))


def _each(amounts: RunForecast, bank: BankFacts, around: RunContext) -> Iterator[Advice]:
    yield _cache(amounts)
    yield _layers(amounts, bank, around)
    rows = amounts.known + amounts.computed
    config = around.config
    binary = config.projection == "simhash"
    kind = choose_kind(rows, binary=binary, device=config.device) if config.index == "auto" else config.index
    yield Advice("index", kind, f"for {rows:,} entries" if config.index == "auto" else "as the settings say")
    yield _dtype(amounts, bank, around)
    yield _tau(amounts, around)


def _cache(amounts: RunForecast) -> Advice:
    if amounts.hit_rate < _LEAST_SHARE:
        why = f"{amounts.hit_rate:.1%} of these documents repeat; it pays when they, or most of them, come again"
        return Advice("cache", "only for later runs", why)
    return Advice("cache", "yes", f"{amounts.saved / max(amounts.uncached, 1e-9):.0%} of the model's time is saved")


def _layers(amounts: RunForecast, bank: BankFacts, around: RunContext) -> Advice:
    state_bytes = amounts.computed * around.layers * _states(amounts, bank, around)
    if around.config.layers != "output":
        return Advice("layers", str(around.config.layers), "as the settings say; only several heads need them")
    return Advice(
        "layers", "output", f"the states of all {around.layers} layers would take {_readable(state_bytes)} more"
    )


def _dtype(amounts: RunForecast, bank: BankFacts, around: RunContext) -> Advice:
    new, _ = bytes_of(amounts, bank, around)
    room = around.free
    if around.config.max_bytes is not None:
        room = min(room, around.config.max_bytes - around.store_bytes)
    if new <= room:
        how = "lossless" if around.config.dtype in ("auto", "float32") else "as the settings say"
        return Advice("dtype", bank.dtype, f"{how}; {_readable(new)} to write, {_readable(room)} there")
    # float16 would round the dimensions of sparse vectors, so these are always stored as float32
    half = 0 if around.encoder == "SparseEncoder" else amounts.computed * _numbers(amounts, bank)
    half *= DTYPES[bank.dtype] - 2
    sizes = f"{_readable(new)} to write and only {_readable(room)} there"
    if half > 0 and new - half <= room:
        why = f"{sizes}; float16 takes {_readable(half)} less and rounds what hits give (a namespace of its own)"
        return Advice("dtype", "float16", why)
    return Advice("dtype", bank.dtype, f"{sizes}: the rest is computed and not kept, or older entries are evicted")


def _tau(amounts: RunForecast, around: RunContext) -> Advice:
    if around.calibrated is not None:
        return Advice("tau", "as calibrated", f"the gate's threshold is {around.calibrated:.3g}")
    if around.config.tau is not None:
        tau = f"{around.config.tau:g}"
        how = "" if amounts.matrix_rows is not None else ", `llmcache calibrate` measures it"
        return Advice("tau", tau, f"as given; its drift is not known{how}")
    if amounts.matrix_rows is not None:
        why = f"calibrated near reuse is for one vector per document, and a {around.encoder} gives a matrix"
        return Advice("tau", "none", why)
    if amounts.known < _CALIBRATES:
        why = f"repeats only; calibrating takes {_CALIBRATES} entries, there are {amounts.known:,}"
        return Advice("tau", "none", why)
    if amounts.similar is not None and amounts.similar < _LEAST_SHARE:
        return Advice("tau", "none", f"{amounts.similar:.1%} of the new documents have a neighbour at similarity 0.9")
    hint = "" if amounts.similar is None else f"{amounts.similar:.0%} of the new documents have a neighbour at 0.9; "
    how = " --drift label --head H" if around.encoder == "CrossEncoder" else ""
    why = f"{hint}`llmcache calibrate --budget 0.005{how}` says how many can be reused safely"
    return Advice("tau", "none yet", why)


def _readable(count: float) -> str:
    """Return a number of bytes in a readable unit."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{max(count, 0):,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
