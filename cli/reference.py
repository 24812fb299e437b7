"""Reference of the command line, generated from its help texts: python -m llmcache.cli.reference > docs/cli.md"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import typer

WIDTH = 100

_HEAD = """# The command line

Generated from the help texts by `python -m llmcache.cli.reference > docs/cli.md`. Exit codes, log lines and metrics are
in [operations.md](operations.md).
"""


def reference() -> str:
    """Format the help of all commands as Markdown, WIDTH columns wide whatever COLUMNS says."""
    from llmcache.cli.main import app

    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), str(WIDTH)
    try:
        parts = [f"## {name}\n\n```\n{text}\n```\n" for name, text in _helps(typer.main.get_command(app), "llmcache")]
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width
    return "\n".join([_HEAD, *parts])


def _helps(command: Any, name: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    context = command.context_class(command, info_name=name.rpartition(" ")[2], parent=parent, max_content_width=WIDTH)
    text = "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
    yield name, text
    for child in sorted(getattr(command, "commands", {})):
        yield from _helps(command.commands[child], f"{name} {child}", context)


if __name__ == "__main__":
    sys.stdout.write(reference())
