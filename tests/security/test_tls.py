"""TLS for clients and between processes; who shows the wrong certificate is not talked to."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import trustme

from memserve.api.http_message import Reply, Request
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.serving import Shutdown, bind, serve_http, url_of
from memserve.api.tls import client_tls, server_tls
from memserve.cluster.member import Member
from memserve.errors import ConfigError
from memserve.gateway.relay import Attempt
from memserve.gateway.route import Route
from memserve.gateway.upstream import Upstream
from memserve.gateway.upstream_connection import Unreachable
from tests.gateway_harness import Client

# A name of this machine's that is not its loopback: there certificates count.
NAME = "gateway.example"


class Certificates:
    """Of two authorities: ours and somebody else's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = self._authority("ours")
        self.other = self._authority("theirs")

    def _authority(self, name: str) -> trustme.CA:
        made = trustme.CA()
        made.cert_pem.write_to_path(self.directory / f"{name}.pem")
        return made

    def issued(self, by: trustme.CA, *names: str) -> ssl.SSLContext:
        made = by.issue_cert(*names)
        chain, key = self.directory / "chain.pem", self.directory / "key.pem"
        key.write_bytes(made.private_key_pem.bytes())
        chain.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        context = server_tls(str(chain), str(key))
        assert context is not None
        return context


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@asynccontextmanager
async def served(tls: ssl.SSLContext) -> AsyncIterator[str]:
    async def handle(request: Request, reply: Reply) -> None:
        reply.send(200, json.dumps({"private": request.private}).encode())

    sock, shutdown = bind("127.0.0.1", 0), Shutdown()
    url = url_of(sock, tls=True)

    async def drain() -> None:
        pass

    serving = asyncio.create_task(serve_http(handle, sock, shutdown, drain, 1024, tls=tls))
    try:
        yield url
    finally:
        shutdown.request()
        await serving


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME leads here, as another machine's would."""
    real = socket.getaddrinfo

    def getaddrinfo(host: object, *arguments: object, **more: object) -> object:
        found = "127.0.0.1" if host in (NAME, NAME.encode()) else host
        return real(found, *arguments, **more)  # type: ignore[call-overload, unused-ignore]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def test_a_client_speaks_tls_and_nothing_else(certificates: Certificates) -> None:
    async with served(certificates.issued(certificates.authority, "127.0.0.1")) as url:
        context = client_tls(str(certificates.directory / "ours.pem"))
        async with aiohttp.ClientSession() as session:
            async with session.get(url, ssl=context or True) as answer:
                assert (answer.status, await answer.json()) == (200, {"private": True})
            with pytest.raises(aiohttp.ClientError):
                await session.get(url.replace("https", "http"))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("issuer", "name", "good"),
    [("authority", NAME, True), ("authority", "other.example", False), ("other", NAME, False)],
)
async def test_a_process_elsewhere_shows_a_certificate_of_ours(
    certificates: Certificates, issuer: str, name: str, good: bool
) -> None:
    tls = certificates.issued(getattr(certificates, issuer), name)
    authorities = client_tls(str(certificates.directory / "ours.pem"))
    async with served(tls) as url, PeerClient(None, authorities) as peers:
        there = url.replace("127.0.0.1", NAME)
        upstream = Upstream(None, authorities)
        call = json.dumps({}).encode()
        client = Client()
        attempt = Attempt(Route(Member(there, 0.0)), client.reply, None)
        if good:
            assert (await peers.ask("GET", there)).status == 200
            await upstream.call(there, call, attempt)
            assert attempt.status == 200
        else:
            with pytest.raises(PeerError, match="ertificate"):
                await peers.ask("GET", there)
            with pytest.raises(Unreachable):
                await upstream.call(there, call, attempt)
        upstream.close()


async def test_within_the_machine_the_secret_proves_who_answers(
    certificates: Certificates,
) -> None:
    tls = certificates.issued(certificates.other, "other.example")
    async with served(tls) as url, PeerClient(None) as peers:
        assert (await peers.ask("GET", url)).status == 200


@pytest.mark.parametrize(
    ("cert", "key"), [(None, "key"), ("missing.pem", "missing.pem"), (__file__, __file__)]
)
def test_files_that_are_no_certificates_are_refused(cert: str | None, key: str) -> None:
    with pytest.raises(ConfigError, match="tls_"):
        server_tls(cert, key)
    with pytest.raises(ConfigError, match="tls_ca"):
        client_tls(cert or "missing.pem")
