"""Engines that compute a run: this process, or workers of a Ray cluster."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcache.errors import ConfigError, StoreFenced

if TYPE_CHECKING:
    from llmcache.cache import LLMCache

log = logging.getLogger("llmcache")

Engine = Annotated[str, typer.Option(help="Engine that computes: local, or ray (needs the extra 'ray').")]
Workers = Annotated[
    int | None, typer.Option(help="Most processes of --engine ray, default 2. RAY_ADDRESS names a cluster.")
]


@contextmanager
def opened(engine: str, workers: int | None, store: str, model: str | None, **keywords: Any) -> Iterator[LLMCache]:
    """Open a store with an engine. ConfigError for an unknown engine."""
    if engine == "ray":
        from llmcache.distributed import ray

        count = 2 if workers is None else workers
        # Ray reports dead workers on standard output, which is for results
        with redirect_stdout(sys.stderr), ray.open(store, model, workers=count, **keywords) as cache:
            yield cache
        return
    if engine != "local":
        raise ConfigError(f"--engine is local or ray, got {engine!r}")
    if workers is not None:
        raise ConfigError("--workers is for --engine ray; one process uses all cores")
    from llmcache.cache import LLMCache

    with LLMCache.open(store, model, **keywords) as cache:
        yield cache
        committed(cache)


def committed(cache: LLMCache) -> None:
    """Commit the computed rows of a run. The results are complete without them, so a failing disk is only a warning."""
    storing = cache.storing
    try:
        if storing.store.writable:
            cache.commit()
    except StoreFenced as error:
        log.warning("%s. The results are complete; rows computed since are not stored", error)
    if not storing.store.writable and not storing.store.read_only:
        storing.give_up()
