"""`Readiness`: which instances have been ready, as a gateway of the cluster tells it."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from memserve.api.status import InstanceState
from memserve.api.tls import command_tls
from memserve.cluster.client import ClusterClient
from memserve.cluster.member import MemberView
from memserve.errors import ClusterError
from memserve.logs import worth_a_line
from memserve.models.resolve import Progress
from memserve.secrets import Secret

POLL_SECONDS = 0.2  # between looks at the state of a starting cluster
# Looks, about 10 s, without a new instance until what is waited for is told: longer than a gateway
# takes to start again. The next lines come when the looks have doubled: models may load for long.
PATIENT_LOOKS = 50


class Readiness:
    """Asks a gateway for ready instances, look by look."""

    def __init__(self, secret: Secret, tls_ca: str | None, tell: Progress) -> None:
        """`tls_ca`: as `security.tls_ca`; MEMSERVE_TLS_CA wins, for commands on another machine.
        `tell` gets a line for each instance that becomes ready, and for what is waited for."""
        self.ready: set[str] = set()  # instances that have been ready once
        self._secret = secret
        self._tls_ca = tls_ca
        self._tell = tell
        self._lives: dict[str, tuple[str, int | None]] = {}  # of members that were ready last
        self._former: dict[str, tuple[str, int | None]] = {}  # of instances that were replaced
        self._looks = 0  # in a row without news

    def tls(self) -> ssl.SSLContext | None:
        """Return how gateways are verified. Raises ConfigError."""
        return command_tls(self._tls_ca)

    def replaced(self, name: str) -> None:
        """Wait for the successor of an instance that was ended after the last look. A gateway may
        show the former for a while, if it has ended without a word."""
        self.ready.discard(name)
        if name in self._lives:
            self._former[name] = self._lives[name]

    async def look(self, url: str, wanted: Sequence[str]) -> bool:
        """Ask the gateway at `url`; return whether any instance is ready now. `wanted`: the names
        of all instances. A gateway that does not answer has ended, which whoever keeps it finds
        out, or does not trust or reach this process, which is told. Raises ConfigError."""
        async with ClusterClient(url, self._secret, self.tls()) as client:
            try:
                members = (await client.view()).instances
            except ClusterError as error:
                self._wait(str(error))
                return False
        self._lives = {one.id: one.life for one in members if one.state is InstanceState.READY}
        # Others of the gateway's members are of other clusters, or were scaled away.
        ready = {
            name
            for name, life in self._lives.items()
            if name in wanted and life != self._former.get(name)
        }
        new = sorted(ready - self.ready)
        for name in new:
            self._tell(f"{name} is ready")
        self.ready |= ready
        late = [name for name in wanted if name not in self.ready]
        if new or not late:
            self._looks = 0
        else:
            self._wait(", ".join(_said(name, members) for name in late))
        return bool(self._lives)

    def _wait(self, why: str) -> None:
        self._looks += 1
        if worth_a_line(self._looks, PATIENT_LOOKS):
            self._tell(f"still waiting: {why}")


def _said(name: str, members: Sequence[MemberView]) -> str:
    state = next((member.state for member in members if member.id == name), None)
    return f"{name} is {state}" if state is not None else f"{name} has not registered"
