"""A user's commands find the user's clusters, and only those."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from memserve.cluster import running
from memserve.cluster.running import DEFAULT_URL, announce_cluster, find_gateway, running_clusters
from memserve.errors import ConfigError
from memserve.secrets import DIRECTORY_VARIABLE, Secret, keep_secret


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "runtime"
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(path))
    monkeypatch.delenv("MEMSERVE_SECRET", raising=False)
    return path


def test_the_only_cluster_is_found_with_its_secret() -> None:
    assert find_gateway(None) == (DEFAULT_URL, None)
    secret = Secret(("s" * 20,))
    keep_secret(secret, 8123)
    file = announce_cluster("https://10.0.0.5:8123", "10.0.0.5", 8123)
    assert file.stat().st_mode & 0o777 == 0o600
    assert find_gateway(None) == ("https://10.0.0.5:8123", secret)
    file.unlink()
    assert find_gateway(None) == (DEFAULT_URL, None)


def test_a_url_that_is_given_wins() -> None:
    announce_cluster("http://127.0.0.1:8123", "127.0.0.1", 8123)
    assert find_gateway("http://gpu1:9") == ("http://gpu1:9", None)


def test_of_several_one_is_to_be_chosen() -> None:
    for port in (8124, 8123):
        announce_cluster(f"http://127.0.0.1:{port}", "127.0.0.1", port)
    with pytest.raises(
        ConfigError,
        match=r"run here: http://127.0.0.1:8123, http://127.0.0.1:8124; choose with --url",
    ):
        find_gateway(None)


def test_a_killed_clusters_file_is_removed(place: Path) -> None:
    file = announce_cluster("http://127.0.0.1:8123", "127.0.0.1", 8123)
    alive = msgspec.json.decode(file.read_bytes(), type=running.RunningCluster)
    again = msgspec.structs.replace(alive, started=alive.started + 1)  # another process by that id
    file.write_bytes(msgspec.json.encode(again))
    assert running_clusters() == []
    assert not file.exists()


def test_another_pid_namespaces_cluster_is_judged_by_its_port() -> None:
    file = announce_cluster("http://127.0.0.1:1", "127.0.0.1", 1)
    alive = msgspec.json.decode(file.read_bytes(), type=running.RunningCluster)
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(alive, namespace=5)))
    assert running_clusters() == []  # nobody listens on port 1


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff", b'{"url": "file:///etc/passwd"}', b"[1]", b"x" * 10_000]
)
def test_a_file_that_says_nothing_useful_is_passed_over(place: Path, data: bytes) -> None:
    good = announce_cluster("http://127.0.0.1:8123", "127.0.0.1", 8123)
    (good.parent / "gateway-9.address").write_bytes(data)
    os.chmod(good.parent / "gateway-9.address", 0o600)
    assert [one.port for one in running_clusters()] == [8123]


def test_a_directory_that_others_may_write_is_not_believed(place: Path) -> None:
    announce_cluster("http://127.0.0.1:8123", "127.0.0.1", 8123)
    place.chmod(0o777)
    with pytest.raises(ConfigError, match="nobody else may read"):
        find_gateway(None)


def test_a_cluster_in_another_namespace_is_passed_over_and_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its processes cannot be seen from here, and its port may be one of another network."""
    file = announce_cluster("http://127.0.0.1:9", "127.0.0.1", 9)
    monkeypatch.setattr(running, "pid_namespace", lambda: 1)
    assert running_clusters() == []
    assert file.exists()
