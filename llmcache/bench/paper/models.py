"""Models of the experiments: seeded weights of the paper's shapes, and all-MiniLM-L6-v2 with real weights."""

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
"""Maximum length in tokens. No document of the workloads is longer."""
CLASSES = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a seeded model. options: of its configuration; the defaults are those of the named model."""

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
        """Return the same shape with other options."""
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
    """A loaded model. model: one vector per document. decoder: for "lasttoken", the same weights with their head."""

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
        """Layers with a bank: four of twelve, three of six, the last among them."""
        step = max(1, -(-self.layers // 4))
        return tuple(sorted(range(self.layers - 1, -1, -step)))


def made(name: str, models: Path, folder: Path) -> Made:
    """Create one of the shapes, or load the real model; files go below `folder`."""
    return Made(REAL, "real", demo_model()) if name == REAL else seeded(SHAPES[name], models, folder)


def seeded(shape: Shape, models: Path, folder: Path) -> Made:
    """Create a model of this shape with weights from seed 0, for speed and self-agreement, never for accuracy.

    ConfigError when its tokenizer is missing.
    """
    import transformers

    hf: Any = transformers
    where = models / shape.folder
    if not where.is_dir():
        raise ConfigError(f"{models} has no {shape.folder}; --models names the folder of the tokenizers")
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
    """Fit a logistic head to the labels of outputs."""
    with warnings.catch_warnings():  # few documents of many classes; the sizes are in every row
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        return fitted_head(outputs, np.array(labels))


def decisions(made: Made, outputs: NDArray[np.float32]) -> LinearHead:
    """Create a seeded linear classifier of eight classes over standardised outputs.

    outputs: float32 [n, out], of known documents. There are no labels, so only agreement with itself is measured.
    """
    mean, scale = outputs.mean(axis=0), outputs.std(axis=0) + 1e-9
    matrix = np.random.default_rng(0).standard_normal((CLASSES, outputs.shape[1])) / scale
    return LinearHead(matrix.astype(np.float32), (-(matrix @ mean)).astype(np.float32))


def agreement(head: LinearHead, computed: NDArray[np.float32], given: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Compare the decisions on two sets of outputs; bool [n], True where equal."""
    return np.asarray(head(computed).argmax(axis=1) == head(given).argmax(axis=1))
