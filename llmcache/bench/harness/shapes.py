"""Models of well-known shapes with seeded weights, and texts for them: for speed and exactness, not for accuracy.

Nothing is downloaded and no file is needed; the tokenizer is created here too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast

WORDS = 8000
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a model. family: "bert" or "llama". sizes: of its config. tokens: length of the documents to measure."""

    name: str
    family: str
    sizes: dict[str, int]
    tokens: int

    def config(self) -> Any:
        kind: Any = BertConfig if self.family == "bert" else LlamaConfig
        return kind(**self.sizes)


SHAPES = {
    one.name: one
    for one in (
        Shape("minilm", "bert", {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
                                 "intermediate_size": 1536}, 32),
        Shape("bert-base", "bert", {}, 128),
        Shape("llama-1b", "llama", {"vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 16,
                                    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
                                    "max_position_embeddings": 16_384}, 256),
    )
}  # fmt: skip
"""all-MiniLM-L6-v2, BERT-base, and Llama 3.2 1B."""


def tiny(shape: Shape) -> Shape:
    """Return a tiny shape of the same family, to test a measurement."""
    sizes = {"vocab_size": WORDS + 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 64, "max_position_embeddings": 1024}  # fmt: skip
    more = {"num_key_value_heads": 2} if shape.family == "llama" else {}
    return Shape(shape.name, shape.family, sizes | more, 12)


def trunk(shape: Shape, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Create a model of this shape with seeded weights, drawn on the device."""
    torch.manual_seed(0)
    with _made(device, dtype):
        kind: Any = BertModel if shape.family == "bert" else LlamaModel
        model: PreTrainedModel = kind(shape.config()).eval()
    return model


@contextmanager
def _made(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer of 8,000 words, one token per word."""
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = WhitespaceSplit()
    marks = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), _SPECIAL, strict=True))
    made: Any = PreTrainedTokenizerFast  # transformers has no types for it
    tokenizer: PreTrainedTokenizerFast = made(tokenizer_object=plain, **marks)
    return tokenizer


def sentences(shape: Shape, device: str, dtype: torch.dtype) -> SentenceTransformer:
    """Create a SentenceTransformer on such a trunk, with mean pooling."""
    model = trunk(shape, device, dtype)
    with tempfile.TemporaryDirectory(prefix="llmcache-shape-") as folder:
        # a Transformer module is loaded from files: load one layer, then put the model in its place
        small = Shape(shape.name, shape.family, {**tiny(shape).sizes, "num_hidden_layers": 1}, 1)
        trunk(small, "cpu", dtype).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        words = Transformer(folder, max_seq_length=shape.tokens + 2)
    words.model = model
    return SentenceTransformer(modules=[words, Pooling(model.config.hidden_size)], device=device)


def texts(count: int, tokens: int, seed: int) -> list[str]:
    """Draw `count` random documents of `tokens` words."""
    numbers = np.random.default_rng(seed).integers(0, WORDS, (count, tokens))
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]
