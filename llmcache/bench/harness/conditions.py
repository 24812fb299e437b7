"""Conditions of a measurement: versions, commit and processors of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmcache import __version__


def conditions() -> dict[str, Any]:
    """Return versions, commit and processors, for a record."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    torch = sys.modules.get("torch")  # a measurement without a model does not import it for its version
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = None
    return {
        "llmcache": __version__,
        "commit": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__ if torch else torch_version,
        "threads": torch.get_num_threads() if torch else len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
    }


def load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]
