"""Page of `llmcache report`: its numbers, its sentences without data, and its display in a browser."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmcache import units as words
from llmcache.banks.counters import Counters
from llmcache.indexes.stats import runs as journal
from llmcache.indexes.store import Store
from llmcache.report.charts import thinned, ticks
from llmcache.report.facts import Facts, facts
from llmcache.report.page import rendered, write
from llmcache.report.statistics import BankStatistics, statistics
from llmcache.report.totals import RunTotals
from tests.conftest import Command
from tests.storybook import calibration, filled, told

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium-headless-shell", "chromium-shell", "chromium", "google-chrome")


def report(path: Path, **given: Any) -> Facts:
    opened = Store.open(path, uses=False)
    try:
        return facts(opened, **given)
    finally:
        opened.close()


class Page(HTMLParser):
    """Parser for the text and external references of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [str(value) for name, value in attrs if name in ("src", "href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def past(store: Path) -> Path:
    """Store with five weeks of runs and a calibration."""
    opened = filled(store, 400, {"calibration": calibration()})
    told(opened)
    opened.close()
    return store


# -- numbers --------------------------------------------------------------------------------------------------


def test_the_totals_are_those_of_the_counters_and_of_all_runs(past: Path) -> None:
    found = report(past, price=2.0)
    documents = sum(one.tally.documents for one in found.periods)
    assert found.total.documents == documents == sum(one.tally.documents for one in found.corpora)
    assert sum(found.total.tiers) == pytest.approx(documents)
    assert found.total.hit_rate == pytest.approx(1 - found.total.tiers[-1] / documents)
    assert found.money == pytest.approx(2.0 * (found.total.saved_seconds - found.total.own_seconds) / 3600)
    assert found.early == 0
    assert [one.name for one in found.corpora] == ["tickets.jsonl", "logs.txt.gz", "policies"]
    assert sum(found.asked) >= sum(found.near) > 0


def test_tiers_add_up_to_the_documents_whatever_the_counters_say() -> None:
    counters = {"documents": 10, "exact_text": 9, "exact_tokens": 5, "repeats": 3, "near": 2, "misses": 4}
    assert RunTotals.of(counters).tiers == (4, 0, 0, 2, 0, 4)
    assert RunTotals.of({}).hit_rate == 0
    assert RunTotals.of({}).times == 1


def test_days_become_weeks_and_months_where_there_are_many(store: Path) -> None:
    opened = filled(store, 0)
    for days, period in ((20, "day"), (200, "week"), (900, "month")):
        when = [datetime.date(2024, 1, 1) + datetime.timedelta(days=7 * i) for i in range(days // 7 + 1)]
        lines = [{"day": str(day), "end": i, "corpus": "", "counters": {"documents": 2}} for i, day in enumerate(when)]
        journal.write_journal(opened.folder, "b" * 32, lines)
        found = facts(opened)
        assert found.period == period
        assert sum(one.tally.documents for one in found.periods) == 2 * len(when)
        assert len(rendered(found)) > 5000
    opened.close()


def test_the_most_used_entries_are_counted_before_the_others(past: Path) -> None:
    kept = report(past).usage
    assert kept is not None
    assert kept.hits[-1] == 1
    assert (np.diff(kept.hits) >= 0).all()
    # the entries with most uses per byte come first
    assert (np.diff(np.diff(kept.hits) / np.diff(kept.bytes)) <= 1e-9).all()
    assert kept.bytes_for(0.5) < 0.5 * kept.bytes[-1]
    # 400 rows of 1536 + 72 + 48 + 8 bytes
    assert kept.bytes[-1] == 400 * (1536 + 72 + 48 + 8)


def test_drift_of_all_results_is_that_of_the_audits_by_the_share_reused() -> None:
    tally = RunTotals.of({"documents": 100, "audits": 50, "audited_drift": 1.0, "near": 40}, 80, 40)
    assert tally.drift_of_all == pytest.approx(1 / 50 * 40 / 80)
    assert RunTotals.of({"documents": 100}).drift_of_all is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 ms"), (0.0123, "12 ms"), (5.25, "5.25 s"), (59.9, "59.9 s"), (125, "2 min 5 s"), (1500, "25 min"),
     (15120, "4 h 12 min"), (7200, "2 h"), (-90, "-1 min 30 s"), (864000, "10 days"), (3599, "59 min")],
)  # fmt: skip
def test_durations_read_like_a_person_says_them(seconds: float, said: str) -> None:
    assert words.duration(seconds) in (said, "1 h")


def test_other_numbers_read_like_a_person_says_them() -> None:
    assert [words.count(one) for one in (0, 9999, 1_234_567, 2.5e9)] == ["0", "9,999", "1.23 million", "2.5 billion"]
    assert [words.share(one) for one in (0, 0.0031, 0.805, 1)] == ["0.0 %", "0.31 %", "80.5 %", "100.0 %"]
    assert [words.size(one) for one in (12, 1500, 6.66e6, 3e13)] == ["12 bytes", "1.5 KB", "6.66 MB", "30 TB"]
    assert [words.money(one, "€") for one in (0, 0.00123, 12.5, -3)] == ["€0.00", "€0.0012", "€12.50", "-€3.00"]
    assert [words.short(one) for one in (0, 2500, 150_000, 1.5e6)] == ["0", "2,500", "150 k", "1.5 M"]


def test_axes_have_round_numbers_and_as_many_names_as_fit() -> None:
    for most in (0.003, 0.7, 1, 7, 99, 12345):
        values = ticks(most)
        assert 3 <= len(values) <= 8
        assert values[0] == 0
        assert values[-1] >= most * (1 - 1e-9)
        assert values[-2] < most
    assert ticks(0) == ticks(float("nan")) == [0.0, 1.0]
    assert thinned([str(i) for i in range(40)]) == [0, 10, 20, 30]
    assert thinned(["a", "b"]) == [0, 1]


# -- words ----------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_saved_and_in_what_currency(past: Path) -> None:
    found = report(past, price=1.2, currency="€")
    assert found.money is not None
    page = Page(rendered(found))
    for said in (words.share(found.total.hit_rate), words.duration(found.total.net_seconds), "€1.20 an hour",
                 words.money(found.money, "€"), "tickets.jsonl", "budget 0.5 %", "68.4 %", "entries were evicted",
                 "Layers", "Slowest corpora"):  # fmt: skip
        assert said in page.text
    assert "€" not in Page(rendered(report(past))).text


def test_a_page_holds_all_it_shows_and_stays_small(past: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    size = write(report(past), path)
    assert size == path.stat().st_size < 2 << 20
    html = path.read_text()
    page = Page(html)
    assert page.outside == ["data:,"]
    assert "script" not in page.tags
    assert not re.search(r"https?:|@import|url\(", html)
    assert not [one for one in tmp_path.iterdir() if "partial" in one.name]


def test_what_is_not_there_is_said_in_words(store: Path) -> None:
    filled(store, 0).close()
    text = Page(rendered(report(store, price=1.0))).text
    for said in ("Nothing was asked of this store yet", "No audits yet", "Near reuse was not calibrated",
                 "No corpora yet", "No entries were evicted", "No entry was read again yet",
                 "No document was compared"):  # fmt: skip
        assert said in text
    opened = filled(store, 20)
    opened.write_counters({"documents": 10, "exact_text": 4, "misses": 6, "model_seconds": 1.0, "saved_seconds": 0.4})
    opened.close()
    text = Page(rendered(report(store))).text
    assert "No runs were recorded yet" in text
    assert "40.0 % of 10 documents" in text


def test_a_cache_that_does_not_pay_is_not_praised(store: Path) -> None:
    opened = filled(store, 20)
    opened.write_counters({"documents": 10, "misses": 10, "model_seconds": 1.0, "overhead_seconds": 0.5})
    opened.close()
    text = Page(rendered(report(store))).text
    assert "but the cache took 500 ms more than it saved" in text
    assert "It does not pay on these documents" in text


def test_a_calibration_without_a_safe_threshold_says_why(store: Path) -> None:
    filled(store, 20, {"calibration": calibration(threshold=None)}).close()
    assert "so near reuse stays off: too few documents" in Page(rendered(report(store))).text
    bare = {name: value for name, value in calibration().items() if name != "curve"}
    opened = filled(store.with_name("other"), 20, {"calibration": bare})
    assert "This calibration kept no curve" in Page(rendered(facts(opened))).text
    opened.close()


def test_names_in_a_store_are_shown_and_never_obeyed(store: Path) -> None:
    evil = '<script>alert(1)</script>" onload="x'
    opened = Store.open(store, create=True)
    opened.declare(evil, {"name": evil}, {"calibration": {**calibration(threshold=None), "reason": evil}})
    line = {"day": "2026-01-01", "end": 1, "corpus": evil, "counters": {"documents": 3, "misses": 1}}
    journal.write_journal(opened.folder, "c" * 32, [line])
    html = rendered(facts(opened))
    opened.close()
    assert "script" not in Page(html).tags
    assert evil in Page(html).text


def test_a_calibration_with_odd_parts_still_has_a_page(store: Path) -> None:
    odd = {**calibration(), "curve": [["a", 1], [1, 2, 3, None], 7, [1.0, 0.5, 0.1, 0.2]], "confidence": None}
    opened = filled(store, 5, {"calibration": odd})
    assert "can be reused" in Page(rendered(facts(opened))).text
    opened.close()


# -- the command ----------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_what_is_in_it(llmcache: Command, past: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    dry = llmcache("report", past, "-o", out, "--dry-run")
    assert "to be written to" in dry.out
    assert not out.exists()
    before = sorted((str(one), one.stat().st_mtime_ns) for one in past.rglob("*"))
    said = json.loads(llmcache("report", past, "-o", out, "--price-per-hour", "2", "--json").out)
    assert said["bytes"] == out.stat().st_size
    assert said["documents"] == report(past).total.documents
    assert said["money"] > 0
    assert "money saved" in llmcache("report", past, "-o", out, "--price-per-hour", "2").out
    assert sorted((str(one), one.stat().st_mtime_ns) for one in past.rglob("*")) == before


def test_what_cannot_be_done_is_one_line(llmcache: Command, past: Path, tmp_path: Path) -> None:
    for arguments, code, said in (
        ((past, "-o", tmp_path), 2, "cannot be written"),
        ((past, "-o", tmp_path / "no" / "r.html"), 2, "cannot be written"),
        ((past, "-o", "/proc/r.html"), 1, "cannot be written"),
        ((past, "-o", tmp_path / "r.html", "--price-per-hour", "-1"), 2, "price of an hour"),
        ((past, "-o", tmp_path / "r.html", "--price-per-hour", "nan"), 2, "price of an hour"),
        ((past, "-o", tmp_path / "r.html", "--currency", "a long sentence"), 2, "a currency is"),
        ((tmp_path / "nowhere", "-o", tmp_path / "r.html"), 1, "there is no store"),
    ):
        done = llmcache("report", *arguments)
        assert (done.code, done.err.count("\n"), said in done.err) == (code, 1, True), done
    assert not (tmp_path / "r.html").exists()


def test_reporting_needs_neither_torch_nor_faiss(past: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['llmcache', 'report', *sys.argv[1:]]\n"
        "from llmcache.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'faiss', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    command = [sys.executable, "-c", code, str(past), "-o", str(tmp_path / "r.html")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


# -- a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def browser() -> str:
    """Headless Chromium."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no browser: apt-get install chromium-headless-shell, to see the report as its readers do")
    return found


def shown(browser: str, page: Path, folder: Path, width: int, dark: bool, *more: str) -> str:
    """Load the page in a browser. Returns its output; its requests are in folder/net.json."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},3000",
    ]  # fmt: skip
    done = subprocess.run(
        [browser, *options, *more, page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_page_and_asks_nobody_for_more(
    browser: str, past: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    write(report(past, price=1.2), page)
    said = shown(browser, page, tmp_path, width, dark, f"--screenshot={shot}")
    assert "CONSOLE" not in said  # where a browser prints errors and refused requests of a page
    asked = set(re.findall(r'"url":"([^"]+)"', (tmp_path / "net.json").read_text()))
    assert not {one for one in asked if not one.startswith(("file:", "data:", "chrome:", "about:"))}
    seen = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert seen.shape[1] == width
    colours = np.unique(seen.reshape(-1, 3) // 8, axis=0)
    assert len(colours) > 60  # text, lines and bars of all tiers; a blank page has one
    ground = np.median(seen.reshape(-1, 3), axis=0).mean()
    assert ground < 60 if dark else ground > 200
    ink = np.abs(seen.mean(axis=2) - ground) > 60
    assert 0.01 < ink.mean() < 0.5
    for top in range(0, 2400, 400):  # no part of it is empty
        assert ink[top : top + 400].any()


def test_nothing_on_the_page_is_wider_than_a_phone(browser: str, past: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    html = rendered(report(past, price=1.2))
    measure = "<script>document.title = 'wide ' + document.documentElement.scrollWidth</script>"
    page.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", html).replace("</body>", measure + "</body>"))
    said = shown(browser, page, tmp_path, 390, False, "--dump-dom")
    found = re.search(r"<title>wide (\d+)</title>", said)
    assert found is not None
    assert int(found[1]) <= 390


# -- notebooks ------------------------------------------------------------------------------------------------


def test_statistics_show_themselves_in_a_notebook(past: Path) -> None:
    opened = Store.open(past, uses=False)
    life = statistics(opened, Counters())
    html = statistics(opened, Counters(documents=10, exact_text=6, near=1, misses=3, model_seconds=2.0))._repr_html_()
    opened.close()
    text = Page(html).text
    assert "70.0 % of 10 documents cost no model time." in text
    assert "same text 60.0 %" in text
    assert "Since the store was made" in text
    assert "default · output" in text
    assert "model 2 s" in text
    assert Page(life._repr_html_()).text.startswith("Nothing was asked yet.")
    assert not Page(html).outside


def test_a_notebook_obeys_no_name_either(store: Path) -> None:
    opened = Store.open(store, create=True)
    found = statistics(opened, Counters())
    shown_ = replace(found, banks=[BankStatistics("<script>", "<b>", 1, "float32", 4, 1, 16, 16, None)])._repr_html_()
    opened.close()
    assert "script" not in Page(shown_).tags
    assert "<script> · <b>" in Page(shown_).text
