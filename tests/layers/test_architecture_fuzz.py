"""Random calls of all installed transformers architectures: results are the model's own, or the cache is bypassed."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from tests.architecture_fuzz import tried
from tests.tiny import architectures

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
ALWAYS = {
    "audio-wav2vec2", "audio-whisper", "decoder-big_bird", "decoder-gemma3_text", "decoder-llama", "decoder-mistral",
    "decoder-phi3", "decoder-rwkv", "encoder-big_bird", "encoder-canine", "encoder-decoder-led", "encoder-deberta-v2",
    "encoder-decoder-t5", "encoder-funnel", "encoder-longformer", "encoder-modernbert", "encoder-perceiver",
    "encoder-reformer", "encoder-squeezebert", "encoder-xlm", "vision-swin", "vision-vit",
}  # fmt: skip
EVERY = [(f"{kind}-{model_type}", kind, model_type, name) for kind, model_type, name in architectures()]


def nightly(name: str) -> bool:
    """Return whether a configuration runs only with LLMCACHE_FUZZ=all: five of six, always the same ones."""
    return name not in ALWAYS and zlib.crc32(name.encode()) % 6 != 0


CHOSEN = [
    one
    for one in EVERY
    if os.environ.get("LLMCACHE_NIGHTLY") or os.environ.get("LLMCACHE_FUZZ") == "all" or not nightly(one[0])
]


@pytest.mark.parametrize(("name", "kind", "model_type", "class_name"), CHOSEN, ids=[one[0] for one in CHOSEN])
def test_every_call_of_an_attached_model_is_the_models_own_or_goes_past_the_cache_with_a_reason(
    name: str, kind: str, model_type: str, class_name: str, store: Path
) -> None:
    outcome = tried(kind, model_type, class_name, store)
    if not outcome.built:
        pytest.skip(f"{name} cannot be built small: {outcome.reasons[0]}")
    assert not outcome.faults
    assert outcome.reused or outcome.reasons or outcome.calls


def test_a_hundred_configurations_are_drawn_and_fifty_of_them_always() -> None:
    assert len(EVERY) >= 100
    assert sum(not nightly(one[0]) for one in EVERY) >= 50
