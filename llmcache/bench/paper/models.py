"""The paper's models: seeded weights of their shapes, and all-MiniLM-L6-v2 with its real ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from llmcache.bench.near import fitted_head
from llmcache.demo import demo_model
from llmcache.errors import ConfigError
from llmcache.near.neighbors.linear_head import LinearHead

REAL = "MiniLM"
LENGTH = 192
"""Tokens after which a document is cut. None of the workloads is that long."""
CLASSES = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to be made from a seed. options: of its configuration; the defaults are those of the name."""

    name: str
    config: str
    model: str
    tokenizer: str
    folder: str
    pooling: str = "mean"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decodes(self) -> bool:
        return self.pooling == "lasttoken"

    def smaller(self, **options: Any) -> Shape:
        """The same with other options."""
        return replace(self, options=options)


SHAPES = {
    one.name: one
    for one in (
        Shape("BERT-base", "BertConfig", "BertModel", "BertTokenizer", "tok-bert-base-uncased"),
        Shape("DistilBERT", "DistilBertConfig", "DistilBertModel", "BertTokenizer", "tok-bert-base-uncased"),
        Shape("GPT-2-small", "GPT2Config", "GPT2LMHeadModel", "GPT2Tokenizer", "tok-gpt2", "lasttoken"),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """model: gives one vector per document. decoder: for "lasttoken", the same weights as they write texts."""

    name: str
    weights: str
    model: SentenceTransformer
    decoder: Any = None

    @property
    def layers(self) -> int:
        config = self.model.transformers_model.config  # type: ignore[union-attr]
        return int(config.num_hidden_layers)

    @property
    def banked(self) -> tuple[int, ...]:
        """Layers that get a bank: four of twelve, three of six, the last among them."""
        step = max(1, -(-self.layers // 4))
        return tuple(sorted(range(self.layers - 1, -1, -step)))


def made(name: str, models: Path, folder: Path) -> Made:
    """One of the shapes, or the real model; files go below `folder`."""
    return Made(REAL, "real", demo_model()) if name == REAL else seeded(SHAPES[name], models, folder)


def seeded(shape: Shape, models: Path, folder: Path) -> Made:
    """The shape with weights from seed 0, for speed and for agreement with itself; never for a claim about accuracy."""
    import transformers

    hf: Any = transformers
    where = models / shape.folder
    if not where.is_dir():
        raise ConfigError(f"{models} has no {shape.folder}; --models names the folder that holds the tokenizers")
    tokenizer = getattr(hf, shape.tokenizer).from_pretrained(where)
    torch.manual_seed(0)
    own = getattr(hf, shape.model)(getattr(hf, shape.config)(**shape.options)).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        own.config.pad_token_id = tokenizer.pad_token_id
    path = folder / shape.name
    own.save_pretrained(path)
    tokenizer.save_pretrained(path)
    first = Transformer(str(path))
    first.max_seq_length = LENGTH
    last = Pooling(first.get_embedding_dimension(), pooling_mode=shape.pooling)
    model = SentenceTransformer(modules=[first, last], device="cpu")
    return Made(shape.name, "seeded", model, own if shape.decodes else None)


def classifier(outputs: NDArray[np.float32], labels: Sequence[str]) -> Any:
    """A logistic head, fitted to the labels of these outputs."""
    with warnings.catch_warnings():  # few documents of many classes: said by the sizes in every row
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        return fitted_head(outputs, np.array(labels))


def decisions(made: Made, outputs: NDArray[np.float32]) -> LinearHead:
    """What decides on the model's outputs: a seeded linear classifier of eight classes over standardised outputs.

    outputs: float32 [n, out], of known documents. Without labels for it, it can only agree or disagree with itself.
    """
    mean, scale = outputs.mean(axis=0), outputs.std(axis=0) + 1e-9
    matrix = np.random.default_rng(0).standard_normal((CLASSES, outputs.shape[1])) / scale
    return LinearHead(matrix.astype(np.float32), (-(matrix @ mean)).astype(np.float32))


def agreement(head: LinearHead, computed: NDArray[np.float32], given: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which outputs are decided alike, bool [n]."""
    return np.asarray(head(computed).argmax(axis=1) == head(given).argmax(axis=1))
