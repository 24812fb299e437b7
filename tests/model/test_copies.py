"""Copies and pickles of a cached model have their own weights and no part of the cache."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cloudpickle
import dill
import pytest
import torch
import transformers as t
from torch import Tensor, nn

from llmcache import CacheConfig, LLMCache
from llmcache.model.forward_patch import StandIn, install, remove
from tests import threads
from tests.architectures import MODELS, model, rows, states

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301
    "torch.save": saved,
    "cloudpickle": lambda module: pickle.loads(cloudpickle.dumps(module)),  # noqa: S301
    "dill": lambda module: dill.loads(dill.dumps(module)),  # noqa: S301
}


def changed(module: nn.Module) -> None:
    """Change the weights of a copy, so that its results show which weights it runs."""
    torch.manual_seed(1)
    with torch.inference_mode():  # like the weights of a copy that is made during generation
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def plain(module: nn.Module) -> None:
    """Assert that no module has an attribute of the cache."""
    for part in module.modules():
        assert "forward" not in vars(part)
        assert "__getstate__" not in vars(part)


def attach(cache: LLMCache, module: Any, ids: Tensor, mask: Tensor, when: str) -> Iterator[None]:
    with ExitStack() as stack:
        if when != "before":
            stack.enter_context(cache.attached())
            states(module, ids, mask)
        if when == "twice":
            stack.enter_context(cache.attached())
        if when == "after":
            stack.close()
        yield


@pytest.mark.parametrize("when", ["before", "attached", "twice", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_runs_its_own_weights_with_the_forward_of_its_class(name: str, when: str, tmp_path: Path) -> None:
    original, (ids, mask) = model(name), rows(9, 5)
    if name == "nn.TransformerEncoder":
        mask = torch.ones_like(mask)
    reference = model(name)
    changed(reference)
    expected, own = states(reference, ids, mask), states(original, ids, mask)
    try:
        cache = LLMCache.open(tmp_path / "store", original, config=CacheConfig(layers="all"))
        with cache, cache.attached():
            pass
    except ValueError as refused:  # a model whose layers cannot be skipped
        pytest.skip(str(refused))
    with LLMCache.open(tmp_path / "store", original, config=CacheConfig(layers="all")) as cache:
        for _ in attach(cache, original, ids, mask, when):
            copies = {way: take(original) for way, take in COPIES.items()}
            part = copy.deepcopy(next(iter(original.children())))
            plain(part)
            shallow = copy.copy(original)
            assert "forward" not in vars(shallow)
            for made in copies.values():
                plain(made)
                assert type(made) is type(original)
                changed(made)
                torch.testing.assert_close(states(made, ids, mask), expected, atol=1e-6, rtol=0)
            visible = mask.bool()
            torch.testing.assert_close(states(original, ids, mask)[visible], own[visible], atol=1e-5, rtol=0)
    plain(original)
    for made in copies.values():
        torch.testing.assert_close(states(made, ids, mask), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(states(original, ids, mask), own, atol=0, rtol=0)


class _Copies(t.LogitsProcessor):
    """A logits processor that copies the model during generation and changes nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.made: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.made:
            self.made = [take(self.module) for take in COPIES.values()]
        return scores


t5_config: Any = t.T5Config  # its annotations lack arguments for generation

DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=304, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=3, bos_token_id=2)
    ),
    "llama": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=304,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            eos_token_id=3,
            bos_token_id=2,
        )
    ),
    "t5": lambda: t.T5ForConditionalGeneration(
        t5_config(
            vocab_size=304,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            eos_token_id=3,
            pad_token_id=0,
        )
    ),
}


def logits(module: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if module.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: Tensor = module(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize("layers", ["output", "all"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_copy_made_inside_a_generation_is_a_model_of_its_own(name: str, layers: Any, store: Path) -> None:
    torch.manual_seed(0)
    original = DECODERS[name]().eval()
    reference, ids = copy.deepcopy(original), torch.arange(4, 16)[None]
    changed(reference)
    expected = logits(reference, ids)
    copies = _Copies(original)
    with LLMCache.open(store, original, tokenizer=threads.tiny_tokenizer(), config=CacheConfig(layers=layers)) as cache:
        before = cache.generate(["w1 w2 w3"], max_new_tokens=4)
        after = cache.generate(["w1 w2 w3"], max_new_tokens=4, logits_processor=t.LogitsProcessorList([copies]))
    assert [row.tolist() for row in before.ids] == [row.tolist() for row in after.ids]
    assert len(copies.made) == len(COPIES)
    for made in copies.made:
        plain(made)
        changed(made)
        torch.testing.assert_close(logits(made, ids), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_while_choices_are_scored_gives_all_its_logits(way: str, store: Path) -> None:
    torch.manual_seed(0)
    made: list[Any] = []
    original, ids = DECODERS["gpt2"]().eval(), torch.arange(4, 16)[None]
    expected = logits(original, ids)
    take = COPIES[way]

    class Copying(nn.Module):
        """The head, which copies the decoder when it is called."""

        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, states: Tensor) -> Tensor:
            if not made:
                made.append(take(original.transformer))
            found: Tensor = self.head(states)
            return found

    with LLMCache.open(store, original, tokenizer=threads.tiny_tokenizer()) as cache:
        head = original.lm_head
        original.lm_head = Copying(head)
        cache.score(["w1 w2"], [" w3", " w4 w5"])
        original.lm_head = head
    with torch.inference_mode():
        found = head(made[0](input_ids=ids).last_hidden_state)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("own", [False, True], ids=["class", "instance"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_stand_ins_may_be_taken_away_in_any_order(order: tuple[int, ...], own: bool) -> None:
    module, calls = Doubled(), list[int]()
    if own:
        module.forward = lambda x: 3 * x  # type: ignore[method-assign]
    before = dict(vars(module))

    def adding(number: int) -> StandIn:
        def answer(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(number)
            return forward(*args, **kwargs)

        return StandIn(module, answer)

    stand_ins = [adding(number) for number in range(3)]
    for stand_in in stand_ins:
        install(stand_in)
    left = [2, 1, 0]
    for number in (None, *order):
        if number is not None:
            remove(stand_ins[number])
            left.remove(number)
        calls.clear()
        assert module(torch.ones(1)).item() == (3 if own else 2)
        assert calls == left
    assert vars(module) == before
