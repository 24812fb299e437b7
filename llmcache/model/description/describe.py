"""Description of a model: the ordered list of facts that decide what it computes, from one walk over the model.

The identity is derived from this list, and the check before every call compares the same list, so that both cover the
same facts. The attributes that are left out on purpose are listed below, with the reason.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as torch_module

from llmcache.errors import ConfigError
from llmcache.model.architecture import pooler_is_idle, trunk_of
from llmcache.model.description.code import (
    attributes_stored,
    is_library_function,
    is_library_module,
    names_used,
)
from llmcache.model.description.tokenizer_rules import attributes_text, length_limit, rules_digest
from llmcache.model.description.walk import Walk
from llmcache.model.forward_patch import is_stand_in, without_stand_ins

_OF_EVERY_MODULE = frozenset(vars(Module())) | {"_compiled_call_impl", "_output_capturing_hooks_installed"}
"""Attributes that every module has. Parameters, buffers, children and forward hooks have facts of their own."""

# -- attributes that decide no result -----------------------------------------------------------------------
# the training flag is no fact, since modules in training mode are not cached at all
# dropout and gradient checkpointing have no effect outside of training
_INERT = re.compile(r"(.*_)?dropout(_p|_prob|_rate)?|.*_pdrop|.*layerdrop|gradient_checkpointing|_is_hf_initialized|"
                    r"_gradient_checkpointing_func")  # fmt: skip
# where a model came from, and how it is loaded, saved, split over devices or trained; also defaults of `generate`,
# since only results of the trunk are stored
_OF_PRETRAINED = re.compile(
    r"name_or_path|warnings_issued|generation_config|.*_plan|all_tied_weights_keys|_tied_weights_keys|"
    r"_keep_in_fp32_modules.*|_no_split_modules|_skip_keys_device_placement|_keys_to_ignore_on.*|_weight_conversions|"
    r"kernel_config|_use_kernels|loss_type|_?loss_function|model_tags|_auto_class|hf_device_map|hf_quantizer|"
    r"quantization_method|is_loaded_in_.*|_hf_peft_config_loaded|_device_mesh|_tp_size|tp_size|vocab_size|num_labels|"
    r"_require_grads_hooks?|_adapter_.*_request|is_parallelizable|supports_gradient_checkpointing|_compile_config|_compiled_call|"
    r"_last_compile_config|_output_embedding|training_args|_requires_.*_hook|_prepared_.*|device_mesh"
)
# of a SentenceTransformer: prompts (described by name elsewhere), processing of finished vectors, model cards
_OF_SENTENCES = re.compile(
    r"encode.*|prompts|default_prompt_name|_?similarity.*|truncate_dim|trust_remote_code|.*model_card.*|_model_config|"
    r"_device_map|_modules_placed|_accelerate_placement_hook|is_hpu_graph_enabled|_target_device|module_kwargs|revision|"
    r"local_files_only|cache_folder|token|model_name_or_path|activation_fn"
)
# caches that the modules of a SentenceTransformer keep between calls
_MEMORIES = re.compile(r"_.*_cache|_prompt_length_mapping|_declared_forward_params|input_formatter")
# frequencies that some kinds of rotary positions recompute in their own forward, by the length of the input
_OWN_FREQUENCIES = re.compile(r"((?!.*original).*_)?inv_freq|(.*_)?max_seq_len_cached")


@dataclass(slots=True)
class Description:
    """Result of one walk over a model.

    facts: texts by path; "encoder.layer.0.=eps" is the attribute eps of encoder.layer.0, a path without "=" a tensor.
    tensors: by path. settings: further facts of the whole model, by name. rules: digest of the tokenizer's rules.
    trunk, prefix: the transformers model inside, and the prefix of the paths of its facts.
    configuration: settings of the trunk as a dict. attention: name of the attention implementation, with the digest of
    its code if it is no library's. walk: with everything that was read. modules: all modules, each once.
    """

    model: Module
    tokenizer: Any
    trunk: Module
    prefix: str
    facts: dict[str, str]
    tensors: dict[str, Tensor]
    settings: dict[str, str]
    configuration: Any
    rules: str
    attention: str
    walk: Walk
    modules: list[Module] = field(default_factory=list)


def describe(model: Module, tokenizer: Any = None) -> Description:
    """Describe a SentenceTransformer, a transformers model, or any other module, as it is in memory now.

    tokenizer: of a plain transformers model; a SentenceTransformer has its own.
    ConfigError when the weights are on the meta device or belong to another runtime than torch.
    """
    trunk, prefix = trunk_of(model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    walk = Walk()
    walk.tokenizer = tokenizer
    config: Any = getattr(trunk, "config", None)
    configuration = None if config is None else walk.settings(config, "config")
    attributes = attributes_text(walk, tokenizer, "tokenizer")
    facts: dict[str, str] = {}  # global hooks and functions come first: they affect all layers
    _global_hooks(walk, facts)
    _replaced_functions(walk, model, facts)
    facts |= facts_of_module(walk, model, "")
    tensors = dict(walk.tensors)
    if trunk is not model and pooler_is_idle(model, trunk):
        facts = {name: text for name, text in facts.items() if not name.startswith(f"{prefix}pooler.")}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{prefix}pooler.")}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ConfigError(f"{name} is on the meta device and has no bytes; load the model's weights first")
    attention = _attention(walk, config)
    modules = list(_all_modules(model))
    walk.probe("classes of the modules", lambda: [type(tokenizer), *map(type, modules)])
    settings = {f"config {name}": repr(value) for name, value in _flat(configuration)}
    settings["attention implementation"] = attention
    return Description(
        model, tokenizer, trunk, prefix, facts, tensors, settings | _settings(walk, model, tokenizer), configuration,
        rules_digest(tokenizer, attributes), attention, walk, modules,
    )  # fmt: skip


def facts_of_module(walk: Walk, module: Module, path: str) -> dict[str, str]:
    """Return the facts of a module and all modules inside it, in order of registration. Adds tensors to the walk."""
    facts: dict[str, str] = {}
    _add(walk, module, path, facts, [])
    return facts


def _add(walk: Walk, module: Module, path: str, facts: dict[str, str], above: list[int]) -> None:
    """Add the facts of a module and of all modules inside it. above: ids of the modules around it."""
    if id(module) in above or len(above) > 64:
        return
    prefix = f"{path}." if path else ""
    attributes = vars(module)
    own = not is_library_module(type(module).__module__)
    with walk.in_order(own):
        walk.watch(path, attributes, "module")
        for name in ("_parameters", "_buffers", "_modules"):
            if name in attributes:
                walk.watch(path, attributes[name])
    with walk.in_order(True):
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            if name in attributes:
                walk.watch(path, attributes[name], "hooks")
    hooks = _hooks(walk, attributes, prefix)
    if _does_nothing(module) and not hooks:
        return
    facts[f"{prefix}=class"] = walk.class_text(type(module))
    excluded = _excluded(module)
    stored = _stored_by_forward(type(module))
    with walk.in_order(own):
        for name, value in sorted(without_stand_ins(attributes).items()):
            if name in _OF_EVERY_MODULE or name in stored or value is None:
                continue
            if not any(each.fullmatch(name) for each in excluded):
                _note(walk, facts, f"{prefix}={name}", value, f"{prefix}{name}")
    facts |= hooks
    _extra_state(walk, module, prefix, facts)
    children = [name for name, child in module._modules.items() if child is not None]
    if children and (isinstance(module, torch.nn.Sequential) or _out_of_order(children)):
        facts[f"{prefix}=children"] = repr(children)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or any(each.fullmatch(name) for each in excluded if each is _OWN_FREQUENCIES):
            continue
        walk.tensors[f"{prefix}{name}"] = tensor
        facts[f"{prefix}{name}"] = ""
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            facts[f"{prefix}={name} is"] = type(tensor).__qualname__
            for key, value in sorted(vars(tensor).items()):
                if not key.startswith("_"):
                    _note(walk, facts, f"{prefix}={name}.{key}", value, f"{prefix}{name}.{key}")
    above.append(id(module))
    for name, child in module._modules.items():
        if child is not None:
            _add(walk, child, f"{prefix}{name}", facts, above)
    above.pop()


def _stored_by_forward(cls: type) -> frozenset[str]:
    """Return the attributes that a module's forward assigns to: they are results of a call, not settings.

    Also those that methods assign to which the forward calls.
    """
    stored: set[str] = set()
    waiting, seen = ["forward"], {"__init__"}
    for name in waiting:  # the list grows during the loop
        code = getattr(getattr(cls, name, None), "__code__", None)
        if name in seen or code is None:
            continue
        seen.add(name)
        if code not in _stored:
            _stored[code] = attributes_stored(code), frozenset(names_used(code))
        stored |= _stored[code][0]
        waiting += _stored[code][1]
    return frozenset(stored)


_stored: dict[Any, tuple[frozenset[str], frozenset[str]]] = {}


def _note(walk: Walk, facts: dict[str, str], name: str, value: Any, path: str) -> None:
    """Add the fact of one value, and those of the tensors inside it."""
    before = len(walk.tensors)
    facts[name] = walk.text_of(value, path)
    if len(walk.tensors) > before:
        facts |= dict.fromkeys(list(walk.tensors)[before:], "")


def _excluded(module: Module) -> list[re.Pattern[str]]:
    """Return patterns of attributes of this module that decide no result, or are described elsewhere."""
    library = is_library_module(type(module).__module__)
    patterns = [_INERT]
    if hasattr(type(module), "base_model_prefix"):
        patterns.append(_OF_PRETRAINED)
    if hasattr(type(module), "transformers_model"):
        patterns.append(_OF_SENTENCES)
        if "max_active_dims" not in getattr(module, "get_model_kwargs", list)():
            patterns.append(re.compile("max_active_dims"))  # only cuts finished vectors
    if library and hasattr(module, "get_config_dict"):
        patterns.append(_MEMORIES)
        settings = pooling_settings(module)
        if settings:
            patterns.append(re.compile("|".join(map(re.escape, settings))))
    if any(kind in repr(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope")):
        patterns.append(_OWN_FREQUENCIES)
    return patterns


def pooling_settings(module: Module) -> dict[str, Any]:
    """Return the settings of a SentenceTransformer's pooling module; {} for any other module."""
    read: Any = getattr(module, "get_config_dict", None)
    settings: dict[str, Any] = read() if callable(read) else {}
    return settings if "pooling_mode" in settings else {}


def _does_nothing(module: Module) -> bool:
    """Return whether a module returns its input unchanged outside of training (`trains` checks for training)."""
    plain = type(module).__module__ in ("torch.nn.modules.dropout", "torch.nn.modules.linear")
    inert = plain and ("Dropout" in type(module).__qualname__ or type(module) is torch.nn.Identity)
    return inert and "forward" not in vars(module) and not module._modules


def _hooks(walk: Walk, attributes: dict[str, Any], prefix: str) -> dict[str, str]:
    """Return the facts of forward hooks. attributes: dictionaries of hooks by name. prefix: of the facts' paths."""
    facts: dict[str, str] = {}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = attributes.get(name, {}).values()
        functions = [hook for hook in hooks if not is_stand_in(hook) and not _is_inert(hook)]
        for place, function in enumerate(functions):
            _note(walk, facts, f"{prefix}={name} {place}", function, f"{prefix}{name}.{place}")
    return facts


_INERT_HOOKS = (".make_inputs_require_grads", ".output_capturing_hook")


def _is_inert(hook: Any) -> bool:
    """Return whether a hook of transformers changes no result: hooks for gradients, or that collect hidden states."""
    named = str(getattr(hook, "__qualname__", "")).endswith(_INERT_HOOKS)
    return named and is_library_module(getattr(hook, "__module__", None))


def _global_hooks(walk: Walk, facts: dict[str, str]) -> None:
    """Add the facts of hooks that PyTorch runs for all modules."""
    by_name: dict[str, Any] = {
        "_forward_hooks": torch_module._global_forward_hooks,
        "_forward_pre_hooks": torch_module._global_forward_pre_hooks,
    }
    for hooks in by_name.values():
        walk.watch("hooks of all modules", hooks, "hooks")
    facts |= _hooks(walk, by_name, "hooks of all modules.")


def _replaced_functions(walk: Walk, model: Module, facts: dict[str, str]) -> None:
    """Add the facts of foreign functions in modules of installed libraries that the model's classes come from."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    names = {name for name in names if is_library_module(name) and name not in ("builtins", "typing")}
    for name in sorted(names | {"torch.nn.functional"}):
        entries = vars(sys.modules[name]) if name in sys.modules else {}
        walk.watch(name, entries)
        for entry, value in entries.items():
            if isinstance(value, FunctionType) and not is_library_function(value):
                _note(walk, facts, f"function {name}.{entry}", value, f"{name}.{entry}")


def _out_of_order(children: list[str]) -> bool:
    numbers = [name for name in children if name.isdigit()]
    return len(numbers) == len(children) and numbers != sorted(numbers, key=int)


def _extra_state(walk: Walk, module: Module, prefix: str, facts: dict[str, str]) -> None:
    """Add the facts of a module's extra state, such as packed and quantised weights."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        facts[f"{prefix}=code"] = walk.text_of(str(getattr(module, "code", "")), prefix)
        return
    if kind.get_extra_state is not Module.get_extra_state:
        _note(walk, facts, f"{prefix}=extra state", module.get_extra_state(), f"{prefix}extra_state")
    if kind._save_to_state_dict is not Module._save_to_state_dict:
        saved: dict[str, Any] = {}
        module._save_to_state_dict(saved, "", True)
        known = {**module._parameters, **module._buffers}
        for name, value in sorted(saved.items()):
            if name not in known and not name.endswith("_extra_state"):
                _note(walk, facts, f"{prefix}=saved {name}", value, f"{prefix}saved.{name}")


def _settings(walk: Walk, model: Module, tokenizer: Any) -> dict[str, str]:
    """Return settings of the whole pipeline that have a field of their own in the identity, for messages."""
    settings = {
        "max_seq_length": repr(getattr(model, "max_seq_length", None) or length_limit(tokenizer)),
        "default_prompt_name": repr(getattr(model, "default_prompt_name", None)),
    }
    prompts = getattr(model, "prompts", None)
    if isinstance(prompts, dict):
        walk.watch("prompts", prompts)
        settings |= {f"prompts {name}": repr(text) for name, text in prompts.items()}
    for module in model.modules():
        settings |= {f"pooling {name}": repr(value) for name, value in pooling_settings(module).items()}
    for name in ("padding_side", "truncation_side", "model_input_names"):
        settings[f"tokenizer {name}"] = repr(getattr(tokenizer, name, None))
    return settings


def _attention(walk: Walk, config: Any) -> str:
    """Return the name of the attention implementation, with the digest of its code if it is no library's."""
    name = str(getattr(config, "_attn_implementation", None) or "none")
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        return name
    functions: Any = ALL_ATTENTION_FUNCTIONS
    for table in (getattr(functions, "_local_mapping", None), getattr(type(functions), "_global_mapping", None)):
        if isinstance(table, dict):
            walk.watch("attention functions", table)
    function = functions.get(name) if name != "none" else None
    text = "" if function is None else walk.text_of(function, "attention")
    return f"{name}, {text}" if " with code " in text else name


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings in nested dicts, with dotted names."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


def _all_modules(model: Module) -> Iterator[Module]:
    """Yield the model and all modules inside it, each once."""
    seen: set[int] = set()
    waiting = [model]
    for module in waiting:  # the list grows during the loop
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting += [child for child in module._modules.values() if child is not None]


# -- training -----------------------------------------------------------------------------------------------

_trains: dict[type, bool] = {}


def trains(module: Module) -> bool:
    """Return whether a module is in training mode and gives other results for that."""
    if not module.training:
        return False
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    kind = type(module)
    if kind not in _trains:
        bases = [base for base in kind.__mro__ if base not in (Module, object)]
        codes = [getattr(value, "__code__", None) for base in bases for value in vars(base).values()]
        _trains[kind] = any("training" in names_used(code) for code in codes if code is not None)
    return _trains[kind]
