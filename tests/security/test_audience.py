"""At which addresses a server takes what was signed for it."""

from __future__ import annotations

import socket

import pytest

from memserve.api.audience import Audience, check_url, origin_of
from memserve.api.serving import bind
from memserve.errors import ConfigError


def audience(*, any_name: bool = False) -> tuple[Audience, int]:
    made = Audience(any_name=any_name)
    with bind("127.0.0.1", 0) as sock:
        made.add_socket(sock)
        return made, sock.getsockname()[1]


def test_an_instance_is_at_its_machine_s_addresses_and_names() -> None:
    made, port = audience()
    for host in ("127.0.0.1", "127.8.9.1", "localhost", socket.gethostname().lower()):
        assert f"{host}:{port}" in made
        assert f"{host}:{port + 1}" not in made
    for host in ("192.0.2.1", "gateway", "localhost.example", "", "[2001:db8::1]", "127.0.0.1.nip"):
        assert f"{host}:{port}" not in made
    for authority in ("127.0.0.1", "127.0.0.1:", f"127.0.0.1:{port}x", f"127.0.0.1:²{port}", 7):
        assert authority not in made


def test_a_gateway_has_names_that_it_does_not_know() -> None:
    made, port = audience(any_name=True)
    assert f"gateway.example:{port}" in made
    assert f"gateway.example:{port + 1}" not in made
    assert f"192.0.2.1:{port}" not in made  # an address is no name


def test_where_else_it_is_reached_is_said() -> None:
    made, _ = audience()
    made.add_url("https://node.example")
    made.add_url("http://[2001:db8::1]:30001/")
    assert "node.example:443" in made
    assert "[2001:db8::1]:30001" in made
    assert "node.example:80" not in made


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://GPU1/x?y", "http://gpu1:80"),
        ("https://gpu1", "https://gpu1:443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_origin_has_its_port(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    "url", ["ftp://x", "x", "http://", "http://h:0", "http://h:x", "http://h/p"]
)
def test_what_is_no_url_of_a_process_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no http"):
        check_url(url)
