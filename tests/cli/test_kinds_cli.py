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


@pytest.mark.parametrize("named", [(), ("--pair-fields", "query,document")])
def test_pairs_are_read_from_query_and_document_in_every_command(
    named: tuple[str, ...], llmcache: Command, saved: dict[str, str], pairs: Path, store: Path, tmp_path: Path
) -> None:
    model = ("--model", saved["CrossEncoder"])
    planned = llmcache("plan", pairs, *model, "--store", store, *named, "--json")
    assert (planned.code, store.exists()) == (0, False)
    assert json.loads(planned.out)["computed"] == len(PAIRS)
    previewed = llmcache("build", pairs, *model, "--store", store, *named, "--dry-run", "--json")
    assert json.loads(previewed.out)["distinct"] == len(PAIRS)
    plan, out = tmp_path / "plan.json", tmp_path / "logits.npy"
    assert llmcache("plan", pairs, *model, "-s", store, *named, "-o", plan).code == 0
    built = json.loads(llmcache("build", pairs, *model, "-s", store, *named, "--plan", plan, "--json").out)
    assert (built["misses"], built["plan"]["points"]) == (len(PAIRS), 0)
    again = json.loads(llmcache("plan", pairs, "-s", store, *named, "--json").out)
    assert (again["in_store"], again["computed"], again["read"]) == (len(PAIRS), 0, len(PAIRS))
    for dry in ("warm", pairs, "-s", store), ("run", pairs, "-s", store, "-o", out):
        assert json.loads(llmcache(*dry, *named, "--dry-run", "--json").out)["known"] == len(PAIRS)
    assert json.loads(llmcache("warm", pairs, "-s", store, *named, "--json").out)["exact"] == len(PAIRS)
    assert llmcache("run", pairs, "-s", store, "-o", out, *named).code == 0
    expected = CrossEncoder(saved["CrossEncoder"], device="cpu").predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(np.load(out)[:, 0], expected, atol=3e-5)


@pytest.mark.parametrize("command", ["build", "warm", "run", "plan", "plan of a new store"])
@pytest.mark.parametrize("absent", FIELDS)
def test_a_record_with_one_of_the_two_fields_is_one_clear_error(
    absent: str, command: str, llmcache: Command, saved: dict[str, str], pairs: Path, store: Path, tmp_path: Path
) -> None:
    model, made = ("-m", saved["CrossEncoder"]), tmp_path / "made"
    assert llmcache("build", pairs, *model, "-s", made).code == 0
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "x", **{field: "a" for field in FIELDS if field != absent}}) + "\n")
    arguments: dict[str, tuple[Any, ...]] = {
        "build": ("build", corpus, *model, "-s", store),
        "warm": ("warm", corpus, "-s", made),
        "run": ("run", corpus, "-s", made, "-o", tmp_path / "out.npy"),
        "plan": ("plan", corpus, "-s", made),
        "plan of a new store": ("plan", corpus, *model, "-s", store),
    }
    refused = llmcache(*arguments[command])
    assert (refused.code, refused.err.count("\n"), store.exists()) == (1, 1, False)
    other = next(field for field in FIELDS if field != absent)
    assert f"corpus.jsonl line 1 has no field '{absent}', only 'id', '{other}'" in refused.err
    assert "a pair of texts needs both 'query' and 'document'" in refused.err
    assert "--pair-fields" in refused.err


def test_fields_that_the_model_does_not_read_are_named(
    llmcache: Command, saved: dict[str, str], pairs: Path, store: Path, tmp_path: Path
) -> None:
    build = ("build", pairs, "--model", saved["CrossEncoder"], "--store", store)
    for wrong in ("query", "query,query", "a,b,c", ""):
        assert "--pair-fields is two names" in llmcache(*build, "--pair-fields", wrong).err
    assert "give one of them" in llmcache(*build, "--pair-fields", "query,document", "--text-field", "query").err
    assert "no field 'answer'" in llmcache(*build, "--pair-fields", "query,answer").err
    one_field = llmcache(*build, "--text-field", "query")
    assert (one_field.code, store.exists()) == (2, False)
    assert "--text-field query names one field" in one_field.err
    assert llmcache(*build).code == 0
    for command in ("warm", pairs, "-s", store), ("run", pairs, "-s", store, "-o", tmp_path / "out.jsonl"):
        refused = llmcache(*command, "--text-field", "document")
        assert refused.code == 2
        assert "--pair-fields (by default query,document)" in refused.err
    texts = llmcache(
        "build", pairs, "-m", saved["SparseEncoder"], "-s", tmp_path / "other", "--pair-fields", "query,document"
    )
    assert "is for a CrossEncoder, and this model is a SparseEncoder" in texts.err
    assert not (tmp_path / "other").exists()


def test_other_fields_may_be_named_everywhere(
    llmcache: Command, saved: dict[str, str], store: Path, tmp_path: Path
) -> None:
    path, named = tmp_path / "other.csv", ("--pair-fields", "question,answer")
    path.write_text("question,answer\n" + "".join(f"{a},{b}\n" for a, b in PAIRS))
    assert llmcache("build", path, "-m", saved["CrossEncoder"], "-s", store, *named).code == 0
    assert json.loads(llmcache("plan", path, "-s", store, *named, "--json").out)["in_store"] == len(PAIRS)
    without = llmcache("plan", path, "-s", store)
    assert "no field 'query', only 'question', 'answer'" in without.err


# -- the kind of a model that is named ----------------------------------------------------------------------


@pytest.fixture
def plain(saved: dict[str, str], tmp_path: Path) -> Path:
    """Folder of a classifier of transformers, which fits a CrossEncoder and a SentenceTransformer."""
    folder = tmp_path / "plain"
    model: Any = CrossEncoder(saved["CrossEncoder"], device="cpu")
    model.transformers_model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_that_fits_two_kinds_is_planned_and_built_as_named(
    llmcache: Command, plain: Path, pairs: Path, store: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(8)))
    by_itself = llmcache("plan", pairs, "-m", plain, "-s", store, "--json")
    assert json.loads(by_itself.out)["documents"] == len(PAIRS)
    named = ("-m", plain, "-s", store, "--kind", "sentence-transformer")
    assert json.loads(llmcache("plan", corpus, *named, "--json").out)["documents"] == 8
    assert "no field 'text'" in llmcache("plan", pairs, *named).err
    assert llmcache("build", corpus, *named).code == 0
    assert json.loads(llmcache("plan", corpus, "-s", store, "--json").out)["in_store"] == 8, "the store has the kind"


@pytest.mark.parametrize("kind", kinds.MAKERS)
def test_verify_model_finds_every_kind_and_compares_all_tiers(
    kind: str, llmcache: Command, saved: dict[str, str], pairs: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n".join(sentences(8)))
    done = llmcache("verify-model", "-m", saved[kind], "-d", pairs if kind == "CrossEncoder" else corpus, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["passed"]
    assert [one["tier"] for one in facts["checks"]] == ["model", "output", "output", "output", "layer-0", "layer-1"]
    assert all(one["reused"] == one["documents"] for one in facts["checks"][2:])


def test_verify_model_takes_another_kind_by_name(llmcache: Command, plain: Path, pairs: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n".join(sentences(4)))
    tiers = {}
    for kind, data in (("cross-encoder", pairs), ("sentence-transformer", corpus)):
        done = llmcache("verify-model", "-m", plain, "-d", data, "--kind", kind, "--layers", "output", "--json")
        assert done.code == 0, done.err
        tiers[kind] = [one["tier"] for one in json.loads(done.out)["checks"]]
    expected = ["model", "output", "output", "output", "layer-1"]
    assert tiers["cross-encoder"] == tiers["sentence-transformer"] == expected
    itself = llmcache("verify-model", "-m", plain, "-d", corpus, "--json")
    assert json.loads(itself.out)["checks"][1]["tier"] == "layers", "a model of transformers"
    wrong = llmcache("verify-model", "-m", plain, "-d", corpus, "--kind", "reranker")
    assert wrong.code == 2
    assert "sentence-transformer, cross-encoder" in wrong.err
    texts = llmcache("verify-model", "-m", plain, "-d", pairs, "--kind", "cross-encoder", "--text-field", "query")
    assert texts.code == 2
    assert "names one field" in texts.err


def test_pairs_are_calibrated_on_the_command_line(
    llmcache: Command, saved: dict[str, str], store: Path, tmp_path: Path
) -> None:
    def written(name: str, pairs: list[tuple[str, str]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"query": a, "document": b}) + "\n" for a, b in pairs))
        return path

    grid = [(query, document) for query in sentences(20) for document in sentences(20, seed=1)]
    known, sample = written("known.jsonl", grid[:300]), written("sample.jsonl", grid[300:])
    model = CrossEncoder(saved["CrossEncoder"], device="cpu")
    logits = model.predict(grid, activation_fn=torch.nn.Identity())
    head, scale = tmp_path / "head.npz", 1 / logits.std()
    np.savez(head, weights=np.array([[-scale], [scale]]), offset=np.median(logits) * np.array([scale, -scale]))
    assert llmcache("build", known, "-m", saved["CrossEncoder"], "-s", store).code == 0
    by = ("-s", store, "--budget", "0.5", "--json")
    done = llmcache("calibrate", sample, *by, "--drift", "label", "--head", head)
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"] == 100
    assert json.loads(done.out)["entries"] == 300
    without = llmcache("calibrate", sample, *by)
    assert (without.code, "this model gives one per document" in without.err) == (2, True)
    one_field = llmcache("calibrate", sample, *by, "--text-field", "query")
    assert (one_field.code, "names one field" in one_field.err) == (2, True)


def test_purge_reads_with_the_kind_of_the_namespace(
    llmcache: Command, plain: Path, pairs: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(PAIRS[0][0] + "\n")
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(3)))
    stores = {"cross-encoder": pairs, "sentence-transformer": corpus}
    for kind, data in stores.items():
        path = tmp_path / kind
        assert llmcache("build", data, "-m", plain, "-s", path, "--kind", kind).code == 0
        expected = 4 if kind == "cross-encoder" else 1  # pairs with this query, or the text
        arguments = ("purge", path, "--text-file", secret, "--model", plain, "--json")
        for named in ((), ("--kind", kind)):
            done = llmcache(*arguments, *named, "--dry-run")
            assert json.loads(done.out)["rows"] == expected, done
    refused = llmcache("purge", tmp_path / "cross-encoder", "--text-file", secret, "--kind", "cross-encoder")
    assert refused.code == 2
    assert "--model" in refused.err
    wrong = llmcache("purge", tmp_path / "cross-encoder", "--text-file", secret, "--model", plain, "--kind", "reranker")
    assert (wrong.code, "multi-vector-encoder" in wrong.err) == (2, True)


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
