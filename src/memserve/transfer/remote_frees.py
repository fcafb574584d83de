"""`RemoteFrees`: frees of blocks at a peer, repeated until answered and carried out once."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count

from memserve.errors import PeerLost
from memserve.transfer.messages import to_error
from memserve.transfer.session import LEASE, Retry
from memserve.transfer.wire import FreeBlocks, FreedBlocks
from memserve.types import Owner

# Answers kept for each life: more than its calls in flight at a time.
ANSWERS = 1024


@dataclass(slots=True, eq=False)
class _Call:
    peer: Owner
    message: FreeBlocks
    outcome: Future[None]
    retry: Retry
    gives_up_at: float


class RemoteFrees:
    """Calls that free blocks at a peer, and answers to such calls of peers. No I/O."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._open: dict[int, _Call] = {}
        self._answers: dict[Owner, OrderedDict[int, FreedBlocks]] = {}

    @property
    def active(self) -> bool:
        return bool(self._open)

    def begin(self, peer: Owner, wire_refs: bytes, outcome: Future[None], now: float) -> FreeBlocks:
        """Return the message to send."""
        message = FreeBlocks(next(self._numbers), wire_refs)
        call = _Call(peer, message, outcome, Retry(), now + LEASE)
        call.retry.start(now)
        self._open[message.call] = call
        return message

    def on_answer(self, peer: Owner, answer: FreedBlocks) -> None:
        call = self._open.get(answer.call)
        if call is None or call.peer != peer:
            return
        del self._open[answer.call]
        if answer.failure is None:
            call.outcome.set_result(None)
        else:
            call.outcome.set_exception(to_error(answer.failure, peer.instance))

    def on_tick(self, now: float) -> list[tuple[Owner, FreeBlocks]]:
        """Fail calls that are due. Return the messages to repeat, with their peers."""
        for call in list(self._open.values()):
            if now >= call.gives_up_at:
                self._lose(call, f"no answer for {LEASE:g} s")
        return [(call.peer, call.message) for call in self._open.values() if call.retry.due(now)]

    def on_gone(self, peer: Owner) -> None:
        """Fail the calls to a life that has ended, and forget the answers to it."""
        self._answers.pop(peer, None)
        for call in list(self._open.values()):
            if call.peer == peer:
                self._lose(call, "the peer is gone")

    def known_answer(self, peer: Owner, call: int) -> FreedBlocks | None:
        """Return the answer to an earlier copy of a call; None for a new call."""
        answers = self._answers.get(peer)
        return None if answers is None else answers.get(call)

    def remember(self, peer: Owner, answer: FreedBlocks) -> None:
        answers = self._answers.setdefault(peer, OrderedDict())
        answers[answer.call] = answer
        if len(answers) > ANSWERS:
            answers.popitem(last=False)

    def _lose(self, call: _Call, why: str) -> None:
        del self._open[call.message.call]
        name = call.peer.instance
        call.outcome.set_exception(PeerLost(f"blocks of {name!r} may not be free: {why}"))
