"""Score near hits by a fixed formula over their evidence, and approximate a head by a linear map.

The score is a formula without fitted numbers. A gate that is fitted to the drift of the same documents that the bound
is computed on gives too low a bound: with few drifted documents it finds, among the many directions of the evidence,
one that is clean by luck in all of them, and cross-fitting does not remove that, since the luck is in every fold. A
formula has the same scale in every fold of a calibration and when it answers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ConfigError
from llmcache.near.neighbors.correction import DECIDED, EVIDENCE

_DISSIMILARITY = EVIDENCE.index("dissimilarity")
_GAP = len(EVIDENCE) + DECIDED.index("gap")
_TINY = 1e-12  # a gap of nothing has a score, far below all others

Floats = NDArray[np.float64]


def safety(evidence: NDArray[np.floating]) -> Floats:
    """Scores of near hits, higher is safer, float64 [n]; -inf where the evidence is not finite (no neighbour).

    evidence: [n, columns] of `correction.evidence`. The expected error of a result grows as the square root of
    1 - similarity. With the columns of a head the score is log(gap / sqrt(1 - similarity)): by how many such errors the
    two best classes are apart. Without them it is -log(1 - similarity).
    ConfigError: the evidence has other columns.
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
