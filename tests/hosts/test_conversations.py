"""Conversations on a cluster of three hosts, with a secret and TLS: the tokens are those of
Transformers' generate, and KV goes over a link only where it is missing."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme

from memserve.api.status import HandoffTotals
from memserve.api.tls import TLS_CA_VARIABLE
from memserve.models.tokenizer import Tokenizer
from memserve.secrets import SECRET_VARIABLE
from memserve.types import Role
from tests.fault.conftest import Expected
from tests.hosts.cluster import BLOCK, HostCluster, Operator, Tls
from tests.hosts.conversations import Turn, react, sharegpt
from tests.hosts_harness import Hosts

CONVERSATIONS = 3
# What processes say to each other beside KV, at most, in bytes: polls, events and heartbeats; and
# what the test itself asks, with a TLS handshake each time. KV of one block is 96 KiB.
TALK_A_SECOND, TALK_A_QUESTION = 15_000, 6_000
P = "p-a"
DECODES = {"d-b": "B", "d-c": "C"}


def issue(hosts: Hosts, directory: Path) -> Tls:
    """A certificate for each host's address."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    chains, keys = {}, {}
    for host in hosts:
        made = authority.issue_cert(host.address, host.hostname)
        chains[host.name] = directory / f"{host.name}.pem"
        keys[host.name] = directory / f"{host.name}.key"
        chains[host.name].write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        made.private_key_pem.write_to_path(keys[host.name])
    return Tls(directory / "ca.pem", chains, keys)


@pytest.fixture(scope="module")
def operator(
    module_hosts: Hosts, model: Path, secret: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    a, b, c = module_hosts
    tls = issue(module_hosts, tmp_path_factory.mktemp("certificates"))
    cluster = HostCluster(module_hosts, model, secret, tls)
    gateway = cluster.gateway(a)
    cluster.instance(a, "p-a", Role.PREFILL, gateway)
    cluster.instance(b, "d-b", Role.DECODE, gateway)
    cluster.instance(c, "d-c", Role.DECODE, gateway)
    with a.entered():
        operator = Operator(cluster, gateway)
        operator.until_ready("p-a", "d-b", "d-c")
        yield operator


@dataclass
class Held:
    """Prefixes, in whole blocks, that an instance's cache must have."""

    prefixes: set[tuple[int, ...]] = field(default_factory=set)

    def lacks(self, tokens: list[int]) -> int:
        return sum(prefix not in self.prefixes for prefix in _whole(tokens))

    def add(self, tokens: list[int]) -> None:
        self.prefixes.update(_whole(tokens))


def _whole(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]


class Turns:
    """Has turns answered, and checks each: its tokens, and which blocks moved."""

    def __init__(self, operator: Operator, expected: Expected) -> None:
        self._operator = operator
        self._expected = expected
        self._held = {name: Held() for name in (P, *DECODES)}
        self.received = dict.fromkeys(DECODES, 0)  # blocks
        self.returned = dict.fromkeys(DECODES, 0)

    def answer(self, prompt: list[int], count: int) -> list[int]:
        before = self._handoffs()
        answer = self._operator.complete(prompt, count)
        tokens: list[int] = answer["choices"][0]["token_ids"]
        assert tokens == self._expected(prompt, count)
        (name,) = (n for n, each in self._handoffs().items() if each.asked > before[n].asked)
        received = answer["usage"]["memserve"]["blocks_received"]
        assert received == self._held[name].lacks(prompt)
        self.received[name] += received
        # The last token's KV is computed only if another token follows.
        computed = [*prompt, *tokens[:-1]]
        self._held[name].add(computed)
        self._held[P].add(prompt)
        self._operator.until(lambda: self._is_back(name), "what the answer left goes back")
        returned = self._handoffs()[name].blocks_returned - before[name].blocks_returned
        assert returned == self._held[P].lacks(computed)
        self.returned[name] += returned
        self._held[P].add(computed)
        return tokens

    def _handoffs(self) -> dict[str, HandoffTotals]:
        return {name: self._operator.stats(name).handoff for name in DECODES}

    def _is_back(self, name: str) -> bool:
        handoff = self._handoffs()[name]
        assert not handoff.failed + handoff.returns_dropped
        return handoff.returns == handoff.asked


@pytest.mark.parametrize("data", [react, sharegpt])
def test_tokens_are_generates_and_kv_moves_only_where_it_is_missing(
    operator: Operator,
    tokenizer: Tokenizer,
    expected: Expected,
    data: Callable[[Tokenizer, int], list[list[Turn]]],
) -> None:
    conversations = data(tokenizer, CONVERSATIONS)
    said: list[list[int]] = [[] for _ in conversations]
    hosts = {name: operator.cluster.hosts[host] for name, host in DECODES.items()}
    links = {name: host.traffic() for name, host in hosts.items()}
    asked, begin = operator.asked, time.monotonic()
    checked = Turns(operator, expected)
    for turns in zip(*conversations, strict=True):
        for turn, tokens in zip(turns, said, strict=True):
            tokens += turn.tokens
            tokens += checked.answer(tokens, turn.answer)
    block = operator.stats("d-b").handoff.block_bytes
    talk = TALK_A_SECOND * (time.monotonic() - begin) + TALK_A_QUESTION * (operator.asked - asked)
    assert sum(checked.received.values()) * block > 5_000_000
    assert sum(checked.returned.values()) > 0
    for name, host in hosts.items():
        link = host.traffic().since(links[name])
        received, returned = checked.received[name] * block, checked.returned[name] * block
        assert received < link.received < 1.1 * received + talk
        assert returned < link.sent < 1.1 * returned + talk


def test_between_hosts_kv_moves_by_nixl(operator: Operator) -> None:
    a, *_ = operator.cluster.hosts
    assert operator.cluster.tls is not None
    environment = {
        SECRET_VARIABLE: operator.cluster.secret,
        TLS_CA_VARIABLE: str(operator.cluster.tls.authority),
    }
    said = a.run(
        *(sys.executable, "-m", "memserve", "doctor", "--url", operator.url),
        environment=environment,
    )
    reached = [line for line in said.splitlines() if " reach " in line]
    # Each of three pools reaches the two others.
    assert re.findall(r"\((\w+), [\d.]+ s\)", "".join(reached)) == ["nixl"] * 6, said
