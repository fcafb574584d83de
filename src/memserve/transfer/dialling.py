"""Connections that have not said Hello yet."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from memserve.errors import MemserveError, PeerLost, PeerRefused
from memserve.transfer.links import Dealer, Links, Way
from memserve.types import InstanceId, Owner

# Connections ended before a Hello after which no more are tried. Who does not know the secret
# is hung up on; but once may be a peer that died just then.
REFUSALS = 2


@dataclass(slots=True, eq=False)
class Dialled:
    """Somebody waits for the first Hello of `instance`."""

    instance: InstanceId
    dealer: Dealer
    outcome: Future[Owner]
    gives_up_at: float
    refusal: PeerRefused | None = None  # what the other side has said last, or deserved


class Dialling:
    """Owns connections until a peer has answered."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._waiting: list[Dialled] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, dialled: Dialled) -> None:
        self._waiting.append(dialled)

    def by(self, path: Way) -> Dialled | None:
        """Who waits for what comes this way."""
        return next((each for each in self._waiting if each.dealer is path), None)

    def succeed(self, dialled: Dialled, owner: Owner) -> None:
        """The connection is the peer's from now on."""
        self._waiting.remove(dialled)
        dialled.outcome.set_result(owner)

    def fail(self, dialled: Dialled, error: MemserveError) -> None:
        self._waiting.remove(dialled)
        self._links.hang_up(dialled.dealer)
        dialled.outcome.set_exception(error)

    def abandon(self) -> None:
        """The pool was closed: nobody will answer."""
        for dialled in list(self._waiting):
            self.fail(dialled, PeerLost("the pool was closed"))

    def on_tick(self, now: float) -> list[Dealer]:
        """Whom to greet again."""
        for dialled in list(self._waiting):
            address = dialled.dealer.address
            if dialled.dealer.foreign or dialled.dealer.broken >= REFUSALS:
                text = f"{address} hangs up: its secret is not this pool's"
                self.fail(dialled, PeerRefused(text))
            elif now >= dialled.gives_up_at:
                lost = PeerLost(f"no pool has answered at {address}")
                self.fail(dialled, dialled.refusal or lost)
        return [dialled.dealer for dialled in self._waiting]
