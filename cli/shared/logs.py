"""Log lines on standard error: text, or one JSON object a line with the field names of OpenTelemetry's log model."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from llmcache import __version__
from llmcache.cli.shared.output import printable
from llmcache.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
log = logging.getLogger("llmcache")


class Lines(logging.Formatter):
    """Formatter of log lines. form: "" gives `llmcache: message`, "text" adds time and level, "json" one object."""

    def __init__(self) -> None:
        super().__init__()
        self.form = ""

    def format(self, record: logging.LogRecord) -> str:
        message = " ".join(record.getMessage().split())
        facts: dict[str, Any] = getattr(record, "facts", {})
        if self.form == "json":
            return json.dumps({**_fixed(record), "body": message, **facts}, default=str, ensure_ascii=False)
        if self.form == "text":
            return f"{_time(record)} {record.levelname} {record.name}: {printable(message)}"
        return f"llmcache: {printable(message)}"


def _fixed(record: logging.LogRecord) -> dict[str, Any]:
    return {
        "timestamp": _time(record),
        "severity_text": record.levelname,
        "service.name": "llmcache",
        "service.version": __version__,
        "process.pid": os.getpid(),
        "logger": record.name,
    }


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


lines = Lines()


@contextmanager
def logged() -> Iterator[None]:
    """Log to standard error inside the block: warnings and errors, unless `choose` sets another level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(lines)
    root, level = logging.getLogger(), log.level
    lines.form = ""
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        log.setLevel(level)


def choose(level: str | None, form: str | None) -> None:
    """Apply --log-level and --log-format. ConfigError for unknown values."""
    if level is not None and level not in LEVELS:
        raise ConfigError(f"--log-level is one of {', '.join(LEVELS)}, got {level!r}")
    if form is not None and form not in ("text", "json"):
        raise ConfigError(f"--log-format is text or json, got {form!r}")
    lines.form = form or ("text" if level in ("debug", "info") else "")
    if level is not None:
        log.setLevel(level.upper())


def error_line(message: str, code: int) -> str:
    """Format the last line of a failed command."""
    if not lines.form:
        return "llmcache: " + printable(message)
    record = logging.LogRecord("llmcache", logging.ERROR, __file__, 0, "%s", (message,), None)
    record.facts = {"process.exit.code": code}
    return lines.format(record)
