"""Configurations of transformers models as dicts, without the settings that do not decide what a model computes."""

from __future__ import annotations

import re
from typing import Any

VOLATILE_ADAPTER_SETTINGS = re.compile(
    r"base_model_name_or_path|revision|inference_mode|auto_mapping|peft_version|task_type|.*dropout|init_.*|"
    r"runtime_config|loftq_config|eva_config|corda_config|lora_ga_config|layer_replication|megatron_.*"
)
"""Settings of an adapter (PEFT) that say where it came from, or that only training uses."""
_VOLATILE_SETTINGS = re.compile(
    r"_name_or_path|_commit_hash|transformers_version|dtype|torch_dtype|architectures|auto_map|id2label|"
    r"label2id|problem_type|return_dict|output_attentions|output_hidden_states|output_router_logits|use_cache|"
    r"gradient_checkpointing|.*dropout.*|.*_pdrop|.*layerdrop|initializer_.*|use_return_dict"
)
"""Settings of a model that say where it came from, that only training uses, or that each call decides itself."""


def is_configuration(value: Any) -> bool:
    """Return whether a value is a configuration of transformers, or has the same interface."""
    return hasattr(value, "to_diff_dict") and hasattr(value, "__dict__") and not isinstance(value, type)


def settings_of(config: Any, without: re.Pattern[str] = _VOLATILE_SETTINGS) -> Any:
    """Return a configuration as a dict, without the settings whose names match `without`.

    Nested configurations and lists of configurations become dicts likewise.
    """
    # only settings that differ from the defaults: a library upgrade that adds a default must not invalidate every store
    config = config.to_diff_dict() if hasattr(config, "to_diff_dict") else config
    if isinstance(config, (list, tuple)):
        return [settings_of(item, without) for item in config]
    if not isinstance(config, dict):
        return config
    return {str(k): settings_of(v, without) for k, v in config.items() if not without.fullmatch(str(k))}
