"""Fine-tune all-MiniLM-L6-v2 to a CrossEncoder on question pairs, since no trained one is in a Python package.

    python -m tests.fine_tune_pairs QQP.jsonl.gz FOLDER [--pairs 20000]

QQP.jsonl.gz has one JSON array per line: label (1: the same question) and two questions. The 2,000 pairs after the ones
for training are held out; accuracy and average precision on them are printed. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder

from llmcache.demo import demo_model_path

HELD_OUT, BATCH, RATE = 2000, 32, 5e-5


def read(path: Path, most: int) -> tuple[list[tuple[str, str]], NDArray[np.float32]]:
    """Return the first pairs of questions, and their labels, float32 [n]."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        records = [json.loads(line) for line in islice(lines, most)]
    pairs = [(str(first), str(second)) for _, first, second in records]
    return pairs, np.array([label for label, *_ in records], np.float32)


def fine_tuned(pairs: list[tuple[str, str]], labels: NDArray[np.float32], seed: int = 0) -> CrossEncoder:
    """Return a CrossEncoder with one label, trained for one epoch in batches of pairs of similar length."""
    torch.manual_seed(seed)
    model: Any = CrossEncoder(str(demo_model_path()), num_labels=1, device="cpu", max_length=64)
    steps = len(pairs) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    warm_up: Any = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / steps)
    )
    random = np.random.default_rng(seed)
    blocks = np.array_split(random.permutation(len(pairs)), max(1, len(pairs) // (50 * BATCH)))
    model.train()
    began, step = time.perf_counter(), 0
    for block in blocks:
        ordered = sorted(block.tolist(), key=lambda i: sum(map(len, pairs[i])))
        batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
        for number in random.permutation(len(batches)).tolist():
            chosen = batches[number]
            logits = model(model.preprocess([pairs[i] for i in chosen]))["scores"].reshape(-1)
            loss: Any = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels[chosen]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            warm_up.step()
            step += 1
            if step % 50 == 0:
                say(f"step {step} of {steps}, loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s")
    model.eval()
    trained: CrossEncoder = model
    return trained


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=20_000)
    given = parser.parse_args()
    pairs, labels = read(given.data, given.pairs + HELD_OUT)
    train = len(pairs) - HELD_OUT
    model = fine_tuned(pairs[:train], labels[:train])
    scores = np.asarray(model.predict(pairs[train:], show_progress_bar=False))
    truth = labels[train:] > 0.5
    ranked = truth[np.argsort(-scores, kind="stable")]
    precision = float((np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked].mean())
    say(
        f"{HELD_OUT:,} held-out pairs: accuracy {float(((scores > 0.5) == truth).mean()):.3f}, "
        f"always the commoner label {max(truth.mean(), 1 - truth.mean()):.3f}, average precision {precision:.3f}"
    )
    model.save_pretrained(str(given.folder))


if __name__ == "__main__":
    main()
