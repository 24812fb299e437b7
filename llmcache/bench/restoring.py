"""Long beginnings on a device: restored from a store, or computed again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmcache.bench.decoding import attached
from llmcache.bench.device import Device, against, spread
from llmcache.bench.shapes import SHAPES, WORDS, tiny, trunk
from llmcache.blocks import shape_of
from llmcache.indexes.bank import Bank
from llmcache.indexes.neighbours import NearChoice
from llmcache.indexes.store import Store
from llmcache.prefix import Prefixes

_ASKED = 64  # tokens behind the beginning, new in each call


def prefixes(device: Device) -> list[dict[str, Any]]:
    """The 1B-class Llama shape: keys, values and states of one row of 1 to 8 thousand known tokens and 64 new ones.

    recompute: the model alone. restore: the beginning from the store's files, in the page cache, checksums compared.
    """
    shape = tiny(SHAPES["llama-1b"]) if device.tiny else SHAPES["llama-1b"]
    lengths = (64, 128) if device.tiny else (1024, 2048, 4096, 8192)
    model = trunk(shape, device.name, device.dtype)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="llmcache-gpu-") as folder:
        store = Store.open(Path(folder) / "s", create=True)
        store.declare("bench", {}, {}, "")
        bank = store.bank("bench", "prefix", lambda: shape_of(model).facts, NearChoice(index="torch"))
        made = Prefixes(model, bank, b"bench", Bank.put)
        for length in lengths:
            if rows and device.over:
                break
            rows.append(_restored(model, made, store, length, device))
            device.said(f"beginnings of {length:,} tokens: {rows[-1]['times_as_fast']:.2f} x recomputing them")
        store.close()
    return rows


def _restored(model: Any, made: Prefixes, store: Store, length: int, device: Device) -> dict[str, Any]:
    random = torch.Generator().manual_seed(length)
    begin = torch.randint(4, WORDS, (1, length), generator=random)
    asked = [torch.cat([begin, torch.randint(4, WORDS, (1, _ASKED), generator=random)], 1) for _ in range(24)]
    states: dict[str, torch.Tensor] = {}

    def run(name: str, number: int) -> None:
        with torch.inference_mode():
            found = model(input_ids=asked[number].to(device.name), use_cache=True)
        states[name] = found.last_hidden_state[:, -1].float()

    def restored(number: int) -> None:
        with attached(model, made):
            run("restore", number)

    restored(0)  # computes and stores the beginning
    store.commit()
    before, apart = made.counters.restored, 0.0
    seconds: dict[str, list[float]] = {"recompute": [], "restore": []}
    for number in range(1, 4 if device.tiny else 8):
        if number > 2 and device.over:
            break
        actions: dict[str, Callable[[], None]] = {
            "recompute": lambda number=number: run("recompute", number),  # type: ignore[misc]
            "restore": lambda number=number: restored(number),  # type: ignore[misc]
        }
        for name, action in actions.items():
            each = device.seconds(action)
            if number > 1:  # the first round is to warm up
                seconds[name].append(each)
        apart = max(apart, float((states["restore"] - states["recompute"]).abs().max()))
    largest = float(states["recompute"].abs().max())
    return {
        "tokens": length, "asked": _ASKED, **{name: spread(each) for name, each in seconds.items()},
        "times_as_fast": against(seconds["recompute"], seconds["restore"]), "relative_difference": apart / largest,
        "restored_tokens": made.counters.restored - before, "bytes": length * made.shape.record * device.dtype.itemsize,
    }  # fmt: skip
