"""Measurement of long prefixes on a device: restored from a store, or recomputed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from llmcache.banks.device_cache import DeviceCache
from llmcache.bench.decoding import attached
from llmcache.bench.harness.device import Device, against, spread
from llmcache.bench.harness.shapes import (
    SHAPES,
    WORDS,
    tiny,
    trunk,
)
from llmcache.decoders.kv_buffer import shape_of
from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.indexes.bank import Bank
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

_ASKED = 64  # new tokens after the prefix, in each call
_BLOCK = 16  # tokens of a KV block


def prefixes(device: Device) -> Iterator[dict[str, Any]]:
    """Measure one row of 1 to 8 thousand known tokens and 64 new ones, on the 1B-class Llama shape.

    recompute: the model alone. disk: the prefix from the store's files in the page cache, checksums compared. pinned
    memory, device memory: its KV blocks from that level.
    """
    shape = tiny(SHAPES["llama-1b"]) if device.tiny else SHAPES["llama-1b"]
    lengths = (64, 128) if device.tiny else (1024, 2048, 4096, 8192)
    room = (1 << 22) if device.tiny else (1 << 30)
    model = trunk(shape, device.name, device.dtype)
    with tempfile.TemporaryDirectory(prefix="llmcache-gpu-") as folder:
        store = Store.open(Path(folder) / "s", create=True)
        store.declare("bench", {}, {}, "")
        bank = store.bank("bench", "prefix", lambda: shape_of(model).facts, NearChoice(index="torch"))
        levels = {
            "disk": None,
            "pinned memory": DeviceCache(bank, device.name, pinned_bytes=room, tokens=_BLOCK),
            "device memory": DeviceCache(bank, device.name, device_bytes=room, tokens=_BLOCK),
        }
        made = {
            name: PrefixCache(model, bank, b"bench", Bank.put, block=_BLOCK, levels=one) for name, one in levels.items()
        }
        for number, length in enumerate(lengths):
            if number and device.over:
                break
            row = _restored(model, made, store, length, device)
            device.say(f"prefixes of {length:,} tokens: {row['device memory']['times_as_fast']:.2f} x recomputing them")
            yield row
        store.close()


def _restored(model: Any, made: Mapping[str, PrefixCache], store: Store, length: int, device: Device) -> dict[str, Any]:
    random = torch.Generator().manual_seed(length)
    begin = torch.randint(4, WORDS, (1, length), generator=random)
    states: dict[str, torch.Tensor] = {}

    def run(name: str, ids: torch.Tensor) -> None:
        with attached(model, made[name]) if name in made else nullcontext(), torch.inference_mode():
            output = model(input_ids=ids, use_cache=True)
        states[name] = output.last_hidden_state[:, -1].float()

    def asked() -> torch.Tensor:
        new = torch.randint(4, WORDS, (1, _ASKED), generator=random)
        return torch.cat([begin, new], 1).to(device.name)

    run("disk", asked())  # computes and stores the prefix
    store.commit()
    seconds: dict[str, list[float]] = {name: [] for name in ("recompute", *made)}
    before, apart = {name: one.counters.restored for name, one in made.items()}, dict.fromkeys(made, 0.0)
    rounds = 3 if device.tiny else 8
    for number in range(rounds):
        if number > 1 and device.over:
            break
        for name, each in seconds.items():
            ids = asked()  # new tokens for each, since the store keeps those of the previous one
            took = device.seconds(lambda name=name, ids=ids: run(name, ids))  # type: ignore[misc]
            if number:  # the first round warms up
                each.append(took)
            if name in made and number == rounds - 1:
                run("recompute", ids)
                apart[name] = float((states[name] - states["recompute"]).abs().max() / states["recompute"].abs().max())
    return {
        "tokens": length, "asked": _ASKED, "recompute": spread(seconds["recompute"]),
        "bytes": length * made["disk"].shape.record * device.dtype.itemsize,
        **{
            name: {
                **spread(seconds[name]), "times_as_fast": against(seconds["recompute"], seconds[name]),
                "relative_difference": apart[name], "restored_tokens": one.counters.restored - before[name],
            }
            for name, one in made.items()
        },
    }  # fmt: skip
