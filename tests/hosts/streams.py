"""Streams that are under way when a host is lost, and what must become of them."""

from __future__ import annotations

from tests.fakes import metric
from tests.fault.conftest import Expected
from tests.fault.processes import Client
from tests.handoff_harness import prompt_of
from tests.hosts.cluster import BLOCK, Operator
from tests.hosts_harness import Host

STREAMS, TOKENS = 3, 700
ATTEMPTS = 10
PROMPTS = [prompt_of(120, seed) for seed in range(STREAMS)]
# KV of these takes five seconds over a link that is so slow, and 20 ms over the others.
LONG, FEW, SLOW = 400, 8, 4_000_000
LONG_PROMPTS = [prompt_of(LONG, seed) for seed in (20, 21)]
_FAILOVERS = "memserve_failovers_total"


def hands_over(operator: Operator, name: str, expected: Expected) -> None:
    """Send new prompts until KV of one has been handed over to instance `name`; check the tokens of
    all."""
    before = operator.stats(name).handoff.blocks_received
    for seed in range(100, 110):
        prompt = prompt_of(100, seed + before)
        answer = operator.complete(prompt, 4)
        assert answer["choices"][0]["token_ids"] == expected(prompt, 4)
        if operator.stats(name).handoff.blocks_received > before:
            return
    raise AssertionError(f"no KV reaches {name}\n{operator.cluster.logs()}")


def streaming(operator: Operator, name: str) -> list[Client]:
    """Streams under way, some of them at this instance."""
    for _ in range(ATTEMPTS):  # on a busy machine they can be over before they are seen
        clients = [Client(operator, prompt, TOKENS) for prompt in PROMPTS]  # type: ignore[arg-type]
        for client in clients:
            client.wait(5)
        if operator.stats(name).engine.running:
            return clients
        for client in clients:
            client.result()
    raise AssertionError(f"no stream is seen at {name}\n{operator.cluster.logs()}")


def in_hand_over(operator: Operator, prefill: str, name: str, host: Host) -> list[Client]:
    """Two prompts, whose KV goes from `prefill` to two instances: to the other one
    quickly, and to this one for as long as `host`'s link is that slow."""
    host.limit(SLOW)
    clients = [Client(operator, prompt, FEW) for prompt in LONG_PROMPTS]  # type: ignore[arg-type]
    operator.until(
        lambda: (
            any(client.times for client in clients)
            and operator.stats(prefill).pool.hbm.pinned >= LONG // BLOCK
        ),
        f"a hand-over to {name}",
    )
    assert not all(client.times for client in clients)
    return clients


def finished(
    operator: Operator, clients: list[Client], answers: list[list[int]], fault: float
) -> float:
    """Return the longest pause of a client after the fault, in seconds. All answers must have the
    right tokens, and some of them must have gone on elsewhere."""
    before = metric(operator.url, _FAILOVERS)
    for client, wanted in zip(clients, answers, strict=True):
        assert client.result() == wanted
    assert metric(operator.url, _FAILOVERS) > before
    return max((pause for client in clients if (pause := client.pause(fault))), default=0.0)
