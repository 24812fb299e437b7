"""Measurement of a GPU's memory, copies and fingerprint search: bytes per second, and times beside their floor."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmcache.bench.harness.device import Device, spread
from llmcache.bench.harness.turns import Row, freed
from llmcache.indexes.search.torch_index import Matrix

_DIM = 128
_PART = 1 << 20


def bandwidth(device: Device) -> Row:
    """Measure bytes per second of device memory (read and written), of the bus both ways, and of host memory.

    Also measures the operations per second of a bfloat16 matrix product.
    """
    size = (1 << 20) if device.tiny else (1 << 30)
    here = torch.ones(size, dtype=torch.uint8, device=device.name)
    there, host = torch.empty_like(here), torch.empty(size, dtype=torch.uint8, pin_memory=device.cuda)
    plain, other = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    side = 256 if device.tiny else 8192
    square = torch.randn(side, side, device=device.name, dtype=torch.bfloat16)
    actions = {
        "memory": lambda: there.copy_(here),
        "to the device": lambda: there.copy_(host, non_blocking=True),
        "to the device, pageable": lambda: there.copy_(plain),
        "to the host": lambda: host.copy_(here, non_blocking=True),
        "on the host": lambda: other.copy_(plain),
        "matrix product": freed(lambda: square @ square),
    }
    made = device.rounds(actions, 3 if device.tiny else 20, warm=3)
    amounts = {name: 2 * size if name in ("memory", "on the host") else size for name in actions}
    amounts["matrix product"] = 2 * side**3
    return {name: {**spread(one.seconds), "per_second": amounts[name] / one.median} for name, one in made.items()}


def search(device: Device, bytes_per_second: float) -> Iterator[Row]:
    """Measure exact search for the 8 nearest of 1 and 10 million fingerprints, beside the time to read them once.

    bytes_per_second: bandwidth of device memory, measured in the same run. difference: the largest, of the similarities
    of 8 queries to those in float64.
    """
    counts = (2_000, 5_000) if device.tiny else (1_000_000, 10_000_000)
    for dtype in (torch.float32, torch.float16):
        for count in counts:
            if (dtype, count) != (torch.float32, counts[0]) and device.over:
                return
            for row in _searched(device, dtype, count, bytes_per_second):
                device.say(f"{row['queries']} among {count:,}, {row['dtype']}: {row['milliseconds']:.3g} ms")
                yield row


def _searched(device: Device, dtype: torch.dtype, count: int, bytes_per_second: float) -> list[Row]:
    random = torch.Generator(device.name).manual_seed(0)
    index = Matrix(_DIM, dtype, device.name)
    for start in range(0, count, _PART):
        index.add(_units(min(_PART, count - start), device, random))
    queries = _units(256, device, random)
    floor = count * _DIM * dtype.itemsize / bytes_per_second
    rows, difference = [], _difference(index, queries[:8])
    for batch in (1, 32, 256):
        made = device.rounds({"": lambda batch=batch: index.search_on(queries[:batch], 8)}, 10, warm=2)[""]  # type: ignore[misc]
        rows.append({
            "rows": count, "dtype": str(dtype).removeprefix("torch."), "queries": batch,
            "seconds": spread(made.seconds), "milliseconds": 1000 * made.median,
            "floor_milliseconds": 1000 * floor, "of_floor": floor / made.median, "difference": difference,
        })  # fmt: skip
    return rows


def _units(count: int, device: Device, random: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, _DIM, generator=random, device=device.name), dim=1)


def _difference(index: Matrix, queries: torch.Tensor) -> float:
    similarity, _ = index.search_on(queries, 8)
    best = torch.full((len(queries), 8), -2.0, dtype=torch.float64, device=queries.device)
    for start in range(0, index.ntotal, _PART):
        scores = queries.double() @ index.rows[start : start + _PART].double().T
        best = torch.cat([best, scores], 1).topk(8, dim=1).values
    return float((similarity.double() - best).abs().max())
