"""Language-model jobs: answers are the model's own, in order, whatever is stored, stopped or equal."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from llmcache import CacheConfig, LLMCache, Pipeline
from llmcache.errors import ConfigError, CorpusError
from llmcache.pipeline.job_rows import GeneratedRow
from tests.conftest import MODELS, ROOT

transformers: Any = pytest.importorskip("transformers")
FOLDER = MODELS / "stories260k-llama"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="set LLMCACHE_MODELS to the folder of real small models")
TEMPLATE = "Once upon a time there was a story. {text} One day,"
SETTINGS = CacheConfig(stand_aside=False)
"""Reuse that does not depend on measured times."""


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


def opened(folder: Path, model: Any, tokenizer: Any, **settings: Any) -> LLMCache:
    return LLMCache.open(folder, model, tokenizer=tokenizer, **{"config": SETTINGS, **settings})


@pytest.fixture
def cache(tmp_path: Path, model: Any, tokenizer: Any) -> Iterator[LLMCache]:
    with opened(tmp_path / "store", model, tokenizer) as one:
        yield one


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return records in a random order; each text has several endings, and some are equal."""
    words = ["little dog", "big cat", "red ball", "blue bird", "old tree", "happy girl", "sad boy", "new friend"]
    chance = random.Random(seed)
    texts = [f"There was a {a} and a {b} in the park." for a in words for b in words]
    every = [{"text": f"{text} {end}", "mood": end} for text in texts for end in ("They ran.", "They sang.")]
    chosen = [every[chance.randrange(len(every))] for _ in range(count)]
    return [{"id": f"r{i}", **record, "number": i} for i, record in enumerate(chosen)]


def alone(model: Any, tokenizer: Any, prompt: str, **how: Any) -> tuple[str, list[float]]:
    """Return the model's own answer to one prompt, and the log-likelihoods of its tokens by one plain forward."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)[0]
        likely = torch.log_softmax(model(written[None]).logits[0].float(), -1)
    new = range(ids.shape[1], len(written))
    return tokenizer.decode(written[ids.shape[1] :], skip_special_tokens=True), [
        float(likely[at - 1, written[at]]) for at in new
    ]


# -- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"max_new_tokens": 6}, {"max_new_tokens": 5, "num_beams": 3}], ids=["greedy", "beams"])
def test_answers_are_the_models_own_in_order(cache: LLMCache, model: Any, tokenizer: Any, how: dict[str, Any]) -> None:
    documents = records(50)
    expected = [alone(model, tokenizer, TEMPLATE.format(**each), do_sample=False, **how) for each in documents]
    for batch_size in (7, 32):  # the second time they are stored
        rows = list(Pipeline(cache, task="generate", template=TEMPLATE, batch_size=batch_size, **how).run(documents))
        assert [row.id for row in rows] == [record["id"] for record in documents]
        assert [row.text for row in rows] == [text for text, _ in expected]
        for row, (_, likely) in zip(rows, expected, strict=True):
            assert row.log_likelihoods == pytest.approx(likely, abs=1e-4)
            assert (row.finish, len(row.tokens)) == ("length", how["max_new_tokens"])
    assert {(row.tier, row.reused, row.restored) for row in rows} == {("exact", 1.0, 1.0)}


def test_an_end_token_ends_an_answer(cache: LLMCache, model: Any, tokenizer: Any) -> None:
    documents = records(12)
    plain = list(Pipeline(cache, task="generate", template=TEMPLATE, max_new_tokens=6).run(documents))
    end = plain[0].tokens[2]
    rows = list(Pipeline(cache, task="generate", template=TEMPLATE, max_new_tokens=6, eos_token_id=end).run(documents))
    for row, before in zip(rows, plain, strict=True):
        ended = end in before.tokens
        assert row.finish == ("end" if ended else "length")
        assert row.tokens == (before.tokens[: before.tokens.index(end) + 1] if ended else before.tokens)


@pytest.mark.parametrize("by", ["total", "token", "character"])
def test_scores_are_those_of_whole_texts(cache: LLMCache, model: Any, tokenizer: Any, by: Any) -> None:
    documents = [{**each, "choices": ["he was glad", "no", "They all went home."]} for each in records(20)]
    job: dict[str, Any] = {"template": TEMPLATE, "choices_field": "choices", "by": by}
    rows = list(Pipeline(cache, task="score", **job).run(documents))
    labels = list(Pipeline(cache, task="classify", **job).run(documents))
    for record, row, label in zip(documents, rows, labels, strict=True):
        prompt, totals, lengths = TEMPLATE.format(**record), [], []
        for choice in record["choices"]:
            stem, ids = tokenizer(prompt).input_ids, tokenizer(f"{prompt} {choice}").input_ids
            assert ids[: len(stem)] == stem
            with torch.inference_mode():
                likely = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            totals.append(sum(float(likely[at - 1, ids[at]]) for at in range(len(stem), len(ids))))
            lengths.append({"total": 1, "token": len(ids) - len(stem), "character": len(choice)}[by])
        scores = np.array(totals) / lengths
        assert row.log_likelihoods == pytest.approx(totals, abs=1e-4)
        assert row.best == scores.argmax()
        weights = np.exp(scores) / np.exp(scores).sum()
        assert label.label == record["choices"][int(scores.argmax())]
        assert label.probabilities == pytest.approx(weights.tolist(), abs=1e-4)
        assert label.probability == pytest.approx(weights.max(), abs=1e-4)
    assert {label.tier for label in labels} == {"exact"}  # the scores are those of the other job


@pytest.mark.parametrize(
    ("template", "choices", "separator", "joined"),
    [
        ("{text} It is", ["good", "bad"], None, ["{text} It is good", "{text} It is bad"]),
        ("{text} It is", [" good", "\tbad"], None, ["{text} It is good", "{text} It is\tbad"]),
        ("{text} It is ", ["good", "bad"], None, ["{text} It is good", "{text} It is bad"]),
        ("{text} (", ["A", "B"], "", ["{text} (A", "{text} (B"]),
        ("{text}", ["yes", "no"], "\n- ", ["{text}\n- yes", "{text}\n- no"]),
    ],
)
def test_choices_are_scored_as_the_text_that_they_make(
    cache: LLMCache, model: Any, tokenizer: Any, template: str, choices: list[str], separator: Any, joined: list[str]
) -> None:
    documents = records(4)
    rows = Pipeline(cache, task="score", template=template, choices=choices, separator=separator).run(documents)
    for record, row in zip(documents, rows, strict=True):
        stem = tokenizer(template.format(**record).rstrip()).input_ids
        for found, text in zip(row.log_likelihoods, joined, strict=True):
            ids = tokenizer(text.format(**record)).input_ids
            first = next(i for i, (a, b) in enumerate(zip([*stem, -1], ids, strict=False)) if a != b)
            with torch.inference_mode():
                likely = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            expected = sum(float(likely[at - 1, ids[at]]) for at in range(first, len(ids)))
            assert found == pytest.approx(expected, abs=1e-4)


def test_a_text_that_stops_an_answer(cache: LLMCache, model: Any, tokenizer: Any) -> None:
    how: dict[str, Any] = {"max_new_tokens": 20, "stop_strings": [".", "!"]}
    rows = list(Pipeline(cache, task="generate", template=TEMPLATE, **how).run(records(6)))
    for record, row in zip(records(6), rows, strict=True):
        ids = tokenizer(TEMPLATE.format(**record), return_tensors="pt").input_ids
        with torch.inference_mode():
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False, tokenizer=tokenizer, **how
            )
        assert row.text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        ended = row.tokens[-1] == tokenizer.eos_token_id
        assert row.finish == ("end" if ended else "length" if len(row.tokens) == 20 else "stop")


@pytest.mark.parametrize("how", [{"repetition_penalty": 1.6}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.0}])
def test_settings_that_read_the_padding_give_the_models_own_answers(
    cache: LLMCache, model: Any, tokenizer: Any, how: dict[str, Any]
) -> None:
    documents = [{"text": "word " * n} for n in (1, 9, 4, 4, 17)]
    how = {"max_new_tokens": 8, **how}
    rows = list(Pipeline(cache, task="generate", template=TEMPLATE, **how).run(documents))
    expected = [alone(model, tokenizer, TEMPLATE.format(**each), do_sample=False, **how)[0] for each in documents]
    assert [row.text for row in rows] == expected
    again = list(Pipeline(cache, task="generate", template=TEMPLATE, **how).run(documents))
    assert ({row.tier for row in again} == {"exact"}) == (how.get("repetition_penalty") == 1.0)


def test_equal_prompts_are_answered_once_and_a_shuffled_corpus_shares_as_a_sorted_one(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    shuffled = records(60)
    distinct = {tuple(tokenizer(TEMPLATE.format(**each)).input_ids) for each in shuffled}
    assert len(distinct) < 60
    every, saved = sum(map(len, distinct)), {}
    for name, documents in (("shuffled", shuffled), ("sorted", sorted(shuffled, key=lambda each: each["text"]))):
        with opened(tmp_path / name, model, tokenizer) as cache:
            job = Pipeline(cache, task="generate", template=TEMPLATE, max_new_tokens=1, batch_size=8)
            assert {row.tier for row in job.run(documents)} <= {"prefix", "miss"}
            counters = cache.stats().counters.prefix
            assert counters.prompts == len(distinct)
            saved[name] = every - counters.computed
    assert saved["shuffled"] >= 0.9 * saved["sorted"] > 0.2 * every


def test_templates_with_several_fields_numbers_and_examples(cache: LLMCache, model: Any, tokenizer: Any) -> None:
    examples = [
        {"text": "A dog ran.", "number": 1, "answer": "dog"},
        {"text": "A cat sat.", "number": 2, "answer": "cat"},
    ]
    documents = records(5)
    job: dict[str, Any] = {"template": "{number}: {text} Who?", "examples": examples, "max_new_tokens": 4}
    rows = list(Pipeline(cache, task="generate", **job).run(documents))
    head = "1: A dog ran. Who? dog\n\n2: A cat sat. Who? cat\n\n"
    expected = [
        alone(model, tokenizer, f"{head}{each['number']}: {each['text']} Who?", do_sample=False, max_new_tokens=4)
        for each in documents
    ]
    assert [row.text for row in rows] == [text for text, _ in expected]


def test_chats_are_written_by_the_chat_template(cache: LLMCache, model: Any, tokenizer: Any) -> None:
    chatty = transformers.AutoTokenizer.from_pretrained(FOLDER)
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with opened(cache.storing.store.folder.path, model, chatty, namespace="chat") as other:
        rows = list(
            Pipeline(other, task="generate", template="{text}", system="Be kind.", max_new_tokens=4).run(records(3))
        )
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": records(3)[0]["text"]}]
        given = other.generate([messages], max_new_tokens=4)
    for row, record in zip(rows, records(3), strict=True):
        prompt = f"{tokenizer.bos_token}<system> Be kind.\n<user> {record['text']}\n<assistant>"
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=4)[0]
        assert list(row.tokens) == written[ids.shape[1] :].tolist()
    assert given.texts == [rows[0].text]


@pytest.mark.skipif(not (MODELS / "bart-g2p-us").exists(), reason="set LLMCACHE_MODELS to the real small models")
def test_an_encoder_decoder_generates(tmp_path: Path) -> None:
    folder = MODELS / "bart-g2p-us"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = [{"id": word, "text": word} for word in ("hello", "world", "cache", "paper", "hello", "a")]
    with opened(tmp_path / "store", model, tokenizer) as cache:
        for tier in ("miss", "exact"):
            rows = list(Pipeline(cache, task="generate", template="{text}", max_new_tokens=12, num_beams=1).run(words))
            for row in rows:
                ids = tokenizer(row.id, return_tensors="pt").input_ids
                with torch.inference_mode():
                    written = model.generate(ids, max_new_tokens=12, num_beams=1)[0].tolist()
                assert list(row.tokens) == written[: len(row.tokens)]
                assert row.text == tokenizer.decode(written, skip_special_tokens=True)
            assert {row.tier for row in rows} == {tier}
        with pytest.raises(ConfigError, match="causal"):
            Pipeline(cache, task="score", template="{text}", choices=["a"])


# -- files --------------------------------------------------------------------------------------------------

JOBS: dict[str, dict[str, Any]] = {
    "generate": {"max_new_tokens": 4},
    "score": {"choices": ["they sang", "they ran"]},
    "classify": {"choices": ["glad", "sad", "cold"]},
}


@pytest.mark.parametrize("task", sorted(JOBS))
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_the_same_job_again_gives_the_same_bytes(
    tmp_path: Path, model: Any, tokenizer: Any, task: str, ending: str
) -> None:
    files, documents = [], records(30)
    for run in range(2):
        with opened(tmp_path / "store", model, tokenizer) as cache:
            job = Pipeline(cache, task=task, template=TEMPLATE, provenance=False, **JOBS[task])
            written = job.write(documents, tmp_path / f"{run}{ending}")
            files.append(written.path.read_bytes())
        assert (written.documents, written.exact) == (30, 30 * run)
    assert files[0] == files[1]
    with opened(tmp_path / "store", model, tokenizer) as cache:
        rows = list(Pipeline(cache, task=task, template=TEMPLATE, **JOBS[task]).run(documents))
        path = (
            Pipeline(cache, task=task, template=TEMPLATE, **JOBS[task]).write(documents, tmp_path / f"all{ending}").path
        )
    if ending == ".parquet":
        read = pq.read_table(path).to_pylist()
    else:
        read = [json.loads(line) for line in path.read_text().splitlines()]
    names = list(read[0])
    assert read == [{name: _plain(getattr(row, name)) for name in names} for row in rows]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_a_longer_limit_continues_answers(cache: LLMCache, model: Any, tokenizer: Any) -> None:
    documents = records(10)
    list(Pipeline(cache, task="generate", template=TEMPLATE, max_new_tokens=3).run(documents))
    rows = list(Pipeline(cache, task="generate", template=TEMPLATE, max_new_tokens=6).run(documents))
    expected = [
        alone(model, tokenizer, TEMPLATE.format(**each), do_sample=False, max_new_tokens=6) for each in documents
    ]
    for row, (text, likely) in zip(rows, expected, strict=True):
        assert (row.text, row.reused, row.tier) == (text, 0.5, "prefix")
        assert row.log_likelihoods == pytest.approx(likely, abs=1e-4)


# -- stops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(JOBS))
def test_a_job_that_is_stopped_everywhere_gives_the_same_bytes(
    tmp_path: Path, model: Any, tokenizer: Any, task: str, one_thread: None
) -> None:
    documents = records(30)
    job: dict[str, Any] = {"task": task, "template": TEMPLATE, "batch_size": 8, **JOBS[task]}
    with opened(tmp_path / "whole", model, tokenizer) as cache:
        whole = Pipeline(cache, **job).write(documents, tmp_path / "whole.jsonl", resume=True)
    stops = 0
    while True:
        stops += 1
        with opened(tmp_path / "store", model, tokenizer) as cache:
            part = Pipeline(cache, **job).write(documents, tmp_path / "out.jsonl", resume=True, max_seconds=1e-9)
        if part.finished:
            break
    assert stops > 3
    assert part.resumed > 0
    assert part.path.read_bytes() == whole.path.read_bytes()
    assert {name: getattr(part, name) for name in ("documents", "exact", "misses", "prefix")} == {
        name: getattr(whole, name) for name in ("documents", "exact", "misses", "prefix")
    }


CHILD = """
import sys, json
import transformers
from llmcache import CacheConfig, LLMCache, Pipeline
store, out, model, corpus = sys.argv[1:]
documents = json.load(open(corpus))
def progress(answered, computed):
    print("answered", answered, flush=True)
    sys.stdin.readline()
loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
with LLMCache.open(
    store, loaded, tokenizer=transformers.AutoTokenizer.from_pretrained(model),
    config=CacheConfig(stand_aside=False, commit_seconds=1e-9),
) as cache:
    job = Pipeline(cache, task="generate", template=%r, batch_size=4, max_new_tokens=3, progress=progress)
    job.write(documents, out, resume=True)
print("finished", flush=True)
"""


def test_a_job_that_is_killed_at_random_gives_the_same_bytes(
    tmp_path: Path, model: Any, tokenizer: Any, one_thread: None
) -> None:
    """Processes are killed with SIGKILL after a random number of batches; the last one finishes.

    LLMCACHE_KILLS: number of kills, 4 by default, since every process loads a model.
    """
    most = int(os.environ.get("LLMCACHE_KILLS", "4"))
    corpus = tmp_path / "corpus.json"
    corpus.write_text(json.dumps(records(64)))
    chance, finished, kills = random.Random(5), False, 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "store"), str(tmp_path / "out.jsonl"), str(FOLDER), str(corpus)]
    while not finished:
        with subprocess.Popen(
            [sys.executable, "-c", CHILD % TEMPLATE, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        ) as child:  # fmt: skip
            assert child.stdin is not None
            assert child.stdout is not None
            batches = chance.randint(1, 3) if kills < most else 10**6
            for line in child.stdout:
                if line.startswith("finished"):
                    finished = True
                    break
                batches -= 1
                if not batches:
                    child.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                child.stdin.write("\n")
                child.stdin.flush()
            else:
                pytest.fail("the process ended by itself")
    assert kills >= min(4, most)
    with opened(tmp_path / "whole", model, tokenizer) as cache:
        job = Pipeline(cache, task="generate", template=TEMPLATE, batch_size=4, max_new_tokens=3)
        whole = job.write(records(64), tmp_path / "whole.jsonl", resume=True)
    rows = [[json.loads(line) for line in Path(path).read_text().splitlines()] for path in (arguments[1], whole.path)]
    for ours, theirs in zip(*rows, strict=True):
        assert {name: ours[name] for name in ("id", "text", "tokens")} == {
            name: theirs[name] for name in ("id", "text", "tokens")
        }
    assert Path(arguments[1]).read_bytes() == whole.path.read_bytes()


def test_a_job_is_not_resumed_with_other_records_or_settings(cache: LLMCache, tmp_path: Path) -> None:
    job: dict[str, Any] = {"task": "generate", "template": TEMPLATE, "batch_size": 4, "max_new_tokens": 2}
    out, documents = tmp_path / "out.jsonl", records(40)
    Pipeline(cache, **job).write(documents, out, resume=True, max_documents=8)
    others: list[dict[str, Any]] = [
        {"template": TEMPLATE + " so"}, {"max_new_tokens": 3}, {"batch_size": 8}, {"provenance": False},
        {"task": "score", "choices": ["a"], "max_new_tokens": None}, {"num_beams": 2}, {"too_long": "left"},
    ]  # fmt: skip
    for other in others:
        changed = {name: value for name, value in {**job, **other}.items() if value is not None}
        with pytest.raises(ConfigError, match="another one"):
            Pipeline(cache, **changed).write(documents, out, resume=True)
    with pytest.raises(CorpusError, match="not those"):
        Pipeline(cache, **job).write(documents[::-1], out, resume=True)
    assert Pipeline(cache, **job).write(documents, out, resume=True).resumed >= 8


# -- bad input ----------------------------------------------------------------------------------------------


def test_records_without_a_prompt_are_collected_with_the_reason(cache: LLMCache) -> None:
    documents = [
        {"id": "good", "text": "a dog"}, {"id": "missing"}, {"id": "empty", "text": "  "}, {"id": "none", "text": None},
        {"id": "long", "text": "word " * 2000}, {"id": "also good", "text": "a cat"}, 7,
    ]  # fmt: skip
    pipeline = Pipeline(cache, task="generate", template=TEMPLATE, max_new_tokens=2)
    assert [row.id for row in pipeline.run(documents)] == ["good", "also good"]
    reasons = {record.id: record.reason for record in pipeline.errors}
    assert set(reasons) == {"missing", "empty", "none", "long", "6"}
    assert "no field 'text'" in reasons["missing"]
    assert "empty document" in reasons["empty"]
    assert "null" in reasons["none"]
    assert "fit" in reasons["long"]
    with pytest.raises(CorpusError, match=r"long.*too_long"):
        list(Pipeline(cache, task="generate", template=TEMPLATE, max_new_tokens=2, strict=True).run(documents[4:5]))
    for side in ("left", "right"):
        job = Pipeline(cache, task="generate", template=TEMPLATE, max_new_tokens=2, too_long=side)
        assert [row.id for row in job.run(documents)] == ["good", "long", "also good"]


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        (7, "list of texts"), ([], "empty"), (["a", "a"], "twice"), (["a", 3], "number 1"), (["a", " "], "white space"),
        ("a, b", "list of texts"),
    ],
)  # fmt: skip
def test_wrong_choices_are_refused_before_anything_is_computed(cache: LLMCache, choices: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Pipeline(cache, task="classify", template="{text}", choices=choices)
    job = Pipeline(cache, task="classify", template="{text}", choices_field="choices")
    documents = [{"id": "x", "text": "a dog", "choices": choices}, {"id": "y", "text": "a dog", "choices": ["b", "c"]}]
    assert [row.id for row in job.run(documents)] == ["y"]
    assert reason in job.errors[0].reason


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"task": "translate", "template": "{text}"}, "task is one of"),
    ({"task": "generate"}, "template"),
    ({"task": "generate", "template": "no field"}, "no field"),
    ({"task": "generate", "template": "{text.upper}"}, "text.upper"),
    ({"task": "generate", "template": "{text}", "choices": ["a"]}, "choices are for"),
    ({"task": "score", "template": "{text}"}, "choices"),
    ({"task": "score", "template": "{text}", "choices": ["a"], "choices_field": "b"}, "either"),
    ({"task": "score", "template": "{text}", "choices": ["a"], "max_new_tokens": 3}, "max_new_tokens"),
    ({"task": "generate", "template": "{text}", "chunk": "structure"}, "chunk"),
    ({"task": "generate", "template": "{text}", "too_long": "middle"}, "too_long"),
    ({"task": "score", "template": "{text}", "choices": ["a"], "by": "word"}, "by is one of"),
    ({"task": "generate", "template": "{text}", "max_new_tokens": 5000}, "leaves none"),
    ({"task": "generate", "template": "{text}", "max_new_tokens": 0}, "refuses"),
    ({"task": "generate", "template": "{text}", "num_beams": 0}, "refuses"),
    ({"task": "generate", "template": "{text}", "unknown": 1}, "unknown"),
    ({"task": "generate", "template": "{text}", "max_length": 30}, "max_new_tokens"),
    ({"task": "generate", "template": "{text}", "prompt_lookup_num_tokens": 3}, "refuses"),
    ({"task": "score", "template": "{text}", "choices": ["a"], "separator": 3}, "separator"),
    ({"task": "generate", "template": "{text}", "num_return_sequences": 2, "num_beams": 2}, "one answer"),
    ({"task": "generate", "template": "{text}", "system": "Be kind."}, "chat template"),
    ({"template": "{text}"}, "task="),
]  # fmt: skip


@pytest.mark.parametrize(("job", "reason"), WRONG, ids=lambda value: None if isinstance(value, dict) else value[:20])
def test_wrong_settings_are_refused(cache: LLMCache, job: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        list(Pipeline(cache, **job).run(records(1)))


def test_vectors_are_refused_as_a_job_file(cache: LLMCache, tmp_path: Path) -> None:
    job = Pipeline(cache, task="generate", template=TEMPLATE)
    with pytest.raises(ConfigError, match=r"\.jsonl or \.parquet"):
        job.write(records(1), tmp_path / "out.npy")
    assert [type(row) for row in job.run(records(1))] == [GeneratedRow]
    assert list(job.run([])) == []
    assert job.write([], tmp_path / "none.parquet").documents == 0
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0
