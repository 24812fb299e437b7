"""Attached transformers models: errors, nesting, threads, gradients, changes of the model, odd inputs."""

from __future__ import annotations

import copy
import errno
import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError
from llmcache.indexes.files.folder import Folder
from llmcache.model.forward_patch import OwnHook
from tests.architectures import alone, difference, model, rows, states, tolerance

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = CacheConfig(layers="all")


def entered(cache: LLMCache) -> list[int]:
    return cache.attached().entered.tolist()


def classifier(**settings: Any) -> Any:
    torch.manual_seed(1)
    config = model("bert").config
    for name, value in {"num_labels": 3, **settings}.items():
        setattr(config, name, value)
    made: Any = transformers.BertForSequenceClassification(config)
    return made.eval()


class Counting(nn.Module):
    """A layer that counts the rows it computes."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own, self.rows = own, 0

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.rows += len(states)
        return self.own(states, *args, **kwargs)


# -- the model stays the model ------------------------------------------------------------------------------


def test_nothing_of_the_model_changes(store: Path) -> None:
    one, (ids, mask) = classifier(), rows(5, 3)
    kind, before = type(one), {name: tensor.clone() for name, tensor in one.state_dict().items()}
    modules = {id(module): dict(vars(module)) for module in one.modules()}
    with torch.no_grad():
        expected = one(input_ids=ids, attention_mask=mask).logits
        with LLMCache.open(store, one) as cache, cache.attached():
            assert type(one) is kind
            assert {name for name, _ in one.named_parameters()} <= set(before)
            one(input_ids=ids, attention_mask=mask)
        after = one(input_ids=ids, attention_mask=mask).logits
    assert {id(module): set(vars(module)) for module in one.modules()} == {k: set(v) for k, v in modules.items()}
    assert list(one.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())
    assert torch.equal(after, expected)


def test_a_forward_that_somebody_else_replaced_is_put_back(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    calls, own = [], one.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    one.forward = forward
    with LLMCache.open(store, one) as cache, cache.attached():
        states(one, ids, mask)
    assert one.__dict__["forward"] is forward
    assert calls


def test_an_exception_inside_a_layer_leaves_the_model_as_it_was(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    expected = states(one, ids, mask)

    def fail(*_: Any) -> None:
        raise RuntimeError("a layer broke")

    with LLMCache.open(store, one, config=ALL) as cache:
        attachment = cache.attached()
        with attachment:
            states(one, ids[:1], mask[:1])
            broken = one.encoder.layer[2].register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="a layer broke"):
                states(one, ids, mask)
            broken.remove()
            assert torch.equal(states(one, ids[:1], mask[:1]), expected[:1])
            assert entered(cache) == [4]
            found = states(one, ids, mask)
            assert entered(cache) == [4, 0]  # the failed forward stored nothing
        assert difference(found, [expected[0], expected[1, :3]]) < 1e-5
        with pytest.raises(ZeroDivisionError), attachment:
            raise ZeroDivisionError
    assert "forward" not in one.__dict__
    assert all("forward" not in block.__dict__ for block in one.encoder.layer)


def test_attaching_twice_is_attaching_once(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    with LLMCache.open(store, one) as cache:
        with cache.attached() as first:
            with cache.attached() as second, cache.attached(one):
                states(one, ids, mask)
            assert first is second
            states(one, ids, mask)
            assert entered(cache) == [4, 4]
        assert "forward" not in one.__dict__
        assert cache.stats().counters.layers["layer-3"].asked == 4


def test_another_cache_is_refused_and_the_first_one_stays(store: Path, tmp_path: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    with LLMCache.open(store, one) as first, LLMCache.open(tmp_path / "other", one) as second, first.attached():
        with pytest.raises(ConfigError, match="is attached already, by another cache"), second.attached():
            pass
        states(one, ids, mask)
        states(one, ids, mask)
        assert entered(first) == [4, 4]
    assert "forward" not in one.__dict__


def test_other_layers_cannot_be_named_inside(store: Path) -> None:
    one = model("bert")
    with LLMCache.open(store, one) as cache, cache.attached():
        one.encoder.layer = nn.ModuleList(one.encoder.layer[:2])
        with pytest.raises(ConfigError, match="leave that context first"):
            cache.attached()


def test_a_model_cut_short_between_two_contexts_is_attached_anew(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    with LLMCache.open(store, one, config=ALL) as cache:
        with cache.attached():
            states(one, ids, mask)
        one.encoder.layer = one.encoder.layer[:2]
        one.config.num_hidden_layers = 2
        expected = states(one, ids, mask)
        with cache.attached() as attachment:
            found = states(one, ids, mask)
        assert attachment.entered.tolist() == [2, 2]  # two layers, those of the longer model
    assert difference(found, [expected[0], expected[1, :3]]) < 1e-5


def test_layers_put_in_place_of_others_while_attached_are_seen(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    with LLMCache.open(store, one, config=ALL) as cache, cache.attached():
        states(one, ids, mask)
        one.encoder.layer[1] = copy.deepcopy(model("bert").encoder.layer[3])
        with pytest.raises(ConfigError, match="layers of the attached model were replaced"):
            states(one, ids, mask)


# -- modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_mode_of_gradients(mode: Any, store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3, 6)
    expected = states(one, ids, mask)
    with LLMCache.open(store, one, config=ALL) as cache, cache.attached(), mode():
        cold = one(input_ids=ids[:2], attention_mask=mask[:2]).last_hidden_state
        warm = one(input_ids=ids, attention_mask=mask).last_hidden_state
        assert entered(cache) == [4, 4, 0]
        assert cold.is_inference() == (mode is torch.inference_mode)
        if mode is torch.enable_grad:
            warm.sum().backward()
            assert one.encoder.layer[0].attention.self.query.weight.grad is not None
    assert difference(warm.detach(), [row[:n] for row, n in zip(expected, (5, 3, 6), strict=True)]) < 1e-5


def test_training_mode_goes_past_the_cache_and_says_so_once(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    with LLMCache.open(store, one) as cache, cache.attached():
        states(one, ids, mask)
        one.train()
        torch.manual_seed(3)
        noisy = [states(one, ids, mask), states(one, ids, mask)]
        assert entered(cache) == [0, 0]
        assert not torch.equal(*noisy)
        one.eval()
        states(one, ids, mask)
        assert entered(cache) == [4, 4]
        assert cache.stats().counters.bypassed == 4
    assert [r.getMessage() for r in caplog.records] == ["BertModel goes past the cache: the model is in training mode"]
    torch.manual_seed(3)
    one.train()
    assert torch.equal(states(one, ids, mask), noisy[0])


def test_a_model_attached_in_training_mode_is_looked_at_later(store: Path) -> None:
    one, (ids, mask) = model("bert").train(), rows(5, 3)
    with LLMCache.open(store, one) as cache, cache.attached():
        states(one, ids, mask)
        one.eval()
        cold, warm = states(one, ids, mask), states(one, ids, mask)
        assert entered(cache) == [4, 4]
    assert difference(warm, [cold[0], cold[1, :3]]) == 0


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("by", ["call", "configuration"])
def test_a_call_that_asks_for_every_layer_gets_the_models_own(asked: str, by: str, store: Path) -> None:
    one, (ids, mask) = classifier(), rows(5, 3)
    one.set_attn_implementation("eager")
    field = asked.removeprefix("output_")
    given = {asked: True} if by == "call" else {}
    with LLMCache.open(store, one) as cache, torch.no_grad():
        with cache.attached():
            one(input_ids=ids, attention_mask=mask)
            one(input_ids=ids, attention_mask=mask)
            if by == "configuration":
                setattr(one.config, asked, True)
            found = one(input_ids=ids, attention_mask=mask, **given)
        expected = one(input_ids=ids, attention_mask=mask, **given)
        with cache.attached():
            again = one(input_ids=ids, attention_mask=mask, **given)
    assert len(found[field]) == len(expected[field]) >= 4
    for outputs in (found, again):
        for mine, own in zip(outputs[field], expected[field], strict=True):
            assert torch.equal(mine, own)
        assert torch.equal(outputs.logits, expected.logits)


def test_autocast_shares_nothing_with_plain_passes(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = states(one, ids, mask)
    plain = states(one, ids, mask)
    assert not torch.equal(expected, plain)
    with LLMCache.open(store, one, config=ALL) as cache, cache.attached():
        for _ in range(2):
            assert difference(states(one, ids, mask), [plain[0], plain[1, :3]]) == 0
            with torch.autocast("cpu", torch.bfloat16):
                assert difference(states(one, ids, mask), [expected[0], expected[1, :3]]) == 0
        assert cache.stats().counters.layers["layer-3"].hits == 4
    with LLMCache.open(store, one) as cache, torch.autocast("cpu", torch.bfloat16), cache.attached():
        warm = states(one, ids, mask)
        assert entered(cache) == [4, 4]
    assert difference(warm, [expected[0], expected[1, :3]]) == 0


def test_a_compiled_model_is_refused(store: Path) -> None:
    one = model("bert")
    compiled: Any = torch.compile(one, backend="eager")
    with LLMCache.open(store, one) as cache:
        with pytest.raises(ConfigError, match="compiled"):
            cache.attached(compiled)
        one.compile(backend="eager")
        with pytest.raises(ConfigError, match="compiled"):
            cache.attached()


def test_a_compiled_function_around_an_attached_model_goes_by_the_banks(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    expected = states(one, ids, mask)

    def mean(ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = (one(input_ids=ids, attention_mask=mask)[0] * mask[:, :, None]).sum(1)
        return found

    compiled = torch.compile(mean, backend="eager")
    with torch.no_grad(), LLMCache.open(store, one) as cache:
        with cache.attached():
            for _ in range(2):
                torch.testing.assert_close(compiled(ids, mask), (expected * mask[:, :, None]).sum(1))
            assert entered(cache) == [4, 4]
        torch.testing.assert_close(compiled(ids, mask), (expected * mask[:, :, None]).sum(1))
    torch.compiler.reset()


@pytest.mark.parametrize("by", ["call", "configuration"])
def test_tuples_are_given_where_tuples_are_asked_for(by: str, store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3, 7)
    asked = {"return_dict": False} if by == "call" else {}
    with LLMCache.open(store, one, config=ALL) as cache, torch.no_grad():
        if by == "configuration":
            one.config.return_dict = False
        expected = one(ids, mask, **asked)
        with cache.attached():
            one(ids[:1], mask[:1], **asked)
            found = one(ids, mask, **asked)
            assert entered(cache) == [4, 0, 0]
            one.config.return_dict = True
            named = one(ids, mask, return_dict=True)
    assert isinstance(found, tuple)
    assert len(found) == 2
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[0][2], expected[0][2])
    torch.testing.assert_close(named.pooler_output, found[1])


# -- programs around the model ------------------------------------------------------------------------------


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(90))])}
    rules = Tokenizer(models.WordLevel(words, "[PAD]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=rules, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def test_pipelines_go_by_the_banks(store: Path) -> None:
    one = classifier()
    texts = ["w1 w2 w3", "w4", "w1 w2 w3", "w5 w6"]
    classify: Any = transformers.pipeline("text-classification", model=one, tokenizer=tokenizer(), top_k=None)
    extract: Any = transformers.pipeline("feature-extraction", model=one.bert, tokenizer=tokenizer())
    expected, vectors = classify(texts, batch_size=4), extract(texts)
    with LLMCache.open(store, one) as cache, cache.attached():
        cold, warm = classify(texts, batch_size=4), classify(texts, batch_size=4)
        assert entered(cache) == [4] * 4
        for other in (cold, warm):
            for mine, own in zip(other, expected, strict=True):
                mine, own = ({one["label"]: one["score"] for one in each} for each in (mine, own))
                assert mine == pytest.approx(own, abs=1e-5)
        for mine, own in zip(extract(texts), vectors, strict=True):
            np.testing.assert_allclose(mine, own, atol=1e-5)
        assert entered(cache) == [4]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs accelerate")
def test_a_trainers_predictions_go_by_the_banks(store: Path, tmp_path: Path) -> None:
    one, (ids, mask) = classifier(), rows(6, 6, 6, 6)
    data = [{"input_ids": ids[i], "attention_mask": mask[i]} for i in range(4)]
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(one, arguments)
    expected = trainer.predict(data).predictions  # type: ignore[arg-type]
    with LLMCache.open(store, one) as cache, cache.attached():
        for _ in range(2):
            np.testing.assert_allclose(trainer.predict(data).predictions, expected, atol=1e-5)  # type: ignore[arg-type]
        assert entered(cache) == [4] * 4


def test_a_low_rank_adapter_around_a_layers_weights_is_another_model(store: Path) -> None:
    class Adapted(nn.Module):
        """A linear map and a low-rank addition, as PEFT injects them."""

        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.scaling = base_layer, {"default": 1.0}
            self.down = nn.Linear(base_layer.in_features, 2, bias=False)
            self.up = nn.Linear(2, base_layer.out_features, bias=False)

        def forward(self, states: Tensor) -> Tensor:
            found: Tensor = self.base_layer(states) + self.scaling["default"] * self.up(self.down(states))
            return found

        def merge(self) -> None:
            self.base_layer.weight.data += self.up.weight @ self.down.weight

    one, (ids, mask) = model("bert"), rows(5, 3)
    attention: Any = one.encoder.layer[2].attention.self
    with LLMCache.open(store, one, config=ALL) as cache, cache.attached():
        states(one, ids, mask)
        base = attention.query
        attention.query = Adapted(base)
        adapted = states(one, ids, mask)
        assert entered(cache) == [2, 2]  # the layers below are unchanged
        states(one, ids, mask)
        assert entered(cache) == [4, 4]
        attention.query.merge()
        attention.query = base
        merged = states(one, ids, mask)
        assert entered(cache) == [2, 2]
    assert difference(merged, [adapted[0], adapted[1, :3]]) < 1e-5
    expected = states(one, ids, mask)
    assert difference(merged, [expected[0], expected[1, :3]]) < 1e-5


# -- inputs -------------------------------------------------------------------------------------------------


def test_duplicates_in_a_batch_are_computed_once(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(7, 4, 6)
    order = [0, 1, 0, 2, 1, 0]
    reached: list[int] = []
    for layer in one.encoder.layer:
        layer.attention.register_forward_pre_hook(
            OwnHook(layer.attention, lambda _, args: reached.append(len(args[0])))
        )
    expected = states(one, ids[order], mask[order])
    reached.clear()
    with LLMCache.open(store, one) as cache, cache.attached():
        reached.clear()
        found = states(one, ids[order], mask[order])
        assert reached == [3] * 4
        states(one, ids[order], mask[order])
        assert reached == [3] * 4
        wider = torch.nn.functional.pad(ids[:1], (0, 4), value=9)  # other padding with other ids at hidden positions
        states(one, wider, torch.nn.functional.pad(mask[:1], (0, 4)))
        assert reached == [3] * 4
    lengths = [(7, 4, 6)[i] for i in order]
    assert difference(found, [row[:n] for row, n in zip(expected, lengths, strict=True)]) < 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_left_padding_holes_and_position_ids_are_part_of_what_is_known(name: str, store: Path) -> None:
    one, (ids, mask) = model(name), rows(8, 5, 8, 8, seed=4)
    hidden = mask.clone()
    hidden[0, :3] = 0
    hidden[3, 2:4] = 0
    places = (hidden.cumsum(1) - 1).clamp(min=0)
    calls: list[dict[str, Any]] = [
        {"mask": mask},
        {"mask": hidden},
        {"mask": hidden, "position_ids": places},
        {"mask": mask, "position_ids": torch.arange(8)[None] + 2},
        {"mask": None},
    ]
    if name == "bert":
        calls.append({"mask": mask, "token_type_ids": (torch.arange(8) > 3).long().expand(4, 8)})
        calls.append({"mask": hidden, "token_type_ids": torch.ones(1, 8).long()})
    expected = [states(one, ids, **call) for call in calls]
    with LLMCache.open(store, one, config=CacheConfig(layers=(1, 3))) as cache, cache.attached():
        for part in ([1], [0, 2, 3], [3, 2, 1, 0]):
            for call, own in zip(calls, expected, strict=True):
                given = {k: v[part] if v is not None and len(v) == 4 else v for k, v in call.items()}
                found = states(one, ids[part], **given)
                seen = torch.ones_like(mask) if call["mask"] is None else call["mask"]
                visible = seen[part].bool()
                torch.testing.assert_close(found[visible], own[part][visible], atol=1e-5, rtol=1e-4)
        assert entered(cache) == [4] * 4
        assert cache.stats().counters.bypassed == 0


def test_embeddings_instead_of_ids_go_past_the_cache_which_is_said_once(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    vectors = one.embeddings.word_embeddings(ids).detach()
    with torch.no_grad(), LLMCache.open(store, one) as cache:
        expected = one(inputs_embeds=vectors, attention_mask=mask)[0]
        with cache.attached():
            for _ in range(2):
                assert torch.equal(one(inputs_embeds=vectors, attention_mask=mask)[0], expected)
        assert cache.stats().counters.bypassed
    assert [r.getMessage() for r in caplog.records] == [
        "BertModel goes past the cache: inputs_embeds are given instead of token ids"
    ]


def test_a_mask_of_more_dimensions_or_of_weights_goes_past_the_cache(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    square = mask[:, None, None, :].expand(2, 1, 5, 5).bool()
    soft = mask * 0.5
    with torch.no_grad(), LLMCache.open(store, one) as cache:
        for given in (square, soft):
            expected = one(input_ids=ids, attention_mask=given)[0]
            with cache.attached():
                for _ in range(2):
                    assert torch.equal(one(input_ids=ids, attention_mask=given)[0], expected)
        assert cache.stats().counters.bypassed == 8
        with cache.attached():
            for other in (mask.float(), mask.bool(), mask.int()):
                states(one, ids, other)
            assert entered(cache) == [4, 4]


@pytest.mark.parametrize("wrong", [100, -1, 2**32 + 5, 2**40])
def test_ids_outside_the_vocabulary_are_the_models_own_error_and_leave_nothing(wrong: int, store: Path) -> None:
    one = model("bert")
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    with LLMCache.open(store, one, config=ALL) as cache, cache.attached():
        states(one, ids, None)
        ids[1, 0] = wrong
        with pytest.raises(IndexError, match="out of range"):
            states(one, ids, None)
        with pytest.raises(IndexError, match="out of range"):
            states(one, ids[[1, 1]], None)
        cache.commit()
        assert {bank.layer: bank.entries for bank in cache.stats().banks} == dict.fromkeys(
            [f"layer-{i}" for i in range(4)], 2
        )


def test_an_empty_batch_and_a_batch_without_tokens_are_the_models_own(store: Path) -> None:
    one = model("bert")
    with LLMCache.open(store, one) as cache:
        for shape in ((0, 5), (2, 0), (0, 0)):
            ids = torch.zeros(shape, dtype=torch.long)
            expected = _outcome(one, ids)
            with cache.attached():
                states(one, *rows(3, 3))
                assert _outcome(one, ids) == expected
                assert entered(cache) == [0] * shape[0]


def _outcome(model: nn.Module, ids: Tensor) -> Any:
    try:
        return states(model, ids, torch.ones_like(ids)).shape
    except (RuntimeError, ValueError, IndexError) as error:
        return type(error), str(error)


def test_a_mask_of_zeros_gives_what_the_model_gives(store: Path) -> None:
    one, (ids, mask) = classifier(), rows(5, 3, 4)
    mask[1] = 0
    with torch.no_grad(), LLMCache.open(store, one) as cache:
        expected = one(input_ids=ids, attention_mask=mask).logits
        with cache.attached():
            for _ in range(2):
                torch.testing.assert_close(one(input_ids=ids, attention_mask=mask).logits, expected)
            other = ids.clone()
            other[1] += 1
            found = one(input_ids=other, attention_mask=mask).logits
        torch.testing.assert_close(found, one(input_ids=other, attention_mask=mask).logits)


def test_a_batch_of_one_row_is_the_models_own_bits(store: Path) -> None:
    one, (ids, mask) = classifier(), rows(5)
    with torch.no_grad(), LLMCache.open(store, one, config=ALL) as cache:
        expected = one(input_ids=ids, attention_mask=mask).logits
        with cache.attached():
            for _ in range(2):
                assert torch.equal(one(input_ids=ids, attention_mask=mask).logits, expected)


# -- weights that change ------------------------------------------------------------------------------------


def _add(one: Any) -> None:
    with torch.no_grad():
        one.encoder.layer[1].output.dense.weight.add_(0.1)


def _load(one: Any) -> None:
    one.load_state_dict({name: tensor * 1.1 for name, tensor in one.state_dict().items()})


def _through_data(one: Any) -> None:
    one.encoder.layer[1].output.dense.weight.data += 0.1


def _other_data(one: Any) -> None:
    weight = one.encoder.layer[1].output.dense.weight
    for _ in range(3):
        weight.data = weight.data + 0.1


def _other_parameter(one: Any) -> None:
    dense = one.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() + 0.1)


def _other_module(one: Any) -> None:
    one.encoder.layer[1].output.dense = nn.Linear(64, 32)


def _rounded(one: Any) -> None:
    one.half().float()


def _half(one: Any) -> None:
    one.half()


def _bfloat16(one: Any) -> None:
    one.to(torch.bfloat16)


def _step(one: Any) -> None:
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


CHANGES = [_add, _load, _through_data, _other_data, _other_parameter, _other_module, _rounded, _half, _bfloat16, _step]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inside", [True, False])
def test_weights_that_change_are_never_answered_with_old_states(change: Any, inside: bool, store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    own = (CacheConfig if change not in (_half, _bfloat16) else lambda **k: CacheConfig(dtype="float32", **k))(
        layers="all"
    )
    with LLMCache.open(store, one, config=own) as cache:
        with cache.attached():
            before = states(one, ids, mask)
            if inside:
                change(one)
                found = states(one, ids, mask)
        if not inside:
            change(one)
            with cache.attached():
                found = states(one, ids, mask)
        expected = states(one, ids, mask)
        assert not torch.equal(expected, before)
        assert found.dtype == expected.dtype
        assert difference(found, [expected[0], expected[1, :3]]) == 0


def test_weights_that_come_back_are_known_again(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    before = copy.deepcopy(one.state_dict())
    with LLMCache.open(store, one, config=ALL) as cache, cache.attached():
        states(one, ids, mask)
        _add(one)
        states(one, ids, mask)
        assert entered(cache) == [1, 1]  # the layer below is unchanged
        one.load_state_dict(before)
        states(one, ids, mask)
        assert entered(cache) == [4, 4]
    assert "the attached model has changed" in caplog.text


def test_a_bank_of_another_width_is_refused(store: Path) -> None:
    narrow = model("bert")
    config = copy.deepcopy(narrow.config)
    config.hidden_size = 64
    wide: Any = transformers.BertModel(config)
    wide.eval()
    with LLMCache.open(store, narrow) as cache:
        with cache.attached():
            states(narrow, *rows(5, 3))
        with pytest.raises(ConfigError, match=r"layer 3 holds float32 states of width 32.*width 64.*namespace"):
            cache.attached(wide).__enter__()
        assert "forward" not in wide.__dict__
        with cache.attached():
            states(narrow, *rows(5, 3))
            assert entered(cache) == [4, 4]


# -- the store ----------------------------------------------------------------------------------------------


def test_damaged_states_are_computed_again(store: Path) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3, 7)
    expected = states(one, ids, mask)
    with LLMCache.open(store, one, config=CacheConfig(layers=(1, 3))) as cache, cache.attached():
        states(one, ids, mask)
    for path in (store / "seg").glob("*.var"):
        path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))
    with LLMCache.open(store, one) as cache, cache.attached():
        found = states(one, ids, mask)
        assert entered(cache) == [0, 0, 0]
        assert difference(found, [expected[0][:5], expected[1][:3], expected[2]]) == 0
        states(one, ids, mask)
        assert entered(cache) == [4, 4, 4]


def test_a_full_disk_stops_the_storing_and_not_the_model(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, (ids, mask) = model("bert"), rows(5, 3)
    expected = states(one, ids, mask)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = LLMCache.open(store, one, config=CacheConfig(layers="all", commit_seconds=1e-9))
    with cache.attached():
        monkeypatch.setattr(Folder, "write", full)
        for _ in range(3):
            assert difference(states(one, ids, mask), [expected[0], expected[1, :3]]) == 0
    assert cache.stats().counters.not_stored
    monkeypatch.undo()
    cache.close()


def test_a_bounded_store_evicts_and_stays_right(store: Path) -> None:
    one = model("bert")
    config = CacheConfig(layers="all", max_bytes=1 << 20, commit_seconds=1e-9)
    with LLMCache.open(store, one, config=config) as cache, cache.attached():
        for seed in range(12):
            ids, mask = rows(*[40] * 16, seed=seed)
            found = states(one, ids, mask)
        cache.commit()
        assert sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) <= 1 << 20
        states(one, *rows(*[40] * 16, seed=0))
    assert torch.equal(found, states(one, ids, mask))


# -- any sequence of calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seed"), [("bert", 0), ("bert", 1), ("gpt2", 2), ("t5", 3), ("modernbert", 4)])
def test_any_sequence_of_calls_gives_what_the_model_gives(name: str, seed: int, store: Path) -> None:
    random, plain, one = np.random.default_rng(seed), model(name), model(name)
    ids, mask = rows(*random.integers(1, 12, 10).tolist(), seed=seed)
    expected, allowed = alone(plain, ids, mask), tolerance(plain, ids, mask)
    for _ in range(6):
        numbers = random.choice(4, random.integers(1, 4), replace=False).tolist()
        config = CacheConfig(layers=tuple(numbers))
        with LLMCache.open(store, one, config=config) as cache, cache.attached():
            for _ in range(6):
                chosen = random.choice(10, random.integers(1, 9)).tolist()
                width = int(mask[chosen].sum(dim=1).max()) + int(random.integers(0, 3))
                padded = torch.nn.functional.pad(ids, (0, 3))[chosen, :width]
                seen = torch.nn.functional.pad(mask, (0, 3))[chosen, :width]
                found = states(one, padded, seen)
                assert found.shape[:2] == padded.shape
                assert difference(found, [expected[i] for i in chosen]) <= allowed
                first = {i: states(one, padded[k : k + 1], seen[k : k + 1])[0] for k, i in enumerate(chosen)}
                assert all(value == max(numbers) + 1 for value in entered(cache))
                assert all(difference(one_[None], [expected[i]]) <= allowed for i, one_ in first.items())


def test_no_warning_is_given_for_what_is_cached(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, (ids, mask) = classifier(), rows(5, 3)
    with caplog.at_level(logging.WARNING, "llmcache"), LLMCache.open(store, one) as cache, cache.attached():
        one(input_ids=ids, attention_mask=mask)
    assert not caplog.records
