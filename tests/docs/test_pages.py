"""The commands in the documentation, run as a reader would, and what the page says they print.

Blocks of a page marked `bash` run in one shell, in an empty directory; a `text` block behind one is
its output, with `...` for what differs. They use port 8000 and the demo model.
"""

from __future__ import annotations

import doctest
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md"))]
PORT = 8000  # of the pages
END = "--- end of block ---"
SECONDS = 280
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_same = doctest.OutputChecker().check_output


class Block(NamedTuple):
    commands: str
    printed: str | None


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    before = ""
    for language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            found.append(Block(text, None))
        elif language == "text":
            assert before == "bash", f"{page.name}: output without a command:\n{text}"
            found[-1] = Block(found[-1].commands, text)
        before = language
    return found


@pytest.fixture
def free_port() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", PORT))
        except OSError:
            pytest.skip(f"port {PORT} is in use: stop what listens there")


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
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for block, got in zip(parts, printed, strict=False):
        if block.printed is not None:
            assert _same(block.printed, got, flags), f"{block.commands}\nprinted:\n{got}"


def test_links_of_pages_lead_to_files() -> None:
    for page in (*DOCS.rglob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
