"""Rolling restarts of instances, one at a time, and removal of an instance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from memserve.api.control import InstanceChange, WantedState
from memserve.api.status import InstanceState
from memserve.clock import Clock
from memserve.cluster.client import ClusterClient
from memserve.cluster.member import ClusterView, MemberView
from memserve.errors import ClusterError

# Enough for an instance to finish its requests, end, start again and load its model.
RESTART_SECONDS = 600.0
POLL_SECONDS = 0.2


async def restart(
    client: ClusterClient,
    instances: Sequence[str],
    clock: Clock,
    progress: Callable[[str], None],
    seconds: float = RESTART_SECONDS,
) -> None:
    """Restart instances one at a time: each is ready again before the next restarts.

    Raises ClusterError if one is not ready again within `seconds`; the next ones are not restarted
    then.
    """
    for number, instance in enumerate(instances, 1):
        before = await client.member(instance)
        others = [m for m in (await client.view()).instances if m.id != instance and _ready(m)]
        place = f"{number} of {len(instances)}"
        alone = "" if others else "; no other instance is ready, requests will be refused"
        progress(f"{instance} ({place}): finishes what it runs{alone}")
        await client.change(instance, InstanceChange(state=WantedState.RESTARTING))
        started = clock.now()

        def is_back(view: ClusterView, before: MemberView = before) -> bool:
            now = view.find(before.id)
            return now is not None and now.life != before.life and _ready(now)

        if not await _until(client, is_back, clock, seconds):
            raise ClusterError(
                f"{instance} is not ready again after {seconds:g} s: its log says why; if "
                "nobody supervises it, it has to be started by hand"
            )
        progress(f"{instance} ({place}): ready again after {clock.now() - started:.1f} s")


async def remove(
    client: ClusterClient,
    instance: str,
    clock: Clock,
    progress: Callable[[str], None],
    seconds: float = RESTART_SECONDS,
) -> None:
    """End an instance in order, and wait until it is gone; a dead one is only forgotten.

    Raises ClusterError if it is still there after `seconds`.
    """
    member = await client.member(instance)
    if member.state is InstanceState.DEAD or member.pid is None:
        await client.forget(member.address)
        return
    progress(f"{instance}: finishes what it runs")
    await client.change(instance, InstanceChange(state=WantedState.STOPPED))

    def is_gone(view: ClusterView) -> bool:
        now = view.find(instance)
        return now is None or now.life != member.life or now.state is InstanceState.DEAD

    if not await _until(client, is_gone, clock, seconds):
        raise ClusterError(f"{instance} is still there after {seconds:g} s")
    left = (await client.view()).find(instance)
    if left is not None and left.life == member.life:  # it had no gateway to leave
        await client.forget(member.address)


def _ready(member: MemberView) -> bool:
    return member.state is InstanceState.READY


async def _until(
    client: ClusterClient,
    condition: Callable[[ClusterView], bool],
    clock: Clock,
    seconds: float,
) -> bool:
    """Check a condition every POLL_SECONDS. Return whether it came true within `seconds`."""
    end = clock.now() + seconds
    while not condition(await client.view()):
        if clock.now() > end:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True
