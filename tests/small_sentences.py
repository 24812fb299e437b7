"""A SentenceTransformer of two seeded layers over characters, which takes milliseconds, and texts for it."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WIDTH = 32
PROMPTS = {"query": "query: ", "document": "passage: ", "topic": "topic of the text: ", "mood": "mood of the text: "}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_WORDS = {
    "who": ("my sister", "the clerk", "our neighbour", "a customer", "the manager", "their teacher"),
    "does": ("wants to see", "has lost", "is looking for", "asks about", "sends back", "writes about"),
    "what": ("the blue card", "an old letter", "the transfer", "a broken lamp", "the rate", "her account"),
    "where": ("in the shop", "at home", "near the station", "on the phone", "by the river", "in the office"),
}


def tiny_folder(folder: Path) -> str:
    """Write the files of a BERT of two layers with a tokenizer of single characters; always the same ones."""
    shown = [one for one in string.printable if one.strip()]
    pieces = [*_SPECIAL, *shown, *("##" + one for one in shown)]
    rules = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    rules.normalizer = normalizers.Lowercase()
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rules.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast: Any = transformers.PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=rules, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=160,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes: Any = {
        "vocab_size": len(pieces), "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 160,
    }  # fmt: skip
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def with_prompts(folder: str) -> SentenceTransformer:
    """One trunk for all roles, with `PROMPTS`."""
    modules = [Transformer(folder), Pooling(WIDTH, pooling_mode="mean")]
    return SentenceTransformer(modules=modules, prompts=dict(PROMPTS), device="cpu")


def with_router(folder: str) -> SentenceTransformer:
    """A trunk for queries and another for documents, which pools in another way."""
    ways = [[Transformer(folder), Pooling(WIDTH, pooling_mode=mode)] for mode in ("mean", "cls")]
    router = Router.for_query_document(query_modules=ways[0], document_modules=ways[1])
    return SentenceTransformer(modules=[router], device="cpu")


def sentences(n: int, seed: int = 0) -> list[str]:
    """Different plain texts without numbers, dates, names or negations."""
    random = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        found[" ".join(str(random.choice(part)) for part in _WORDS.values())] = None
    return list(found)
