"""A purge by text leaves no token ids of it, whatever a decoder has computed with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmcache import CacheConfig, LLMCache
from llmcache.errors import ConfigError
from llmcache.planning.purging import purge_documents
from tests import threads

hf: Any = transformers
SECRET = " ".join(f"w{200 + i}" for i in range(24))
OTHER = " ".join(f"w{i}" for i in range(24))
USES: dict[str, Callable[[LLMCache, str], Any]] = {
    "a prompt": lambda cache, text: cache.generate([text], max_new_tokens=4, do_sample=False),
    "a prompt in a template": lambda cache, text: cache.generate([f"w90 w91 {text} w92"], max_new_tokens=4),
    "a scored prompt": lambda cache, text: cache.score([text], [" w100", " w101 w102"]),
    "a choice": lambda cache, text: cache.score(["w90 w91 w92 w93"], [" " + text]),
    "one window": lambda cache, text: cache.perplexity([text], window=64),
    "windows": lambda cache, text: cache.perplexity([text], window=12, stride=4),
}


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"vocab_size": 304, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**ids, **sizes, max_position_embeddings=128)).eval()


def holding(folder: Path, text: str) -> list[str]:
    """Return the files with three token ids of a text in a row."""
    ids = np.array(threads.tiny_tokenizer()(text, add_special_tokens=False)["input_ids"], "<i4")
    parts = [ids[at : at + 3].tobytes() for at in range(1, len(ids) - 3)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if any(part in path.read_bytes() for part in parts)]


@pytest.mark.parametrize("layers", ["output", "all"])
@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("name", sorted(USES))
def test_no_token_ids_are_left(tmp_path: Path, name: str, layers: Any, answers: bool) -> None:
    causal, store, tokenizer = model(), tmp_path / "store", threads.tiny_tokenizer()
    config = CacheConfig(layers=layers, answers=answers, prefix_block=4)
    with LLMCache.open(store, causal, tokenizer=tokenizer, config=config) as cache:
        for text in (SECRET, OTHER):
            USES[name](cache, text)
    assert holding(store, SECRET)
    purge_documents(store, texts=[SECRET], reader=tokenizer)
    assert holding(store, SECRET) == []
    assert holding(store, OTHER)
    with LLMCache.open(store, causal, tokenizer=tokenizer) as cache:
        USES[name](cache, SECRET)


def test_a_model_is_no_reader_of_texts(tmp_path: Path) -> None:
    causal, store = model(), tmp_path / "store"
    with LLMCache.open(store, causal, tokenizer=threads.tiny_tokenizer()) as cache:
        cache.score([SECRET], [" w1"])
    with pytest.raises(ConfigError, match="give its tokenizer"):
        purge_documents(store, texts=[SECRET], reader=causal)
