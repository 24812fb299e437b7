"""Changes of a live model and calls after them: no old result is returned, no result of the changed model stored."""

from __future__ import annotations

import copy
import functools
import os
import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import nn

from llmcache import LLMCache
from llmcache.config import CacheConfig
from llmcache.errors import ConfigError, ModelMismatch
from llmcache.model.description.checksums import Contents
from llmcache.model.description.watch import ModelWatch
from llmcache.model.identity import Identity, identify, mismatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
]

WORDS = [f"w{i}" for i in range(90)]
TEXTS = ["w1 w2 w3 w4 w5 W6 w7 w8 w9", "w11 w12 w13 w14", "w20 w21 w22 w23 w24 w25"]
CHOICES = [" w30 w31", " w40"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 100,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
t: Any = transformers  # its configurations accept more than their annotations declare


# -- models -------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    vocabulary = {one: i for i, one in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return t.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", unk_token="[UNK]", eos_token="[SEP]",
        bos_token="[CLS]", model_max_length=32,
    )  # fmt: skip


def stirred(model: Any) -> Any:
    with torch.no_grad():  # initial norms of 1 and biases of 0 could hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


class Shift(nn.Module):
    """A user's module after the pooling, with settings of every plain kind."""

    limit = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.by, self.table, self.names, self.kind = 0.5, {"a": [1.0, 2.0]}, ["a"], torch.float32
        self.vector, self.array = torch.full((32,), 0.25), np.full(32, 0.125, np.float32)
        self.act: Any = torch.tanh
        self.calls = 0
        self.register_buffer("hidden", torch.full((32,), 0.1), persistent=False)

    def extra(self, states: torch.Tensor) -> torch.Tensor:
        return states * 1.5

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.calls += 1
        found = features["sentence_embedding"] + self.by + self.vector + torch.from_numpy(self.array) + self.hidden
        for name in self.names:
            found = found + torch.tensor(self.table[name]).sum().to(self.kind)
        features["sentence_embedding"] = self.act(self.extra(found)).clamp(max=self.limit)
        return features


@functools.cache
def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    stirred(t.BertModel(t.BertConfig(**SIZES))).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "bert")


def sentences(path: Path) -> Any:
    inner = Transformer(str(path), max_seq_length=16)
    return SentenceTransformer(
        modules=[inner, Pooling(32, pooling_mode="mean"), Shift(), Normalize()], device="cpu",
        prompts={"query": "w50 w51 "}, default_prompt_name="query",
    ).eval()  # fmt: skip


def llama(**others: Any) -> Any:
    torch.manual_seed(1)
    model = stirred(t.LlamaForCausalLM(t.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | others)))
    model.generation_config.pad_token_id = 0
    return model


def adapted(model: Any) -> Any:
    """Return the model with two low-rank adapters, of which "a" is active."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["query", "value", "q_proj", "v_proj"], lora_alpha=8)
    inner: Any = trunk_of_adapters(model)
    torch.manual_seed(2)
    inner.add_adapter(settings, "a")
    inner.add_adapter(settings, "b")
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    inner.set_adapter("a")
    return model.eval()


def trunk(model: Any) -> Any:
    """Return the module with the embeddings, of either kind of model."""
    return model[0].auto_model if isinstance(model, SentenceTransformer) else model.model


def layer(model: Any) -> Any:
    inner = trunk(model)
    return inner.encoder.layer[1] if hasattr(inner, "encoder") else inner.layers[1]


def linear(model: Any) -> Any:
    return next(one for one in layer(model).modules() if isinstance(one, nn.Linear))


# -- ways to change a model ---------------------------------------------------------------------------------

Change = Callable[[Any], Any]
ENCODERS: dict[str, Change] = {}
DECODERS: dict[str, Change] = {}
ADAPTERS: dict[str, Change] = {}
NOTHING: dict[str, Change] = {}


def of(*tables: dict[str, Change]) -> Callable[[Change], Change]:
    def noted(change: Change) -> Change:
        for table in tables:
            table[change.__name__] = change
        return change

    return noted


def row(model: Any) -> torch.Tensor:
    """Return the embedding of a word that all texts have."""
    found: torch.Tensor = trunk(model).get_input_embeddings().weight
    return found


def wrapped(own: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return scaled(own(*args, **kwargs), 1.5)

    return forward


def scaled(output: Any, by: float) -> Any:
    return output * by if isinstance(output, torch.Tensor) else (output[0] * by, *output[1:])


def set_on(target: str, name: str, value: Any) -> Change:
    def change(model: Any) -> None:
        setattr(eval(target, {"m": model, "trunk": trunk, "layer": layer, "linear": linear}), name, value)  # noqa: S307

    return change


def every(modules: Any, name: str, value: Any) -> None:
    """Set an attribute, or one of an attribute ("self_attn.is_causal"), of every module."""
    *path, last = name.split(".")
    for module in modules:
        setattr(reduce(getattr, path, module), last, value)


def truncated_on_the_left(model: Any) -> None:
    model.max_seq_length = 4
    model.tokenizer.truncation_side = "left"


BOTH = (ENCODERS, DECODERS)
for table in BOTH:
    table |= {
        "weight written to in place": lambda m: linear(m).weight.data.copy_(linear(m).weight * 1.1),
        "row written through data": lambda m: row(m).data[5].mul_(-3),
        "one number written through data": lambda m: linear(m).weight.data.view(-1)[77:78].add_(0.5),
        "number written through numpy": lambda m: linear(m).weight.detach().numpy().__setitem__((3, 3), 9.0),
        "optimiser step": lambda m: step(m),
        "weights loaded": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}),
        "parameter replaced": lambda m: setattr(linear(m), "weight", nn.Parameter(linear(m).weight.detach() * 2)),
        "parameter's data replaced": lambda m: setattr(linear(m).weight, "data", linear(m).weight.data * 2),
        "bias given": lambda m: setattr(linear(m), "bias", nn.Parameter(torch.ones(linear(m).out_features))),
        "module replaced": lambda m: replaced(m),
        "module wrapped": lambda m: wrap_module(m),
        "parametrization": lambda m: nn.utils.parametrizations.orthogonal(linear(m)) and None,
        "forward hook": lambda m: layer(m).register_forward_hook(lambda _, __, out: scaled(out, 1.5)),
        "forward pre-hook": lambda m: layer(m).register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:])),
        "hook that is a partial": lambda m: layer(m).register_forward_hook(functools.partial(steer, by=1.5)),
        "hook that is an object": lambda m: layer(m).register_forward_hook(Steer(1.5)),
        "forward replaced": lambda m: setattr(layer(m), "forward", wrapped(layer(m).forward)),
        "method bound to a module": lambda m: setattr(
            linear(m), "forward", types.MethodType(lambda self, x: x @ self.weight.T * 1.2, linear(m))
        ),
        "class of a module": lambda m: setattr(linear(m), "__class__", Doubled),
        "epsilon of a norm": lambda m: set_epsilon(m),
        "layers swapped": lambda m: swap(m),
        "layer removed": lambda m: remove_layer(m),
        "dtype": lambda m: (trunk(m) if sentence(m) else m).bfloat16() and None,
        "attention scaling": lambda m: set_scaling(m),
        "activation": lambda m: set_activation(m),
        "attention implementation": lambda m: trunk(m).set_attn_implementation("eager"),
        "attention function registered": lambda m: register_attention(m),
        "quantised linear maps": lambda m: quantise(m),
        "configuration setting": set_on("trunk(m).config", "chunk_size_feed_forward", 1),
    }


def step(model: Any) -> None:
    optimiser = torch.optim.AdamW(linear(model).parameters(), lr=0.1, foreach=True)
    linear(model)(torch.ones(1, linear(model).in_features)).sum().backward()
    optimiser.step()


def replaced(model: Any) -> None:
    for name, child in layer(model).named_modules():
        if isinstance(child, nn.Linear):
            layer(model).set_submodule(name, nn.Linear(child.in_features, child.out_features))
            return


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> Any:
        return self.inner(states) * 1.1


def wrap_module(model: Any) -> None:
    for name, child in layer(model).named_modules():
        if isinstance(child, nn.Linear):
            layer(model).set_submodule(name, Wrapper(child))
            return


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def steer(module: nn.Module, args: Any, output: Any, by: float) -> Any:
    return scaled(output, by)


class Steer:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return scaled(output, self.by)


def set_epsilon(model: Any) -> None:
    for one in layer(model).modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(one, name):
                setattr(one, name, 0.5)


def layers_of(model: Any) -> Any:
    inner = trunk(model)
    return inner.encoder.layer if hasattr(inner, "encoder") else inner.layers


def swap(model: Any) -> None:
    stack = layers_of(model)
    stack[0], stack[1] = stack[1], stack[0]


def remove_layer(model: Any) -> None:
    del layers_of(model)[2]
    trunk(model).config.num_hidden_layers = 2


def set_scaling(model: Any) -> None:
    for one in layer(model).modules():
        if hasattr(one, "scaling"):
            one.scaling = 0.9


def set_activation(model: Any) -> None:
    for one in layer(model).modules():
        for name in ("intermediate_act_fn", "act_fn"):
            if hasattr(one, name):
                setattr(one, name, nn.ReLU())


def register_attention(model: Any) -> None:
    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
        return torch.zeros_like(query).transpose(1, 2).contiguous() + 0.1, None

    transformers.AttentionInterface.register("own_attention", attention)
    trunk(model).config._attn_implementation = "own_attention"


def quantise(model: Any) -> None:
    for name, child in list(layer(model).named_modules()):
        if isinstance(child, nn.Linear):
            layer(model).set_submodule(name, Quantised(child))


class Quantised(nn.Module):
    """Layer with eight bits per weight, packed into a tensor that is neither parameter nor buffer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        weight = inner.weight.detach()
        self.packed = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 20, 0, torch.qint8)
        self.bias = inner.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.packed.dequantize(), self.bias)


ENCODERS |= {
    "non-persistent buffer": lambda m: trunk(m).embeddings.position_ids.copy_(trunk(m).embeddings.position_ids.flip(1)),
    "padding index": set_on("trunk(m).embeddings.word_embeddings", "max_norm", 0.5),
}
DECODERS |= {
    "rotary frequencies": lambda m: m.model.rotary_emb.inv_freq.mul_(0.25),
    "rotary scaling": set_on("m.model.rotary_emb", "attention_scaling", 0.5),
    "causality of an attention": lambda m: every(m.model.layers, "self_attn.is_causal", False),
    "causality of the configuration": set_on("m.config", "is_causal", False),
    "epsilon of the last norm": set_on("m.model.norm", "variance_epsilon", 0.5),
}
SENTENCES: dict[str, Change] = {
    "max_seq_length": set_on("m", "max_seq_length", 4),
    "pooling mode": set_on("m[1]", "pooling_mode", "max"),
    "include_prompt": set_on("m[1]", "include_prompt", False),
    "normalize removed": lambda m: m._modules.pop("3"),
    "normalize moved": lambda m: m._modules.__setitem__("2", m._modules.pop("2")),
    "module added": lambda m: m.append(Shift()),
    "prompt": lambda m: m.prompts.update(query="w60 "),
    "default prompt": set_on("m", "default_prompt_name", None),
    "lower case": set_on("m[0]", "do_lower_case", True),
    "truncation side": truncated_on_the_left,
    "token added": lambda m: m.tokenizer.add_tokens(["w5 w6"]),
    "normaliser": lambda m: setattr(m.tokenizer.backend_tokenizer, "normalizer", normalizers.Replace("w2", "w3")),
    "pre-tokeniser": lambda m: setattr(
        m.tokenizer.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Split(Regex("w"), "isolated")
    ),
    "post-processor": lambda m: setattr(
        m.tokenizer.backend_tokenizer, "post_processor", TemplateProcessing("[SEP] $A", special_tokens=[("[SEP]", 2)])
    ),
    "number of a module": set_on("m[2]", "by", 0.75),
    "nested list of a module": lambda m: m[2].table["a"].append(3.0),
    "list of a module": lambda m: m[2].names.append("a"),
    "tensor of a module": lambda m: m[2].vector.mul_(2),
    "tensor of a module through data": lambda m: m[2].vector.data[3:4].add_(1),
    "array of a module": lambda m: m[2].array.__setitem__(3, 5.0),
    "dtype of a module": set_on("m[2]", "kind", torch.float64),
    "function of a module": set_on("m[2]", "act", torch.sigmoid),
    "lambda of a module": set_on("m[2]", "act", lambda x: x * 2),
    "buffer of a module": lambda m: m[2].hidden.add_(1),
    "method of a module": lambda m: setattr(m[2], "extra", lambda x: x * 3),
}
ADAPTERS = {
    "adapter switched": lambda m: trunk_of_adapters(m).set_adapter("b"),
    "adapters disabled": lambda m: trunk_of_adapters(m).disable_adapters(),
    "adapter scaled": lambda m: [one.scaling.__setitem__("a", 9.0) for one in m.modules() if hasattr(one, "lora_A")],
    "adapter merged": lambda m: [one.merge() for one in m.modules() if hasattr(one, "lora_A")],
}
NOTHING = {
    "chat template": lambda m: setattr(m.tokenizer, "chat_template", "{{ messages }}") if sentence(m) else None,
    "name": set_on("trunk(m).config", "_name_or_path", "elsewhere"),
    "commit": set_on("trunk(m).config", "_commit_hash", "0123"),
    "return_dict": set_on("trunk(m).config", "return_dict", True),
    "gradients off": lambda m: m.requires_grad_(False),
    "gradients of one weight": lambda m: linear(m).weight.requires_grad_(False),
    "labels": set_on("trunk(m).config", "id2label", {0: "yes", 1: "no"}),
    "dropout rate of the configuration": set_on("trunk(m).config", "attention_dropout", 0.5),
    "dropout rate of modules": lambda m: every([x for x in m.modules() if isinstance(x, nn.Dropout)], "p", 0.9),
    "gradient checkpointing": lambda m: trunk(m).gradient_checkpointing_enable(),
    "generation defaults": lambda m: setattr(trunk(m), "generation_config", t.GenerationConfig(max_length=7)),
    "model card": lambda m: setattr(m.model_card_data, "license", "mit") if sentence(m) else None,
    "similarity": lambda m: setattr(m, "similarity_fn_name", "dot") if sentence(m) else None,
    "weights written with their own values": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "parameter replaced by its copy": lambda m: setattr(linear(m), "weight", nn.Parameter(linear(m).weight.clone())),
    "backward hook": lambda m: layer(m).register_full_backward_hook(lambda *_: None),
    "architectures": set_on("trunk(m).config", "architectures", ["Something"]),
    "padding of the last call": lambda m: pad(m),
    "training and back": lambda m: m.train().eval(),
    "gradients of a backward pass": lambda m: linear(m)(torch.ones(1, linear(m).in_features)).sum().backward(),
}


def pad(model: Any) -> None:
    if sentence(model):
        model.tokenizer.backend_tokenizer.enable_padding(length=9)


def trunk_of_adapters(model: Any) -> Any:
    return model[0].auto_model if sentence(model) else model


def sentence(model: Any) -> bool:
    return isinstance(model, SentenceTransformer)


# -- ways to call it ----------------------------------------------------------------------------------------


def encode(cache: LLMCache, model: Any) -> Any:
    return cache.encode(TEXTS)


def run(cache: LLMCache, model: Any) -> Any:
    return np.stack([one.output for one in cache.run(TEXTS)])


def encode_itself(model: Any) -> Any:
    return model.encode(TEXTS)


def batch(texts: Sequence[str] = TEXTS) -> dict[str, torch.Tensor]:
    given = tokenizer()(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)
    return dict(given)


def attached(cache: LLMCache, model: Any) -> Any:
    with cache.attached(), torch.no_grad():
        return visible(trunk(model)(**batch()))


def attached_itself(model: Any) -> Any:
    with torch.no_grad():
        return visible(trunk(model)(**batch()))


def visible(output: Any) -> Any:
    return (output[0].float() * batch()["attention_mask"][:, :, None]).numpy()


def generate(cache: LLMCache, model: Any) -> Any:
    return cache.generate(TEXTS, max_new_tokens=5, do_sample=False).texts


def score(cache: LLMCache, model: Any) -> Any:
    return cache.score(TEXTS, CHOICES).total


def perplexity(cache: LLMCache, model: Any) -> Any:
    return np.array([cache.perplexity(TEXTS, window=6)])


def generate_itself(model: Any) -> Any:
    from llmcache.decoders import generation as decoding

    return decoding.generate(model, tokenizer(), TEXTS, max_new_tokens=5, do_sample=False).texts


def score_itself(model: Any) -> Any:
    from llmcache.decoders import scoring

    return scoring.score(model, tokenizer(), TEXTS, CHOICES).total


def perplexity_itself(model: Any) -> Any:
    from llmcache.decoders import scoring

    return np.array([scoring.perplexity(model, tokenizer(), TEXTS, window=6)])


def run_heads(cache: LLMCache, model: Any) -> Any:
    return np.stack([one["head"].output for one in cache.run_heads(TEXTS, {"head": model})])


Call = Callable[[LLMCache, Any], Any]
CALLS: dict[str, tuple[Call, Callable[[Any], Any]]] = {
    "encode": (encode, encode_itself),
    "run": (run, encode_itself),
    "run_heads": (run_heads, encode_itself),
    "attached": (attached, attached_itself),
    "generate": (generate, generate_itself),
    "score": (score, score_itself),
    "perplexity": (perplexity, perplexity_itself),
}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return bool(found == expected)
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return found.shape == expected.shape and bool(np.allclose(found, expected, atol=2e-5, equal_nan=True))


@contextmanager
def opened(store: Path, model: Any) -> Iterator[LLMCache]:
    config = CacheConfig(layers="all", prefix_block=2, stand_aside=False)
    given = None if sentence(model) else tokenizer()
    with LLMCache.open(store, model, tokenizer=given, config=config) as cache:
        yield cache


def check(store: Path, make: Callable[[], Any], change: Change, call: str) -> None:
    """Check one change and one call: in the same opening, what it stores, and an opening of the changed model."""
    ask, itself = CALLS[call]
    model = make()
    with opened(store / "one", model) as cache:
        before = ask(cache, model)
        assert same(before, itself(model))
        change(model)
        expected = itself(model)
        for _ in range(2):
            found = answered(lambda: ask(cache, model))
            assert found is None or same(found, expected), "something old was given"
    poisoned = make()
    with opened(store / "two", poisoned) as cache:
        change(poisoned)
        answered(lambda: ask(cache, poisoned))
    for name in ("one", "two"):
        original = make()
        with opened(store / name, original) as cache:
            assert same(ask(cache, original), before), "something of the changed model was kept"
    changed = make()
    change(changed)

    def of_the_changed() -> Any:
        with opened(store / "one", changed) as cache:
            return ask(cache, changed)

    found = answered(of_the_changed)
    assert found is None or same(found, expected), "the changed model was given something of the original"


REFUSALS = re.compile(
    r"has changed.*namespace|different are.*namespace|bank of layer.*namespace|attention_mask hides|"
    r"those that the namespace was made with|writes to its own weights"
)


def answered(ask: Callable[[], Any]) -> Any:
    """Return the answer; None where the call was refused with an expected reason."""
    try:
        return ask()
    except (ModelMismatch, ConfigError) as error:
        if not REFUSALS.search(str(error)):
            raise
        return None


@pytest.fixture(autouse=True)
def clean_attention() -> Iterator[None]:
    yield
    transformers.AttentionInterface._global_mapping.pop("own_attention", None)


def drawn(changes: dict[str, Change], calls: Sequence[str]) -> pytest.MarkDecorator:
    """Return pairs of a change and a call: one call for each change, or all where LLMCACHE_ALL_CHANGES is set."""
    every = os.environ.get("LLMCACHE_ALL_CHANGES") or os.environ.get("LLMCACHE_NIGHTLY")
    pairs = [(name, call) for name in changes for call in calls]
    some = [(name, calls[place % len(calls)]) for place, name in enumerate(changes)]
    return pytest.mark.parametrize(("change", "call"), pairs if every else some)


@drawn(ENCODERS, ["encode", "attached", "run_heads"])
def test_a_changed_encoder_gives_nothing_old_and_keeps_nothing(
    tmp_path: Path, bert_path: Path, change: str, call: str
) -> None:
    check(tmp_path, lambda: sentences(bert_path), ENCODERS[change], call)


@drawn(SENTENCES, ["encode", "run", "run_heads"])
def test_a_changed_pipeline_gives_nothing_old_and_keeps_nothing(
    tmp_path: Path, bert_path: Path, change: str, call: str
) -> None:
    check(tmp_path, lambda: sentences(bert_path), SENTENCES[change], call)


@drawn(DECODERS, ["attached", "generate", "score", "perplexity"])
def test_a_changed_decoder_gives_nothing_old_and_keeps_nothing(tmp_path: Path, change: str, call: str) -> None:
    check(tmp_path, llama, DECODERS[change], call)


@drawn(ADAPTERS, ["encode", "attached"])
def test_changed_adapters_of_an_encoder_give_nothing_old(
    tmp_path: Path, bert_path: Path, change: str, call: str
) -> None:
    check(tmp_path, lambda: adapted(sentences(bert_path)), ADAPTERS[change], call)


@drawn(ADAPTERS, ["generate", "attached", "score"])
def test_changed_adapters_of_a_decoder_give_nothing_old(tmp_path: Path, change: str, call: str) -> None:
    check(tmp_path, lambda: adapted(llama()), ADAPTERS[change], call)


def test_there_are_at_least_sixty_ways_to_change_a_model() -> None:
    assert len({*ENCODERS, *DECODERS, *SENTENCES, *ADAPTERS}) >= 60
    assert len(NOTHING) >= 15


# -- what decides nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", NOTHING)
def test_what_decides_nothing_is_no_change_for_an_encoder(tmp_path: Path, bert_path: Path, change: str) -> None:
    model = sentences(bert_path)
    with opened(tmp_path / "store", model) as cache:
        before = encode(cache, model)
        attached(cache, model)
        misses = cache.stats().counters.misses
        NOTHING[change](model)
        assert np.array_equal(encode(cache, model), before)
        assert cache.stats().counters.misses == misses
        attached(cache, model)
        assert set(cache.attached().entered.tolist()) == {3}
    with opened(tmp_path / "store", model) as cache:  # a new opening accepts the model too
        assert np.array_equal(encode(cache, model), before)
        assert cache.stats().counters.misses == 0


@pytest.mark.parametrize("change", NOTHING)
def test_what_decides_nothing_is_no_change_for_a_decoder(tmp_path: Path, change: str) -> None:
    model = llama()
    with opened(tmp_path / "store", model) as cache:
        before = attached(cache, model)
        NOTHING[change](model)
        for _ in range(2):
            assert same(attached(cache, model), before)
        prefix = cache.stats().counters.prefix
        assert prefix.calls == 3
        computed = prefix.computed
    with opened(tmp_path / "other", llama()) as cache:
        attached(cache, cache.model)
        assert cache.stats().counters.prefix.computed == computed  # one call computes, two further ones do not


# -- back and forth -----------------------------------------------------------------------------------------


def test_a_model_that_is_changed_back_works_again(tmp_path: Path, bert_path: Path) -> None:
    model = adapted(sentences(bert_path))
    with opened(tmp_path / "store", model) as cache:
        before = encode(cache, model)
        for _ in range(3):
            trunk_of_adapters(model).disable_adapters()
            with pytest.raises(ModelMismatch, match="_disable_adapters: False -> True"):
                cache.encode(TEXTS)
            trunk_of_adapters(model).enable_adapters()
            assert np.array_equal(encode(cache, model), before)


def test_adapters_in_turn_each_find_their_own_beginnings(tmp_path: Path) -> None:
    model = adapted(llama())
    with opened(tmp_path / "store", model) as cache:
        computed = []
        for _ in range(3):
            for name in ("a", "b"):
                model.set_adapter(name)
                assert same(attached(cache, model), attached_itself(model))
                computed.append(cache.stats().counters.prefix.computed)
    assert computed[1:] == [computed[1]] * 5


def test_autocast_shares_nothing_with_plain_calls(tmp_path: Path, bert_path: Path) -> None:
    model = sentences(bert_path)
    with opened(tmp_path / "store", model) as cache:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = encode(cache, model)
            assert np.array_equal(encode(cache, model), reduced)
        assert same(encode(cache, model), encode_itself(model))
        assert not np.array_equal(encode(cache, model), reduced)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert np.array_equal(encode(cache, model), reduced)


@pytest.mark.parametrize("part", ["Dropout", "BertSelfAttention"])
def test_a_model_whose_dropout_alone_trains_goes_past_the_cache(
    tmp_path: Path, bert_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = sentences(bert_path)
    with opened(tmp_path / "store", model) as cache:
        for one in layer(model).modules():
            if type(one).__name__ == part:
                one.train()
        for _ in range(2):
            attached(cache, model)
            assert set(cache.attached().entered.tolist()) == {0}
        model.eval()
        assert same(attached(cache, model), attached_itself(model))
    assert caplog.text.count("is in training mode") == 1


def test_a_hook_that_only_takes_notes_changes_nothing_while_it_does(tmp_path: Path) -> None:
    model, seen = llama(), list[int]()
    layer(model).register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    with opened(tmp_path / "store", model) as cache:
        first = attached(cache, model)
        assert seen
        computed = cache.stats().counters.prefix.computed
        assert same(attached(cache, model), first)
        assert cache.stats().counters.prefix.computed == computed


def test_what_was_computed_after_an_unnoticed_write_is_never_committed(
    tmp_path: Path, bert_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Disable the check before a call, as for a part of a large model; the pass before a commit still runs."""

    def plain() -> Any:
        made = sentences(bert_path)
        del made._modules["2"]  # it counts its calls, so the model would be described again after each
        return made

    model = plain()
    with opened(tmp_path / "store", model) as cache:
        cache.encode(TEXTS[:1])
        cache.commit()
        monkeypatch.setattr(Contents, "changed_in_part", lambda *_: [])
        monkeypatch.setattr(ModelWatch, "_paid_pass", lambda *_: False)
        row(model).data[5] *= -3
        cache.encode(TEXTS[1:])
        cache.commit()
        assert "computed results are not stored" in caplog.text
        monkeypatch.undo()
        with pytest.raises(ModelMismatch, match="other numbers"):
            cache.encode(TEXTS)
    original = plain()
    with opened(tmp_path / "store", original) as cache:
        assert same(encode(cache, original), encode_itself(original))
        assert cache.stats().counters.misses == 2


@pytest.mark.parametrize("seed", range(8))
def test_a_single_changed_number_is_seen_within_one_turn_of_the_blocks(seed: int) -> None:
    random = np.random.default_rng(seed)
    tensors = {f"t{i}": torch.from_numpy(random.standard_normal((300, 257)).astype(np.float32)) for i in range(5)}
    contents = Contents(tensors)
    turns = int(contents.nbytes // 65536) + 6
    assert not any(contents.changed_in_part(1) for _ in range(turns))
    name = f"t{random.integers(5)}"
    place = int(random.integers(300 * 257))
    tensors[name].view(-1).data[place : place + 1].view(torch.int32).bitwise_xor_(1 << int(random.integers(32)))
    seen = [contents.changed_in_part(1) for _ in range(turns)]
    assert [name] in seen
    assert contents.changed() == [name]


def test_an_identity_of_the_first_form_is_refused_with_the_reason(tmp_path: Path, bert_path: Path) -> None:
    identity = identify(sentences(bert_path))
    raw = identity.to_json()
    del raw["form"]
    old = Identity.from_json(raw)
    assert old.digest != identity.digest
    assert "form 1 of the model identity" in str(mismatch(old, identity))
