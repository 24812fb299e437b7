"""Everything that is measured on a GPU, in one run of minutes, into one JSON file: `llmcache bench gpu`.

`python -m llmcache.bench.gpu` is the same where the command line's libraries are not installed: it needs torch,
transformers, sentence-transformers, scipy and xxhash, and no FAISS, no data and no downloaded weights.
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
from llmcache.bench.harness.conditions import conditions
from llmcache.bench.harness.device import Device
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
    """Run the parts, each within what is left of the minutes, and write the file anew when one is done.

    only: parts, with commas between. A part that fails is recorded with the reason, and the next one runs.
    LLMCacheError: there is no such device. ConfigError: no such part.
    """
    wanted = _wanted(only)
    if device == "cuda" and not torch.cuda.is_available():
        raise LLMCacheError("torch sees no CUDA device here; give --device cpu --tiny to try the benchmark out")
    began = time.monotonic()
    found: dict[str, Any] = {**conditions(), **_machine(device), "tiny": tiny, "minutes": minutes, "parts": {}}
    for number, name in enumerate(wanted):
        left = began + 60 * minutes - time.monotonic()
        if left <= 0 and number:
            say(f"{name}: no time is left")
            found["parts"][name] = {"skipped": "no time was left"}
            continue
        # a part may take twice its share of what is left: those that need less leave the rest to others
        place = Device(device, time.monotonic() + 2 * left / (len(wanted) - number), tiny, say)
        found["parts"][name] = _part(name, place, found["parts"])
        found["seconds"] = time.monotonic() - began
        if out is not None:
            _written(out, found)
    return found


def _wanted(only: str) -> list[str]:
    names = [one.strip() for one in only.split(",") if one.strip()] or list(PARTS)
    if unknown := sorted(set(names) - set(PARTS)):
        raise ConfigError(f"there is no part {', '.join(unknown)}; choose of: {', '.join(PARTS)}")
    return [one for one in PARTS if one in names]


def _machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": device, "load": os.getloadavg()[0], "cores": os.cpu_count()}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {"gpu": card.name, "gpu_bytes": card.total_memory, "cuda": torch.version.cuda}
    return facts


def _part(name: str, device: Device, before: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    result: Any = [] if name in ("search", "near", "prefix") else {}
    ended: dict[str, Any] = {}
    try:
        if name == "bandwidth":
            result = bandwidth(device)
        elif name == "search":
            memory = before.get("bandwidth", {}).get("result") or bandwidth(device)
            for row in search(device, memory["memory"]["per_second"]):
                result.append(row)
        elif name in ("near", "prefix"):
            for row in (near if name == "near" else prefixes)(device):
                result.append(row)
        else:
            for what, found in tiers(SHAPES[name], device):
                result[what] = found
    except Exception as error:  # whatever it is, what was measured before it and the parts after it are worth having
        ended["error"] = f"{type(error).__name__}: {error}"
        device.say(f"{name} failed: {ended['error']}")
    finally:
        if device.cuda:
            torch.cuda.empty_cache()
    return {"result": result, **ended, "seconds": time.monotonic() - began}


def _written(out: Path, found: dict[str, Any]) -> None:
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out)


def failed(found: dict[str, Any]) -> list[str]:
    """Parts that ended with an error."""
    return [name for name, part in found["parts"].items() if "error" in part]


def main() -> None:
    """The command without the command line's libraries."""
    parser = argparse.ArgumentParser(
        prog="python -m llmcache.bench.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="Write the JSON here, anew after every part.")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", default="", help=f"Parts, with commas between: {', '.join(PARTS)}.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="Almost nothing of everything, to try it out.")
    given = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no types for it
    try:
        found = measured(
            given.out, minutes=given.minutes, only=given.only, device=given.device, tiny=given.tiny,
            say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
        )  # fmt: skip
    except LLMCacheError as error:
        sys.exit(f"llmcache: {error}")
    if given.out is None:
        print(json.dumps(found, indent=1))  # noqa: T201
    sys.exit(1 if failed(found) else 0)
