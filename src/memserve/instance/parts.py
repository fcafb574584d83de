"""The parts that an instance is made of: what `build` and `vllm_build` return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from memserve.api.kv_events import KVEventsInfo
from memserve.api.status import (
    MemberKind,
    PoolTotals,
)
from memserve.engine.request import EngineProtocol
from memserve.instance.grammars import Grammars
from memserve.instance.link import KVLink
from memserve.models.tokenizer import Tokenizer
from memserve.scheduler.profiles import Profile
from memserve.types import Epoch, InstanceId, Role
from memserve.vllm.forwarder import Forwarder


@dataclass(frozen=True, slots=True)
class Identity:
    """Name, epoch, model and kind of an instance."""

    id: InstanceId
    epoch: Epoch
    role: Role  # at start; `InstanceLifecycle.role` is the current one
    model: str
    kind: MemberKind = MemberKind.MEMSERVE


class Events(Protocol):
    """Publisher of an instance's KV events, which tell gateways what prefixes it holds."""

    @property
    def info(self) -> KVEventsInfo: ...

    def snapshot(self) -> bytes:
        """Return an encoded `KVSnapshot`. Raises TransferError if there is none."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an instance. The instance owns them and calls `close` when it ends."""

    engine: EngineProtocol
    tokenizer: Tokenizer
    pool_totals: Callable[[], PoolTotals]
    close: Callable[[], None]  # after the engine has stopped
    # Roles in which the KV of a sequence stays in the index for other sequences.
    sharing: frozenset[Role] = frozenset(Role)
    link: KVLink | None = None  # to the pools of other instances
    profile: Profile | None = None  # the engine's cost model
    events: Events | None = None  # publisher of KV events
    # Returns the threads whose end ends the instance; called once the engine runs.
    threads: Callable[[], Sequence[threading.Thread]] = lambda: ()
    forwarder: Forwarder | None = None  # to a vLLM server, which takes requests unchanged
    grammars: Grammars | None = None  # None: the engine does not support them
