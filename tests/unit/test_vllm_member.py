"""A vLLM server that joins a cluster by one flag: what the instance beside it is started with."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from memserve.config import ModelConfig
from memserve.errors import ConfigError
from memserve.types import Role
from memserve.vllm.connector import member
from memserve.vllm.connector.member import (
    Member,
    MemberSettings,
    instance_command,
    read_arguments,
    read_settings,
)

MODEL = ModelConfig(path="owner/model", served_name="m")


def test_settings_are_read_as_a_user_writes_them() -> None:
    given = {"dram_bytes": "64GiB", "role": "prefill", "join": ["http://gateway:8000"]}
    settings = read_settings(given)
    assert (settings.role, settings.gateways) == (Role.PREFILL, ("http://gateway:8000",))
    assert read_settings({"dram_bytes": 4096, "join": "http://g"}).gateways == ("http://g",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "dram_bytes"),
        ({"dram_bytes": "1GiB", "rule": "prefill"}, "unknown field `rule`"),
        ({"dram_bytes": "1GiB", "role": "both"}, "Invalid enum value 'both'"),
        ({"dram_bytes": "1GiB", "caching": "some"}, "caching"),
    ],
)
def test_settings_that_are_wrong_are_named_with_those_there_are(
    given: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        read_settings(given)
    assert "known: dram_bytes, instance, role, join" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (["serve", "model"], "http://127.0.0.1:8000"),
        (["--port", "9", "--host", "0.0.0.0"], "http://127.0.0.1:9"),
        (["--port=9", "--host", "10.0.0.1"], "http://10.0.0.1:9"),
        (["--ssl_certfile", "x.pem", "--port", "9"], "https://127.0.0.1:9"),
        (["--host", "fd00::1", "--ssl-certfile", "x.pem"], "https://[fd00::1]:8000"),
    ],
)
def test_a_server_s_command_line_tells_where_it_listens(arguments: list[str], url: str) -> None:
    said = read_arguments([*arguments, "--block-size", "32", "--api_key", "k"])
    assert said is not None
    assert (said.url, said.key) == (url, "k")


@pytest.mark.parametrize("arguments", [["--uds", "/run/x"], ["--config", "x.yaml"], ["--port"]])
def test_a_command_line_that_does_not_tell_is_none(arguments: list[str]) -> None:
    assert read_arguments(arguments) is None


def test_the_instance_is_told_its_server_its_role_and_its_gateways() -> None:
    settings = MemberSettings(
        dram_bytes="1GiB", role=Role.DECODE, join=("http://g:1", "http://h:2")
    )
    command = instance_command(
        settings, "v", MODEL, "http://127.0.0.1:8000", "tcp://127.0.0.1:5557"
    )
    shown = subprocess.run(
        [*command, "--vllm-pool", "/run/pool", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr  # each of these is a flag
    text = " ".join(command)
    for part in ("--id v", "--role decode", "--join http://g:1", "--join http://h:2"):
        assert part in text
    for part in ("--vllm-url http://127.0.0.1:8000", "--vllm-events tcp://127.0.0.1:5557"):
        assert part in text
    assert "--model owner/model" in text


def test_an_instance_that_ends_is_started_again_until_its_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "FIRST_PAUSE_SECONDS", 0.01)
    lives, key = tmp_path / "lives", tmp_path / "key"
    script = (
        "import os, sys, time\n"
        f"open({str(key)!r}, 'w').write(os.environ.get('VLLM_API_KEY', ''))\n"
        f"open({str(lives)!r}, 'a').write('x')\n"  # the last file: `close` may end it from here
        f"if len(open({str(lives)!r}).read()) < 3: sys.exit(1)\n"
        "sys.stdin.read()\n"
    )
    own = Member()
    directory = own.pool.parent
    assert directory.stat().st_mode & 0o077 == 0
    own.start([sys.executable, "-c", script], "secret")
    while not lives.exists() or len(lives.read_text()) < 3:
        time.sleep(0.01)
    own.close()
    assert lives.read_text() == "xxx"
    assert key.read_text() == "secret"
    assert "VLLM_API_KEY" not in os.environ
    assert not directory.exists()


def test_what_cannot_be_started_now_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "FIRST_PAUSE_SECONDS", 0.01)
    program = tmp_path / "program"
    own = Member()
    own.start([str(program)], None)
    time.sleep(0.1)
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\ncat\n")
    program.chmod(0o700)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    own.close()


def test_what_a_killed_engine_has_left_the_next_one_removes() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    left = Path(tempfile.mkdtemp(prefix=f"memserve-member-{process.pid}-"))
    alive = Member()
    assert not left.exists()
    other = Member()
    assert alive.pool.parent.exists()
    for each in (alive, other):
        each.close()
