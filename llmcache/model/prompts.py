"""Choose the prompt of a text by the rules of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping

from llmcache.errors import ConfigError

ROLES: Mapping[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Prompt names for each role of a text. The first name that the model has is used."""


def resolve(
    prompts: Mapping[str, str | None],
    default_name: str | None,
    *,
    role: str | None = None,
    name: str | None = None,
    prompt: str | None = None,
) -> str | None:
    """Return the prompt for a text; None where there is none.

    prompts, default_name: of the model. role: "query", "document", or None for `encode`. name, prompt: arguments of the
    caller. A prompt has precedence over a name, a name over the role's prompt or the model's default.
    ConfigError for an unknown role, or a name that the model does not have.
    """
    if role is not None and role not in ROLES:
        raise ConfigError(f"role is {' or '.join(ROLES)}, or left out; got {role!r}")
    if prompt is not None:
        return prompt
    if name is None and role is not None:
        name = next((candidate for candidate in ROLES[role] if candidate in prompts), None)
    if name is None:
        return prompts.get(default_name) if default_name is not None else None
    if name not in prompts:
        raise ConfigError(f"the model has no prompt {name!r}; it has {', '.join(sorted(prompts)) or 'none'}")
    return prompts[name]
