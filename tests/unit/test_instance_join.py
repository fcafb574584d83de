"""An instance registers with every gateway that a URL's name stands for."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trustme

from memserve.api.audience import Audience
from memserve.api.guard import Guard
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import HttpServer
from memserve.api.peer_client import PeerClient
from memserve.api.serving import bind
from memserve.api.signatures import Signer, Verifier
from memserve.api.tls import client_tls, server_tls
from memserve.instance import join
from memserve.instance.join import Registration
from memserve.secrets import Secret
from memserve.types import Epoch, InstanceId
from tests.waiting import until

SECRET = Secret(("gateways share it",))
NAME = "gateways.example"


class Gateway:
    """What a gateway does for registrations: checks their signatures, and notes their methods."""

    def __init__(self, sock: socket.socket) -> None:
        self.heard: list[str] = []
        self.hosts: set[bytes | None] = set()
        self.port = sock.getsockname()[1]
        audience = Audience(any_name=True)
        audience.add_socket(sock)
        self.verifier = Verifier(SECRET, audience)
        self.handle = Guard(self._note, self.verifier)

    async def _note(self, request: Request, reply: Reply) -> None:
        self.heard.append(request.method)
        self.hosts.add(request.header(b"host"))
        reply.send(200, b"{}")


@asynccontextmanager
async def gateway(address: str, port: int = 0, chain: Path | None = None) -> AsyncIterator[Gateway]:
    sock = bind(address, port)
    made = Gateway(sock)
    server = HttpServer(made.handle, 4096)
    await server.start(sock, 16, server_tls(str(chain), str(chain)) if chain else None)
    try:
        yield made
    finally:
        await server.close(1.0)


class Names:
    """A name server, for one name."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] = addresses
        self.asked: list[str] = []
        self.broken = False

    async def resolve(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        if self.broken:
            raise OSError("no name server")
        return self.addresses


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    for pause in ("JOIN_SECONDS", "RETRY_SECONDS", "RESOLVE_SECONDS"):
        monkeypatch.setattr(join, pause, 0.02)


@asynccontextmanager
async def registered(
    url: str, names: Names, authorities: Path | None = None, *more: str
) -> AsyncIterator[asyncio.Task[None]]:
    tls = client_tls(str(authorities) if authorities else None)
    async with PeerClient(Signer(SECRET), tls) as peers:
        registration = Registration(
            peers, [url, *more], "http://10.1.2.3:1", InstanceId("d0"), Epoch(7), names.resolve
        )
        running = asyncio.create_task(registration.run())
        try:
            yield running
        finally:
            running.cancel()
            await asyncio.wait((running,))
            await registration.leave()


async def test_every_address_of_a_name_is_a_gateway_of_its_own() -> None:
    """Each has a life of its own: signatures for one are not tried at another again and again."""
    async with gateway("127.0.0.2") as first, gateway("127.0.0.3", first.port) as second:
        url = f"http://{NAME}:{first.port}"
        async with registered(url, Names("127.0.0.2", "127.0.0.3")):
            await until(lambda: min(len(first.heard), len(second.heard)) > 5, "registrations")
        for one in (first, second):
            assert one.heard[-1] == "DELETE"
            assert one.hosts == {f"{NAME}:{first.port}".encode()}  # as load balancers route by
            assert one.verifier.refused == 1  # the challenge that each server begins with


async def test_gateways_are_followed_as_they_come_and_go() -> None:
    async with gateway("127.0.0.2") as first, gateway("127.0.0.3", first.port) as second:
        names = Names("127.0.0.2")
        async with registered(f"http://{NAME}:{first.port}", names):
            await until(lambda: len(first.heard) > 1, "the first gateway hears")
            assert not second.heard
            names.addresses = ("127.0.0.3",)
            await until(lambda: len(second.heard) > 1, "the second gateway hears")
            seen, known = len(first.heard), len(second.heard)
            await until(lambda: len(second.heard) > known + 5, "the second gateway hears more")
            assert len(first.heard) <= seen + 1  # one may have been under way


@pytest.mark.parametrize("again", ["", "/"])
async def test_a_gateway_that_is_named_twice_is_one(again: str) -> None:
    """Also when it goes: two that follow one name must not both forget it."""
    async with gateway("127.0.0.2") as first, gateway("127.0.0.3", first.port) as second:
        names = Names("127.0.0.2")
        url = f"http://{NAME}:{first.port}"
        async with registered(url, names, None, url + again) as running:
            await until(lambda: len(first.heard) > 1, "the first gateway hears")
            names.addresses = ("127.0.0.3",)
            before = len(names.asked)
            await until(lambda: len(second.heard) > 1, "the second gateway hears")
            await until(lambda: len(names.asked) > before + 5, "look-ups")
            assert not running.done()
        assert second.heard.count("DELETE") == 1


async def test_a_name_server_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway("127.0.0.2") as only:
        names = Names("127.0.0.2")
        async with registered(f"http://{NAME}:{only.port}", names):
            await until(lambda: len(only.heard) > 1, "the gateway hears")
            names.broken, before = True, len(names.asked)
            await until(lambda: len(names.asked) > before + join.UNHEARD_TRIES + 1, "look-ups")
            seen = len(only.heard)
            await until(lambda: len(only.heard) > seen + 2, "the gateway hears still")
        assert f"{NAME} has no address, {join.UNHEARD_TRIES} times: no name server" in caplog.text


async def test_a_dead_address_beside_a_gateway_is_no_reason_to_worry(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As `::1` of localhost, where gateways listen on 127.0.0.1 alone."""
    async with gateway("127.0.0.2") as only:
        with caplog.at_level(logging.INFO):
            async with registered(f"http://{NAME}:{only.port}", Names("127.0.0.2", "127.0.0.9")):
                await until(lambda: "127.0.0.9 cannot be reached" in caplog.text, "a line")
        assert {record.levelno for record in caplog.records} == {logging.INFO}


async def test_no_gateway_at_any_address_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async with registered(f"http://{NAME}:9", Names("127.0.0.8", "127.0.0.9")):
        await until(lambda: caplog.text.count("cannot be reached, 20 times") == 2, "two lines")
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


async def test_a_gateway_that_stays_away_is_told_of_less_and_less(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "UNHEARD_TRIES", 2)
    async with registered(f"http://{NAME}:9", Names("127.0.0.9")):
        await until(lambda: "cannot be reached, 16 times" in caplog.text, "the fourth line")
    told = [int(n) for n in re.findall(r"cannot be reached, (\d+) times", caplog.text)]
    assert told == [2, 4, 8, 16]


async def test_with_tls_each_address_shows_the_name_s_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in (NAME, "another.example"):
        authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(tmp_path / name)
    async with AsyncExitStack() as stack:
        good = await stack.enter_async_context(gateway("127.0.0.2", 0, tmp_path / NAME))
        other = await stack.enter_async_context(
            gateway("127.0.0.3", good.port, tmp_path / "another.example")
        )
        names = Names("127.0.0.2", "127.0.0.3")
        url = f"https://{NAME}:{good.port}"
        await stack.enter_async_context(registered(url, names, tmp_path / "ca.pem"))
        await until(lambda: len(good.heard) > 5, "registrations")
        assert not other.heard


async def test_addresses_of_hosts() -> None:
    assert await join.addresses_of("127.0.0.1") == ["127.0.0.1"]
    assert await join.addresses_of("::1") == ["::1"]
    assert "127.0.0.1" in await join.addresses_of("localhost")
    for no_host in ("", "..", "a" * 70, "nowhere.invalid"):
        with pytest.raises(socket.gaierror):
            await join.addresses_of(no_host)
