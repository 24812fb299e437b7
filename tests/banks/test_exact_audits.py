"""Audits of exact hits: models whose results differ although nothing in their description does.

A fault is patched into a torch function that the model calls: weights, settings, code and hooks of the model stay the
same, and only its results change. Expected results are always those of the model without a cache.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn import functional

from llmcache import CacheConfig, LLMCache
from llmcache.banks.agreement import compared
from llmcache.banks.audits import ExactAudits
from llmcache.banks.counters import Counters
from llmcache.decoders import generation as decoding
from llmcache.decoders import scoring
from llmcache.errors import ConfigError, ModelMismatch
from llmcache.model.description import describe as description
from llmcache.model.description.watch import ModelWatch
from tests import architectures
from tests.layers.test_attachment import tokenizer as word_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
hf: Any = transformers
Answers = list[NDArray[Any]]
DRAWS = int(os.environ.get("LLMCACHE_FAULTS", "2"))
"""Faults drawn for each kind of use and order of calls."""


# -- faults -------------------------------------------------------------------------------------------------

FAULTS = ("linear", "embedding")


@contextmanager
def fault(name: str, strength: float) -> Iterator[None]:
    """Patch a torch function inside the block so that all of its numbers, or every second one, are a little larger."""
    own: Callable[..., torch.Tensor] = getattr(functional, name)

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = own(*args, **kwargs).clone()
        result[..., ::2] *= 1 + strength
        return result

    looked = description._replaced_functions
    vars(description)["_replaced_functions"] = lambda walk, model, facts: None  # it would detect the patch
    setattr(functional, name, wrong)
    try:
        yield
    finally:
        setattr(functional, name, own)
        vars(description)["_replaced_functions"] = looked


def drawn_fault(random: np.random.Generator, name: str) -> tuple[str, float]:
    """Choose a fault for the model of this use case: all models call these functions; GPT-2 has no linear layers."""
    functions = ("layer_norm", "scaled_dot_product_attention") if "gpt2" in name else FAULTS
    return str(random.choice(functions)), float(10 ** random.uniform(-3, -0.5))


# -- uses ---------------------------------------------------------------------------------------------------


@dataclass
class Use:
    """Use case of a cache. answers: results of texts from a cache, or from the model alone for None."""

    model: Any
    answers: Callable[[LLMCache | None, Sequence[str]], Answers]
    tokenizer: Any = None
    settings: Callable[..., CacheConfig] = CacheConfig

    def opened(self, store: Path, **settings: Any) -> LLMCache:
        return LLMCache.open(store, self.model, tokenizer=self.tokenizer, config=self.settings(**settings))

    def tolerance(self, texts: Sequence[str]) -> float:
        """Tolerance for the change by another batch shape."""
        together = self.answers(None, texts)
        alone = [self.answers(None, [text])[0] for text in texts]
        scale = max(float(np.abs(one).max(initial=0)) for one in alone)
        return 4 * distance(together, alone) + 16 * float(np.finfo(np.float32).eps) * scale


def distance(one: Answers, other: Answers) -> float:
    """Return the largest absolute difference; infinite for different shapes."""
    if [a.shape for a in one] != [b.shape for b in other]:
        return np.inf
    return max((float(np.abs(a - b).max(initial=0)) for a, b in zip(one, other, strict=True)), default=0.0)


def texts_of(random: np.random.Generator, count: int, longest: int = 30) -> list[str]:
    return [" ".join(f"w{i}" for i in random.integers(0, 90, random.integers(3, longest))) for _ in range(count)]


def sentences(folder: Path) -> SentenceTransformer:
    """Make a small SentenceTransformer whose vocabulary is w0 to w89."""
    architectures.model("bert").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    words = Transformer(str(folder), max_seq_length=48)
    return SentenceTransformer(modules=[words, Pooling(32)], device="cpu", prompts={"query": "w1 w2 ", "document": ""})


def plain_tokenizer() -> Any:
    """Make a tokenizer with the same words and no special tokens, for decoders."""
    made = word_tokenizer()
    made.backend_tokenizer.post_processor = None
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return sentences(tmp_path_factory.mktemp("small"))


def decoder(name: str = "llama") -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, **sizes)).eval()
    sizes |= {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, max_position_embeddings=128, **sizes)).eval()


def states_of(model: Any, tokenizer: Any) -> Callable[[LLMCache | None, Sequence[str]], Answers]:
    """Return a transformers model's output for each token (or its logits), attached if there is a cache."""

    @torch.inference_mode()
    def answers(cache: LLMCache | None, texts: Sequence[str]) -> Answers:
        inputs = dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        if cache is None:
            output = model(**inputs)[0]
        else:
            with cache.attached():
                output = model(**inputs)[0]
        return [row[mask.bool()].float().numpy() for row, mask in zip(output, inputs["attention_mask"], strict=True)]

    return answers


def use_named(name: str, small: SentenceTransformer) -> Use:
    if name in ("encode", "encode to a tensor", "encode with layers"):
        tensor = name == "encode to a tensor"

        def encode(cache: LLMCache | None, texts: Sequence[str]) -> Answers:
            given: Any = (small if cache is None else cache).encode(list(texts), convert_to_tensor=tensor)
            return list(given.cpu().numpy() if tensor else given)

        layers: Any = "all" if name == "encode with layers" else "output"
        memory = 1 << 20 if tensor else 0
        return Use(small, encode, settings=lambda **more: CacheConfig(layers=layers, device_bytes=memory, **more))
    if name in ("run", "run with a role"):
        role = "query" if name == "run with a role" else None

        def run(cache: LLMCache | None, texts: Sequence[str]) -> Answers:
            if cache is None:
                return list(small.encode_query(list(texts)) if role else small.encode(list(texts)))
            return [result.output for result in cache.run(texts, role=role)]

        return Use(small, run)
    if name == "run_heads":
        torch.manual_seed(1)
        heads: dict[str, Any] = {}
        for number, head in enumerate(("topic", "tone")):
            made = hf.BertForSequenceClassification(hf.BertConfig(**architectures._SIZES, num_labels=3 + number)).eval()
            trunk: Any = small.transformers_model
            made.bert.load_state_dict(trunk.state_dict(), strict=False)
            heads[head] = made

        @torch.inference_mode()
        def classes(cache: LLMCache | None, texts: Sequence[str]) -> Answers:
            if cache is not None:
                found = list(cache.run_heads(texts, heads))
                return [row[head].output for row in found for head in heads]
            inputs = small.tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
            logits = [made(**inputs).logits.numpy() for made in heads.values()]
            return [table[i] for i in range(len(texts)) for table in logits]

        return Use(small, classes)
    if name.startswith("attached "):
        kind = name.removeprefix("attached ")
        if kind in ("llama", "gpt2"):
            model, words = decoder(kind), plain_tokenizer()
            words.padding_side = "left"
            return Use(model, states_of(model, words), words)
        model, words = architectures.model(kind), word_tokenizer()
        return Use(model, states_of(model, words), words)
    model, words = decoder(), plain_tokenizer()
    if name == "generate":

        def written(cache: LLMCache | None, texts: Sequence[str]) -> Answers:
            ways: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
            if cache is None:
                return list(decoding.generate(model, words, texts, **ways).ids)
            return list(cache.generate(texts, **ways).ids)

        return Use(model, written, words)

    def likelihoods(cache: LLMCache | None, texts: Sequence[str]) -> Answers:
        choices = [" w3 w4", " w5"]
        found = scoring.score(model, words, texts, choices) if cache is None else cache.score(texts, choices)
        return list(found.total)

    return Use(model, likelihoods, words)


USES = (
    "encode", "encode to a tensor", "encode with layers", "run", "run with a role", "run_heads", "attached bert",
    "attached t5", "attached bart", "attached llama", "attached gpt2", "generate", "score",
)  # fmt: skip
ORDERS = ("known", "known and new", "new, then known")


def calls_in(order: str, known: list[str], new: list[str]) -> list[list[str]]:
    if order == "known":
        return [known, known[:3]]
    if order == "known and new":
        return [[*known[:4], *new, *known[4:]], known]
    return [new, known]


def entries(cache: LLMCache) -> dict[str, int]:
    return {bank.layer: bank.entries for bank in cache.stats().banks}


# -- nothing wrong is served, nothing wrong is stored -------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", USES)
def test_a_model_that_differs_without_a_trace_is_served_nothing_and_stores_nothing(
    name: str, order: str, small: SentenceTransformer, tmp_path: Path
) -> None:
    use = use_named(name, small)
    random = np.random.default_rng([USES.index(name), ORDERS.index(order)])
    known, new = texts_of(random, 8), texts_of(random, 4)
    with use.opened(tmp_path / "filled") as cache:
        use.answers(cache, known)
        cache.commit()
        before = entries(cache)
        assert sum(before.values()) > 0
    healthy, tolerance = use.answers(None, known), use.tolerance(known)
    for number in range(DRAWS):
        store = tmp_path / f"store {number}"
        shutil.copytree(tmp_path / "filled", store)
        bypass = bool(number % 2)
        raised = 0
        with fault(*drawn_fault(random, name)):
            with use.opened(store, on_mismatch="bypass" if bypass else "error") as cache:
                for texts in calls_in(order, known, new):
                    expected = use.answers(None, texts)
                    try:
                        answers = use.answers(cache, texts)
                    except ModelMismatch:
                        raised += 1
                    else:
                        assert bypass, "a wrong entry was believed"
                        assert distance(answers, expected) <= 2 * use.tolerance(texts)
                stats = cache.stats()
                assert stats.counters.exact_mismatches == 1
                assert "verify-model" in stats.mismatch
                assert stats.counters.exact_audits > 0
            assert raised == (0 if bypass else 2)
        with use.opened(store) as cache:
            assert entries(cache) == before, "something was stored"
            assert distance(use.answers(cache, known), healthy) <= tolerance
            assert distance(use.answers(cache, new), use.answers(None, new)) <= use.tolerance(new)
            assert not cache.stats().mismatch


@pytest.mark.parametrize("name", USES)
def test_entries_of_a_model_that_differed_are_not_served_to_the_right_one(
    name: str, small: SentenceTransformer, tmp_path: Path
) -> None:
    use = use_named(name, small)
    random = np.random.default_rng(100 + USES.index(name))
    for number in range(DRAWS):
        known = texts_of(random, int(random.integers(1, 9)))
        store = tmp_path / f"store {number}"
        with fault(*drawn_fault(random, name)), use.opened(store) as cache:
            use.answers(cache, known)
        with use.opened(store) as cache:
            before = entries(cache)
            with pytest.raises(ModelMismatch, match="is not what this model gives"):
                use.answers(cache, known)
            with pytest.raises(ModelMismatch):
                use.answers(cache, texts_of(random, 2))
        with use.opened(store, on_mismatch="bypass") as cache:
            for texts in (known, texts_of(random, 2)):
                assert distance(use.answers(cache, texts), use.answers(None, texts)) <= use.tolerance(texts)
            cache.commit()
            assert entries(cache) == before


def test_what_waits_to_be_committed_is_dropped_when_a_difference_is_found(
    small: SentenceTransformer, tmp_path: Path
) -> None:
    store, random = tmp_path / "store", np.random.default_rng(1)
    known, new = texts_of(random, 6), texts_of(random, 6)
    with LLMCache.open(store, small) as cache:
        cache.encode(known)
    with fault("linear", 0.01), LLMCache.open(store, small) as cache:
        cache.encode_query(new)  # no entry of that role to compare with
        assert len(cache) == 12
        with pytest.raises(ModelMismatch):
            cache.encode(known)
        cache.commit()
    with LLMCache.open(store, small) as cache:
        assert len(cache) == 6
        assert np.abs(cache.encode_query(new) - small.encode_query(new)).max() < 1e-5


def test_one_use_that_differs_ends_reuse_for_all_of_them(small: SentenceTransformer, tmp_path: Path) -> None:
    trunk: Any = small.transformers_model
    known = texts_of(np.random.default_rng(2), 6)
    with LLMCache.open(tmp_path / "store", small, config=CacheConfig(layers="all")) as cache:
        cache.encode(known)
        states_of(small.transformers_model, small.tokenizer)(cache, known)
    with fault("linear", 0.01), LLMCache.open(tmp_path / "store", small) as cache:
        with pytest.raises(ModelMismatch):
            cache.encode(known)
        with pytest.raises(ModelMismatch):
            list(cache.run(["w1 w2"]))
        with pytest.raises(ModelMismatch), cache.attached(), torch.no_grad():
            trunk(**small.tokenizer("w1", return_tensors="pt"))
        with pytest.raises(ModelMismatch):
            cache.calibrate(budget=0.1)


def test_texts_that_are_tokenised_otherwise_are_a_difference(small: SentenceTransformer, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    known = [*texts_of(random, 6), *texts_of(random, 2, longest=45)]
    known[-1] = " ".join(f"w{i % 90}" for i in range(60))  # truncated to the model's maximum length
    with LLMCache.open(tmp_path / "store", small) as cache:
        cache.encode(known)
    own = small.preprocess

    def reversed_words(texts: Any, *args: Any, **kwargs: Any) -> Any:
        return own([" ".join(text.split()[::-1]) for text in texts], *args, **kwargs)

    with LLMCache.open(tmp_path / "store", small) as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "preprocess", reversed_words)
        patch.setattr(ModelWatch, "changed", lambda self: False)  # it detects such a method
        with pytest.raises(ModelMismatch, match="token ids"):
            cache.encode(known)


def test_near_matches_of_entries_that_are_another_models_are_not_given(
    small: SentenceTransformer, tmp_path: Path
) -> None:
    random = np.random.default_rng(4)
    known = texts_of(random, 6)
    with LLMCache.open(tmp_path / "store", small) as cache:
        cache.encode(known)
    near = [f"{text} w7" for text in known]
    with (
        fault("linear", 0.01),
        LLMCache.open(tmp_path / "store", small, tau=0.2) as cache,
        pytest.raises(ModelMismatch),
    ):
        cache.encode(near)


def test_an_untrusted_store_is_audited_and_bypass_warns_once(
    small: SentenceTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = texts_of(np.random.default_rng(5), 6)
    with LLMCache.open(tmp_path / "store", small) as cache:
        cache.encode(known)
    ways: dict[str, Any] = {"trust": "untrusted", "allow_untrusted": True}
    with LLMCache.open(tmp_path / "store", small, **ways) as cache:
        cache.encode(known)
        assert cache.stats().counters.exact_audits == 4
    config = CacheConfig(on_mismatch="bypass")
    with fault("linear", 0.01), LLMCache.open(tmp_path / "store", small, config=config, **ways) as cache:
        with caplog.at_level(logging.WARNING, logger="llmcache"):
            for _ in range(3):
                assert np.abs(cache.encode(known) - small.encode(known)).max() < 1e-5
        assert [one.message for one in caplog.records if "is not what this model gives" in one.message] != []
        assert sum("is not what this model gives" in one.message for one in caplog.records) == 1
        assert cache.stats().counters.bypassed == 18


# -- no false alarm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["auto", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_healthy_vectors_raise_no_alarm_whatever_dtype_and_batches(
    dtype: torch.dtype, stored: Any, tmp_path: Path
) -> None:
    model = sentences(tmp_path / "model").to(dtype)
    random = np.random.default_rng(6)
    audits = 0
    for number, (filled, asked) in enumerate([(1, 32), (32, 1), (3, 5), (7, 32)]):
        known = texts_of(random, 40, longest=46)
        store = tmp_path / f"store {number}"
        with LLMCache.open(store, model, config=CacheConfig(dtype=stored)) as cache:
            cold = cache.encode(known, batch_size=filled)
        with LLMCache.open(store, model, config=CacheConfig(dtype=stored, exact_audits=64)) as cache:
            some = random.permutation(len(known))[: int(random.integers(1, 40))]
            first = cache.encode([known[i] for i in some], batch_size=asked)
            warm = cache.encode(known, batch_size=asked)
            audits += cache.stats().counters.exact_audits
            np.testing.assert_array_equal(first, warm[some])
            if stored == "auto":
                np.testing.assert_array_equal(warm, cold)
    assert audits >= 160


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(architectures.MODELS))
def test_healthy_states_of_every_architecture_raise_no_alarm(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = architectures.model(kind).to(dtype)
    random = np.random.default_rng(7)
    config = CacheConfig(layers="all", exact_audits=32)
    lengths = [int(n) for n in random.integers(2, 40, 12)]
    ids, mask = architectures.rows(*lengths)
    try:
        with LLMCache.open(tmp_path / "store", model, config=config) as cache, cache.attached():
            for start in range(0, 12, 5):
                width = max(lengths[start : start + 5])
                architectures.states(model, ids[start : start + 5, :width], mask[start : start + 5, :width])
    except ConfigError:
        pytest.skip("its layers are not cached in this dtype")
    with LLMCache.open(tmp_path / "store", model, config=config) as cache, cache.attached():
        order = torch.from_numpy(random.permutation(12))
        architectures.states(model, ids[order], mask[order])
        assert cache.stats().counters.exact_audits >= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_healthy_beginnings_raise_no_alarm_whatever_split_and_padding(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, words = decoder(name).to(dtype), plain_tokenizer()
    words.padding_side = "left"
    answers = states_of(model, words)
    random = np.random.default_rng(8)
    stems = texts_of(random, 4, longest=60)
    config = CacheConfig(exact_audits=64)
    audits = 0
    for _ in range(10):
        texts = [f"{random.choice(stems)} {tail}" for tail in texts_of(random, int(random.integers(1, 9)), longest=40)]
        with LLMCache.open(tmp_path / "store", model, tokenizer=words, config=config) as cache:
            answers(cache, texts)
            audits += cache.stats().counters.exact_audits
            assert not cache.stats().mismatch
    assert audits >= 10


def test_a_stored_number_differs_only_beyond_its_rounding_and_nan_is_equal_to_nan() -> None:
    random = np.random.default_rng(9)
    values: Any = random.normal(size=(3, 64)).astype(np.float32)
    values[1, 3] = np.nan
    for dtype, step in (("float32", 1e-7), ("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        near = (values * (1 + step * 0.9)).astype(np.float32)
        assert compared(near, iter([values, values]), 1.2e-7, dtype).agrees
        far = values.copy()
        far[2, 5] += 4 * step + 1e-4
        found = compared(far, iter([values, values]), 1.2e-7, dtype)
        assert (found.agrees, found.entry) == (False, 2)
    one_nan = values.copy()
    one_nan[0, 0] = np.nan
    assert not compared(one_nan, iter([values, values]), 1.2e-7, "float32").agrees


# -- when, and how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USES)
def test_the_first_hits_of_an_opening_are_audited_and_again_after_renew(
    name: str, small: SentenceTransformer, tmp_path: Path
) -> None:
    use = use_named(name, small)
    known = texts_of(np.random.default_rng(10), 6)
    quiet = {"exact_audit_share": 0.0}
    with use.opened(tmp_path / "store", **quiet) as cache:
        use.answers(cache, known)
        own = cache.stats().counters.exact_audits
        assert own == 0 or name == "run_heads", "but for a head whose first layers another one has computed"
        use.answers(cache, known)
        assert cache.stats().counters.exact_audits == own, "computed by this model in this opening"
        cache._exact_audits.renew()
        use.answers(cache, known)
        assert cache.stats().counters.exact_audits > own
    with use.opened(tmp_path / "store", **quiet) as cache:
        use.answers(cache, known)
        first = cache.stats().counters.exact_audits
        assert first >= 4
        use.answers(cache, known)
        assert cache.stats().counters.exact_audits == first
        cache._exact_audits.renew()
        use.answers(cache, known)
        assert cache.stats().counters.exact_audits == 2 * first
        cache._exact_audits.renew()
        with fault(*drawn_fault(np.random.default_rng(0), name)), pytest.raises(ModelMismatch):
            use.answers(cache, known)
    with use.opened(tmp_path / "store", exact_audits=0, **quiet) as cache:
        use.answers(cache, known)
        assert cache.stats().counters.exact_audits == 0


def test_audits_go_on_until_enough_hits_were_seen(small: SentenceTransformer, tmp_path: Path) -> None:
    known = texts_of(np.random.default_rng(11), 8)
    with LLMCache.open(tmp_path / "store", small) as cache:
        cache.encode(known)
    with LLMCache.open(tmp_path / "store", small) as cache:
        seen = []
        for count in range(1, 7):
            cache.encode(known[:count])
            seen.append(cache.stats().counters.exact_audits)
        assert seen == [1, 2, 3, 4, 4, 4]


def plenty() -> Counters:
    """Make counters with unlimited seconds saved and spent, so that audits have any budget."""
    return Counters(saved_seconds=1e12, overhead_seconds=1e12)


@pytest.mark.parametrize("share", [0.0, 1 / 2000, 0.02, 1.0])
def test_the_share_of_hits_that_are_audited_is_the_one_asked_for(share: float) -> None:
    audits = ExactAudits(CacheConfig(exact_audit_share=share), plenty(), seed=1)
    calls, hits = 2000, 3080
    found = [audits.drawn(hits, lambda places: 0.003 * len(places)) for _ in range(calls if share < 1 else 2)]
    count, total = sum(map(len, found)), hits * len(found)
    assert abs(count - share * total) <= 4 * np.sqrt(total * share * (1 - share))
    assert all(len(set(places.tolist())) == len(places) and (places < hits).all() for places in found)
    if 0 < share < 1:  # all positions are equally likely
        places = np.concatenate(found) / hits
        assert abs(places.mean() - 0.5) <= 4 * np.sqrt(1 / 12 / count)


@pytest.mark.parametrize("bound", ["saved", "calls"])
def test_random_audits_keep_to_their_share_of_the_seconds(bound: str) -> None:
    counters = Counters(saved_seconds=1e12, overhead_seconds=1e12)
    audits = ExactAudits(CacheConfig(exact_audit_share=0.5), counters, seed=2)
    if bound == "saved":
        counters.saved_seconds = 0.0
    else:
        counters.overhead_seconds = 0.0
    each, saved, spent = 0.003, 0.0, 0.0
    for _ in range(300):
        made = len(audits.drawn(50, lambda places: each * len(places)))
        counters.exact_audits += made
        counters.exact_audit_seconds += each * made
        counters.saved_seconds += 50 * each
        counters.overhead_seconds += 0.01
        saved, spent = saved + 50 * each, spent + 0.01
    limit = 0.01 * saved if bound == "saved" else 0.02 * spent
    assert 0.5 * limit <= counters.exact_audit_seconds <= limit + each


def test_the_largest_difference_is_kept_over_openings_and_audits_are_added_up(
    small: SentenceTransformer, tmp_path: Path
) -> None:
    known = texts_of(np.random.default_rng(12), 8)
    with LLMCache.open(tmp_path / "store", small) as cache:
        cache.encode(known)
    seen = []
    for _ in range(3):
        with LLMCache.open(tmp_path / "store", small) as cache:
            cache.encode(known)
            seen.append(cache.stats())
    last = seen[-1].lifetime
    assert last["exact_audits"] == 12
    assert last["exact_audit_largest"] == max(one.counters.exact_audit_largest for one in seen)
    assert last["exact_audit_seconds"] > seen[-1].counters.exact_audit_seconds > 0


@pytest.mark.parametrize("settings", [{"exact_audits": -1}, {"exact_audit_share": 1.5}, {"exact_audit_time": -1.0},
                                      {"on_mismatch": "ignore"}])  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        CacheConfig(**settings)
