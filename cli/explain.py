"""`llmcache explain`: the tier and the entries that would answer one text, with the reasons."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing


def explain(
    store: options.StoreArgument,
    text: Annotated[str, typer.Argument(help="Text to look up.")],
    namespace: options.Namespace = "default",
    role: options.Role = None,
    secret_file: options.SecretFile = None,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    json: options.Json = False,
) -> None:
    """Show the tier that would answer a text, its nearest entries, and the gates passed. The model is not run."""
    from llmcache.cache import LLMCache

    printing.quiet()
    access = options.Access(secret_file, key_file, key_variable).keywords()
    with LLMCache.open(store, namespace=namespace, **access) as cache:
        explanation = cache.explain(text, role=role)
    if json:
        printing.as_json(explanation.as_dict())
        return
    if explanation.neighbours:
        printing.table(
            ["similarity", "entry", "text"],
            [[f"{entry.similarity:.4f}", entry.source, entry.text[:80]] for entry in explanation.neighbours],
        )
    printing.facts(
        [
            ("tier", explanation.tier),
            ("reason", explanation.why),
            *((f"gate: {name}", "open" if passed else "closed") for name, passed in explanation.gates),
            *(
                (name, value)
                for name in ("consensus", "score", "threshold")
                if (value := getattr(explanation, name)) is not None
            ),
        ]
    )
