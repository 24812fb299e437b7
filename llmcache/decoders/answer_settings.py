"""Settings of `model.generate` that decide an answer, as a text that is part of the keys of stored answers."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from llmcache.model.description.checksums import in_memory_order
from llmcache.model.description.walk import Walk

_NO_MATTER = {
    "transformers_version", "max_new_tokens", "return_dict_in_generate", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "use_cache", "_from_model_config",
}  # fmt: skip
"""Settings that decide nothing of the token ids, or are compared by themselves."""
_WHILE_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
"""Settings that act on sampling only."""
_STEP_BY_STEP = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "decoder_start_token_id", "cache_implementation", "num_beams", "do_sample",
    "num_return_sequences", "cache_config", "compile_config", "disable_compile",
} | _WHILE_SAMPLING  # fmt: skip
"""Settings with which a greedy answer within a lower limit is the beginning of the answer within a higher one."""
_OBJECTS = ("logits_processor", "stopping_criteria")


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """Settings of a call of `model.generate` whose answers can be stored.

    name: text that differs wherever the answers may differ, but for the limit. most: largest number of new tokens; None
    if the limit is part of the name. sequences: answers of each prompt. grows: True if the answer within a lower limit
    is the beginning of the answer within a higher limit. ends: ids of the tokens that end an answer.
    """

    name: str
    most: int | None
    sequences: int
    grows: bool
    ends: frozenset[int]


def answer_settings(model: Any, arguments: Mapping[str, Any]) -> AnswerSettings | str:
    """Return the settings of `model.generate(**arguments)`, or the reason why its answers cannot be stored.

    arguments: without the inputs.
    """
    config = copy.deepcopy(arguments.get("generation_config") or model.generation_config)
    given = {name: value for name, value in arguments.items() if name != "generation_config"}
    try:
        unused = config.update(**given)
    except (TypeError, ValueError):
        return "its settings are not valid"  # the model says why
    if getattr(config, "do_sample", False):
        return "it samples"
    if getattr(config, "max_time", None) is not None:
        return "its answers depend on the time they take"
    objects = {name: unused.pop(name) for name in _OBJECTS if unused.get(name) is not None}
    unknown = sorted(name for name, value in unused.items() if value is not None)
    if unknown:
        return f"the argument {unknown[0]!r} cannot be named in a key"
    settings = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER | _WHILE_SAMPLING}
    try:
        parts = [
            json.dumps(settings, sort_keys=True),
            *(f"{name}={described(value)}" for name, value in objects.items()),
        ]
    except (TypeError, ValueError) as error:
        return f"its settings cannot be named in a key ({error})"
    usual = transformers.GenerationConfig().to_dict()
    changed = {name for name, value in settings.items() if value != usual.get(name)}
    beams, sequences = getattr(config, "num_beams", None) or 1, getattr(config, "num_return_sequences", None) or 1
    most = getattr(config, "max_new_tokens", None)
    whole = bool(getattr(model.config, "is_encoder_decoder", False))
    grows = most is not None and beams == sequences == 1 and not (objects or whole) and changed <= _STEP_BY_STEP
    if most is not None and not grows:
        parts.append(f"max_new_tokens={most}")
    ends = getattr(config, "eos_token_id", None)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    name = "\n".join([transformers.__version__, *parts])
    return AnswerSettings(name, most, sequences, grows, frozenset(map(int, ends)))


def described(value: Any) -> str:
    """Return a text of objects such as logits processors: classes, code, attributes and the data of tensors."""
    walk = Walk()
    parts = [walk.text_of(value, "value")]
    for path, tensor in sorted(walk.tensors.items()):
        data = in_memory_order(tensor.detach()).cpu().contiguous().view(-1)
        digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        parts.append(f"{path}: {tensor.dtype} {tuple(tensor.shape)} {digest}")
    return "\n".join(parts)
