"""`llmcache explain`: how one text would be answered, and what decides."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def explain(
    store: options.StoreArgument,
    text: Annotated[str, typer.Argument(help="The text to ask about.")],
    namespace: options.Namespace = "default",
    role: options.Role = None,
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    json: options.Json = False,
) -> None:
    """Say how a text would be answered: the tier, the entry at hand, and the gate that decided. Nothing is computed."""
    from llmcache.cache import LLMCache

    printing.quiet()
    access = options.Access(secret_file, key_file, key_variable).keywords()
    with LLMCache.open(store, namespace=namespace, **access) as cache:
        found = cache.explain(text, role=role)
    if json:
        printing.as_json(found.as_dict())
        return
    if found.neighbours:
        printing.table(
            ["similarity", "entry", "text"],
            [[f"{one.similarity:.4f}", one.source, one.text[:80]] for one in found.neighbours],
        )
    printing.facts(
        [
            ("tier", found.tier),
            ("because", found.why),
            *((f"gate: {name}", "open" if passed else "closed") for name, passed in found.gates),
            *(
                (name, value)
                for name in ("consensus", "score", "threshold")
                if (value := getattr(found, name)) is not None
            ),
        ]
    )
