"""docs/many-hosts.md, run as it stands: each block on its host, in the order of the page.

The demo model is a tiny one here, in a cache of its own, and `scp` copies between the hosts' homes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memserve.models.demo import prepare_demo_model, user_cache
from tests.docs.pages import DOCS, END, blocks
from tests.fakes import save_tiny_tokenizer
from tests.hosts_harness import Host, Hosts, started_hosts
from tests.tiny_models import save_tiny_model

SECONDS = 420  # on a machine that has much else to do
SCP = """#!/bin/sh
for last; do :; done
for name; do [ "$name" = "$last" ] || cp -p "$name" "$HOMES/${last%:}/"; done
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this user's cache has (compiled code above all), but for the demo model."""
    real, own = user_cache(), tmp_path / "cache"
    (own / "memserve" / "models").mkdir(parents=True)
    for entry in real.iterdir() if real.is_dir() else ():
        if entry.name not in ("models", "profiles"):
            (own / "memserve" / entry.name).symlink_to(entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own))
    made = save_tiny_model("llama", tmp_path)
    save_tiny_tokenizer(made)
    with monkeypatch.context() as patch:
        patch.setattr("memserve.models.demo._convert_into", lambda target, _: made.rename(target))
        prepare_demo_model(print)
    return own


class Shell:
    """A shell on a host, which keeps its variables and jobs from block to block."""

    def __init__(self, host: Host, environment: dict[str, str]) -> None:
        self._bash = subprocess.Popen(
            host.command("bash", "-s", environment=environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.run("set -eu")

    def run(self, commands: str) -> str:
        """What they print. Fails if one of them fails."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{commands}\necho '{END}'\n")
        self._bash.stdin.flush()
        printed = ""
        for line in self._bash.stdout:
            if line.strip() == END:
                return printed
            printed += line
        raise AssertionError(f"{commands}\nended with {self._bash.wait()}:\n{printed}")

    def close(self) -> None:
        """Once its host is off."""
        self._bash.communicate()


@pytest.fixture
def page_hosts(tmp_path: Path) -> Iterator[Hosts]:
    with started_hosts("ABC", tmp_path / "hosts") as hosts:
        yield hosts


@pytest.mark.docs
@pytest.mark.timeout(SECONDS)
def test_the_page_of_many_hosts_prints_what_it_says(
    page_hosts: Hosts, cache: Path, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scp").write_text(SCP)
    (programs / "scp").chmod(0o755)
    for host in page_hosts:
        (tmp_path / host.address).symlink_to(host.directory)
    path = (str(programs), str(Path(sys.executable).parent), os.environ["PATH"])
    environment = {"PATH": os.pathsep.join(path), "HOMES": str(tmp_path)}
    shells = {host.name: Shell(host, environment) for host in page_hosts}
    parts = blocks(DOCS / "many-hosts.md")
    assert {part.host for part in parts} == set(shells)
    try:
        for part in parts:
            assert part.host is not None
            part.check(shells[part.host].run(part.commands))
    except AssertionError as error:
        logs = "".join(
            f"--- {log}\n{log.read_text()[-2000:]}\n" for log in tmp_path.glob("hosts/*/*.log")
        )
        raise AssertionError(f"{error}\n{logs}") from error
    finally:
        page_hosts.close()
        for shell in shells.values():
            shell.close()
