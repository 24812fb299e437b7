"""Rules of a tokenizer: everything that decides the token ids of a text, without the state of its last call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcache.model.digests import canonical, sha

if TYPE_CHECKING:
    from llmcache.model.description.walk import Walk

_NO_RULES = frozenset(
    (
        "name_or_path", "init_kwargs", "init_inputs", "chat_template", "response_template", "chat_control_tokens",
        "deprecation_warnings", "verbose", "files_loaded", "backend", "_processor_class", "model_max_length",
        "_in_target_context_manager", "_tokenizer", "_vocab", "_merges", "vocab", "merges",
        "_should_update_post_processor", "clean_up_tokenization_spaces", "_chat_template",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "_special_tokens_map",
        "_extra_special_tokens", "local_files_only", "_compiled_jinja_template", "response_schema",
    )
)  # fmt: skip
"""Attributes of a tokenizer that are names, files or states of a call, or that its backend's rules contain."""
_NAMES = ("padding_side", "truncation_side", "model_input_names", "special_tokens_map")
_OF_MODELS = (
    "unk_token", "unk_id", "dropout", "fuse_unk", "byte_fallback", "ignore_merges", "continuing_subword_prefix",
    "end_of_word_suffix", "max_input_chars_per_word",
)  # fmt: skip
_MANY = 256
"""Added tokens above which only their number is checked before a call. A complete description has all of them."""


def is_tokenizer(value: Any) -> bool:
    """Return whether a value is a tokenizer of transformers, or has the same interface."""
    return hasattr(value, "get_vocab") and hasattr(value, "init_kwargs")


def backend_of(tokenizer: Any) -> Any:
    """Return the `tokenizers` object inside a fast tokenizer; the tokenizer itself if it has none."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer)


def rules_digest(tokenizer: Any, attributes: str = "") -> str:
    """Return the sha256 in hexadecimal of a tokenizer's rules. None is allowed.

    attributes: text of its Python attributes, see `attributes_text`.
    """
    backend = backend_of(tokenizer)
    rules: Any = None
    if hasattr(backend, "to_str"):
        # truncation and padding belong to the last call, and come before "added_tokens" in the JSON. Quotes inside a
        # text would be escaped, so the search is safe; parsing a large vocabulary takes longer than loading it
        text = backend.to_str()
        rules = text.partition(',"added_tokens":')[2] or text
    elif hasattr(tokenizer, "get_vocab"):
        flags = getattr(tokenizer, "init_kwargs", {})
        flags = {k: v for k, v in flags.items() if isinstance(v, bool) and "local" not in k}
        rules = [type(tokenizer).__qualname__, tokenizer.get_vocab(), flags]
    names = [getattr(tokenizer, name, None) for name in _NAMES]
    return sha(canonical([rules, names, attributes])).hex()


def attributes_text(walk: Walk, tokenizer: Any, path: str) -> str:
    """Return the text of the class and of the attributes that take part in tokenising; the walk watches them all."""
    if tokenizer is None:
        return ""
    attributes = dict(getattr(tokenizer, "__dict__", {}))
    if attributes:
        walk.watch(path, tokenizer.__dict__, "tokenizer")
    backend = backend_of(tokenizer)
    if hasattr(backend, "to_str"):
        walk.probe(path, lambda: backend_state(tokenizer))
    parts = [walk.class_text(type(tokenizer))]
    for name, value in sorted(attributes.items()):
        if name not in _NO_RULES and not name.endswith("_file"):
            parts.append(f"{name}={walk.text_of(value, f'{path}.{name}')}")
    return ", ".join(parts)


def rules_only(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a tokenizer that are rules, and its limit of tokens."""
    without = _NO_RULES - {"model_max_length"}
    return {k: v for k, v in attributes.items() if k not in without and not k.endswith("_file")}


def backend_state(tokenizer: Any) -> list[Any]:
    """Return facts of a fast tokenizer that are cheap to read: pipeline steps, added tokens, vocabulary size."""
    backend = backend_of(tokenizer)
    steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    size = backend.get_vocab_size(with_added_tokens=True)
    added = size - backend.get_vocab_size(with_added_tokens=False)
    tokens = repr(backend.get_added_tokens_decoder()) if added < _MANY else ""
    model = backend.model
    settings = [getattr(model, name, None) for name in _OF_MODELS]
    return [*(None if step is None else _state(step) for step in steps), size, tokens, type(model), settings]


def _state(step: Any) -> Any:
    try:
        return step.__getstate__()
    except Exception:  # a step written in Python has no readable state
        return repr(step)


def length_limit(tokenizer: Any) -> int | None:
    """Return the number of tokens after which texts are cut; None for no limit (also for 10^30 and infinity)."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit and limit < 1 << 53 else None
