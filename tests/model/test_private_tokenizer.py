"""Private tokenizers: a cache calls only its own copies, and follows changed settings of the original."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as t
from sentence_transformers import SentenceTransformer
from tokenizers import AddedToken, Regex, normalizers

from llmcache import LLMCache, Pipeline
from llmcache.errors import ConfigError
from llmcache.model.private_tokenizer import Settings, forget_copy, private_copy
from llmcache.model.tokens import tokenise, tokenise_plainly
from tests import threads

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = threads.texts_of(60) + [f"W{i} w{i} extra" for i in range(20)]


@pytest.fixture
def tiny(tmp_path: Path) -> SentenceTransformer:
    return threads.tiny_sentences(tmp_path / "model")


def own_ids(model: SentenceTransformer, texts: list[str]) -> list[list[int]]:
    """Tokenise by the model's `preprocess`, one text at a time, so without padding."""
    return [model.preprocess([text])["input_ids"][0].tolist() for text in texts]


def state_of_last_call(tokenizer: Any) -> tuple[Any, Any]:
    backend = tokenizer.backend_tokenizer
    return backend.padding, backend.truncation


def _set(name: str, value: Any) -> Callable[[SentenceTransformer], None]:
    return lambda model: setattr(model.tokenizer, name, value)


def _normaliser(made: Any) -> Callable[[SentenceTransformer], None]:
    return lambda model: setattr(model.tokenizer.backend_tokenizer, "normalizer", made)


def _template(model: SentenceTransformer) -> None:
    from tokenizers import processors

    single = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    model.tokenizer.backend_tokenizer.post_processor = single


def _shorter_processing(model: SentenceTransformer) -> None:
    first: Any = model[0]
    first.processing_kwargs.update(text={"max_length": 5})


CHANGES: dict[str, Callable[[SentenceTransformer], Any]] = {
    "max_seq_length": lambda model: setattr(model, "max_seq_length", 7),
    "model_max_length": _set("model_max_length", 9),
    "truncation_side": _set("truncation_side", "left"),
    "an added token": lambda model: model.tokenizer.add_tokens(["extra"]),
    "an added token that is a word": lambda model: model.tokenizer.add_tokens([AddedToken("w1", single_word=False)]),
    "lower case": _normaliser(normalizers.Lowercase()),
    "a replacement": _normaliser(normalizers.Replace(Regex("w1"), "w2")),
    "special tokens": _template,
    "another tokenizer": lambda model: setattr(model[0], "processor", threads.tiny_tokenizer()),
    "arguments of the processor": _shorter_processing,
    "lower case in the module": lambda model: setattr(model[0], "do_lower_case", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_is_followed_at_the_next_call(name: str, tiny: SentenceTransformer) -> None:
    before = [ids.tolist() for ids in tokenise(tiny, TEXTS, None, None).ids]
    assert before == own_ids(tiny, TEXTS)
    CHANGES[name](tiny)
    assert [ids.tolist() for ids in tokenise(tiny, TEXTS, None, None).ids] == own_ids(tiny, TEXTS)


def test_what_a_call_leaves_in_the_tokenizer_is_no_change_of_settings(tiny: SentenceTransformer) -> None:
    settings = Settings(tiny)
    draw = random.Random(0)
    for _ in range(30):
        some = draw.sample(TEXTS, 3)
        tiny.tokenizer(some, padding=draw.choice((True, "max_length")), max_length=draw.randint(2, 60), truncation=True)
        tiny.preprocess(some, prompt=draw.choice((None, "w1 ", "w2 w3 ")))
        tiny.encode(some)
        tiny.tokenizer.batch_decode([[4, 5, 6]])
        assert settings.hold(tiny)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_caller_tokenises_meanwhile_the_ids_are_those_of_the_model_alone(
    seed: int, tiny: SentenceTransformer
) -> None:
    draw, expected = random.Random(seed), own_ids(tiny, TEXTS)
    for _ in range(25):
        places = [draw.randrange(len(TEXTS)) for _ in range(draw.choice((1, 3, 20)))]
        ways = draw.choice(
            ({"padding": "max_length", "max_length": draw.randint(2, 60), "truncation": True}, {"padding": True}, {})
        )
        tiny.tokenizer(TEXTS[:3], **ways)
        left = state_of_last_call(tiny.tokenizer)
        rows = tokenise(tiny, [TEXTS[i] for i in places], None, None)
        assert [ids.tolist() for ids in rows.ids] == [expected[i] for i in places]
        assert state_of_last_call(tiny.tokenizer) == left


def test_no_call_of_a_cache_touches_the_callers_tokenizer(tiny: SentenceTransformer, store: Path) -> None:
    tiny.tokenizer(TEXTS[:3], padding="max_length", max_length=11, truncation=True)
    left = state_of_last_call(tiny.tokenizer)
    with LLMCache.open(store, tiny) as cache:
        cache.encode(TEXTS)
        list(cache.run(TEXTS))
        cache.explain(TEXTS[0])
        cache.plan(TEXTS)
        list(Pipeline(cache, chunk="structure").run(TEXTS))
        list(cache.run_heads(TEXTS[:4], {"same": tiny}))
        assert state_of_last_call(tiny.tokenizer) == left
        assert tiny.tokenizer is tiny[0].processor


@pytest.mark.parametrize("kind", ["fast", "python"])
def test_generation_and_scores_use_a_copy_of_the_tokenizer(kind: str, store: Path) -> None:
    tokenizer: Any = threads.tiny_tokenizer() if kind == "fast" else t.ByT5Tokenizer()
    config = t.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=3, bos_token_id=2
    )
    model: Any = t.GPT2LMHeadModel(config)
    model.eval()
    from llmcache.decoders import generation as decoding
    from llmcache.decoders import scoring

    prompts = ["w1 w2 w3", "w5", "w3 w1"]
    expected = decoding.generate(model, tokenizer, prompts, max_new_tokens=3)
    scores = scoring.score(model, tokenizer, prompts, [" w3", " w4 w5"])
    calls: list[str] = []

    class Noted(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **keywords: Any) -> Any:
            calls.append("the caller's" if self is tokenizer else "a copy")
            return super().__call__(*arguments, **keywords)

    tokenizer.__class__ = Noted
    with LLMCache.open(store, model, tokenizer=tokenizer) as cache:
        found = cache.generate(prompts, max_new_tokens=3)
        assert cache.score(prompts, [" w3", " w4 w5"]).total == pytest.approx(scores.total, abs=1e-4)
    assert [row.tolist() for row in found.ids] == [row.tolist() for row in expected.ids]
    assert set(calls) == {"a copy"}


@pytest.mark.parametrize("limit", [None, 9])
def test_a_tokenizer_in_python_is_copied_too(limit: int | None) -> None:
    tokenizer = t.ByT5Tokenizer()
    rows = tokenise_plainly(tokenizer, TEXTS, limit)
    ways: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {}
    assert [ids.tolist() for ids in rows.ids] == [tokenizer(text, **ways)["input_ids"] for text in TEXTS]
    with private_copy(tokenizer) as own:
        assert own is not tokenizer
    with private_copy(tokenizer) as again:
        assert again is own, "made once"
    forget_copy(tokenizer)
    with private_copy(tokenizer) as anew:
        assert anew is not own


def test_a_tokenizer_that_cannot_be_copied_is_refused_in_one_line() -> None:
    class Odd(t.ByT5Tokenizer):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("it holds a socket")

    with pytest.raises(ConfigError, match=r"Odd cannot be copied \(TypeError: it holds a socket\)") as raised:
        tokenise_plainly(Odd(), TEXTS, None)
    assert "\n" not in str(raised.value)


def test_a_copy_shares_the_weights_and_keeps_no_model_alive(tiny: SentenceTransformer) -> None:
    tokenise(tiny, TEXTS, None, None)
    with private_copy(tiny) as reader:
        assert reader.tokenizer is not tiny.tokenizer
        assert {id(one) for one in reader.parameters()} == {id(one) for one in tiny.parameters()}
    del reader
    model = SentenceTransformer(modules=list(tiny), device="cpu")
    tokenise(model, TEXTS, None, None)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
