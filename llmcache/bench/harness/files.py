"""Files of records, and the sizes of folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcache.indexes.files.atomic_write import ordinary_mode, write_atomically


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, atomically and durably."""
    text = json.dumps(record, indent=1, default=_plain) + "\n"
    write_atomically(path, text.encode(), mode=ordinary_mode(), durable=True)


def _plain(value: Any) -> Any:
    """Convert NumPy numbers to Python's, for JSON."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a record is no JSON")


def folder_bytes(folder: Path) -> int:
    """Sum the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
