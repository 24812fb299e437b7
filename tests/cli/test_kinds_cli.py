"""Models of every kind on the command line: build, warm and run find the kind, and read pairs of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from sentence_transformers import CrossEncoder, SparseEncoder

from llmcache.errors import CorpusError
from llmcache.pipeline.files import CorpusReading, documents
from tests import kinds
from tests.conftest import Command
from tests.small_sentences import sentences, tiny_folder

PAIRS = [(query, document) for query in sentences(3) for document in sentences(4, seed=1)]
FIELDS = ("query", "document")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of the small models, by their class."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    found = {kind: str(tmp_path_factory.mktemp(kind)) for kind in kinds.MAKERS}
    for kind, path in found.items():
        kinds.MAKERS[kind](folder).save(path)
    return found


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    lines = [{"id": f"p{i}", "query": a, "document": b} for i, (a, b) in enumerate(PAIRS)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pairs_are_built_warmed_and_run(
    llmcache: Command, saved: dict[str, str], pairs: Path, store: Path, tmp_path: Path
) -> None:
    named = ("--pair-fields", "query,document")
    built = llmcache("build", pairs, "--model", saved["CrossEncoder"], "--store", store, *named, "--json")
    assert (built.code, json.loads(built.out)["misses"]) == (0, len(PAIRS))
    with pairs.open("a") as file:
        file.write(json.dumps(["a new query", "a document"]) + "\n")
        file.write('["alone"]\n{"query": "a"}\n{"query": "a", "document": null}\n"one text"\n')
    previewed = json.loads(llmcache("warm", pairs, "--store", store, *named, "--skip-bad", "--dry-run", "--json").out)
    assert (previewed["distinct"], previewed["known"], previewed["refused"]) == (len(PAIRS) + 1, len(PAIRS), 4)
    warmed = json.loads(llmcache("warm", pairs, "--store", store, *named, "--skip-bad", "--json").out)
    assert (warmed["exact"], warmed["misses"], warmed["bad"]) == (len(PAIRS), 1, 4)
    out = tmp_path / "logits.parquet"
    ran = llmcache("run", pairs, "--store", store, "--out", out, *named, "--skip-bad", "--resume", "--json")
    facts = json.loads(ran.out)
    assert (facts["documents"], facts["exact"], facts["refused"]) == (len(PAIRS) + 1, len(PAIRS) + 1, 4)
    table = pyarrow.parquet.read_table(out)
    assert table["id"].to_pylist() == [*(f"p{i}" for i in range(len(PAIRS))), f"pairs.jsonl:{len(PAIRS) + 1}"]
    model = CrossEncoder(saved["CrossEncoder"], device="cpu")
    expected = model.predict([*PAIRS, ("a new query", "a document")], activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(np.ravel(table["output"].to_pylist()), expected, atol=3e-5)


@pytest.mark.parametrize("kind", ["SparseEncoder", "MultiVectorEncoder"])
def test_the_kind_is_found_and_the_outputs_are_the_models(
    kind: str, llmcache: Command, saved: dict[str, str], store: Path, tmp_path: Path
) -> None:
    corpus, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    texts = sentences(8)
    corpus.write_text("\n".join(texts))
    assert llmcache("build", corpus, "--model", saved[kind], "--store", store).code == 0
    assert llmcache("run", corpus, "--store", store, "--out", out).code == 0
    model: Any = getattr(__import__("sentence_transformers"), kind)(saved[kind], device="cpu")
    expected = model.encode(texts)
    for line, theirs in zip(out.read_text().splitlines(), expected, strict=True):
        output = json.loads(line)["output"]
        if isinstance(model, SparseEncoder):
            dense = np.zeros(theirs.shape[0])
            dense[output["dimensions"]] = output["values"]
            output, theirs = dense, theirs.to_dense()
        np.testing.assert_allclose(output, theirs, atol=3e-5)
    refused = llmcache("run", corpus, "--store", store, "--out", tmp_path / "out.npy")
    assert refused.code == 2
    assert "as .parquet or .jsonl" in refused.err


def test_another_kind_may_be_named(llmcache: Command, saved: dict[str, str], store: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "texts.txt"
    corpus.write_text("one\ntwo\n")
    arguments = ("build", corpus, "--model", saved["MultiVectorEncoder"], "--store", store)
    wrong = llmcache(*arguments, "--kind", "reranker")
    assert wrong.code == 2
    assert "sentence-transformer, cross-encoder" in wrong.err
    assert not store.exists()
    assert llmcache(*arguments, "--kind", "sentence-transformer").code == 0


def test_fields_that_the_model_does_not_read_are_named(
    llmcache: Command, saved: dict[str, str], pairs: Path, store: Path, tmp_path: Path
) -> None:
    build = ("build", pairs, "--model", saved["CrossEncoder"], "--store", store)
    no_fields = llmcache(*build)
    assert (no_fields.code, store.exists()) == (2, False)
    assert "--pair-fields query,document" in no_fields.err
    for wrong in ("query", "query,query", "a,b,c", ""):
        assert "--pair-fields is two names" in llmcache(*build, "--pair-fields", wrong).err
    assert "give one of them" in llmcache(*build, "--pair-fields", "query,document", "--text-field", "query").err
    assert "no field 'answer'" in llmcache(*build, "--pair-fields", "query,answer").err
    assert llmcache(*build, "--pair-fields", "query,document").code == 0
    for command in (("warm", pairs, "-s", store), ("run", pairs, "-s", store, "-o", tmp_path / "out.jsonl")):
        refused = llmcache(*command)
        assert refused.code == 2
        assert "--pair-fields query,document" in refused.err
    planned = llmcache("plan", pairs, "-s", store, "--pair-fields", "query,document")
    assert "not yet pairs" in planned.err
    texts = llmcache(
        "build", pairs, "-m", saved["SparseEncoder"], "-s", tmp_path / "other", "--pair-fields", "query,document"
    )
    assert "is for a CrossEncoder, and this model is a SparseEncoder" in texts.err


# -- files of pairs -----------------------------------------------------------------------------------------


def test_every_format_gives_the_same_pairs(tmp_path: Path) -> None:
    given = [("a, b", "c"), ("d", ""), ("", 'e "f"')]
    columns = {"document": [b for _, b in given], "id": ["x", "y", "z"], "query": [a for a, _ in given]}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    lines = [{name: columns[name][i] for name in columns} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "pairs.csv").write_text('document,id,query\nc,x,"a, b"\n,y,d\n"e ""f""",z,\n')
    (tmp_path / "pairs.tsv").write_text('document\tid\tquery\nc\tx\ta, b\n\ty\td\n"e ""f"""\tz\t\n')
    for ending in ("parquet", "jsonl", "csv", "tsv"):
        found = list(documents(tmp_path / f"pairs.{ending}", text_field=FIELDS))
        assert [(one.id, one.text) for one in found] == list(zip("xyz", given, strict=True)), ending


def test_a_file_without_a_field_of_the_pair_is_refused_by_its_name(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"query": ["a"], "answer": ["b"]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("query,answer\na,b\n")
    (tmp_path / "a.jsonl").write_text('{"query": "a", "answer": "b"}\n')
    for ending in ("parquet", "csv", "jsonl"):
        with pytest.raises(CorpusError, match=r"no field 'document', only 'query', 'answer'.*--pair-fields"):
            list(documents(tmp_path / f"a.{ending}", text_field=FIELDS))


def test_bad_pairs_of_a_file_are_counted_with_their_reasons(tmp_path: Path) -> None:
    lines = ['["a", "b"]', '["a"]', '["a", "b", "c"]', '["a", null]', '"text"', '{"query": 1, "document": "b"}', "3"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    reading = CorpusReading()
    found = list(documents(tmp_path / "a.jsonl", text_field=FIELDS, skip_bad=True, reading=reading))
    assert [one.text for one in found] == [("a", "b")]
    assert reading.bad == len(lines) - 1
    said = ("has 1 text,", "has 3 texts,", "null under 'document'", "is one text, not a pair", "a number under 'query'")
    for error, reason in zip(reading.errors, said, strict=True):
        assert reason in error
