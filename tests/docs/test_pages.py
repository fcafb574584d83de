"""The commands in the documentation, run as a reader would, and what the page says they print.

Blocks of a page run in one shell, in an empty directory. They use port 8000 and the demo model.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, END, blocks

PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md"))]
PORT = 8000  # of the pages
SECONDS = 280
FREE_SECONDS = 60.0  # for a port that a killed cluster had


@pytest.fixture
def free_port() -> None:
    """Wait for the processes of the page before: some end when they miss the one that is killed."""
    given_up = time.monotonic() + FREE_SECONDS
    while not _is_free():
        if time.monotonic() > given_up:
            pytest.skip(f"port {PORT} is in use: stop what listens there")
        time.sleep(0.2)


def _is_free() -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", PORT))
        except OSError:
            return False
    return True


@pytest.mark.docs
@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("free_port")
def test_a_pages_commands_print_what_it_says(page: Path, tmp_path: Path) -> None:
    parts = blocks(page)
    assert parts
    script = "set -eu\n"
    script += "".join(f"{block.commands}\necho '{END}'\n" for block in parts)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        # Other clusters of this user are not the page's.
        env={**os.environ, "PATH": path, "MEMSERVE_RUNTIME_DIR": str(tmp_path / "runtime")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=SECONDS)
    finally:
        logs = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in tmp_path.glob("*log"))
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, output + logs
    printed = output.split(f"{END}\n")
    assert len(printed) == len(parts) + 1
    for block, got in zip(parts, printed, strict=False):
        block.check(got)


def test_links_of_pages_lead_to_files() -> None:
    for page in (*DOCS.rglob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
