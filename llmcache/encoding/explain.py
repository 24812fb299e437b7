"""Explain how one text would be answered, and which gate decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.encoding.call import EncodeCall
from llmcache.encoding.executor import Executor
from llmcache.indexes.bank import Bank
from llmcache.model.features import features
from llmcache.model.tokens import TokenRows
from llmcache.near.matcher import Decode, NearMatcher
from llmcache.near.neighbors.near_matches import ALONE, GATES, GUARDED, LOW, QUARANTINED, TAKEN

SHOWN = 5
"""Number of neighbours in an explanation."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour of the text. source: id or key of the entry. text: decoded tokens. similarity: of fingerprints."""

    source: str
    text: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Explanation of one text's answer.

    tier: "exact", "near" or "miss". why: the reason. neighbours: nearest first; for an exact hit the entry itself.
    consensus: of the neighbours' outputs; score, threshold: of the gate; each None if not evaluated. gates: name and
    result of each gate that was evaluated, in order; True lets the match pass.
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
        """Similarity of the nearest entry; None without neighbours."""
        return self.neighbours[0].similarity if self.neighbours else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "similarity": self.similarity}

    def __repr__(self) -> str:
        shown = [f"{one.similarity:.3f} {one.source!r} {one.text[:60]!r}" for one in self.neighbours[:3]]
        more = [f"and {len(self.neighbours) - 3} more neighbours"] if len(self.neighbours) > 3 else []
        return "\n    ".join([f"Explanation({self.tier}: {self.why})", *shown, *more])


def explain(execution: Executor, text: str, prompt: str | None, role: str | None, decode: Decode) -> Explanation:
    """Look up a text as a call would, without running the model or storing anything."""
    bank, config, reuse = execution.bank, execution.config, execution.reuse
    scope = execution.scope(EncodeCall([text], None, prompt, role))
    by_text, by_tokens, tokens = execution.keys_of(text, prompt, role)
    for why, row in (
        ("the same text is stored", int(bank.find_text(by_text)[0])),
        ("the same token ids are stored", int(execution.reader.lookup(by_tokens, tokens.ids)[0])),
    ):
        if row >= 0:
            return Explanation("exact", why, _named(bank, [row], [1.0], decode))
    raw = features(execution.embedding, tokens.ids, config.fingerprint)
    if reuse is not None:
        if reuse.scope == scope:
            explanation = _calibrated(bank, reuse, raw, tokens, text, decode)
            repeats = execution.near_tier.near_answers
            if explanation.tier == "near" and not repeats.allowed(by_tokens, np.ones(1, np.int64))[0]:
                why = "an earlier request of this opening got a near match; asked again, it is computed and stored"
                return replace(explanation, tier="miss", why=why, gates=(*explanation.gates, ("repeats", False)))
            return explanation
        why = "near reuse is calibrated for another role or prompt than this text's; see `llmcache calibrate`"
        return Explanation("miss", reuse.off or why, _nearest(bank, raw, scope, decode))
    neighbours = _nearest(bank, raw, scope, decode)
    if config.tau is None or config.reuse == "exact":
        return Explanation(
            "miss", "near reuse is neither calibrated nor given a tau; see `llmcache calibrate`", neighbours
        )
    near = bool(neighbours) and neighbours[0].similarity >= config.tau
    why = f"the nearest entry is {'at' if near else 'below'} tau {config.tau:g}" + (" or above" if near else "")
    return Explanation("near" if near else "miss", why, neighbours, None, None, config.tau, (("tau", near),))


def _nearest(bank: Bank, raw: NDArray[np.float32], scope: int, decode: Decode) -> tuple[Neighbour, ...]:
    """Return the nearest entries of a scope by fingerprint."""
    rows, similarity = (column[0] for column in bank.nearest(raw, SHOWN, scope=scope))
    return _named(bank, rows[rows >= 0].tolist(), similarity[rows >= 0].tolist(), decode)


def _calibrated(
    bank: Bank, reuse: NearMatcher, raw: NDArray[np.float32], tokens: TokenRows, text: str, decode: Decode
) -> Explanation:
    """Explain the decision of a calibrated matcher."""
    if reuse.refresh() is None:
        return Explanation("miss", reuse.off, gates=(("a neighbour", False),))
    near = reuse.look_up(raw, tokens.ids, [text])
    rows, similarity = (column[0, :SHOWN] for column in reuse.neighbours(raw, tokens.ids))
    gate, threshold, score = int(near.gate[0]), reuse.audits.threshold, float(near.score[0])
    decided = {ALONE: 1, LOW: 2, QUARANTINED: 3, GUARDED: 4, TAKEN: 5}[gate]
    names = ("a neighbour", "score", "quarantine", "guard")
    asked = [(name, decided > place) for place, name in enumerate(names, 1) if decided >= place]
    why = "the match passes every gate" if gate == TAKEN else GATES[gate]
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
    """Return rows as neighbours, with their ids and texts."""
    texts = decode([bank.tokens(row) for row in rows]) if len(rows) else []  # some tokenizers return a text for no rows
    return tuple(
        Neighbour(bank.source(row) or bank.key(row), text, near)
        for row, text, near in zip(rows, texts, similarity, strict=True)
    )
