"""Credentials in URLs appear in no error, log line, record, report or manifest."""

from __future__ import annotations

import itertools
import logging
import traceback
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from llmcache.banks.counters import Counters
from llmcache.banks.history import History
from llmcache.banks.history import records as records_of
from llmcache.indexes.errors import CorpusError, LLMCacheError, SnapshotDamaged
from llmcache.indexes.maintenance import remote
from llmcache.indexes.store import Store
from llmcache.indexes.urls import has_secrets, redacted, without_secrets_of
from tests import storybook

SECRETS = ("S3cr3tK3y", "wJalr/XUtnFEMI/K7MDENG+bPxRfi", "p@ss:word#1?x", "tok_0123456789abcdef", "ü-geheim")
HOSTS = ("bucket.example", "bucket.example:8443", "localhost", "[::1]:9000")
SCHEMES = ("s3", "https", "gs", "abfs+ssl", "ftp", "simplecache::s3")
PATHS = ("", "/stores/one", "/a b/ü", "/x@y/z")


def urls(secret: str) -> list[str]:
    found = []
    for scheme, host, path in itertools.product(SCHEMES, HOSTS, PATHS):
        path = path.replace(" ", "%20")
        for written in {secret, quote(secret, safe="")}:
            found += [
                f"{scheme}://user:{written}@{host}{path}",
                f"{scheme}://{quote(secret, safe='')}@{host}{path}",
                f"{scheme}://{host}{path}?sig={quote(secret, safe='/')}&sv=2024",
                f"{scheme}://{host}{path}?X-Amz-Security-Token={quote(secret, safe='')}",
                f"{scheme}://{host}{path}#access_token={quote(secret, safe='')}",
            ]
    return found


def leaks(secret: str, text: str) -> bool:
    return any(form in text for form in (secret, quote(secret, safe=""), quote(secret, safe="/")))


@pytest.mark.parametrize("secret", SECRETS)
def test_no_form_of_a_url_shows_its_credentials(secret: str) -> None:
    for url in urls(secret):
        for text in (url, f"cannot reach {url}; try again", f"{url!r} is gone", str(Path(url))):
            assert not leaks(secret, redacted(text)), text
            assert not leaks(secret, str(LLMCacheError(text)))
            assert not leaks(secret, str(CorpusError(text)))
        said = f"403 for AccessKey={secret} at {quote(secret, safe='')}"
        assert not leaks(secret, without_secrets_of(url, said)), url
        assert has_secrets(url)


@pytest.mark.parametrize(
    "plain",
    [
        "s3://bucket/store",
        "https://host:8443/a/b",
        "/work/store",
        "C:/x",
        "a: b/c@d",
        "file:///tmp/x",
        "see e@mail.example",
    ],
)
def test_what_has_no_credentials_stays_as_it_is(plain: str) -> None:
    assert redacted(plain) == plain
    assert not has_secrets(plain)


@pytest.mark.parametrize("secret", SECRETS)
def test_log_lines_of_every_form_hide_credentials(secret: str, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("llmcache")
    for url in urls(secret)[::7]:
        log.warning("%s cannot be reached", url)
        log.error(f"{url} cannot be reached")
        log.warning("arguments that do not fit: %s %s", url)
    assert len(caplog.records) > 10
    assert not leaks(secret, caplog.text)


class Failing:
    """A library whose calls all fail, with the URL and the secret in the error."""

    def __init__(self, url: str, secret: str) -> None:
        self._said = f"403 at {url}, key {secret}"

    def clear_instance_cache(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError(self._said)

        return fail


def returned(value: Any, *_: Any, **__: Any) -> Any:
    return value


CALLS: dict[str, Any] = {
    "push": lambda store, url, target: remote.push(store, url),
    "pull": lambda store, url, target: remote.pull(url, target),
}


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("call", CALLS)
def test_errors_of_push_and_pull_hide_credentials_in_message_and_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str, call: str
) -> None:
    import fsspec

    storybook.filled(tmp_path / "store", 3).close()
    written = quote(secret, safe="")
    for url in (
        f"memory://user:{written}@host/x",
        f"https://host.example/x?sig={written}",
        f"nosuch://u:{written}@host",
    ):
        for working in (False, True):
            failing = Failing(url, secret)
            with monkeypatch.context() as patched:
                opened = partial(returned, (failing, "x")) if working else failing.anything
                patched.setattr(fsspec.core, "url_to_fs", opened)
                with pytest.raises(LLMCacheError) as raised:
                    CALLS[call](tmp_path / "store", url, tmp_path / "target")
            shown = "".join(traceback.format_exception(raised.value, chain=True))
            assert not leaks(secret, str(raised.value))
            assert not leaks(secret, shown)


def test_what_push_and_pull_report_and_write_has_no_credentials(tmp_path: Path) -> None:
    storybook.filled(tmp_path / "store", 3).close()
    url = f"file://{tmp_path}/there?sig=S3cr3tK3y"
    done = remote.push(tmp_path / "store", url)
    back = remote.pull(url, tmp_path / "back")
    assert not leaks("S3cr3tK3y", f"{done} {back}")
    for folder in (tmp_path / "store", tmp_path / "back"):
        for file in folder.rglob("*"):
            assert not file.is_file() or b"S3cr3tK3y" not in file.read_bytes()


@pytest.mark.parametrize("secret", SECRETS)
def test_records_of_runs_hide_credentials_also_those_written_before(tmp_path: Path, secret: str) -> None:
    store = storybook.filled(tmp_path / "store", 3)
    counters = Counters()
    history = History(store, counters, "default", f"https://user:{quote(secret, safe='')}@host/model")
    for url in urls(secret)[::11]:
        history.begin(url)
        counters.documents += 1
    history.write()
    (written,) = (tmp_path / "store" / "stat").glob("*.runs")
    assert not leaks(secret, "\n".join(str(one.get("corpus")) for one in records_of(store)))
    assert not leaks(secret, str(records_of(store)))
    assert not leaks(secret, written.read_text())
    store.close()


def test_an_error_keeps_its_class_and_its_other_arguments() -> None:
    assert SnapshotDamaged("x", 3).args == ("x", 3)
    with pytest.raises(ValueError, match=r"s3://\*\*\*@b is gone"):
        raise CorpusError("s3://u:p@b is gone")
    assert Store.open.__doc__
