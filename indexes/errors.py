"""Every error a caller may want to catch.

LLMCacheError
 ├── ConfigError          a setting that cannot work (also a ValueError)
 ├── CorpusError          a document file that cannot be read as asked (also a ValueError)
 ├── FaissMissing         no FAISS installed (also an ImportError)
 ├── ModelMismatch        the store was made by another model
 ├── SnapshotNotFound     there is no store at this path
 ├── SnapshotDamaged      the store's own files do not agree with their checksums
 │    └── FormatTooNew    the store was written by a newer LLMCache
 ├── UntrustedSnapshot    nobody vouches for the store's files, or they are older than what was asked for
 ├── CommitConflict       other writers won every round of a commit
 ├── Busy                 another process maintains the store (evicts, compacts or collects)
 ├── StoreFenced          an earlier write failed; this writer may not write again
 │    └── StoreFull       ... because the disk is full
 └── ForkedStoreError     the store was opened in another process

An error message says what was seen, and what to do next. None of these is raised out of an inference call once
the cache is open: there, any failure of the store is a miss.
"""

from __future__ import annotations

import logging

from llmcache.indexes.urls import redacted


class LLMCacheError(Exception):
    """Base class of all errors that LLMCache raises. Credentials in URLs are removed from the message."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redacted(one) if isinstance(one, str) else one for one in arguments))


def _without_credentials(record: logging.LogRecord) -> bool:
    """Hide the credentials of URLs in a line of the log."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit
        message = f"{record.msg} {record.args}"
        record.msg, record.args = message, ()
    if (hidden := redacted(message)) != message:
        record.msg, record.args = hidden, ()
    return True


logging.getLogger("llmcache").addFilter(_without_credentials)


class ConfigError(LLMCacheError, ValueError):
    """A setting that cannot work."""


class CorpusError(LLMCacheError, ValueError):
    """A document file that cannot be read as asked."""


class FaissMissing(LLMCacheError, ImportError):
    """No FAISS is installed."""

    def __init__(self) -> None:
        super().__init__(
            "FAISS is not installed; install one of the two builds: "
            "pip install 'llmcache[cpu]' (faiss-cpu) or pip install 'llmcache[gpu]' (faiss-gpu); "
            "or do without: CacheConfig(index='torch') searches in torch"
        )


class ModelMismatch(LLMCacheError):
    """The store was made by another model."""


class SnapshotNotFound(LLMCacheError):
    """There is no store at this path."""


class SnapshotDamaged(LLMCacheError):
    """The store's own files do not agree with their checksums."""


class FormatTooNew(SnapshotDamaged):
    """The store was written by a newer LLMCache."""


class UntrustedSnapshot(LLMCacheError):
    """Nobody vouches for the store's files, or they are older than what was asked for."""


class CommitConflict(LLMCacheError):
    """Other writers won every round of a commit."""


class Busy(LLMCacheError):
    """Another process maintains the store."""


class StoreFenced(LLMCacheError):
    """An earlier write failed; this writer may not write again."""


class StoreFull(StoreFenced):
    """The disk is full."""


class ForkedStoreError(LLMCacheError):
    """The store was opened in another process."""
