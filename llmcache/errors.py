"""Errors that a caller may want to catch; the class tree is in `llmcache.indexes.errors`."""

from llmcache.indexes.errors import (
    Busy,
    CommitConflict,
    ConfigError,
    CorpusError,
    FaissMissing,
    ForkedStoreError,
    FormatTooNew,
    LLMCacheError,
    ModelMismatch,
    SnapshotDamaged,
    SnapshotNotFound,
    StoreFenced,
    StoreFull,
    UntrustedSnapshot,
)

__all__ = [
    "Busy",
    "CommitConflict",
    "ConfigError",
    "CorpusError",
    "FaissMissing",
    "ForkedStoreError",
    "FormatTooNew",
    "LLMCacheError",
    "ModelMismatch",
    "SnapshotDamaged",
    "SnapshotNotFound",
    "StoreFenced",
    "StoreFull",
    "UntrustedSnapshot",
]
