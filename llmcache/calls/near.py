"""Methods of `LLMCache` that calibrate near reuse and explain its decisions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from sentence_transformers.base.model import BaseModel
from torch.nn import Module

from llmcache.calls.base import LAYER, CacheParts
from llmcache.concurrency.calls import call
from llmcache.document import Text
from llmcache.encoding.executor import Executor
from llmcache.encoding.explain import Explanation, explain
from llmcache.encoding.results import Source
from llmcache.errors import ConfigError
from llmcache.model.digests import canonical, sha
from llmcache.model.encoders import PairScores, SparseVectors
from llmcache.model.private_tokenizer import private_copy
from llmcache.near.calibration.calibrate import Calibration
from llmcache.near.calibration.drift import Drift, DriftKind
from llmcache.near.guard.fields import KINDS
from llmcache.near.neighbors.sides import side_of

_PROBES = ("where is my card", "it comes within a week")
"""Texts of pairs that show how a model separates the sides of a pair."""


class NearMethods(CacheParts):
    """Calibrate near reuse, and explain how a text would be answered."""

    @call
    def calibrate(
        self,
        sample: Iterable[Source] | None = None,
        *,
        budget: float,
        drift: DriftKind | Drift = "label",
        head: Any = None,
        truth: Iterable[Any] | None = None,
        limit: float | None = None,
        confidence: float | None = 0.95,
        guard: bool | Collection[str] = True,
        guard_pattern: str = "",
        seed: int = 0,
        of: Module | None = None,
        role: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> Calibration:
        """Choose the threshold of near matches so that the mean drift of all results stays within a budget.

        sample: documents that are not stored and that the head was not trained on; they are computed. None uses the
            stored entries, each matched against the others, with a head refitted to its own decisions. For a
            CrossEncoder pairs of texts; matches whose sides are exchanged are no hits, whatever the guard.
        budget: mean drift allowed; 0.005 allows one result in 200 to differ.
        confidence: probability with which the bound holds; None uses the measured drift (with "accuracy": plus one
            standard error).
        drift: "label", share of changed decisions of `head` (a scikit-learn classifier, or a callable from outputs to
            labels or logits); "accuracy", decisions that become wrong minus those that become right, by `truth`;
            "cosine", 1 - cosine; "beyond", 1 - cosine above `limit`; "kl", divergence of logits as a share of `limit`
            nats; or a function of computed and reused outputs, each [n, out], that returns [n] in [0, 1]. A function
            is not stored: pass it to `open` again.
        truth: true labels of the sample, whose documents may then also be stored.
        guard: refuse matches whose numbers, dates, identifiers, quotations or negations differ; or a collection of
            kinds to check (`llmcache.near.guard.rules.KINDS`).
        guard_pattern: a regular expression for further fields. It is applied to texts stored from now on; earlier
            entries do not pass the guard with it.
        seed: of the cross-fitting folds.
        of: a head as for `run_heads`; its outputs are calibrated instead of embeddings.
        role, prompt_name, prompt: of the documents to match, as for `run`. Near matches never come from entries with
            another role or prompt, and this calibration holds only for these.
        Returns the calibration, which is saved with the store and applies from now on. Its `threshold` is None if no
        threshold is safe. ConfigError for invalid settings, too few entries or documents, a SparseEncoder or
        MultiVectorEncoder, and a CrossEncoder whose tokens do not separate the sides of a pair.
        """
        self._check_open()
        if of is None:
            self._check_model()
        self._exact_audits.require()
        if self._store.read_only:
            raise ConfigError(
                "a calibration is saved with its store, and this store is read-only; open it with write access"
            )
        if isinstance(self.model, BaseModel):
            prompt = self._prompt(role, prompt_name, prompt)
        name, execution = (LAYER, self._execution) if of is None else self._heads({"": of}).only()
        _check_outputs(execution, drift)
        return self._calibrations.calibrate(
            name, execution, sample, truth, prompt, role, budget=budget, drift=drift, head=head, limit=limit,
            confidence=confidence, guarded=bool(guard), pattern=guard_pattern, seed=seed,
            kinds=KINDS if isinstance(guard, bool) else tuple(guard),
        )  # fmt: skip

    @property
    @call
    def calibration(self) -> Calibration | None:
        """Calibration of near reuse; None if there is none."""
        reuse = self._execution.reuse
        return reuse.calibration if reuse else None

    @property
    @call
    def vectors_id(self) -> str:
        """Digest of everything that determines the vectors of this cache, 64 hexadecimal digits.

        Caches above this one can use the digest in their keys.
        It differs between models, and between poolings, prompts or near-reuse settings of one model.
        """
        self._check_open()
        config, reuse = self.config, self._encoding.reuse if self._encoding else None
        calibrated = None if reuse is None else [reuse.calibration.to_json()]
        near = [config.reuse, config.tau, sorted(config.layer_tau.items()), config.dtype, calibrated]
        return sha(self._identity_now().digest, canonical(near)).hex()

    @property
    @call
    def near_is_off(self) -> str:
        """Reason why a calibrated cache gives no near matches at the moment; "" if it does, or is not calibrated."""
        reuse = self._execution.reuse
        return reuse.off or reuse.stands_aside if reuse else ""

    @call
    def explain(
        self, text: Text, *, role: str | None = None, prompt_name: str | None = None, prompt: str | None = None
    ) -> Explanation:
        """Explain how one text would be answered: tier, nearest neighbours and gates. The model is not run.

        text: for a CrossEncoder a pair of texts. ConfigError for a text where a pair is read, or the reverse.
        """
        self._check_open()
        self._check_model()
        pairs = isinstance(self.model, CrossEncoder)
        if pairs != (isinstance(text, tuple) and len(text) == 2):
            wanted = "a pair, (query, document)" if pairs else "one text"
            raise ConfigError(f"explain takes {wanted}, for a {type(self.model).__name__}, got {text!r:.60}; give that")
        document: Any = text
        return explain(self._execution, document, self._prompt(role, prompt_name, prompt), role, self._decoded)

    def _decoded(self, tokens: Sequence[NDArray[np.int32]]) -> list[str]:
        """Return the texts of some token ids."""
        rows = [ids.tolist() for ids in tokens]
        with private_copy(self.model if isinstance(self.model, BaseModel) else self.tokenizer) as copy:
            texts: list[str] = getattr(copy, "tokenizer", copy).batch_decode(rows, skip_special_tokens=True)
        return texts


def _check_outputs(execution: Executor, drift: DriftKind | Drift) -> None:
    """ConfigError unless near reuse can be calibrated for the outputs of this executor with this drift."""
    model = execution.model
    if model.matrices:
        without = "a tau, whose drift is not measured" if isinstance(model, SparseVectors) else "repeats alone"
        raise ConfigError(
            f"near reuse is calibrated for models with one vector per document, and a {type(model.module).__name__} "
            f"gives a matrix; leave the calibration out and reuse by {without}"
        )
    if execution.bank.facts.width == 1 and drift in ("cosine", "beyond", "kl"):
        raise ConfigError(
            f"drift={drift!r} compares the numbers of an output with each other, and this model gives one per document;"
            " use drift='label' with a head, or a function of computed and reused scores"
        )
    if isinstance(model, PairScores) and not _separated(model):
        raise ConfigError(
            "the tokens of this model do not tell the two texts of a pair apart, so a pair could be answered by "
            "another one whose texts are exchanged; reuse its pairs by repeats alone"
        )


def _separated(model: PairScores) -> bool:
    """Return whether the token ids of a pair say which tokens belong to the first text."""
    one, other = _PROBES
    rows = model.tokenise([(one, one), (one, other), (other, one)], None, None).ids
    same, right, turned = (sorted(row[~side_of(row)].tolist()) for row in rows)
    return same == right != turned
