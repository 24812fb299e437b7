"""Snapshots, merges, checks and repairs of stores. Needs neither torch nor FAISS.

from llmcache import snapshot

snapshot.save("store/", "backup/")
"""

from llmcache.indexes.compare import Difference, diff
from llmcache.indexes.merge import Merged, merge
from llmcache.indexes.remote import Carried, pull, push
from llmcache.indexes.repair import Repair, repair
from llmcache.indexes.snapshot import Snapshot, load, save
from llmcache.indexes.verify import Finding, Verification, verify

__all__ = [
    "Carried",
    "Difference",
    "Finding",
    "Merged",
    "Repair",
    "Snapshot",
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
