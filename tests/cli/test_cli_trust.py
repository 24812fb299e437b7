"""The command line around trust: keys, secrets, purging, signing, and stores that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcache.cli.shared.output import printable
from llmcache.indexes.search.bank_index import NearChoice
from llmcache.indexes.store import Store
from tests.conftest import Command, Done

TEXTS = ["How do I locate my card?", "My card has not arrived.", "Zanzibar"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"name-{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef" * 4 + "\n")
    return path


def build(llmcache: Command, corpus: Path, store: Path, model_path: str, *options: object) -> None:
    done = llmcache("build", corpus, "-m", model_path, "-s", store, *options)
    assert done.code == 0, done.err


def refused(done: Done, *said: str) -> None:
    """One line on standard error, that says this, and no traceback."""
    assert done.code in {1, 2}
    assert len(done.err.strip().splitlines()) == 1
    assert done.err.startswith("llmcache: ")
    for part in said:
        assert part in done.err


def test_a_document_is_purged_by_its_text(
    llmcache: Command, corpus: Path, store: Path, model_path: str, tmp_path: Path
) -> None:
    build(llmcache, corpus, store, model_path)
    gone = tmp_path / "gone.txt"
    gone.write_text("Zanzibar\n")
    would = json.loads(llmcache("purge", store, "--text-file", gone, "--dry-run", "--json").out)
    assert (would["rows"], would["dry_run"]) == (1, True)
    assert any(b"name-2" in file.read_bytes() for file in store.rglob("*.var"))
    done = llmcache("purge", store, "--text-file", gone)
    assert done.code == 0
    assert "entries removed" in done.out
    assert not any(b"name-2" in file.read_bytes() for file in store.rglob("*") if file.is_file())
    again = llmcache("purge", store, "--text-file", gone)
    assert again.code == 0
    assert "no entry of the newest generation matches" in again.err
    warmed = json.loads(llmcache("warm", corpus, "-s", store, "--json").out)
    assert (warmed["exact"], warmed["misses"]) == (2, 1)


def test_entries_are_purged_by_key_by_writer_and_by_namespace(
    llmcache: Command, corpus: Path, store: Path, model_path: str
) -> None:
    build(llmcache, corpus, store, model_path)
    build(llmcache, corpus, store, model_path, "--namespace", "other")
    opened = Store.open(store)
    space = opened.manifest.namespaces["default"]
    key = opened.bank("default", "output", lambda: space.banks["output"], NearChoice()).key(0)
    opened.close()
    assert json.loads(llmcache("purge", store, "--key", key, "--namespace", "default", "--json").out)["rows"] == 1
    banks = json.loads(llmcache("inspect", store, "--json").out)["namespaces"]
    (writer,) = banks["other"]["banks"]["output"]["writers"]
    assert banks["default"]["banks"]["output"]["entries"] == 2
    assert json.loads(llmcache("purge", store, "--writer", writer, "--json").out)["rows"] == 3
    assert json.loads(llmcache("purge", store, "--namespace", "default", "--json").out)["rows"] == 2
    assert set(json.loads(llmcache("inspect", store, "--json").out)["namespaces"]) == {"other"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "say what to purge"),
        (["--key", "xyz"], "32 hexadecimal digits"),
        (["--key", "0" * 32, "--writer", "w"], "one of --writer, --key and --text-file"),
        (["--namespace", "x"], "no namespace 'x'"),
        (["--text-file", "/no/such/file.txt"], "/no/such/file.txt"),
    ],
)
def test_a_purge_that_makes_no_sense_is_one_line(llmcache: Command, store: Path, options: list[str], said: str) -> None:
    opened = Store.open(store, create=True)
    opened.declare("default", {}, {})
    opened.close()
    refused(llmcache("purge", store, *options), said)


def test_a_namespace_with_a_secret_needs_it_everywhere(
    llmcache: Command, corpus: Path, store: Path, model_path: str, key: Path, tmp_path: Path
) -> None:
    secret = ["--namespace", "n", "--secret-file", key]
    build(llmcache, corpus, store, model_path, *secret)
    out = tmp_path / "out.jsonl"
    ran = json.loads(llmcache("run", corpus, "-s", store, "-o", out, *secret, "--json").out)
    assert (ran["exact"], ran["misses"]) == (3, 0)
    assert json.loads(llmcache("warm", corpus, "-s", store, *secret, "--dry-run", "--json").out)["known"] == 3
    for command in (
        ["run", corpus, "-s", store, "-o", out, "--namespace", "n"],
        ["warm", corpus, "-s", store, "--namespace", "n"],
        ["warm", corpus, "-s", store, "--namespace", "n", "--dry-run"],
        ["purge", store, "--text-file", corpus, "--namespace", "n"],
    ):
        refused(llmcache(*command), "has a secret; give it")
    assert json.loads(llmcache("purge", store, "--text-file", corpus, *secret, "--json").out)["rows"] == 3


def test_a_signed_store_is_read_by_who_has_the_key(
    llmcache: Command,
    corpus: Path,
    store: Path,
    model_path: str,
    key: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(llmcache, corpus, store, model_path, "--key-file", key)
    store.chmod(0o777)
    out = tmp_path / "out.jsonl"
    refused(llmcache("run", corpus, "-s", store, "-o", out), "written by other users", "chmod", "--allow-untrusted")
    refused(llmcache("stats", store), "written by other users")
    monkeypatch.setenv("LLMCACHE_KEY", key.read_text().strip())
    refused(llmcache("stats", store), "written by other users")  # a variable counts only when it is named
    for how in (["--key-file", key], ["--key-variable", "LLMCACHE_KEY"]):
        ran = json.loads(llmcache("run", corpus, "-s", store, "-o", out, *how, "--json").out)
        assert (ran["exact"], ran["counters"]["exact_text"]) == (3, 3)
        assert json.loads(llmcache("inspect", store, *how, "--json").out)["trust"] == "signed"
    refused(llmcache("stats", store, "--key-file", key, "--key-variable", "LLMCACHE_KEY"), "both given")
    refused(llmcache("stats", store, "--key-variable", "NOT_SET_ANYWHERE"), "not set")


def test_an_untrusted_store_is_read_only_with_the_model_given(
    llmcache: Command, corpus: Path, store: Path, model_path: str, tmp_path: Path
) -> None:
    build(llmcache, corpus, store, model_path)
    store.chmod(0o777)
    corpus.write_text(corpus.read_text() + json.dumps({"id": "new", "text": "new"}) + "\n")
    command = ["run", corpus, "-s", store, "-o", tmp_path / "out.jsonl", "--allow-untrusted", "--json"]
    refused(llmcache(*command), "give the model")
    ran = json.loads(llmcache(*command, "--model", model_path).out)
    assert (ran["exact"], ran["misses"], ran["counters"]["exact_tokens"], ran["counters"]["not_stored"]) == (3, 1, 3, 1)
    assert json.loads(llmcache("stats", store, "--allow-untrusted", "--json").out)["banks"][0]["entries"] == 3


def test_a_store_is_signed_afterwards(
    llmcache: Command, corpus: Path, store: Path, model_path: str, key: Path, tmp_path: Path
) -> None:
    build(llmcache, corpus, store, model_path)
    refused(llmcache("sign", store), "--key-file")
    assert json.loads(llmcache("sign", store, "--key-file", key, "--dry-run", "--json").out)["segments"] == 1
    refused(llmcache("stats", store, "--key-file", key), "signed with the key given")
    assert llmcache("sign", store, "--key-file", key).code == 0
    store.chmod(0o777)
    out = tmp_path / "out.jsonl"
    ran = json.loads(llmcache("run", corpus, "-s", store, "-o", out, "--key-file", key, "--json").out)
    assert ran["exact"] == 3


def test_what_a_store_says_commands_no_terminal(llmcache: Command, store: Path) -> None:
    opened = Store.open(store, create=True)
    opened.declare("\x1b[2Jgone\u202e", {"name": "\x1b]0;title\x07"}, {})
    opened.close()
    for command in ("inspect", "stats"):
        done = llmcache(command, store)
        assert done.code == 0
        assert not {"\x1b", "\x07", "\u202e"} & set(done.out)
    refused(llmcache("purge", store, "--namespace", "\x1b[2J"), "\\x1b[2J")
    assert printable("é ü 漢\x1b\n") == "é ü 漢\\x1b\\n"
