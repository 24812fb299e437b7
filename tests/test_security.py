"""SECURITY.md sentence by sentence: which test states it, or that it is advice; and the tests that are nowhere else."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llmcache import CacheConfig, LLMCache, Pipeline
from llmcache.indexes.format.segment import Segment
from llmcache.indexes.maintenance.snapshot import save
from llmcache.indexes.store import Store
from llmcache.model.tokens import tokenise
from tests import small_sentences

ROOT = Path(__file__).parent.parent
ADVICE = ("Keep ", "Use ", "Do not ", "For stores from elsewhere use", "Write to ", "Say which ")

CLAIMS: dict[str, tuple[str, ...]] = {
    "Every statement below is stated by a test": ("test_security::test_every_sentence_is_stated_by_a_test",),
    "Hidden states give the text back": ("test_security::test_token_ids_can_be_read_off_the_states_of_a_layer",),
    "From the states of a layer the token ids": (
        "test_security::test_token_ids_can_be_read_off_the_states_of_a_layer",
    ),
    "A store also holds token ids": ("test_security::test_a_store_holds_token_ids_and_source_ids_in_clear",),
    "Smaller types": ("test_security::test_token_ids_can_be_read_off_the_states_of_a_layer",),
    "An untrusted store that is let in": ("test_trust::test_nothing_is_written_to_an_untrusted_store",),
    "FAISS never sees its index file": (
        "test_trust::test_nothing_of_an_untrusted_store_reaches_faiss",
        "test_namespaces::test_an_untrusted_store_serves_equal_tokens_only",
        "test_namespaces::test_an_untrusted_store_does_not_choose_the_model",
    ),
    "*own* is about who can change files now": ("test_security::test_a_copy_of_an_untrusted_store_is_ones_own",),
    "A signature is made with the same key": ("test_trust::test_a_signature_is_the_hmac_of_the_manifests_bytes",),
    "An old signed state": ("test_trust::test_a_reader_can_refuse_what_is_older_than_what_he_saw",),
    "A reader that knows": ("test_trust::test_a_reader_can_refuse_what_is_older_than_what_he_saw",),
    "`snapshot pull` takes whatever": ("test_remote::test_a_signed_store_stays_signed_and_asks_for_its_key",),
    "Every file is compared": (
        "test_remote::test_a_file_that_is_not_whole_is_never_taken_and_a_push_repairs_it",
        "test_folder::test_a_name_that_is_not_inside_the_store_is_refused_by_every_call",
    ),
    "Nothing in a store is executed": (
        "test_hostile::test_nothing_of_a_store_of_any_kind_is_executed",
        "test_hostile::test_the_cache_executes_nothing_of_its_store",
    ),
    "Manifests are strict JSON": ("test_hostile::test_a_hostile_store_is_refused_or_its_entries_are_misses",),
    "FAISS is given bytes only": ("test_hostile::test_a_hostile_store_is_refused_or_its_entries_are_misses",),
    "A namespace has segments": ("test_namespaces::test_namespaces_share_no_file",),
    "With a secret": (
        "test_keys::test_a_key_agrees_with_the_format_written_out_by_hand",
        "test_namespaces::test_a_wrong_secret_is_refused_at_opening",
        "test_namespaces::test_a_secret_that_could_be_guessed_is_refused_and_leaves_no_store",
    ),
    "The store keeps nothing of the secret": ("test_namespaces::test_a_store_keeps_nothing_of_a_secret_but_its_check",),
    "Results say from which tier": ("test_namespaces::test_the_same_namespace_hits",),
    "Folders are made with mode 0700": (
        "test_trust::test_every_file_a_store_ever_makes_is_the_owners_alone",
        "test_journal::test_all_files_are_the_users_alone_until_the_result_is_whole",
    ),
    "Result files get the mode": ("test_journal::test_all_files_are_the_users_alone_until_the_result_is_whole",),
    "No link is followed": (
        "test_folder::test_what_is_no_plain_file_is_not_read_and_nobody_waits_for_it",
        "test_digests_cache::test_what_is_no_plain_file_is_not_read",
        "test_journal::test_a_link_or_pipe_in_the_folder_of_a_run_is_not_followed",
        "test_journal::test_a_link_in_the_place_of_a_partial_result_or_of_the_folder_is_refused",
    ),
    "Logs name files": ("test_security::test_logs_of_every_level_name_no_text_token_ids_or_ids",),
    "Credentials in URLs": (
        "test_urls::test_errors_of_push_and_pull_hide_credentials_in_message_and_traceback",
        "test_urls::test_log_lines_of_every_form_hide_credentials",
        "test_urls::test_records_of_runs_hide_credentials_also_those_written_before",
    ),
    "`llmcache purge` removes": (
        "test_purge::test_no_byte_of_what_was_purged_is_left",
        "test_purge_everywhere::test_no_byte_of_a_purged_document_is_left_and_all_others_are_served",
        "test_purge_caches::test_what_a_cache_stored_of_a_document_is_gone_and_others_are_right",
        "test_trust_upkeep::test_a_purge_leaves_neither_evicted_rows_nor_bitmaps_nor_uses_behind",
    ),
    "Calibrations that a document": (
        "test_purge_everywhere::test_a_document_that_nobody_finds_takes_calibrations_that_it_may_be_in",
        "test_purge_everywhere::test_a_run_at_work_stops_a_purge_before_anything_is_removed",
    ),
    "All other documents are served": (
        "test_purge_everywhere::test_no_byte_of_a_purged_document_is_left_and_all_others_are_served",
    ),
    "It does not reach snapshots": ("test_security::test_a_snapshot_keeps_what_its_store_purges",),
    "Templates never run what a document": ("test_templates::test_documents_are_never_templates",),
    "A document is still read by the model": ("test_security::test_control_tokens_of_a_document_are_control_tokens",),
    "Scored choices (": ("test_jobs::test_scores_are_those_of_whole_texts",),
    "Stored answers and log-likelihoods": (
        "test_stored_answers::test_a_purge_by_text_removes_answers_and_scores",
        "test_purge_decoders::test_no_token_ids_are_left",
    ),
    "Only the newest version": (),  # what the maintainers do, not the program
}
ROWS: dict[str, str] = {
    "own": "test_trust::test_a_store_that_others_may_write_is_refused_with_the_command_that_helps",
    "signed": "test_trust::test_activations_that_were_replaced_with_matching_xxh3_checksums_are_misses",
    "untrusted": "test_trust::test_an_untrusted_store_is_refused_unless_it_is_allowed",
}


def sentences() -> list[str]:
    """The sentences of SECURITY.md, without headings and the table."""
    lines = (ROOT / "SECURITY.md").read_text().splitlines()
    kept = ["" if line.startswith(("#", "|")) else line for line in lines]
    blocks = re.split(r"\n\s*\n|\n(?=- )", "\n".join(kept))
    found = []
    for block in blocks:
        text = " ".join(block.lstrip("- ").split()).replace("**", "")
        found += [one for one in re.split(r"(?<=[.])\s+(?=[A-Z*`])", text) if one]
    return found


def test_every_sentence_is_stated_by_a_test() -> None:
    left = [one for one in sentences() if not one.startswith(ADVICE)]
    for sentence in left:
        assert any(sentence.startswith(claim) for claim in CLAIMS), f"no test states: {sentence}"
    for claim in CLAIMS:
        assert any(sentence.startswith(claim) for sentence in left), f"SECURITY.md does not say: {claim}"
    table = re.findall(r"^\| (\w+) \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert table[1:] == list(ROWS)
    for name in [*ROWS.values(), *(one for some in CLAIMS.values() for one in some)]:
        module, _, function = name.partition("::")
        (file,) = (ROOT / "tests").rglob(f"{module}.py")
        tree = ast.parse(file.read_text())
        assert function in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}, name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    torch.set_num_threads(1)
    return small_sentences.with_prompts(small_sentences.tiny_folder(tmp_path_factory.mktemp("tiny")))


def rows_of(path: Path, bank: str) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Token ids and stored values of every row of a bank."""
    store = Store.open(path)
    facts = store.manifest.namespaces["default"].banks[bank]
    from llmcache.indexes.search.bank_index import NearChoice

    opened = store.bank("default", bank, lambda: facts, NearChoice())
    rows = np.arange(len(opened))
    reading = opened.read(rows)
    return [(opened.tokens(row), np.asarray(value)) for row, value in zip(rows.tolist(), reading.values, strict=True)]


def test_control_tokens_of_a_document_are_control_tokens() -> None:
    from llmcache.decoders.prompts import prompt_ids, rendered
    from tests import threads

    tokenizer = threads.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    end, ids = tokenizer.sep_token, tokenizer.sep_token_id
    assert ids in prompt_ids(tokenizer, rendered(tokenizer, f"w1 {end} w2"))[1:-1]
    assert ids in prompt_ids(tokenizer, rendered(tokenizer, [{"role": "user", "content": f"w1 {end} w2"}]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_token_ids_can_be_read_off_the_states_of_a_layer(
    tmp_path: Path, model: SentenceTransformer, dtype: Any
) -> None:
    texts = small_sentences.sentences(60)
    with LLMCache.open(tmp_path / "store", model, config=CacheConfig(layers=(0,), dtype=dtype)) as cache:
        cache.encode(texts)
    rows = rows_of(tmp_path / "store", "layer-0")
    known, unknown = rows[:50], rows[50:]
    states = np.concatenate([value for _, value in known])
    ids = np.concatenate([tokens for tokens, _ in known])
    classes = np.unique(ids)
    weights = np.linalg.lstsq(np.c_[states, np.ones(len(states))], np.eye(classes.max() + 1)[ids], rcond=None)[0]
    right = [np.mean((np.c_[value, np.ones(len(value))] @ weights).argmax(1) == tokens) for tokens, value in unknown]
    assert np.mean(right) > 0.8


@pytest.mark.parametrize("secret", [None, b"s" * 32])
def test_a_store_holds_token_ids_and_source_ids_in_clear(
    tmp_path: Path, model: SentenceTransformer, secret: bytes | None
) -> None:
    with LLMCache.open(tmp_path / "store", model, secret=secret) as cache:
        list(cache.run([{"id": "the name of it", "text": "a text with words"}]))
    ids = tokenise(model, ["a text with words"], None, None).ids[0]
    data = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert ids.tobytes() in data
    assert b"the name of it" in data


def test_a_copy_of_an_untrusted_store_is_ones_own(tmp_path: Path, model: SentenceTransformer) -> None:
    import shutil

    with LLMCache.open(tmp_path / "store", model) as cache:
        cache.encode(["a text"])
    (tmp_path / "store").chmod(0o777)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    (tmp_path / "copy").chmod(0o700)
    store = Store.open(tmp_path / "copy")
    assert store.trust == "own"
    store.close()


def test_logs_of_every_level_name_no_text_token_ids_or_ids(
    tmp_path: Path, model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    from llmcache.indexes.maintenance.purge import Doomed, purge

    secret, name = "zebrafish under the kumquat", "SECRET-ID-0815"
    documents = [{"id": name, "text": secret}, *({"id": f"d{i}", "text": one} for i, one in enumerate(TEXTS))]
    ids = tokenise(model, [secret], None, None).ids[0]
    with caplog.at_level(logging.DEBUG, logger="llmcache"):
        with LLMCache.open(tmp_path / "store", model, config=CacheConfig(layers="all", tau=0.8)) as cache:
            list(cache.run(documents))
            pipeline = Pipeline(cache, batch_size=1)
            pipeline.write(documents, tmp_path / "out.jsonl", resume=True, max_documents=3)
            pipeline.write(documents, tmp_path / "out.jsonl")
            list(cache.run([secret + "!"]))
        segment = next((tmp_path / "store" / "seg").glob("*.seg"))
        data = segment.read_bytes()
        segment.write_bytes(bytes(len(data)))
        with LLMCache.open(tmp_path / "store", model) as cache:
            list(cache.run(documents))
        store = Store.open(tmp_path / "store")
        purge(store, Doomed("default", ids=[name]))
        store.close()
    assert caplog.text
    for word in ("zebrafish", "kumquat", name, " ".join(map(str, ids.tolist())), ", ".join(map(str, ids.tolist()))):
        assert word not in caplog.text


TEXTS = small_sentences.sentences(12)


def test_a_snapshot_keeps_what_its_store_purges(tmp_path: Path, model: SentenceTransformer) -> None:
    from llmcache.indexes.maintenance.purge import Doomed, purge

    with LLMCache.open(tmp_path / "store", model) as cache:
        list(cache.run([{"id": "SECRET-ID-0815", "text": "a text"}]))
    save(tmp_path / "store", tmp_path / "snapshot")
    store = Store.open(tmp_path / "store")
    assert purge(store, Doomed("default", ids=["SECRET-ID-0815"])).rows == 1
    store.close()
    kept = Store.open(tmp_path / "snapshot")
    (facts,) = kept.manifest.namespaces["default"].banks["output"].segments
    assert Segment.open(kept.folder, facts).source(0) == "SECRET-ID-0815"
    kept.close()
