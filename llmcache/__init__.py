"""LLMCache: a vector-database-backed cache of transformer activations for batch document pipelines.

from llmcache import LLMCache

with LLMCache.open("store/", "all-MiniLM-L6-v2") as cache:
    vectors = cache.encode(texts)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcache.document import Document
from llmcache.errors import LLMCacheError

if TYPE_CHECKING:
    from llmcache.cache import LLMCache
    from llmcache.config import CacheConfig
    from llmcache.encoding.results import Result
    from llmcache.pipeline.pipeline import Pipeline
    from llmcache.report.statistics import Statistics

__version__ = "0.1.0"

__all__ = ["CacheConfig", "Document", "LLMCache", "LLMCacheError", "Pipeline", "Result", "Statistics", "__version__"]


def __getattr__(name: str) -> object:
    """Import public names on first use, so that `llmcache --help` does not import torch. AttributeError for others."""
    if name == "LLMCache":
        from llmcache.cache import LLMCache

        return LLMCache
    if name == "CacheConfig":
        from llmcache.config import CacheConfig

        return CacheConfig
    if name == "Pipeline":
        from llmcache.pipeline.pipeline import Pipeline

        return Pipeline
    if name == "Result":
        from llmcache.encoding.results import Result

        return Result
    if name == "Statistics":
        from llmcache.report.statistics import Statistics

        return Statistics
    raise AttributeError(f"module 'llmcache' has no attribute {name!r}")
