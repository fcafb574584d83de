"""memserve: serve large language models with a shared, elastic KV-cache memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memserve.types import Medium

if TYPE_CHECKING:
    from memserve.pool.layout import KVLayout
    from memserve.transfer.mempool import MemPool

__all__ = ["KVLayout", "Medium", "MemPool"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # The pool needs torch; a gateway does not, and starts seconds sooner without it.
    if name == "MemPool":
        from memserve.transfer.mempool import MemPool

        return MemPool
    if name == "KVLayout":
        from memserve.pool.layout import KVLayout

        return KVLayout
    raise AttributeError(f"module 'memserve' has no attribute {name!r}")
