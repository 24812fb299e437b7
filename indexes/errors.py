"""All errors that a caller may want to catch.

LLMCacheError
 ├── ConfigError          a setting that cannot work (also a ValueError)
 ├── CorpusError          a document file that cannot be read as asked (also a ValueError)
 ├── FaissMissing         no FAISS installed (also an ImportError)
 ├── ModelMismatch        the store was made by another model
 ├── SnapshotNotFound     there is no store at this path
 ├── SnapshotDamaged      the store's own files do not agree with their checksums
 │    └── FormatTooNew    the store was written by a newer LLMCache
 ├── UntrustedSnapshot    the store's owner, permissions or signature cannot be trusted, or it is too old
 ├── CommitConflict       other writers won every round of a commit
 ├── Busy                 another process maintains the store (evicts, compacts or collects)
 ├── StoreFenced          an earlier write failed; this writer may not write again
 │    └── StoreFull       ... because the disk is full
 └── ForkedStoreError     the store was opened in another process

An error message says what was seen, and what to do next. Once the cache is open, an inference call raises none of
these: any failure of the store is a miss.
"""

from __future__ import annotations

import logging

from llmcache.indexes.urls import redacted


class LLMCacheError(Exception):
    """Base class of all errors that LLMCache raises. Credentials in URLs are removed from the message."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redacted(argument) if isinstance(argument, str) else argument for argument in arguments))


def _without_credentials(record: logging.LogRecord) -> bool:
    """Hide credentials of URLs in a log record."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # arguments do not match the format string
        message = f"{record.msg} {record.args}"
        record.msg, record.args = message, ()
    if (hidden := redacted(message)) != message:
        record.msg, record.args = hidden, ()
    return True


logging.getLogger("llmcache").addFilter(_without_credentials)


class ConfigError(LLMCacheError, ValueError):
    """Invalid setting or argument."""


class CorpusError(LLMCacheError, ValueError):
    """Document file that cannot be read as requested."""


class FaissMissing(LLMCacheError, ImportError):
    """FAISS is required and not installed."""

    def __init__(self) -> None:
        super().__init__(
            "FAISS is not installed; install one of the two builds: "
            "pip install 'llmcache[cpu]' (faiss-cpu) or pip install 'llmcache[gpu]' (faiss-gpu); "
            "or do without: CacheConfig(index='torch') searches in torch"
        )


class ModelMismatch(LLMCacheError):
    """Store, namespace or bank that belongs to another model or has other settings."""


class SnapshotNotFound(LLMCacheError):
    """Missing store: there is none at the given path or URL."""


class SnapshotDamaged(LLMCacheError):
    """Files of the store are missing or do not match their checksums."""


class FormatTooNew(SnapshotDamaged):
    """Store that was written by a newer LLMCache."""


class UntrustedSnapshot(LLMCacheError):
    """Store whose owner, permissions or signature cannot be trusted, or that is older than requested."""


class CommitConflict(LLMCacheError):
    """Commit that failed because other writers were faster in every round."""


class Busy(LLMCacheError):
    """Another process holds the store's maintainer lock."""


class StoreFenced(LLMCacheError):
    """Write that is refused, because an earlier one failed or the store is read-only for this process."""


class StoreFull(StoreFenced):
    """Write that failed because the disk is full."""


class ForkedStoreError(LLMCacheError):
    """Store that is used in another process than the one that opened it."""
