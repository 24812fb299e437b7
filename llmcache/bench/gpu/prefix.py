"""Measurement of long prefixes on a device: restored from a store, or recomputed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmcache.banks.device_cache import DeviceCache
from llmcache.bench.decoding import attached
from llmcache.bench.harness.device import Device, spread
from llmcache.bench.harness.shapes import SHAPES, WORDS, tiny, trunk
from llmcache.bench.harness.turns import Action, Row, Turn
from llmcache.decoders.kv_buffer import shape_of
from llmcache.decoders.prefix_cache import PrefixCache
from llmcache.indexes.bank import Bank
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store

_ASKED = 64  # new tokens after the prefix, in each call
_BLOCK = 16  # tokens of a KV block


def prefixes(device: Device) -> Iterator[Row]:
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


def _restored(model: Any, made: Mapping[str, PrefixCache], store: Store, length: int, device: Device) -> Row:
    random = torch.Generator().manual_seed(length)
    begin = torch.randint(4, WORDS, (1, length), generator=random)
    asked: dict[str, torch.Tensor] = {}

    def run(name: str, ids: torch.Tensor) -> torch.Tensor:
        with attached(model, made[name]) if name in made else nullcontext(), torch.inference_mode():
            output = model(input_ids=ids, use_cache=True)
        return output.last_hidden_state[:, -1].float()  # type: ignore[no-any-return]

    def prepared(name: str, _: int) -> AbstractContextManager[Action]:
        """Draw new tokens for each contender, since the store keeps those of the previous one."""
        new = torch.randint(4, WORDS, (1, _ASKED), generator=random)
        asked[name] = torch.cat([begin, new], 1).to(device.name)
        return nullcontext(lambda: run(name, asked[name]))

    with prepared("disk", 0) as store_prefix:
        store_prefix()
    store.commit()
    base = "recompute"
    before = {name: one.counters.restored for name, one in made.items()}
    turns = [Turn(name, 1, partial(prepared, name), base) for name in (base, *made)]
    found = device.in_turn(turns, 2 if device.tiny else 7)
    rows = {}
    for name, one in made.items():
        expected = run(base, asked[name])
        apart = (found[name].outputs[-1] - expected).abs().max() / expected.abs().max()
        rows[name] = {
            **spread(found[name].seconds), "times_as_fast": found[name].ratio, "relative_difference": float(apart),
            "restored_tokens": one.counters.restored - before[name],
        }  # fmt: skip
    return {
        "tokens": length, "asked": _ASKED, base: spread(found[base].seconds),
        "bytes": length * made["disk"].shape.record * device.dtype.itemsize, **rows,
    }  # fmt: skip
