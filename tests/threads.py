"""Threads, event loops and generators that share caches, a model and its tokenizer, compared with the uncached model.

    python -m tests.threads --seconds 20

Every kind of sharing in `KINDS` runs for so many seconds. Printed are calls, results, and how many of them were wrong
or ended in an error, in the run and read back from its stores afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from llmcache import CacheConfig, LLMCache, Pipeline

THREADS = 8
_WORDS = 300
_CLOSE = 2e-5  # batches of other lengths round differently by less


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A fast tokenizer of `w0` to `w299`, with special tokens."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(_WORDS))]
    plain = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast: Any = transformers.PreTrainedTokenizerFast
    made: transformers.PreTrainedTokenizerFast = fast(tokenizer_object=plain, model_max_length=48, **marks)
    return made


def tiny_sentences(folder: Path, seed: int = 0) -> SentenceTransformer:
    """A SentenceTransformer of two small layers with seeded weights and mean pooling, loaded from files in a folder."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=_WORDS + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    trunk: Any = transformers.BertModel(config)
    trunk.eval().save_pretrained(folder / "trunk")
    tiny_tokenizer().save_pretrained(folder / "trunk")
    SentenceTransformer(modules=[Transformer(str(folder / "trunk")), Pooling(32)], device="cpu").save(
        str(folder / "st")
    )
    return SentenceTransformer(str(folder / "st"), device="cpu")


def texts_of(count: int, seed: int = 0) -> list[str]:
    """Different texts of 1 to 40 words, some of them longer than the model reads."""
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(_WORDS)}" for _ in range(draw.randint(1, 60))) + f" w{i}" for i in range(count)]


@dataclass(slots=True)
class Counted:
    """calls, results and those that were wrong; errors: messages of what was raised. Counted by any thread."""

    calls: int = 0
    results: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    _guard: Any = field(default_factory=threading.Lock, repr=False)

    def call(self, given: Any, expected: NDArray[np.float32]) -> None:
        """Count a call and compare its vectors, [n, width]."""
        far = np.abs(np.asarray(given, np.float32) - expected).max(axis=-1, initial=0)
        with self._guard:
            self.calls += 1
            self.results += len(expected)
            self.wrong += int((~(far <= _CLOSE)).sum())

    def error(self, error: BaseException) -> None:
        with self._guard:
            self.errors.append(f"{type(error).__name__}: {error}")


class Shared:
    """What the threads of one run share. more: whether to go on, asked before every call."""

    def __init__(
        self, model: SentenceTransformer, folder: Path, texts: list[str], more: Callable[[Counted], bool]
    ) -> None:
        self.model, self.folder, self.texts = model, folder, texts
        self.expected: NDArray[np.float32] = model.encode(texts)
        self.counted = Counted()
        self._more = more
        self._tokenizing = threading.Lock()

    def more(self) -> bool:
        return not self.counted.errors and self._more(self.counted)

    def together(self, *works: Callable[[random.Random], None]) -> None:
        """Run each work in a thread of its own until all have ended; an error of one ends all."""

        def run(number: int, work: Callable[[random.Random], None]) -> None:
            try:
                work(random.Random(number))
            except BaseException as error:
                self.counted.error(error)

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def drawn(self, draw: random.Random) -> list[int]:
        return [draw.randrange(len(self.texts)) for _ in range(draw.choice((1, 2, 9, 30)))]

    def ask(self, cache: LLMCache, draw: random.Random) -> None:
        """One call of a drawn kind, compared."""
        places = self.drawn(draw)
        some, expected = [self.texts[i] for i in places], self.expected[places]
        kind = draw.randrange(5)
        if kind == 0:
            self.counted.call([result.output for result in cache.run(some, chunk=draw.choice((2, 100)))], expected)
        elif kind == 1:
            self.counted.call(cache.encode_query(some, batch_size=draw.choice((1, 4, 32))), expected)
        elif kind == 2:
            self.counted.call(cache.encode(some, convert_to_tensor=True), expected)
        elif kind == 3:
            self.counted.call([cache.encode(text) for text in some[:3]], expected[:3])
        else:
            self.counted.call(cache.encode(some, batch_size=draw.choice((1, 4, 32))), expected)

    def disturb(self, draw: random.Random) -> None:
        """Use the model's own tokenizer in a way that changes its padding and truncation, as no other caller does."""
        text = self.texts[draw.randrange(len(self.texts))]
        kind = draw.randrange(4)
        with self._tokenizing:  # it is not for several threads: the callers have to see to that among themselves
            if kind == 0:
                self.model.tokenizer(text, padding="max_length", max_length=draw.choice((3, 40)), truncation=True)
            elif kind == 1:
                self.model.tokenizer(text)
            elif kind == 2:
                self.model.tokenizer([text, "w1"], padding=True, return_tensors="pt")
            else:
                self.model.preprocess([text, "w1"])


def one_cache(shared: Shared) -> None:
    """Eight threads ask one cache, and one more uses the model's tokenizer."""
    with LLMCache.open(shared.folder / "store", shared.model) as cache:

        def ask(draw: random.Random) -> None:
            while shared.more():
                shared.ask(cache, draw)

        def disturb(draw: random.Random) -> None:
            while shared.more():
                shared.disturb(draw)

        shared.together(*[ask] * THREADS, disturb)


def cache_per_thread(shared: Shared) -> None:
    """Every thread opens a store of its own with the same model object; half of them keep all layers."""

    def ask(draw: random.Random) -> None:
        number = threading.get_ident()
        config = CacheConfig(layers=draw.choice(("output", "all")))
        with LLMCache.open(shared.folder / f"store-{number}", shared.model, config=config) as cache:
            while shared.more():
                shared.ask(cache, draw)

    shared.together(*[ask] * THREADS)


def event_loop(shared: Shared) -> None:
    """Coroutines that hand calls to threads, by asyncio.to_thread and an executor of their own."""
    with LLMCache.open(shared.folder / "store", shared.model) as cache, ThreadPoolExecutor(4) as pool:

        async def ask(number: int) -> None:
            draw, loop = random.Random(number), asyncio.get_running_loop()
            while shared.more():
                if number % 2:
                    await asyncio.to_thread(shared.ask, cache, draw)
                else:
                    await loop.run_in_executor(pool, shared.ask, cache, draw)

        async def all_of_them() -> None:
            await asyncio.gather(*map(ask, range(THREADS)))

        asyncio.run(all_of_them())


def generators(shared: Shared) -> None:
    """Documents from generators that use the tokenizer and the cache: pipelines and `run`, in four threads."""
    with LLMCache.open(shared.folder / "store", shared.model) as cache:

        def documents(places: list[int], draw: random.Random) -> Iterator[dict[str, str]]:
            for i in places:
                shared.disturb(draw)
                if draw.random() < 0.05:
                    shared.ask(cache, draw)
                yield {"id": str(i), "text": shared.texts[i]}

        def by_pipeline(draw: random.Random) -> None:
            while shared.more():
                places = [draw.randrange(len(shared.texts)) for _ in range(60)]
                pipeline = Pipeline(cache, batch_size=1, prefetch=draw.choice((0, 1, 2)))
                for result in pipeline.run(documents(places, random.Random(draw.random()))):
                    shared.counted.call([result.output], shared.expected[[int(result.id)]])

        def by_run(draw: random.Random) -> None:
            while shared.more():
                places = [draw.randrange(len(shared.texts)) for _ in range(60)]
                for result in cache.run(documents(places, draw), chunk=draw.choice((1, 7, 100))):
                    shared.counted.call([result.output], shared.expected[[int(result.id)]])

        shared.together(by_pipeline, by_run, by_pipeline, by_run)


def attached(shared: Shared) -> None:
    """Threads that run the model itself, attached by them or by others at the moment, beside calls of the cache."""
    folder = shared.folder / "store"
    inputs = [shared.model.preprocess([text]) for text in shared.texts]
    with LLMCache.open(folder, shared.model, config=CacheConfig(layers="all")) as cache:

        def forward(draw: random.Random) -> None:
            while shared.more():
                i = draw.randrange(len(inputs))
                with torch.inference_mode():
                    if draw.random() < 0.5:
                        with cache.attached():
                            output = shared.model(dict(inputs[i]))
                    else:
                        output = shared.model(dict(inputs[i]))
                shared.counted.call(output["sentence_embedding"], shared.expected[[i]])

        def ask(draw: random.Random) -> None:
            while shared.more():
                shared.ask(cache, draw)

        shared.together(*[forward] * 5, ask, ask)


KINDS: Mapping[str, Callable[[Shared], None]] = {
    "one cache": one_cache,
    "a cache per thread": cache_per_thread,
    "an event loop": event_loop,
    "generators": generators,
    "attached": attached,
}


def stored_wrong(shared: Shared) -> int:
    """How many vectors of the stores of a run differ from the model's, read by new openings."""
    wrong = 0
    for folder in shared.folder.glob("store*"):
        with LLMCache.open(folder, shared.model) as cache:
            vectors = cache.encode(shared.texts)
            wrong += int((~(np.abs(vectors - shared.expected).max(axis=1) <= _CLOSE)).sum())
    return wrong


def run(kind: str, folder: Path, more: Callable[[Counted], bool], texts: int = 400) -> tuple[Counted, int]:
    """One kind of sharing; what it counted, and how many stored vectors are wrong afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = Shared(tiny_sentences(folder / "model"), folder, texts_of(texts), more)
    KINDS[kind](shared)
    return shared.counted, stored_wrong(shared)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.threads", description="Caches and models shared by threads.")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--kind", choices=list(KINDS), default=None)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    failed = 0
    for kind in [options.kind] if options.kind else KINDS:
        folder = Path(tempfile.mkdtemp(prefix="threads-"))
        try:
            end = time.monotonic() + options.seconds
            counted, stored = run(kind, folder, lambda _, end=end: time.monotonic() < end)  # type: ignore[misc]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        failed += counted.wrong + stored + len(counted.errors)
        sys.stdout.write(
            f"{kind:>20}: {counted.calls:>8,} calls, {counted.results:>9,} results, {counted.wrong} wrong, "
            f"{stored} wrong in the stores, {len(counted.errors)} errors {counted.errors[:1] or ''}\n"
        )
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
