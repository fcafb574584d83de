"""Hosts of tests are apart, and nothing of them stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts_harness import GIGABIT, Host, Hosts

PORT = 7000
SENT = 24_000_000  # bytes: 0.2 s of the link
RECEIVE = f"""
import socket, sys
with socket.create_server(("", {PORT})) as server:
    print("listens", flush=True)
    with server.accept()[0] as peer:
        size = 0
        while data := peer.recv(1 << 20):
            size += len(data)
        print(size, flush=True)
"""


def listening(host: Host) -> None:
    received = host.start(sys.executable, "-c", RECEIVE)
    while "listens" not in received.text():
        assert received.running(), received.text()
        time.sleep(0.01)


def test_a_link_has_its_rate_and_its_counters(hosts: Hosts) -> None:
    a, b, c = hosts
    listening(b)
    before = [host.traffic() for host in hosts]
    begin = time.monotonic()
    with a.entered(), socket.create_connection((b.address, PORT)) as sock:
        sock.sendall(bytes(SENT))
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
    seconds = time.monotonic() - begin
    sent, received, other = (
        host.traffic().since(at) for host, at in zip(hosts, before, strict=True)
    )
    assert SENT < sent.sent < 1.1 * SENT
    assert SENT < received.received < 1.1 * SENT
    assert other.received < 100_000
    # A lower bound: the link cannot have been faster, however busy the machine is. The bucket
    # and the switch's queue may hold some.
    assert seconds > 0.5 * 8 * SENT / GIGABIT
    assert c.is_up


def test_hosts_share_no_memory_and_no_processes(hosts: Hosts) -> None:
    a, b, _ = hosts
    a.run("touch", "/dev/shm/of-a")
    assert b.run("ls", "/dev/shm") == ""
    assert not Path("/dev/shm/of-a").exists()
    sleeping = a.start("sleep", "60")
    assert sleeping.running()
    assert "sleep" not in b.run("sh", "-c", "cat /proc/[0-9]*/comm")
    assert b.run("hostname").strip() == "host-b"
    assert sorted(b.run("ls", "/sys/class/net").split()) == ["eth0", "lo"]


@pytest.mark.parametrize("silently", [True, False])
def test_a_host_that_is_killed_comes_back_empty(hosts: Hosts, silently: bool) -> None:
    a, b, _ = hosts
    listening(b)
    b.run("touch", "/dev/shm/of-b")
    with a.entered():
        sock = socket.create_connection((b.address, PORT))
    sleeping = b.start("sleep", "60")
    with sock:
        if silently:
            b.cut()
        b.kill()
        assert not psutil.pid_exists(sleeping.pid)
        sock.settimeout(0.5)
        if silently:  # as when somebody pulls the plug
            with pytest.raises(TimeoutError):
                sock.recv(1)
        else:
            assert sock.recv(1) == b""
    b.boot()
    assert b.run("ls", "/dev/shm") == ""
    listening(b)
    with a.entered(), socket.create_connection((b.address, PORT), timeout=10):
        pass


def test_nothing_is_left_of_a_test_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from tests.hosts_harness import Hosts
with Hosts("AB", Path({str(tmp_path)!r})) as hosts:
    print(*(host.start("sleep", "600").pid for host in hosts), flush=True)
    time.sleep(600)
"""
    links = os.listdir("/sys/class/net")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    test = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert test.stdout is not None
    pids = [int(pid) for pid in test.stdout.readline().split()]
    if not pids:
        _, said = test.communicate()
        pytest.skip(said.strip().splitlines()[-1])
    test.send_signal(signal.SIGKILL)
    test.communicate()
    gone, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 10)
    assert not alive, gone
    assert os.listdir("/sys/class/net") == links


def test_threads_of_an_entered_host_stay_there(hosts: Hosts) -> None:
    a, b, _ = hosts
    found: list[str] = []

    def look() -> None:
        found.append(Path("/proc/thread-self/net/dev").read_text())

    with b.entered():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    inside, outside = found
    assert "eth0" in inside
    assert inside != outside
    assert a.traffic().sent >= 0
