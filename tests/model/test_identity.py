"""Identity of models: which models may share activations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch import nn

import llmcache.model.digests
from llmcache.errors import ConfigError, ModelMismatch, SnapshotDamaged
from llmcache.model.digests import model_files
from llmcache.model.identity import (
    Identity,
    difference,
    identify,
    load,
    mismatch,
)

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("LLMCACHE_MODELS", ROOT.parent / "shared" / "models"))
DIGESTS = ("config", "embeddings", "head", "tokenizer")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tests from reading or writing digests in the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmcache" / "digests"


@pytest.fixture(scope="module")
def identity(model_path: str) -> Identity:
    return identify(SentenceTransformer(model_path))


@pytest.fixture
def folder(model_path: str, tmp_path: Path) -> Path:
    """A copy of the model that a test may change, with files old enough for the digest cache."""
    copy = tmp_path / "copy"
    shutil.copytree(model_path, copy)
    settle()
    return copy


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets a tensor's length whenever a tensor is hashed."""
    calls: list[int] = []
    real = llmcache.model.digests._tensor_digest

    def counted(tensor: torch.Tensor) -> str:
        calls.append(tensor.numel())
        return real(tensor)

    monkeypatch.setattr(llmcache.model.digests, "_tensor_digest", counted)
    return calls


def settle() -> None:
    time.sleep(0.15)


def trunk_of(model: SentenceTransformer) -> Any:
    return model[0].auto_model


def weight(model: nn.Module, ending: str) -> torch.Tensor:
    return next(one for name, one in model.named_parameters() if name.endswith(ending))


def flip_one_bit(tensor: torch.Tensor) -> None:
    tensor.data.reshape(-1)[tensor.numel() // 2 : tensor.numel() // 2 + 1].view(torch.int32).bitwise_xor_(1)


def named(one: Identity, other: Identity) -> list[str]:
    return [name for name, _, _ in difference(one, other)]


def small(name: str) -> Path:
    path = MODELS / name
    if not path.is_dir():
        pytest.skip(f"no model at {path}; set LLMCACHE_MODELS to the folder that holds {name}")
    return path


# -- what changes an identity -------------------------------------------------------------------------------


def test_two_loads_have_the_same_identity(model_path: str, identity: Identity) -> None:
    again = identify(SentenceTransformer(model_path))
    assert again == identity
    assert again.digest == identity.digest
    assert len(identity.digest) == 32
    assert len(identity.layers) == 6
    assert named(again, identity) == []


def test_another_process_finds_the_same_identity(model_path: str, identity: Identity) -> None:
    code = (
        "import sys\nfrom sentence_transformers import SentenceTransformer\n"
        "from llmcache.model.identity import identify\n"
        "print(identify(SentenceTransformer(sys.argv[1])).digest.hex())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", code, model_path]
    found = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split()[-1] == identity.digest.hex()


@pytest.mark.parametrize("cores", [None, 1, 16])
def test_the_number_of_threads_does_not_matter(
    model: SentenceTransformer, identity: Identity, monkeypatch: pytest.MonkeyPatch, cores: int | None
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert identify(model) == identity


def test_reading_a_stored_identity_needs_no_torch() -> None:
    code = "import sys, llmcache.model.identity\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_of_the_weights_does_not_matter(model_path: str, identity: Identity) -> None:
    assert identify(SentenceTransformer(model_path, device="cuda")) == identity


def test_encoding_and_train_mode_leave_the_identity_alone(model_path: str, identity: Identity) -> None:
    model = SentenceTransformer(model_path)
    model.encode(["short", "a much longer text " * 100])
    assert identify(model.train()) == identity


@pytest.mark.parametrize(
    ("ending", "field"),
    [
        ("word_embeddings.weight", "embeddings"),
        ("layer.0.attention.self.query.weight", "layers"),
        ("layer.5.output.LayerNorm.bias", "layers"),
    ],
)
def test_one_changed_bit_of_a_weight_changes_the_identity(
    model_path: str, identity: Identity, ending: str, field: str
) -> None:
    model = SentenceTransformer(model_path)
    flip_one_bit(weight(model, ending))
    other = identify(model)
    assert other.digest != identity.digest
    assert named(identity, other) == [field]


def test_layers_agree_up_to_the_first_one_that_differs(model_path: str, identity: Identity) -> None:
    model = SentenceTransformer(model_path)
    flip_one_bit(weight(model, "layer.3.intermediate.dense.weight"))
    other = identify(model)
    assert other.layers[:3] == identity.layers[:3]
    assert not set(other.layers[3:]) & set(identity.layers)
    assert other.head == identity.head
    assert "from layer 3 on" in str(mismatch(identity, other))
    assert [other.up_to(i) == identity.up_to(i) for i in range(6)] == [True] * 3 + [False] * 3


def test_a_model_cut_short_shares_the_layers_it_kept(model_path: str, identity: Identity) -> None:
    model = SentenceTransformer(model_path)
    trunk = trunk_of(model)
    trunk.encoder.layer = trunk.encoder.layer[:4]
    trunk.config.num_hidden_layers = 4
    other = identify(model)
    assert other.layers == identity.layers[:4]
    assert named(identity, other) == ["config", "layers"]


Change = Callable[[SentenceTransformer], object]


def set_pooling(model: SentenceTransformer) -> None:
    pooling: Any = model[1]
    pooling.pooling_mode = "cls"


def drop_normalize(model: SentenceTransformer) -> None:
    del model._modules["2"]


def add_token(model: SentenceTransformer) -> None:
    model.tokenizer.add_tokens(["llmcache"])


def set_epsilon(model: SentenceTransformer) -> None:
    trunk_of(model).config.layer_norm_eps = 1e-6


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("tokenizer", add_token),
        ("tokenizer", lambda model: setattr(model.tokenizer, "padding_side", "left")),
        ("tokenizer", lambda model: setattr(model.tokenizer, "model_input_names", ["input_ids"])),
        ("max_seq_length", lambda model: setattr(model, "max_seq_length", 128)),
        ("pooling", set_pooling),
        ("prompts", lambda model: model.prompts.update(query="query: ")),
        ("default_prompt_name", lambda model: setattr(model, "default_prompt_name", "query")),
        ("dtype", lambda model: model.bfloat16()),
        ("head", drop_normalize),
        ("config", set_epsilon),
    ],
)
def test_a_change_is_named_and_nothing_else(model_path: str, identity: Identity, field: str, change: Change) -> None:
    model = SentenceTransformer(model_path)
    change(model)
    other = identify(model)
    assert other.digest != identity.digest
    assert named(identity, other) == [field]


def test_the_attention_implementation_is_named_and_nothing_else(model_path: str) -> None:
    eager, sdpa = (
        identify(SentenceTransformer(model_path, model_kwargs={"attn_implementation": one}))
        for one in ("eager", "sdpa")
    )
    assert difference(eager, sdpa) == [("attention", "eager", "sdpa")]
    assert eager.layers == sdpa.layers
    assert eager.up_to(0) != sdpa.up_to(0)


def test_bfloat16_is_hashed_as_it_is_in_memory(model_path: str) -> None:
    cast = identify(SentenceTransformer(model_path).bfloat16())
    loaded = identify(SentenceTransformer(model_path, model_kwargs={"dtype": "bfloat16"}))
    assert cast.dtype == loaded.dtype == "bfloat16"
    assert cast == loaded


def test_what_decides_no_activation_changes_nothing(model_path: str, identity: Identity) -> None:
    model = SentenceTransformer(model_path)
    config = trunk_of(model).config
    config._name_or_path, config.hidden_dropout_prob, config.id2label = "elsewhere", 0.5, {0: "yes"}
    other = identify(model)
    assert other == identity
    assert other.name == "elsewhere"


def test_a_pooler_that_is_never_asked_decides_nothing(model_path: str, identity: Identity) -> None:
    # a checkpoint without a pooler gets random weights at every load
    model = SentenceTransformer(model_path)
    torch.nn.init.normal_(trunk_of(model).pooler.dense.weight)
    assert identify(model) == identity
    plain = [identify(trunk_of(model)), identify(trunk_of(SentenceTransformer(model_path)))]
    assert named(*plain) == ["head"]


# -- any transformers model ---------------------------------------------------------------------------------


def tiny(name: str) -> nn.Module:
    """Return a random model of this kind with two layers, always the same one."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 50}
    made: dict[str, tuple[type, dict[str, Any]]] = {
        "BertModel": (transformers.BertConfig, sizes),
        "BertForSequenceClassification": (transformers.BertConfig, sizes),
        "MPNetModel": (transformers.MPNetConfig, sizes),
        "AlbertModel": (transformers.AlbertConfig, sizes | {"embedding_size": 8}),
        "LlamaForCausalLM": (transformers.LlamaConfig, sizes),
        "DistilBertModel": (
            transformers.DistilBertConfig,
            {"n_layers": 2, "dim": 16, "hidden_dim": 32, "n_heads": 2, "vocab_size": 50},
        ),
        "GPT2Model": (transformers.GPT2Config, {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50}),
        "T5Model": (
            transformers.T5Config,
            {"num_layers": 2, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "vocab_size": 50},
        ),
        "T5EncoderModel": (
            transformers.T5Config,
            {"num_layers": 2, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "vocab_size": 50},
        ),
    }
    config, settings = made[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(config(**settings))
    return model


@pytest.mark.parametrize(
    ("name", "depth", "ending", "first"),
    [
        ("BertModel", 2, "layer.1.output.dense.weight", 1),
        ("BertModel", 2, "position_embeddings.weight", 0),
        ("BertModel", 2, "pooler.dense.bias", 2),
        ("DistilBertModel", 2, "layer.1.ffn.lin2.bias", 1),
        ("MPNetModel", 2, "layer.1.output.dense.bias", 1),
        ("MPNetModel", 2, "relative_attention_bias.weight", 0),
        ("AlbertModel", 1, "ffn.weight", 0),
        ("GPT2Model", 2, "h.1.mlp.c_fc.weight", 1),
        ("GPT2Model", 2, "ln_f.weight", 2),
        ("LlamaForCausalLM", 2, "layers.1.mlp.up_proj.weight", 1),
        ("LlamaForCausalLM", 2, "model.norm.weight", 2),
        ("LlamaForCausalLM", 2, "lm_head.weight", 2),
        ("T5Model", 4, "shared.weight", 0),
        ("T5Model", 4, "encoder.block.1.layer.0.SelfAttention.q.weight", 1),
        ("T5Model", 4, "encoder.final_layer_norm.weight", 2),
        ("T5Model", 4, "decoder.block.1.layer.2.DenseReluDense.wo.weight", 3),
        ("T5Model", 4, "decoder.final_layer_norm.weight", 4),
        ("T5EncoderModel", 2, "encoder.final_layer_norm.weight", 2),
    ],
)
def test_a_changed_weight_changes_the_layers_that_see_it(name: str, depth: int, ending: str, first: int) -> None:
    before, model = identify(tiny(name)), tiny(name)
    flip_one_bit(weight(model, ending))
    after = identify(model)
    assert len(before.layers) == depth
    assert [a == b for a, b in zip(before.layers, after.layers, strict=True)] == [i < first for i in range(depth)]
    assert (before.head != after.head) == (first == depth)


def test_a_trunk_has_the_same_layers_under_a_classifier() -> None:
    alone, below = tiny("BertModel"), tiny("BertForSequenceClassification")
    trunk: Any = below.get_submodule("bert")
    trunk.load_state_dict(alone.state_dict())
    one, other = identify(alone), identify(below)
    assert one.layers == other.layers
    assert one.embeddings == other.embeddings
    assert named(one, other) == ["model_class", "head"]


def test_the_number_of_turns_through_a_shared_block_counts() -> None:
    one, other = tiny("AlbertModel"), tiny("AlbertModel")
    config: Any = other.config
    config.num_hidden_layers = 3
    assert identify(one).layers != identify(other).layers


@pytest.mark.parametrize(
    ("folder", "loader", "depth"),
    [
        ("babyllama105-llama", "AutoModelForCausalLM", 5),
        ("slm4096-gpt2", "AutoModelForCausalLM", 4),
        ("bart-g2p-us", "AutoModelForSeq2SeqLM", 2),
    ],
)
def test_real_decoders_have_one_digest_per_layer(folder: str, loader: str, depth: int) -> None:
    path = small(folder)
    one, other = (identify(getattr(transformers, loader).from_pretrained(path)) for _ in range(2))
    assert one == other
    assert len(set(one.layers)) == depth


def test_the_tokenizer_of_a_plain_model_counts_when_it_is_given() -> None:
    path = small("slm4096-gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = tiny("GPT2Model")
    assert named(identify(model), identify(model, tokenizer=tokenizer)) == ["tokenizer"]


class Slow:
    """A tokenizer without a fast backend."""

    def __init__(self, **flags: object) -> None:
        self.init_kwargs = {"do_lower_case": True, "is_local": True, **flags}
        self.padding_side = "right"

    def get_vocab(self) -> dict[str, int]:
        return {"b": 1, "a": 0}


def test_a_slow_tokenizer_is_known_by_vocabulary_and_switches() -> None:
    model = tiny("GPT2Model")
    one, same = (identify(model, tokenizer=Slow(is_local=local)) for local in (True, False))
    assert one == same
    assert named(one, identify(model, tokenizer=Slow(do_lower_case=False))) == ["tokenizer"]


class Adapted(nn.Module):
    """Layer of the form of PEFT: the old layer, two small matrices, and settings that are no tensors."""

    def __init__(self, base_layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
        self.scaling = {"default": scale}
        self.active_adapters = ["default"]


def test_an_adapter_changes_its_layer_and_the_later_ones() -> None:
    found = [identify(tiny("BertModel"))]
    for scale in (1.0, 2.0):
        model: Any = tiny("BertModel")
        attention = model.encoder.layer[1].attention.self
        torch.manual_seed(1)
        attention.query = Adapted(attention.query, scale)
        found.append(identify(model))
    assert len({one.layers[0] for one in found}) == 1
    assert len({one.layers[1] for one in found}) == 3
    assert len({one.embeddings for one in found}) == 1
    assert len({one.head for one in found}) == 1


def test_tied_and_strided_weights_are_hashed_by_their_values() -> None:
    one, other = tiny("LlamaForCausalLM"), tiny("LlamaForCausalLM")
    untied: Any = other
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    inner = untied.model.layers[0].self_attn.q_proj
    inner.weight = nn.Parameter(inner.weight.detach().t().contiguous().t())
    assert not inner.weight.is_contiguous()
    assert identify(one) == identify(other)


def test_a_model_without_bytes_is_refused() -> None:
    with torch.device("meta"):
        model = tiny("BertModel")
    with pytest.raises(ConfigError, match=r"embeddings.*meta device.*load the model's weights"):
        identify(model)


# -- as json, and as an error -------------------------------------------------------------------------------


def test_an_identity_survives_json(identity: Identity) -> None:
    raw = json.loads(json.dumps(identity.to_json()))
    back = Identity.from_json(raw)
    assert back == identity
    assert back.digest == identity.digest
    assert (back.name, back.revision, back.versions) == (identity.name, identity.revision, identity.versions)


@pytest.mark.parametrize("value", [None, 7, "abc", ["zz"], [["a"]], {"a": 1}, True, 1.5])
@pytest.mark.parametrize("field", [one.name for one in fields(Identity)])
def test_a_field_of_the_wrong_type_is_named(identity: Identity, field: str, value: object) -> None:
    right = {
        "max_seq_length": (None, 7),
        "default_prompt_name": (None, "abc"),
        **dict.fromkeys(("model_class", "pooling", "dtype", "attention", "name", "revision"), ("abc",)),
    }
    raw = {**identity.to_json(), field: value}
    if type(value) is not bool and value in right.get(field, ()):
        assert getattr(Identity.from_json(raw), field) == value
    else:
        with pytest.raises(SnapshotDamaged, match=rf"no valid field '{field}'.*fresh namespace"):
            Identity.from_json(raw)


def test_missing_and_unknown_fields_are_named(identity: Identity) -> None:
    raw = identity.to_json()
    with pytest.raises(SnapshotDamaged, match="'colour'"):
        Identity.from_json({**raw, "colour": "blue"})
    raw.pop("layers")
    with pytest.raises(SnapshotDamaged, match="'layers'"):
        Identity.from_json(raw)


def test_names_and_versions_are_shown_and_never_compared(identity: Identity) -> None:
    other = replace(identity, name="elsewhere", revision="abc", versions=(("torch", "9"),))
    assert other == identity
    assert other.digest == identity.digest
    assert difference(identity, other) == []


def test_the_error_says_on_one_line_what_differs_and_what_to_do(identity: Identity) -> None:
    other = replace(
        identity,
        name="two\nlines",
        tokenizer="f" * 64,
        layers=identity.layers[:3] + ("e" * 64,) * 3,
        prompts=(("query", "a\nb"),),
        max_seq_length=None,
        pooling="p" * 500,
    )
    error = mismatch(identity, other)
    text = str(error)
    assert isinstance(error, ModelMismatch)
    assert text.isprintable()
    assert len(text) < 1500
    for part in (
        identity.digest.hex()[:8],
        other.digest.hex()[:8],
        repr(identity.name),
        f"layers: stored {identity.layers[3][:8]} from layer 3 on (6 layers), given eeeeeeee from layer 3 on",
        f"tokenizer: stored {identity.tokenizer[:8]}, given ffffffff",
        "max_seq_length: stored 256, given none",
        "open the store with the same model",
        'namespace="..." in Python, --namespace on the command line',
    ):
        assert part in text


# -- digests of earlier calls -------------------------------------------------------------------------------


def test_loading_by_path_gives_the_identity_of_the_loaded_object(model_path: str) -> None:
    live = identify(SentenceTransformer(model_path))
    first, second = load(model_path)[1], load(Path(model_path))[1]
    assert live == first == second
    assert live.to_json() == first.to_json() == second.to_json()


def test_the_second_opening_by_path_hashes_no_weight(model_path: str, hashed: list[int], cache_folder: Path) -> None:
    load(model_path)
    assert sum(hashed) > 20_000_000
    hashed.clear()
    model, identity = load(model_path, device="cpu", prompts={"query": "q: "})
    assert hashed == []
    assert identity.prompts == (("document", ""), ("query", "q: "))
    assert identity == identify(model)
    assert hashed != []
    (file,) = cache_folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert cache_folder.stat().st_mode & 0o777 == 0o700


def test_only_the_newest_memories_are_kept(
    model_path: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmcache.model.digests, "_REMEMBERED", 3)
    cache_folder.mkdir(parents=True)
    for age in range(6):
        old = cache_folder / f"{age}.json"
        old.write_text("{}")
        os.utime(old, (1e9 - age, 1e9 - age))
    load(model_path)
    kept = {file.name for file in cache_folder.iterdir()}
    assert len(kept) == 3
    assert {"0.json", "1.json"} < kept


def test_a_memory_that_is_used_is_not_the_next_to_go(model_path: str, cache_folder: Path) -> None:
    load(model_path)
    (file,) = cache_folder.iterdir()
    os.utime(file, (1e9, 1e9))
    load(model_path)
    assert file.stat().st_mtime > 1e9


def test_a_model_object_is_hashed_as_it_is_in_memory(model_path: str, hashed: list[int]) -> None:
    model, identity = load(model_path)
    hashed.clear()
    flip_one_bit(weight(model, "layer.3.output.dense.weight"))
    assert named(identity, identify(model)) == ["layers"]
    assert hashed != []


def test_another_dtype_is_hashed_anew(model_path: str, hashed: list[int]) -> None:
    load(model_path)
    hashed.clear()
    model, identity = load(model_path, model_kwargs={"dtype": "bfloat16"})
    assert hashed != []
    assert identity == identify(model)


def test_a_touched_file_is_hashed_anew(folder: Path, hashed: list[int]) -> None:
    load(folder)
    hashed.clear()
    os.utime(folder / "model.safetensors")
    settle()
    load(folder)
    assert hashed != []


@pytest.mark.parametrize("replaced", [True, False])
def test_other_bytes_of_the_same_size_and_time_are_hashed_anew(folder: Path, replaced: bool) -> None:
    _, identity = load(folder)
    weights = folder / "model.safetensors"
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[len(data) * 3 // 4] ^= 1  # inside a layer
    target = folder / "partial" if replaced else weights
    target.write_bytes(data)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(target, weights)
    assert weights.stat().st_size == before.st_size
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    settle()
    model, other = load(folder)
    assert other == identify(model)
    assert other != identity


def test_a_file_changed_a_moment_ago_is_not_remembered(folder: Path, cache_folder: Path) -> None:
    os.utime(folder / "config.json")
    assert model_files(str(folder), {}) is None
    settle()
    assert model_files(str(folder), {}) is not None


def test_weights_that_other_arguments_decide_are_not_remembered(folder: Path) -> None:
    assert model_files(str(folder), {"device": "cpu", "model_kwargs": {"dtype": "float16"}}) is not None
    assert model_files(str(folder), {"trust_remote_code": True}) is None
    assert model_files(str(folder), {"model_kwargs": {"state_dict": {}}}) is None
    (folder / "adapter_config.json").write_text("{}")
    settle()
    assert model_files(str(folder), {}) is None


def test_a_random_weight_that_the_files_lack_is_hashed_anew(model_path: str, hashed: list[int]) -> None:
    files = model_files(model_path, {})
    model = SentenceTransformer(model_path)
    identify(model, files=files)
    hashed.clear()
    torch.nn.init.normal_(weight(model, "layer.5.output.dense.bias"))
    assert identify(model, files=files) == identify(model)
    assert hashed != []


def test_a_damaged_memory_is_ignored_and_mended(model_path: str, cache_folder: Path, hashed: list[int]) -> None:
    model, identity = load(model_path)
    files = model_files(model_path, {})
    (file,) = cache_folder.iterdir()
    whole = file.read_bytes()
    turned = whole.replace(b"1", b"2", 1)
    for damage in (
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"check": "", "tensors": {}}',
        b"\xff\x00",
        whole[:-9],
        turned,
    ):
        file.write_bytes(damage)
        hashed.clear()
        assert identify(model, files=files) == identity
        assert hashed != []
        assert file.read_bytes() == whole


def test_a_memory_that_cannot_be_written_is_no_error(model_path: str, cache_folder: Path) -> None:
    cache_folder.parent.parent.mkdir(parents=True)
    cache_folder.parent.write_text("a file where the folder should be")
    assert load(model_path)[1] == load(model_path)[1]


def test_a_name_on_the_hub_is_remembered_by_its_snapshot_folder(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--sentence-transformers--tiny-copy"
    # as in the hub's cache: the files of a snapshot are links to files in another folder
    shutil.copytree(model_path, repository / "snapshots" / commit, copy_function=os.symlink)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    first = load("tiny-copy", cache_folder=str(tmp_path / "hub"))[1]
    hashed.clear()
    assert load("tiny-copy", cache_folder=str(tmp_path / "hub"))[1] == first
    assert hashed == []
    assert first.name == "tiny-copy"
