"""`llmcache run --head`: several heads on the trunk of a store, a result file for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertForSequenceClassification, BertModel

from tests.conftest import Command

TEXTS = ["where is my card", "it has not come", "where is my card", "a refund, please"]


@pytest.fixture(scope="module")
def folders(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small trunk with a SentenceTransformer on it and two classifiers, one with another last layer."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    trunk = BertModel(config)
    plain = root / "plain"
    trunk.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    words = Transformer(str(plain), max_seq_length=64)
    SentenceTransformer(modules=[words, Pooling(32)], device="cpu").save(str(root / "sentences"))
    found = {"sentences": root / "sentences"}
    for name, classes in (("topic", 3), ("tone", 5)):
        head: Any = BertForSequenceClassification.from_pretrained(plain, num_labels=classes)
        if name == "tone":
            with torch.no_grad():
                head.bert.encoder.layer[-1].output.dense.weight.add_(0.1)
        head.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def test_every_head_gets_a_file_and_the_shared_layers_are_computed_once(
    llmcache: Command, folders: dict[str, Path], corpus: Path, store: Path, tmp_path: Path
) -> None:
    assert llmcache("build", corpus, "-m", folders["sentences"], "-s", store).code == 0
    heads = ("--head", f"topic={folders['topic']}", "--head", f"tone={folders['tone']}")
    done = llmcache("run", corpus, "-s", store, "-o", tmp_path / "out.parquet", *heads, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["layers"] == {"layer-1": {**found["layers"]["layer-1"], "asked": 6, "hits": 3}}, "two of three shared"

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["topic"])
    for name, classes in (("topic", 3), ("tone", 5)):
        table = pyarrow.parquet.read_table(tmp_path / f"out.{name}.parquet").to_pydict()
        assert table["id"] == ["d0", "d1", "d2", "d3"]
        head: Any = BertForSequenceClassification.from_pretrained(folders[name]).train(False)
        with torch.inference_mode():
            logits = head(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        assert logits.shape == (4, classes)
        np.testing.assert_allclose(np.array(table["output"]), logits.numpy(), atol=1e-5)
    tone = pyarrow.parquet.read_table(tmp_path / "out.tone.parquet").to_pydict()
    assert tone["tier"] == ["exact"] * 4
    assert tone["layer"] == ["layer-1"] * 4
    assert tone["source"][2] == "d0", "the repeat came from the first one"

    again = llmcache("run", corpus, "-s", store, "-o", tmp_path / "again.parquet", *heads, "--json")
    assert {name: one["misses"] for name, one in json.loads(again.out)["heads"].items()} == {"topic": 0, "tone": 0}


def test_a_head_that_cannot_be_had_is_one_line(
    llmcache: Command, folders: dict[str, Path], corpus: Path, store: Path, tmp_path: Path
) -> None:
    assert llmcache("build", corpus, "-m", folders["sentences"], "-s", store).code == 0
    out = tmp_path / "out.parquet"
    for given, said in (
        (["topic"], "NAME=FOLDER"),
        (["a b=x"], "NAME=FOLDER"),
        ([f"topic={tmp_path / 'nowhere'}"], "cannot be loaded"),
        ([f"topic={folders['topic']}", f"topic={folders['tone']}"], "same name"),
    ):
        done = llmcache("run", corpus, "-s", store, "-o", out, *(part for one in given for part in ("--head", one)))
        assert done.code in {1, 2}
        assert said in done.err
        assert len(done.err.strip().splitlines()) == 1
        assert not list(tmp_path.glob("out*"))


def test_build_with_layers_says_in_stats_what_each_bank_did(
    llmcache: Command, folders: dict[str, Path], corpus: Path, store: Path
) -> None:
    done = llmcache("build", corpus, "-m", folders["sentences"], "-s", store, "--layers", "0,2")
    assert done.code == 0, done.err
    found = json.loads(llmcache("stats", store, "--json").out)
    assert {(one["layer"], one["entries"]) for one in found["banks"]} == {("output", 3), ("layer-0", 3), ("layer-2", 3)}
    assert found["lifetime"]["layer-2.asked"] == 3
    assert "layer-2" in llmcache("stats", store).out
    assert llmcache("build", corpus, "-m", folders["sentences"], "-s", store, "--layers", "two").code == 2
