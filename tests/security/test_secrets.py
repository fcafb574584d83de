"""Where the secret comes from, and who can read it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memserve.errors import ConfigError
from memserve.hosts import is_loopback
from memserve.secrets import (
    Secret,
    cluster_secret,
    keep_secret,
    new_secret,
    require_secret,
    runtime_directory,
    secret_of,
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MEMSERVE_SECRET", raising=False)
    monkeypatch.delenv("MEMSERVE_SECRET_FILE", raising=False)
    monkeypatch.setenv("MEMSERVE_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_a_user_has_a_secret_that_nobody_else_can_read(place: Path) -> None:
    secret = cluster_secret()
    assert secret.local
    assert secret == cluster_secret()
    assert len(secret.values[0]) == 64
    assert place.stat().st_mode & 0o777 == 0o700
    for file in place.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600


def test_it_does_not_suffice_beyond_this_machine() -> None:
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.8.8.8"):
        require_secret(cluster_secret(), host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu1", "127.0.0.1.example.com", ""):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="MEMSERVE_SECRET"):
            require_secret(cluster_secret(), host)
        require_secret(Secret(("given",)), host)


def test_the_environment_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text("from a file\n")
    file.chmod(0o600)
    monkeypatch.setenv("MEMSERVE_SECRET_FILE", str(file))
    assert cluster_secret() == Secret(("from a file",))
    monkeypatch.setenv("MEMSERVE_SECRET", "new, old")
    assert cluster_secret() == Secret(("new", "old"))
    assert cluster_secret("argument") == Secret(("argument",))


def test_a_file_that_everybody_may_read_is_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    file.write_text("for all to see")
    file.chmod(0o644)
    monkeypatch.setenv("MEMSERVE_SECRET_FILE", str(file))
    with pytest.raises(ConfigError, match="chmod 600"):
        cluster_secret()


@pytest.mark.parametrize("content", [b"", b" , \n", b"\xff", b"x" * 5000])
def test_a_file_without_a_secret_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    file.chmod(0o600)
    monkeypatch.setenv("MEMSERVE_SECRET_FILE", str(file))
    with pytest.raises(ConfigError):
        cluster_secret()


def test_a_directory_that_others_can_read_is_refused(place: Path) -> None:
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        runtime_directory()


def test_a_directory_that_somebody_else_has_put_there_is_refused(place: Path) -> None:
    elsewhere = place.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    place.symlink_to(elsewhere)
    with pytest.raises(ConfigError):
        runtime_directory()
    if os.getuid() == 0:
        place.unlink()
        place.mkdir(mode=0o700)
        os.chown(place, 65534, 65534)
        with pytest.raises(ConfigError, match="of this user"):
            runtime_directory()


def test_a_cluster_s_secret_is_found_by_its_gateway_s_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = new_secret()
    file = keep_secret(secret, 8123)
    assert file.stat().st_mode & 0o777 == 0o600
    assert secret_of("http://127.0.0.1:8123") == secret
    assert secret_of("http://localhost:8123/") == secret
    assert secret_of("http://127.0.0.1:8124") == cluster_secret()
    # Not to be told to somebody else's gateway on another machine.
    assert secret_of("http://gpu1:8123") == cluster_secret()
    assert secret_of("http://[bad") == cluster_secret()
    monkeypatch.setenv("MEMSERVE_SECRET", "given")
    assert secret_of("http://127.0.0.1:8123") == Secret(("given",))


def test_a_secret_is_never_shown() -> None:
    secret = new_secret()
    assert secret.values[0] not in repr(secret)
    assert secret.values[0] not in f"{[secret]}"
