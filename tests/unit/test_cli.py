"""The command line: mistakes end in one line and exit code 2, and help names every flag."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memserve import __version__, cli
from memserve.cluster.launches import instance_launches, with_threads
from memserve.config import ClusterConfig, InstanceConfig, ModelConfig
from memserve.secrets import Secret


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `memserve ARGUMENTS...`."""
    monkeypatch.setattr(sys, "argv", ["memserve", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), output.out, output.err


def test_the_version_is_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, capsys, "--version") == (0, f"memserve {__version__}\n", "")


def test_starting_the_command_imports_neither_torch_nor_transformers() -> None:
    """Help, mistakes and gateways should not take seconds."""
    code = (
        "import sys, memserve.cli, memserve.gateway.run; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "absent.toml"], "absent.toml: No such file or directory"),
        (["up", "--hbm-blocks", "0"], "--hbm-blocks 0: Expected `int` >= 1"),
        (["up", "--port", "0", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["prepare", "--model", "/no/such"], "no model '/no/such'"),
        (["bench", "serve", "--rate", "0"], "--rate 0: Expected `float` > 0"),
        (["bench", "serve", "--cluster", "absent.toml"], "absent.toml: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("memserve: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_unknown_flag_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(monkeypatch, capsys, "up", "--hbm-block", "3")
    assert code == 2
    assert "--hbm-blocks" in err


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("up", ["--model", "--port", "--caching", "--hbm-blocks", "--count"]),
        ("gateway", ["--instances", "--model", "--policy", "--cors-origins", "--allowed-origins"]),
        ("instance", ["--role", "--join", "--id", "--port", "--cpus", "--drain-seconds"]),
        ("bench", ["serve", "engine", "pool"]),
        ("profile", ["--model", "--threads", "--held-out", "--plot"]),
    ],
)
def test_help_names_the_flags(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    flags: list[str],
) -> None:
    code, out, _ = run(monkeypatch, capsys, command, "--help")
    assert code == 0
    for flag in flags:
        assert flag in out


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ClusterConfig]:
    """The configurations that `up` would start."""
    configs: list[ClusterConfig] = []

    async def record(config: ClusterConfig, *_: Any, **__: Any) -> None:
        configs.append(config)

    monkeypatch.setattr(cli, "run_cluster", record)
    return configs


def test_flags_override_the_file_in_every_instance_of_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    started: list[ClusterConfig],
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "c.toml").write_text(
        f"model.path = '{tmp_path}'\n[gateway]\nport = 1\ndrain_seconds = 5\n"
        "[[instance]]\nhbm_blocks = 1\nport = 7\n[[instance]]\ndram_blocks = 2\n"
    )
    flags = ["--hbm-blocks", "9", "--port", "2", "--no-aggregated"]
    code, _, _ = run(monkeypatch, capsys, "up", *flags, str(tmp_path / "c.toml"))
    assert code == 0
    (config,) = started
    assert config.model == ModelConfig(path=str(tmp_path))
    assert (config.gateway.port, config.gateway.drain_seconds) == (2, 5)
    assert not config.cache.aggregated
    assert config.instance == (
        InstanceConfig(hbm_blocks=9, port=7),
        InstanceConfig(hbm_blocks=9, dram_blocks=2),
    )


def test_instances_share_the_cores_instead_of_each_taking_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("memserve.cluster.launches.available_cores", lambda: 7)
    config = ClusterConfig(instance=(InstanceConfig(count=2), InstanceConfig(threads=5)))
    launches = instance_launches(with_threads(config), Secret(("x",)))
    commands = [launch.arguments for launch in launches]
    assert [command[command.index("--threads") + 1] for command in commands] == ["2", "2", "5"]
    assert [command[command.index("--id") + 1] for command in commands] == [
        "colocated-0",
        "colocated-1",
        "colocated-2",
    ]


def test_json_goes_to_standard_output_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress must not get into what a program reads."""
    small = ["--prompts", "20", "--prompt-tokens", "64", "--prefixes", "2", "--prefix-tokens", "32"]
    code, out, err = run(monkeypatch, capsys, "bench", "pool", *small, "--json", "-")
    assert code == 0
    assert err  # the progress
    assert {"environment", "config", "result"} <= set(json.loads(out))
