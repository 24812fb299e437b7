"""How one text would be answered, and what decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.banks.lookup import exact_by_tokens
from llmcache.encoding.call import EncodeCall
from llmcache.encoding.executor import Executor
from llmcache.indexes.bank import Bank
from llmcache.model.features import features
from llmcache.model.tokens import TokenRows
from llmcache.near.matcher import (
    ALONE,
    GATES,
    GUARDED,
    LOW,
    QUARANTINED,
    TAKEN,
    Decode,
    NearMatcher,
)

SHOWN = 5
"""Neighbours that are named."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry near to the text. source: its id or key; text: its tokens as text; similarity: of the fingerprints."""

    source: str
    text: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """tier: "exact", "near" or "miss". why: what decided. neighbours: nearest first; of an exact hit the entry itself.
    consensus: of the neighbours' outputs; score and threshold: of the gate; None where they were not asked.
    gates: each that was asked, in order, and whether it let the match through.
    """

    tier: str
    why: str
    neighbours: tuple[Neighbour, ...] = ()
    consensus: float | None = None
    score: float | None = None
    threshold: float | None = None
    gates: tuple[tuple[str, bool], ...] = ()

    @property
    def similarity(self) -> float | None:
        """Of the nearest entry; None without one."""
        return self.neighbours[0].similarity if self.neighbours else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "similarity": self.similarity}


def explain(execution: Executor, text: str, prompt: str | None, role: str | None, decode: Decode) -> Explanation:
    """Look a text up as a call would, without computing or storing anything."""
    bank, config, reuse = execution.bank, execution.config, execution.reuse
    scope = execution.scope(EncodeCall([text], None, prompt, role))
    by_text, by_tokens, tokens = execution.keys_of(text, prompt, role)
    for why, row in (
        ("the same text is stored", int(bank.find_text(by_text)[0])),
        ("the same token ids are stored", int(exact_by_tokens(bank, by_tokens, tokens.ids)[0])),
    ):
        if row >= 0:
            return Explanation("exact", why, _named(bank, [row], [1.0], decode))
    raw = features(execution.embedding, tokens.ids, config.fingerprint)
    if reuse is not None:
        if reuse.scope == scope:
            found = _calibrated(bank, reuse, raw, tokens, text, decode)
            if (
                found.tier == "near"
                and not execution.near_tier.near_answers.allowed(by_tokens, np.ones(1, np.int64))[0]
            ):
                why = "it was answered near before in this opening: asked again it is computed and stored"
                return replace(found, tier="miss", why=why, gates=(*found.gates, ("repeats", False)))
            return found
        why = "near reuse is calibrated for another role or prompt than this text's; see `llmcache calibrate`"
        return Explanation("miss", reuse.off or why, _nearest(bank, raw, scope, decode))
    named = _nearest(bank, raw, scope, decode)
    if config.tau is None or config.reuse == "exact":
        return Explanation("miss", "near reuse is neither calibrated nor given a tau; see `llmcache calibrate`", named)
    near = bool(named) and named[0].similarity >= config.tau
    why = f"the nearest entry is {'at' if near else 'below'} tau {config.tau:g}" + (" or above" if near else "")
    return Explanation("near" if near else "miss", why, named, None, None, config.tau, (("tau", near),))


def _nearest(bank: Bank, raw: NDArray[np.float32], scope: int, decode: Decode) -> tuple[Neighbour, ...]:
    """The nearest entries of a scope by fingerprint."""
    rows, similarity = (one[0] for one in bank.nearest(raw, SHOWN, scope=scope))
    return _named(bank, rows[rows >= 0].tolist(), similarity[rows >= 0].tolist(), decode)


def _calibrated(
    bank: Bank, reuse: NearMatcher, raw: NDArray[np.float32], tokens: TokenRows, text: str, decode: Decode
) -> Explanation:
    if reuse.refresh() is None:
        return Explanation("miss", reuse.off, gates=(("a neighbour", False),))
    near = reuse.look_up(raw, tokens.ids, [text])
    rows, similarity = (one[0, :SHOWN] for one in reuse.neighbours(raw, tokens.ids))
    gate, threshold, score = int(near.gate[0]), reuse.audits.threshold, float(near.score[0])
    decided = {ALONE: 1, LOW: 2, QUARANTINED: 3, GUARDED: 4, TAKEN: 5}[gate]
    names = ("a neighbour", "score", "quarantine", "guard")
    asked = [(name, decided > place) for place, name in enumerate(names, 1) if decided >= place]
    why = "every gate lets it through" if gate == TAKEN else GATES[gate]
    if near.kinds[0] is not None:
        why = f"the guard: they differ in {near.kinds[0]}"
    return Explanation(
        tier="near" if gate == TAKEN and not reuse.off else "miss",
        why=reuse.off or why,
        neighbours=_named(bank, rows.tolist(), similarity.tolist(), decode),
        consensus=float(near.consensus[0]),
        score=score if np.isfinite(score) else None,
        threshold=threshold if np.isfinite(threshold) else None,
        gates=tuple(asked),
    )


def _named(bank: Bank, rows: Sequence[int], similarity: Sequence[float], decode: Decode) -> tuple[Neighbour, ...]:
    texts = decode([bank.tokens(row) for row in rows]) if len(rows) else []  # some tokenizers make one text of none
    return tuple(
        Neighbour(bank.source(row) or bank.key(row), text, near)
        for row, text, near in zip(rows, texts, similarity, strict=True)
    )
