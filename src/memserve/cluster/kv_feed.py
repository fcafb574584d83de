"""The KV feed: subscribes to every member's KV events, for the prompt tree. One per gateway."""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import urlsplit

import msgspec
import zmq.asyncio

from memserve.api.kv_events import SNAPSHOT_PATH, KVEventsInfo
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.status import InstanceInfo, InstanceState
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.kv_subscription import (
    BACKOFF_SECONDS,
    EventSource,
    Subscription,
)
from memserve.cluster.membership import MAX_MEMBERS, Change, MemberChange
from memserve.scheduler.event_stream import EventCounts
from memserve.scheduler.prompt_tree import PromptTree
from memserve.transfer.secret import cluster_keys
from memserve.types import Epoch, InstanceId, Role
from memserve.vital import Vitals

log = logging.getLogger(__name__)

EXPIRE_SECONDS = 1.0  # between removals of expired expectations: much less than they last
# Longest pause between two questions to a member that starts for its event endpoint.
MAX_FIND_SECONDS = 1.0
MAX_COUNTED = 4096  # instances whose counts are kept for their next life
# Snapshots that are fetched and applied at the same time: a gateway that starts needs one of each
# member, and each is held whole in memory, up to `kv_subscription.MAX_SNAPSHOT_BYTES`.
MAX_RESTORING = 8
# Sockets of the feed: for each member one for live events and one while it asks for a replay.
# libzmq's own limit is 1023.
_MAX_SOCKETS = 2 * MAX_MEMBERS + 64
_INFO_SECONDS = 2.0  # timeout of one question, as that of a poll
_WILDCARDS = ("0.0.0.0", "*", "[::]", "::")
_info = msgspec.json.Decoder(InstanceInfo)


class MemberFeed(msgspec.Struct, frozen=True):
    """State of the subscription to one member's KV events."""

    instance: InstanceId
    subscribed: bool  # False: the member's event endpoint is not known yet
    synchronised: bool  # all batches published so far, as far as known, are applied
    sequence: int | None  # number of the last batch applied
    lag: int  # batches known of and not applied
    silent_seconds: float  # since the last batch; an idle member sends one every second
    blocks: int  # that the prompt tree has for the member
    counts: EventCounts


class _Followed:
    """One followed member: the search for its endpoint, then the subscription."""

    def __init__(self, epoch: Epoch | None, role: Role) -> None:
        self.epoch = epoch
        self.role = role
        self.finding: asyncio.Task[None] | None = None
        self.subscription: Subscription | None = None


class KvFeed:
    """Keeps a `PromptTree` in step with the members. Belongs to the event loop."""

    def __init__(
        self,
        tree: PromptTree,
        peers: PeerClient,
        clock: Clock | None = None,
        secret: str | None = None,
        vitals: Vitals | None = None,
    ) -> None:
        """`clock`: gives the times that `tree.expect` is called with. `secret`: the cluster's;
        None: from `cluster_secret`. `vitals`: watches the feed's tasks."""
        self._vitals = vitals or Vitals()
        self._tree = tree
        self._peers = peers
        self._clock = clock or MonotonicClock()
        self._keys = cluster_keys(secret)
        self._context = zmq.asyncio.Context()
        self._context.max_sockets = _MAX_SOCKETS
        self._restoring = asyncio.Semaphore(MAX_RESTORING)
        self._followed: dict[InstanceId, _Followed] = {}
        self._counts: dict[InstanceId, EventCounts] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._expiring = self._vitals.task("expectations", self._expire())

    # --- members --------------------------------------------------------------------------

    def observe(self, change: MemberChange) -> None:
        """Follow or forget a member by a change: the observer for `Membership.on_change`."""
        gone = change.change in (Change.LEFT, Change.DIED) or change.state is InstanceState.DEAD
        if not gone:
            self.follow(change.id, change.epoch, change.address, change.role)
        elif self._is(change.id, change.epoch):
            self.forget(change.id)

    def follow(self, instance: InstanceId, epoch: Epoch, address: str, role: Role) -> None:
        """Follow the life `epoch` of a member at a URL; any other life of it is forgotten. If the
        life is followed already, only its role is updated."""
        if self._is(instance, epoch):
            self._take_on(instance, role)
            return
        self.forget(instance)
        followed = self._followed[instance] = _Followed(epoch, role)
        followed.finding = self._vitals.errand(
            "search for KV events", self._find(instance, epoch, address, followed)
        )

    def follow_source(self, source: EventSource) -> None:
        """Follow a publisher that is no member, such as a vLLM server with `--kv-events-config`,
        until `forget`. Replaces a source for the same instance."""
        self.forget(source.instance)
        followed = self._followed[source.instance] = _Followed(source.epoch, source.role)
        self._subscribe(source, followed)

    def forget(self, instance: InstanceId) -> None:
        """Remove an instance from the tree at once, and end its subscription. Ignored if it is not
        followed."""
        followed = self._followed.pop(instance, None)
        if followed is None:
            return
        if followed.finding is not None:
            followed.finding.cancel()
        if followed.subscription is not None:
            followed.subscription.close()
            ending = asyncio.ensure_future(followed.subscription.closed())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
        self._tree.leave(instance)

    async def close(self) -> None:
        """Forget all instances, and close the connections."""
        finding = [each.finding for each in self._followed.values() if each.finding is not None]
        for instance in list(self._followed):
            self.forget(instance)
        self._expiring.cancel()
        await asyncio.wait((self._expiring, *finding, *self._ending))
        self._context.destroy(linger=0)

    # --- state ----------------------------------------------------------------------------

    def synchronised(self, instance: InstanceId) -> bool:
        """Return whether the tree has all events of the instance that are known of."""
        followed = self._followed.get(instance)
        if followed is None or followed.subscription is None:
            return False
        return followed.subscription.synchronised

    def members(self) -> list[MemberFeed]:
        """Return the state of all subscriptions, for metrics. Counts continue over the lives of an
        instance."""
        return [self._view(instance, each) for instance, each in self._followed.items()]

    def _view(self, instance: InstanceId, followed: _Followed) -> MemberFeed:
        subscription = followed.subscription
        counts = self._counts.get(instance, EventCounts())
        if subscription is None:
            return MemberFeed(instance, False, False, None, 0, 0.0, 0, counts)
        stream = subscription.stream
        return MemberFeed(
            instance=instance,
            subscribed=True,
            synchronised=subscription.synchronised,
            sequence=stream.position,
            lag=stream.lag,
            silent_seconds=self._clock.now() - subscription.heard,
            blocks=self._tree.held_blocks(instance),
            counts=counts,
        )

    # --- inside ---------------------------------------------------------------------------

    def _is(self, instance: InstanceId, epoch: Epoch) -> bool:
        followed = self._followed.get(instance)
        return followed is not None and followed.epoch == epoch

    def _take_on(self, instance: InstanceId, role: Role) -> None:
        followed = self._followed[instance]
        followed.role = role
        if instance in self._tree:
            self._tree.set_role(instance, role)

    async def _find(
        self, instance: InstanceId, epoch: Epoch, address: str, followed: _Followed
    ) -> None:
        """Ask the member's `/info` until it has an event endpoint, and subscribe. Ends without a
        subscription if the member is up and publishes none."""
        pause = BACKOFF_SECONDS
        while True:
            try:
                info = await self._peers.call(
                    "GET", f"{address}/info", _info.decode, seconds=_INFO_SECONDS
                )
            except PeerError as error:
                log.debug("%s does not say where its events are: %s", instance, error)
            else:
                same = (info.id, info.epoch) == (instance, epoch)
                if same and info.kv_events is not None:
                    source = source_of(info.id, info.epoch, info.kv_events, address, followed.role)
                    self._subscribe(source, followed)
                    return
                if same and info.state is not InstanceState.STARTING:
                    log.warning("%s publishes no KV events: it is routed to blindly", instance)
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_FIND_SECONDS)

    def _subscribe(self, source: EventSource, followed: _Followed) -> None:
        if len(self._counts) >= MAX_COUNTED:  # drop the counts of instances not followed now
            self._counts = {i: each for i, each in self._counts.items() if i in self._followed}
        counts = self._counts.setdefault(source.instance, EventCounts())
        followed.subscription = Subscription(
            source,
            self._tree,
            self._peers,
            self._context,
            self._keys,
            self._clock,
            counts,
            self._restoring,
            self._vitals,
        )

    async def _expire(self) -> None:
        while True:
            try:
                self._tree.expire(self._clock.now())
            except Exception as error:  # noqa: BLE001 - one expectation must not stop all
                self._vitals.survive("an expectation", error)
            await asyncio.sleep(EXPIRE_SECONDS)


def source_of(
    instance: InstanceId, epoch: Epoch, events: KVEventsInfo, address: str, role: Role
) -> EventSource:
    """Return where the events of an instance at `address` come from."""
    host = urlsplit(address).hostname or ""
    return EventSource(
        instance=instance,
        endpoint=_reachable(events.endpoint, host),
        block_tokens=events.block_tokens,
        topic=events.topic,
        replay_endpoint=_reachable(events.replay_endpoint, host),
        snapshot_url=address + SNAPSHOT_PATH if events.snapshot or events.server_snapshot else None,
        references=events.snapshot,
        epoch=epoch,
        role=role,
        secured=events.secured,
    )


def _reachable(endpoint: str, host: str) -> str:
    """Return an endpoint with `host` in place of a wildcard address."""
    name, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    if name not in _WILDCARDS:
        return endpoint
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
