"""All measurements on a GPU, in one run of minutes, into one JSON file: `llmcache bench gpu`.

`python -m llmcache.bench.gpu` does the same without the libraries of the command line. It needs torch, transformers,
sentence-transformers, scipy and xxhash, and no FAISS, no data and no downloaded weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from llmcache.bench.gpu.device_memory import bandwidth, search
from llmcache.bench.gpu.near import near
from llmcache.bench.gpu.prefix import prefixes
from llmcache.bench.gpu.tiers import tiers
from llmcache.bench.harness.conditions import conditions, load
from llmcache.bench.harness.device import Device
from llmcache.bench.harness.files import write
from llmcache.bench.harness.shapes import SHAPES
from llmcache.errors import ConfigError, LLMCacheError

PARTS = ("bandwidth", "search", *SHAPES, "near", "prefix")


def measured(
    out: Path | None = None,
    *,
    minutes: float = 8.0,
    only: str = "",
    device: str = "cuda",
    tiny: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the parts within the time limit, and rewrite the file after each part.

    only: parts, separated by commas. A part that fails is recorded with the reason, and the next one runs. Returns the
    record. LLMCacheError when the device is missing, ConfigError for an unknown part.
    """
    wanted = _wanted(only)
    if device == "cuda" and not torch.cuda.is_available():
        raise LLMCacheError("torch sees no CUDA device here; give --device cpu --tiny for a trial")
    began = time.monotonic()
    record: dict[str, Any] = {**conditions(), **_machine(device), "tiny": tiny, "minutes": minutes, "parts": {}}
    for number, name in enumerate(wanted):
        left = began + 60 * minutes - time.monotonic()
        if left <= 0 and number:
            say(f"{name}: no time is left")
            record["parts"][name] = {"skipped": "no time was left"}
            continue
        # a part may take twice its share of the remaining time, since others take less
        place = Device(device, time.monotonic() + 2 * left / (len(wanted) - number), tiny, say)
        record["parts"][name] = _part(name, place, record["parts"])
        record["seconds"] = time.monotonic() - began
        if out is not None:
            write(out, record)
    return record


def _wanted(only: str) -> list[str]:
    names = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    if unknown := sorted(set(names) - set(PARTS)):
        raise ConfigError(f"there is no part {', '.join(unknown)}; choose of: {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def _machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": device, "load": load(), "cores": os.cpu_count()}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {"gpu": card.name, "gpu_bytes": card.total_memory, "cuda": torch.version.cuda}
    return facts


def _part(name: str, device: Device, before: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    result: Any = [] if name in ("search", "near", "prefix") else {}
    failure: dict[str, Any] = {}
    try:
        if name == "bandwidth":
            result = bandwidth(device)
        elif name == "search":
            memory = before.get("bandwidth", {}).get("result") or bandwidth(device)
            result.extend(search(device, memory["memory"]["per_second"]))
        elif name in ("near", "prefix"):
            result.extend((near if name == "near" else prefixes)(device))
        else:
            result.update(tiers(SHAPES[name], device))
    except Exception as error:  # results before the error and the parts after it are kept
        failure["error"] = f"{type(error).__name__}: {error}"
        device.say(f"{name} failed: {failure['error']}")
    finally:
        if device.cuda:
            torch.cuda.empty_cache()
    return {"result": result, **failure, "seconds": time.monotonic() - began}


def failed(record: dict[str, Any]) -> list[str]:
    """List the parts that ended with an error."""
    return [name for name, part in record["parts"].items() if "error" in part]


def main() -> None:
    """Run the command without the libraries of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llmcache.bench.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after every part.")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", default="", help=f"Parts, separated by commas: {', '.join(PARTS)}.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="Tiny sizes, for a trial without meaningful times.")
    options = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no types for it
    try:
        record = measured(
            options.out, minutes=options.minutes, only=options.only, device=options.device, tiny=options.tiny,
            say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
        )  # fmt: skip
    except LLMCacheError as error:
        sys.exit(f"llmcache: {error}")
    if options.out is None:
        print(json.dumps(record, indent=1))  # noqa: T201
    sys.exit(1 if failed(record) else 0)
