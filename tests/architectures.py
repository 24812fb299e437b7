"""Small models of many architectures with seeded weights, and what the tests of attached models compare them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

t: Any = transformers  # whose configurations take more than they declare
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BART = {"d_model": 32, "encoder_layers": 4, "decoder_layers": 2, "encoder_attention_heads": 4}


class Plain(nn.Module):
    """A `nn.TransformerEncoder` in a module of one's own."""

    def __init__(self, heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.place = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, heads, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(32), enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.embedding(input_ids) + self.place.weight[: input_ids.shape[1]]
        hidden = None if attention_mask is None else attention_mask == 0
        found: Tensor = self.encoder(states, src_key_padding_mask=hidden)
        return found


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "bert": lambda: t.BertModel(t.BertConfig(**_SIZES)),
    "distilbert": lambda: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=100, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    ),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(**_SIZES)),
    "mpnet": lambda: t.MPNetModel(t.MPNetConfig(**_SIZES)),
    "modernbert": lambda: t.ModernBertModel(
        t.ModernBertConfig(**_SIZES, cls_token_id=1, sep_token_id=2, local_attention=8)
    ),
    "deberta-v2": lambda: t.DebertaV2Model(
        t.DebertaV2Config(
            **_SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            conv_kernel_size=3,
        )
    ),
    "gpt2": lambda: t.GPT2Model(t.GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, n_positions=64, **_ENDS)),
    "gpt-neox": lambda: t.GPTNeoXModel(t.GPTNeoXConfig(**_SIZES)),
    "opt": lambda: t.OPTModel(
        t.OPTConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=4,
            ffn_dim=64,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **_ENDS,
        )
    ),
    "llama": lambda: t.LlamaModel(t.LlamaConfig(**_SIZES, num_key_value_heads=2)),
    "qwen3": lambda: t.Qwen3Model(t.Qwen3Config(**_GROUPED)),
    "gemma": lambda: t.GemmaModel(t.GemmaConfig(**_GROUPED)),
    "gemma2": lambda: t.Gemma2Model(t.Gemma2Config(**_GROUPED, sliding_window=8)),
    "bloom": lambda: t.BloomModel(t.BloomConfig(vocab_size=100, hidden_size=32, n_layer=4, n_head=4, **_ENDS)),
    "t5": lambda: t.T5EncoderModel(t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4)),
    "bart": lambda: t.BartModel(
        t.BartConfig(
            vocab_size=100,
            **_BART,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
            **_ENDS,
        )
    ),
    "albert": lambda: t.AlbertModel(t.AlbertConfig(**_SIZES, embedding_size=16)),
    "electra": lambda: t.ElectraModel(t.ElectraConfig(**_SIZES, embedding_size=16)),
    "nn.TransformerEncoder": Plain,
}
"""By name; each has four layers of width 32, 100 tokens and 64 positions."""


def model(name: str) -> Any:
    """The model of this name, with the same weights at every call."""
    torch.manual_seed(0)
    made = MODELS[name]().eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, where mistakes could hide
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def vit() -> Any:
    torch.manual_seed(0)
    config = t.ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    return t.ViTModel(config).eval()


def rows(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask of rows of these lengths, padded on the right; int64 [rows, tokens] both."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (len(lengths), max(lengths)), generator=random)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def states(model: Any, ids: Tensor, mask: Tensor | None, **others: Any) -> Tensor:
    """The last states of a model's trunk, of an encoder-decoder those of its encoder: [rows, tokens, width]."""
    encoder: Any = model.get_encoder() if type(model).__name__ == "BartModel" else model
    config = getattr(encoder, "config", None)
    if getattr(config, "use_cache", False) and not getattr(config, "is_encoder_decoder", False):
        others["use_cache"] = False
    if mask is not None:
        others["attention_mask"] = mask
    with torch.no_grad():
        output = encoder(input_ids=ids, **others)
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def alone(model: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The states of each row, computed by itself without padding: [tokens, width] each."""
    ends = mask.sum(dim=1).tolist()
    return [states(model, ids[i : i + 1, :end], mask[i : i + 1, :end])[0] for i, end in enumerate(ends)]


def difference(found: Tensor, expected: list[Tensor]) -> float:
    """Largest difference of states on what is visible."""
    return max(
        float((row[: len(one)].float() - one.float()).abs().max()) for row, one in zip(found, expected, strict=True)
    )


def tolerance(model: nn.Module, ids: Tensor, mask: Tensor) -> float:
    """What putting rows into one batch changes by itself, with some room for other batches."""
    size = max(float(one.abs().max()) for one in alone(model, ids, mask))
    dtype = next(model.parameters()).dtype
    return max(3 * difference(states(model, ids, mask), alone(model, ids, mask)), 16 * torch.finfo(dtype).eps * size)
