"""Report as a self-contained HTML page: no scripts, no requests, light or dark by the reader's setting."""

from __future__ import annotations

import time
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined, Template

from llmcache import units as words
from llmcache.errors import CorpusError
from llmcache.indexes.files.atomic_write import ordinary_mode, write_atomically
from llmcache.report import sections
from llmcache.report.facts import Facts
from llmcache.report.totals import TIERS


@cache
def _template() -> Template:
    names = ("page.html", "chart.html", "style.css")
    texts = {name: (files("llmcache.report") / name).read_text(encoding="utf-8") for name in names}
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name: getattr(words, name) for name in ("count", "share", "duration", "size", "money")}
    return environment.get_template("page.html")


def rendered(facts: Facts, version: str = "") -> str:
    """Render the page as HTML. version: version of LLMCache, for the footer."""
    calibrations = facts.calibrations.values()
    budgets = [float(calibration["budget"]) for calibration in calibrations if calibration.get("budget")]
    return _template().render(
        facts=facts, sections=sections, tiers=list(zip(TIERS, sections.COLOURS, facts.total.tiers, strict=True)),
        budget=budgets[0] if len(budgets) == 1 else None, version=version,
        made=time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(facts.made)).lstrip("0"),
    )  # fmt: skip


def write(facts: Facts, path: Path, version: str = "") -> int:
    """Write the page atomically. Returns its size in bytes. CorpusError when it cannot be written there."""
    data = rendered(facts, version).encode("utf-8", "replace")
    try:
        write_atomically(path, data, mode=ordinary_mode())
    except OSError as error:
        raise CorpusError(f"{path} cannot be written ({error.strerror or error}); choose another place") from None
    return len(data)
