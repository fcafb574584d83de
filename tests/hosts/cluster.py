"""A cluster whose processes run on several hosts, each started by hand, as docs/many-hosts.md has
it: a secret in the environment, `memserve gateway`, and `memserve instance --join`."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from memserve.api.peer_client import PeerClient
from memserve.api.status import InstanceState, InstanceStats
from memserve.cluster.client import ClusterClient
from memserve.cluster.member import ClusterView
from memserve.errors import ClusterError
from memserve.secrets import SECRET_VARIABLE, cluster_secret
from memserve.types import Role
from tests.hosts_harness import Host, HostProcess, Hosts

T = TypeVar("T")
PATIENCE = 90.0  # seconds: a start, on a machine that has much else to do
PORT = 8000
BLOCK = 16
SERVED = "tiny"
SIZES = ("--hbm-blocks=300", "--dram-blocks=16")


@dataclass(frozen=True)
class Tls:
    """Files for `--tls-*`, by host."""

    authority: Path
    chains: dict[str, Path]
    keys: dict[str, Path]

    def flags(self, host: Host) -> list[str]:
        chain, key = self.chains[host.name], self.keys[host.name]
        return [f"--tls-cert={chain}", f"--tls-key={key}", f"--tls-ca={self.authority}"]


@dataclass
class HostCluster:
    """Started processes, by name. They end with their hosts."""

    hosts: Hosts
    model: Path
    secret: str
    tls: Tls | None = None
    processes: dict[str, HostProcess] = field(default_factory=dict)

    def url(self, host: Host) -> str:
        return f"{'http' if self.tls is None else 'https'}://{host.address}:{PORT}"

    def gateway(self, host: Host) -> str:
        """Returns its URL. The policy hands every request over: by what is faster, a tiny model's
        would not be."""
        self._start(
            host, f"gateway-{host.name}", "gateway", f"--port={PORT}", "--policy=round-robin"
        )
        return self.url(host)

    def instance(
        self, host: Host, name: str, role: Role, *gateways: str, flags: Sequence[str] = SIZES
    ) -> None:
        own = [f"--id={name}", f"--role={role}", "--device=cpu", "--threads=1", "--profile=off"]
        joins = [f"--join={url}" for url in gateways]
        self._start(host, name, "instance", *own, *flags, *joins)

    def _start(self, host: Host, name: str, *arguments: str) -> None:
        settings = [f"--model={self.model}", f"--served-name={SERVED}", "--dtype=float32"]
        settings += [f"--host={host.address}", *(self.tls.flags(host) if self.tls else ())]
        if arguments[0] == "gateway":
            settings.append("--no-prove-handover")  # hand-overs are counted
        self.processes[name] = host.memserve(
            *arguments, *settings, environment={SECRET_VARIABLE: self.secret}, log=f"{name}.log"
        )

    def logs(self) -> str:
        """The last lines of all, for a failure's report."""
        return "\n".join(f"--- {n}\n{p.text()[-3000:]}" for n, p in self.processes.items())


class Operator:
    """Asks a gateway and its members, from a host that reaches them. Use it where this thread has
    `entered` that host."""

    def __init__(self, cluster: HostCluster, url: str) -> None:
        self.cluster = cluster
        self.url = url
        self.asked = 0  # questions so far
        authority = None if cluster.tls is None else str(cluster.tls.authority)
        self._tls = None if authority is None else ssl.create_default_context(cafile=authority)

    def view(self) -> ClusterView:
        return self._ask(lambda client: client.view())

    def ready(self) -> list[str]:
        """Names of the members that the gateway finds ready; none where no gateway answers."""
        try:
            found = self.view().instances
        except ClusterError:
            return []
        return sorted(member.id for member in found if member.state is InstanceState.READY)

    def until_ready(self, *names: str) -> float:
        """Until these members are ready, and no others; the seconds that took."""
        return self.until(lambda: self.ready() == sorted(names), f"ready: {names}")

    def until(self, condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> float:
        begin = time.monotonic()
        while not condition():
            if time.monotonic() > begin + patience:
                raise AssertionError(f"never came: {what}\n{self.cluster.logs()}")
            time.sleep(0.05)
        return time.monotonic() - begin

    def stats(self, name: str) -> InstanceStats:
        async def ask(client: ClusterClient) -> InstanceStats:
            return await client.stats(await client.member(name))

        return self._ask(ask)

    def quiet(self, *names: str) -> bool:
        """Whether nothing runs there, nobody holds a block, and none is kept from use."""
        return all(_is_quiet(self.stats(name)) for name in names)

    def complete(self, prompt: Sequence[int], tokens: int) -> Any:
        """The answer to a client, who has no secret."""
        body = {
            "model": SERVED,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

        async def post() -> Any:
            async with PeerClient(None, self._tls) as client:
                return await client.call(
                    "POST",
                    f"{self.url}/v1/completions",
                    msgspec.json.decode,
                    msgspec.json.encode(body),
                    seconds=PATIENCE,
                )

        return asyncio.run(post())

    def _ask(self, work: Callable[[ClusterClient], Awaitable[T]]) -> T:
        self.asked += 1

        async def run() -> T:
            async with ClusterClient(self.url, cluster_secret(), self._tls) as client:
                return await work(client)

        return asyncio.run(run())


def _is_quiet(stats: InstanceStats) -> bool:
    pool, engine = stats.pool, stats.engine
    held = sum(each.active + each.pinned + each.detached for each in (pool.hbm, pool.dram))
    lost = sum(each.total - each.free - each.cached for each in (pool.hbm, pool.dram))
    return not (engine.running + engine.waiting + held + lost + pool.matches + pool.quarantined)
