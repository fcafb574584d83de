"""Connections that no client of ours makes: garbage at every port, readers that hardly read."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

_LISTEN = "0A"  # a socket's state in /proc/net/tcp
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_ZMTP = b"\xff\0\0\0\0\0\0\0\x01\x7f"  # how a ZeroMQ connection begins
_BEGINNINGS = (
    b"",
    b"\0" * 64,
    _ZMTP,
    _ZMTP + b"\x03\0NULL" + b"\0" * 48,
    _ZMTP + b"\x03\x01CURVE" + b"\xff" * 300,
    b"GET / HTTP/1.1\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)


def listening(pid: int) -> list[int]:
    """TCP ports (IPv4) that a process listens on; none where it has ended."""
    inodes = set()
    ports: set[int] = set()
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return []
    for entry in entries:
        with contextlib.suppress(OSError):
            if match := _SOCKET.fullmatch(os.readlink(entry)):
                inodes.add(match[1])
    for line in lines:
        fields = line.split()
        if fields[3] == _LISTEN and fields[9] in inodes:
            ports.add(int(fields[1].partition(":")[2], 16))
    return sorted(ports)


def throw(ports: list[int], source: random.Random, connections: int = 8) -> None:
    """So many connections to each port, with garbage; half of them are cut at once."""
    held = []
    for port in ports:
        for _ in range(connections):
            with contextlib.suppress(OSError):
                sock = socket.create_connection(("127.0.0.1", port), timeout=5)
                held.append(sock)
                sock.sendall(source.choice(_BEGINNINGS) + source.randbytes(source.randrange(2000)))
                if source.random() < 0.5:
                    sock.close()
    time.sleep(0.2)
    for sock in held:
        sock.close()


def sip(url: str, prompt: list[int], readers: int, seconds: float) -> None:
    """Streams that are asked for and hardly read, and then left."""
    place = urlsplit(url)
    body = json.dumps(
        {"model": "tiny", "prompt": prompt, "max_tokens": 100, "ignore_eos": True, "stream": True}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    socks = []
    for _ in range(readers):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(5)
        sock.connect((place.hostname, place.port))
        sock.sendall(head + body)
        socks.append(sock)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.recv(16)
        time.sleep(0.05)
    for sock in socks:
        sock.close()
