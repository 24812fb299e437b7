"""Which prompt stands before a text, as sentence-transformers picks it."""

from __future__ import annotations

from collections.abc import Mapping

from llmcache.errors import ConfigError

ROLES: Mapping[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Roles a text can have, and the names under which a model may have a prompt for them; the first it has is used."""


def resolve(
    prompts: Mapping[str, str | None],
    default_name: str | None,
    *,
    role: str | None = None,
    name: str | None = None,
    prompt: str | None = None,
) -> str | None:
    """The prompt for a text; None where there is none.

    prompts, default_name: of the model. role: "query", "document", or None for `encode`. name, prompt: as the caller
    gave them; a prompt goes before a name, a name before what the role or the model suggests.
    """
    if role is not None and role not in ROLES:
        raise ConfigError(f"role is {' or '.join(ROLES)}, or left out; got {role!r}")
    if prompt is not None:
        return prompt
    if name is None and role is not None:
        name = next((one for one in ROLES[role] if one in prompts), None)
    if name is None:
        return prompts.get(default_name) if default_name is not None else None
    if name not in prompts:
        raise ConfigError(f"the model has no prompt {name!r}; it has {', '.join(sorted(prompts)) or 'none'}")
    return prompts[name]
