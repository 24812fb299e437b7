"""Settings of `model.generate` that decide an answer, as a text that is part of the keys of stored answers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

_NO_MATTER = {
    "transformers_version", "max_new_tokens", "max_length", "return_dict_in_generate", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "use_cache", "_from_model_config",
}  # fmt: skip
"""Settings that decide nothing of the token ids, or are compared by themselves."""
_WHILE_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
"""Settings that act on sampling only."""
_GREEDY = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "cache_implementation", "cache_config",
    "compile_config", "disable_compile", "num_beams", "do_sample", "num_return_sequences",
}  # fmt: skip
"""Settings with which a greedy answer consists of the tokens with the highest logits."""
_OF_EACH_ROW = {
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "early_stopping", "min_new_tokens", "renormalize_logits", "remove_invalid_values",
} | _GREEDY  # fmt: skip
"""Settings that do not read the prompt, whose padding depends on the other prompts of a batch."""

_NEUTRAL = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "guidance_scale": 1,
    "encoder_no_repeat_ngram_size": 0, "diversity_penalty": 0, "num_beam_groups": 1, "min_length": 0,
}  # fmt: skip
"""Values that change nothing, which many models write into their generation configuration."""
PADDING = "the padding of a batch"
"""Part of the reasons that name the padding."""


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """Settings of a call of `model.generate` whose answers can be stored.

    name: text that differs wherever the answers may differ, but for the limit if `grows`. most: largest number of new
    tokens. greedy: True if each token of an answer is the one with the largest logit. grows: True if the answer within
    a lower limit is the beginning of the answer within a higher one, and the prompt can be extended by it.
    ends: ids of the tokens that end an answer.
    """

    name: str
    most: int
    greedy: bool
    grows: bool
    ends: frozenset[int]


def answer_settings(model: Any, arguments: Mapping[str, Any]) -> AnswerSettings | str:
    """Return the settings of `model.generate(**arguments)`, or the reason why its answers cannot be stored.

    arguments: without the inputs.
    """
    if arguments.get("generation_config") is not None:
        return "generation_config is given; give its settings as arguments"
    config = copy.deepcopy(model.generation_config)
    try:
        unused = config.update(**arguments)
    except (TypeError, ValueError):
        return "its settings are not valid"  # the model says why
    if getattr(config, "do_sample", False):
        return "it samples"
    unknown = sorted(name for name, value in unused.items() if value is not None)
    if unknown:
        return f"the argument {unknown[0]!r} cannot be named in a key"
    most = getattr(config, "max_new_tokens", None)
    if most is None:
        return f"max_length counts {PADDING}; give max_new_tokens"
    settings = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER | _WHILE_SAMPLING}
    plain: Any = transformers.GenerationConfig
    usual = plain().to_dict()
    given = {name: value for name, value in settings.items() if value is not None and value != usual.get(name)}
    changed = {name for name, value in given.items() if value != _NEUTRAL.get(name, _NEUTRAL)}
    reading = sorted(changed - _OF_EACH_ROW)
    if reading:
        return f"the setting {reading[0]!r} may depend on {PADDING}, or on time"
    whole = bool(getattr(model.config, "is_encoder_decoder", False))
    beams, sequences = getattr(config, "num_beams", None) or 1, getattr(config, "num_return_sequences", None) or 1
    greedy = beams == sequences == 1 and changed <= _GREEDY
    grows = greedy and not whole
    parts = [transformers.__version__, json.dumps(settings, sort_keys=True, default=str)]
    if not grows:
        parts.append(f"max_new_tokens={most}")
    return AnswerSettings("\n".join(parts), int(most), greedy, grows, end_tokens(config))


def end_tokens(config: Any) -> frozenset[int]:
    """Return the ids of the tokens that end an answer, of a generation configuration."""
    ends = getattr(config, "eos_token_id", None)
    return frozenset([] if ends is None else map(int, ends if isinstance(ends, list | tuple) else [ends]))
