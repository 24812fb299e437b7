"""What a plan advises: layers, index, dtype, tau, and whether a cache pays at all. Each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmcache.config import CacheConfig
from llmcache.indexes.format.codec import DTYPES
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.search.vector_index import choose_kind

_PER_ROW = 72 + 32 + 64  # record, one alias, and a source id with what is lost to alignment
_MARK = 64  # of an entry of the output bank: its scope and the digests of its fields
_CALIBRATES = 512  # entries from which on calibrating is worth a try
_WORTH = 0.01  # share of documents below which a tier is not worth its look-up


@dataclass(frozen=True, slots=True)
class Advice:
    """One setting. about: its name. value: what is advised. why: with the numbers that speak for it."""

    about: str
    value: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForecast:
    """What is forecast of a run. tokens: of all documents; uncached, saved: seconds; near: share that near reuse takes.

    similar: share of the documents not stored that have a neighbour at similarity 0.9, None where nobody looked.
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

    @property
    def mean_tokens(self) -> float:
        return self.tokens / self.documents


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a run would happen in. layers, hidden: of the model. store_bytes: of the store now; free: of its disk.

    calibrated: threshold of near reuse, None where it was not calibrated or gives nothing. recent: documents that the
    latest runs compared with the entries, and of these those that were reused.
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


def entry_bytes(tokens: float, bank: BankFacts, dtype: str) -> float:
    """Bytes that an entry of the output bank takes up on the disk."""
    return bank.width * DTYPES[dtype] + _PER_ROW + _MARK + 4 * tokens + 2 * bank.feature_width


def bytes_of(amounts: RunForecast, bank: BankFacts, around: RunContext) -> tuple[int, int]:
    """Bytes that a run will write, and that the store will have then, without what a budget evicts."""
    config = around.config
    each = entry_bytes(amounts.mean_tokens, bank, bank.dtype)
    if config.layers != "output":
        banks = around.layers if config.layers == "all" else len(config.layers)
        each += banks * (_states(amounts, bank, around) + _PER_ROW + 4 * amounts.mean_tokens)
    new = amounts.computed * each
    if config.tau is not None or around.calibrated is not None:
        new += 4 * config.dim * (amounts.computed + amounts.known)  # the index is written whole
    return int(new), int(around.store_bytes + new)


def _states(amounts: RunForecast, bank: BankFacts, around: RunContext) -> float:
    """Bytes of one layer's states of one document."""
    return amounts.mean_tokens * around.hidden * DTYPES[bank.dtype]


def advised(amounts: RunForecast, bank: BankFacts, around: RunContext) -> tuple[Advice, ...]:
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
    if amounts.hit_rate < _WORTH:
        why = f"{amounts.hit_rate:.1%} of these documents repeat; it pays when they, or most of them, come again"
        return Advice("cache", "only for later runs", why)
    return Advice("cache", "yes", f"{amounts.saved / max(amounts.uncached, 1e-9):.0%} of the model's time is saved")


def _layers(amounts: RunForecast, bank: BankFacts, around: RunContext) -> Advice:
    all_ = amounts.computed * around.layers * _states(amounts, bank, around)
    if around.config.layers != "output":
        return Advice("layers", str(around.config.layers), "as the settings say; only several heads need them")
    return Advice("layers", "output", f"the states of all {around.layers} layers would take {_said(all_)} more")


def _dtype(amounts: RunForecast, bank: BankFacts, around: RunContext) -> Advice:
    new, _ = bytes_of(amounts, bank, around)
    room = around.free
    if around.config.max_bytes is not None:
        room = min(room, around.config.max_bytes - around.store_bytes)
    if new <= room:
        return Advice("dtype", bank.dtype, f"lossless; {_said(new)} to write, {_said(room)} there")
    half = amounts.computed * bank.width * (DTYPES[bank.dtype] - 2)
    seen = f"{_said(new)} to write and only {_said(room)} there"
    if half > 0 and new - half <= room:
        why = f"{seen}; float16 takes {_said(half)} less and rounds what hits give (a namespace of its own)"
        return Advice("dtype", "float16", why)
    return Advice("dtype", bank.dtype, f"{seen}: the rest is computed and not kept, or older entries are evicted")


def _tau(amounts: RunForecast, around: RunContext) -> Advice:
    if around.calibrated is not None:
        return Advice("tau", "as calibrated", f"the gate's threshold is {around.calibrated:.3g}")
    if around.config.tau is not None:
        given = f"{around.config.tau:g}"
        return Advice("tau", given, "as given; its drift is not known, `llmcache calibrate` measures it")
    if amounts.known < _CALIBRATES:
        why = f"repeats only; calibrating takes {_CALIBRATES} entries, there are {amounts.known:,}"
        return Advice("tau", "none", why)
    if amounts.similar is not None and amounts.similar < _WORTH:
        return Advice("tau", "none", f"{amounts.similar:.1%} of the new documents have a neighbour at similarity 0.9")
    hint = "" if amounts.similar is None else f"{amounts.similar:.0%} of the new documents have a neighbour at 0.9; "
    why = f"{hint}`llmcache calibrate --budget 0.005` says how many can be reused safely"
    return Advice("tau", "none yet", why)


def _said(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{max(count, 0):,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
