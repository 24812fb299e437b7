"""How one text would be answered, and what decides."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmcache.execution import Execution
from llmcache.fingerprint import features
from llmcache.matching import exact_by_tokens
from llmcache.reuse import GATES, TAKEN, Decode


@dataclass(frozen=True, slots=True)
class Explanation:
    """tier: "exact", "near" or "miss". why: what decided. source: of the entry at hand, its id or key; text: its tokens
    as text. similarity: of the fingerprints; consensus: of the neighbours' outputs; score and threshold: of the gate;
    None where they were not asked.
    """

    tier: str
    why: str
    source: str | None = None
    text: str | None = None
    similarity: float | None = None
    consensus: float | None = None
    score: float | None = None
    threshold: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(execution: Execution, text: str, prompt: str | None, role: str | None, decode: Decode) -> Explanation:
    """Look a text up as a call would, without computing or storing anything."""
    bank = execution.bank
    by_text, by_tokens, tokens = execution.keys_of(text, prompt, role)
    for why, row in (
        ("the same text is stored", int(bank.find_text(by_text)[0])),
        ("the same token ids are stored", int(exact_by_tokens(bank, by_tokens, tokens.ids)[0])),
    ):
        if row >= 0:
            return Explanation("exact", why, bank.source(row) or bank.key(row), decode([bank.tokens(row)])[0], 1.0)
    if execution.reuse is None:
        return Explanation("miss", "near reuse was not calibrated; see `llmcache calibrate`")
    raw = features(execution.embedding, tokens.ids, execution.config.fingerprint)
    near = execution.reuse.look_up(raw, tokens.ids)
    gate, row = int(near.gate[0]), int(near.rows[0])
    tier = "near" if gate == TAKEN and not execution.reuse.off else "miss"
    why = "the gate lets it through" if gate == TAKEN else GATES[gate]
    if near.kinds[0] is not None:
        why = f"the guard: they differ in {near.kinds[0]}"
    return Explanation(
        tier=tier,
        why=execution.reuse.off or why,
        source=bank.source(row) or bank.key(row),
        text=decode([bank.tokens(row)])[0],
        similarity=float(near.similarity[0]),
        consensus=float(near.consensus[0]),
        score=float(near.score[0]) if np.isfinite(near.score[0]) else None,
        threshold=float(threshold) if np.isfinite(threshold := execution.reuse.audits.threshold) else None,
    )
