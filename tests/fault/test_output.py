"""Children that say too much, and outputs that take nothing: nobody waits for either."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from memserve.cluster.child import Child
from memserve.cluster.line_printer import MAX_LINE_BYTES, MAX_WAITING, LinePrinter, Lines
from tests.waiting import until

MODULE = "tests.fault.chatty"
HUGE = 3 << 20  # bytes: more than a pipe and asyncio's reader hold


@pytest.fixture(autouse=True)
def here_is_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://[::1]:2"])
async def test_a_child_that_says_a_huge_line_is_read_on(url: str) -> None:
    child = await Child.spawn("chatty", [url, str(HUGE)], MODULE)
    lines: list[str] = []
    child.show_output(lines.append)
    assert await child.address() == url
    await until(lambda: "chatty: said after it" in lines, "what it said after the huge line")
    long = next(line for line in lines if "xxx" in line)
    assert len(long) < MAX_LINE_BYTES + 100
    assert f"[{HUGE - MAX_LINE_BYTES} bytes cut]" in long
    assert child._process.stdin is not None
    child._process.stdin.close()
    assert await asyncio.wait_for(asyncio.shield(child.ended), 15) == 0
    assert lines[-1].startswith("chatty: yyy")  # although that line had no end


async def test_whoever_shows_lines_cannot_stop_the_reading() -> None:
    child = await Child.spawn("chatty", ["http://127.0.0.1:1", str(HUGE)], MODULE)
    shown: list[str] = []

    def show(line: str) -> None:
        shown.append(line)
        raise OSError("no space left on device")

    child.show_output(show)
    assert child._process.stdin is not None
    child._process.stdin.close()
    assert await asyncio.wait_for(asyncio.shield(child.ended), 15) == 0
    assert len(shown) == 4


def test_lines_are_cut_and_put_together() -> None:
    lines = Lines(limit=8)
    assert lines.feed(b"one\ntw") == ["one"]
    assert lines.feed(b"o\n\nthree") == ["two", ""]
    assert lines.feed(b" and more") == []
    assert lines.feed(b" and more\r\nfour") == ["three an [16 bytes cut]"]
    assert lines.end() == ["four"]
    assert lines.end() == []
    assert lines.feed(b"\xff\xfe\n") == ["\ufffd\ufffd"]


def test_a_pipe_that_nobody_reads_holds_up_nobody() -> None:
    reader, writer = os.pipe()
    printer = LinePrinter(writer)
    count = 3 * MAX_WAITING
    line = "x" * 100
    for _ in range(count):
        printer.show(line)
    # Only now somebody reads: what there was room for, and how much there was not.
    seen = bytearray()
    while b"lines dropped]\n" not in seen:
        seen += os.read(reader, 65536)
    printer.show("afterwards")
    while not seen.endswith(b"afterwards\n"):
        seen += os.read(reader, 65536)
    printer.close()
    lines = seen.decode().splitlines()
    dropped = sum(int(each.strip("[").split()[0]) for each in lines if each.startswith("["))
    assert lines.count(line) + dropped == count
    assert dropped > 0
    os.close(reader)
    os.close(writer)


def test_a_full_disk_and_a_closed_pipe_are_survived() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    reader, writer = os.pipe()
    os.close(reader)
    for fd in (full, writer):
        printer = LinePrinter(fd)
        for _ in range(100):
            printer.show("a line")
        printer.close()
        assert printer.dropped == 100
        os.close(fd)
