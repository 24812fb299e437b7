"""Score of near hits: a fixed formula over their evidence.

The formula has no fitted parameters. A gate fitted to the drift of the same documents that the bound is computed on
would give too low a bound: with few drifted documents it finds, among the many directions of the evidence, one that
separates all of them by chance. Cross-fitting does not remove this bias, since every fold shares the documents. A
formula also has the same scale in every fold of a calibration and in live look-ups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.arrays import Floats
from llmcache.errors import ConfigError
from llmcache.near.neighbors.correction import DECIDED, EVIDENCE

_DISSIMILARITY = EVIDENCE.index("dissimilarity")
_GAP = len(EVIDENCE) + DECIDED.index("gap")
_TINY = 1e-12  # keeps the score of a gap of 0 finite, far below all others


def safety(evidence: Floats) -> NDArray[np.float64]:
    """Score near hits; higher is safer.

    The expected error of a result grows as the square root of 1 - similarity. With a head the score is
    log(gap / sqrt(1 - similarity)): the gap between the two best classes in units of the expected error. Without a head
    it is -log(1 - similarity).

    evidence: [n, columns], from `correction.evidence`.
    Returns float64 [n]; -inf where the evidence is not finite (no neighbour).
    ConfigError when the evidence has another number of columns.
    """
    if evidence.ndim != 2 or evidence.shape[1] not in {len(EVIDENCE), len(EVIDENCE) + len(DECIDED)}:
        raise ConfigError(
            f"evidence has {len(EVIDENCE)} columns, {len(DECIDED)} more with a head, got {evidence.shape}"
        )
    usable = np.isfinite(evidence).all(axis=1)
    columns = evidence[usable].astype(np.float64)
    scores = np.full(len(evidence), -np.inf)
    if evidence.shape[1] > _GAP:
        scores[usable] = np.log(np.maximum(columns[:, _GAP], _TINY)) - columns[:, _DISSIMILARITY] / 2
    else:
        scores[usable] = -columns[:, _DISSIMILARITY]
    return scores
