"""Snapshot, merge, verify and repair stores. Needs neither torch nor FAISS.

from llmcache import snapshot

snapshot.save("store/", "backup/")
"""

from llmcache.indexes.maintenance.diff import Difference, diff
from llmcache.indexes.maintenance.merge import Merged, merge
from llmcache.indexes.maintenance.remote import TransferResult, pull, push
from llmcache.indexes.maintenance.repair import Repair, repair
from llmcache.indexes.maintenance.snapshot import Snapshot, load, save
from llmcache.indexes.maintenance.verify import Finding, Verification, verify

__all__ = [
    "Difference",
    "Finding",
    "Merged",
    "Repair",
    "Snapshot",
    "TransferResult",
    "Verification",
    "diff",
    "load",
    "merge",
    "pull",
    "push",
    "repair",
    "save",
    "verify",
]
