"""Clients' keys: none gets in without, none reaches another tenant's cache."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from memserve.api.api_keys import (
    ApiKey,
    append_entry,
    hashed,
    load_keys,
    new_key,
)
from memserve.api.limits import MAX_NAME_CHARACTERS
from memserve.api.namespaces import cache_salt_of, salted
from memserve.config import GatewayConfig
from memserve.errors import ConfigError
from memserve.gateway.access import Client
from tests.e2e.conftest import StartCluster
from tests.fakes import MODEL, FakeCluster, FakeEngine, metric, until
from tests.security.test_control_plane import stranger

ASKED = json.dumps({"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2})
KEY = "sk-one"


@pytest.fixture(scope="module")
def cluster(start_module_cluster: StartCluster) -> FakeCluster:
    return start_module_cluster(FakeEngine(), gateway=GatewayConfig(port=0, api_keys=(KEY,)))


@pytest.mark.parametrize(
    "shown",
    [
        None,
        "",
        KEY,
        f"Basic {KEY}",
        "Bearer",
        "Bearer sk-on",
        f"Bearer {KEY}x",
        "Bearer " + "x" * 9999,
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models"])
def test_nobody_gets_in_without_a_key(cluster: FakeCluster, shown: str | None, path: str) -> None:
    headers = {} if shown is None else {"Authorization": shown}
    method = "GET" if path == "/v1/models" else "POST"
    before = len(cluster.engines[0].submitted)
    answer = stranger(cluster.url, method, path, ASKED if method == "POST" else None, **headers)
    assert answer.status == 401
    assert answer.json["error"]["code"] == "invalid_api_key"
    assert len(cluster.engines[0].submitted) == before


def test_metrics_tell_of_those_who_were_refused(cluster: FakeCluster) -> None:
    before = metric(cluster.url, 'memserve_refusals_total{why="api_key"}')
    assert stranger(cluster.url, "GET", "/v1/models").status == 401
    assert metric(cluster.url, 'memserve_refusals_total{why="api_key"}') == before + 1


def test_who_has_a_key_is_served(cluster: FakeCluster) -> None:
    answer = stranger(cluster.url, "POST", "/v1/completions", ASKED, Authorization=f"bearer {KEY}")
    assert answer.status == 200
    assert stranger(cluster.url, "GET", "/v1/models", Authorization=f"Bearer {KEY}").status == 200


def test_a_key_opens_nothing_but_the_api(cluster: FakeCluster) -> None:
    shown = f"Bearer {KEY}"
    assert stranger(cluster.url, "GET", "/cluster", Authorization=shown).status == 401
    assert stranger(cluster.urls[0], "GET", "/info", Authorization=shown).status == 401


def test_keys_that_were_taken_out_of_the_file_are_worth_nothing_any_more(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    old, entry = new_key("old", None, False)
    append_entry(file, entry)
    assert file.stat().st_mode & 0o077 == 0
    config = GatewayConfig(port=0, api_keys_file=str(file))
    cluster = start_cluster(FakeEngine(), gateway=config)

    def status(key: str) -> int:
        shown = f"Bearer {key}"
        return stranger(cluster.url, "GET", "/v1/models", Authorization=shown).status

    assert status(old) == 200
    new, entry = new_key("new", "team", True)
    file.write_text(f"# of today\n\n{entry}\n")
    assert (status(old), status(new)) == (200, 401)
    cluster.call(cluster.gateway._reload_keys)
    assert (status(old), status(new)) == (401, 200)
    for nothing in ("", "\n", "# all gone\n"):
        file.write_text(nothing)
        cluster.call(cluster.gateway._reload_keys)
        assert stranger(cluster.url, "GET", "/v1/models").status == 401  # and not everybody in
        assert status(new) == 401
    file.write_text(f"{entry}\n")
    cluster.call(cluster.gateway._reload_keys)
    file.write_text("sha256:nonsense\n")
    cluster.call(cluster.gateway._reload_keys)  # says so, and keeps what it had
    assert (status(old), status(new)) == (401, 200)


def test_tenants_do_not_share_cached_prompts() -> None:
    salts = {
        client.salted(salt)
        for client in (
            Client(ApiKey(b"1", "a", "a")),
            Client(ApiKey(b"2", "b", "b")),
            Client(ApiKey(b"3", "a:b", "a")),
        )
        for salt in ("", "x", "b:x", "key@a:")
    }
    assert len(salts) == 8  # the first and the last are one tenant
    assert Client().salted("x") == "x"


def test_salts_are_those_that_vllm_takes() -> None:
    tenant = Client(ApiKey(b"1", "a", "a" * 64))
    longest, other = ("x" * (MAX_NAME_CHARACTERS - 1) + last for last in "xy")
    given = ("", "x", "a@b", "a/b", "a\\b", "a\0b", "x" * 128, "x" * 129, longest, other)
    given += ("salt:" + "x" * 123, "sequence:c.0-0-0")
    digest = Client().salted("a@b")
    salts = [client.salted(salt) for client in (tenant, Client()) for salt in (*given, digest)]
    assert len(set(salts)) == len(salts)
    for salt in salts:
        assert len(salt) <= 128
        assert not set(salt) & set("@/\\\0")
        assert cache_salt_of(salted(salt)) == (salt or None)


def test_entries_are_hashes_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, entry = new_key("alice", "team-a", True)
    assert re.fullmatch(r"sha256:[0-9a-f]{64} name=alice tenant=team-a priority", entry)
    assert key not in entry
    monkeypatch.setenv("MEMSERVE_API_KEYS", hashed([entry, "plain name=bob"]))
    assert "plain" not in os.environ["MEMSERVE_API_KEYS"]
    keys = load_keys((), None)
    found, bob = keys.find(key.encode()), keys.find(b"plain")
    assert found is not None
    assert (found.name, found.tenant, found.privileged) == (
        "alice",
        "team-a",
        True,
    )
    assert bob is not None
    assert (bob.name, bob.privileged) == ("bob", False)
    assert keys.find(b"") is None


@pytest.mark.parametrize(
    "entry",
    [
        "sha256:12",
        "key name=",
        "key name=a\u00e9",
        "key who=me",
        "key tenant=a:b",
        "key weight=0",
        "key weight=x",
        "key name=" + "a" * 65,
    ],
)
def test_entries_that_are_none_are_refused_with_their_place(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"good\n{entry}\n")
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))}:2"):
        load_keys((), str(file))


def test_an_entry_is_added_to_a_file_that_ends_anyhow(tmp_path: Path) -> None:
    for before in ("", "sk-old", "sk-old\n", "sk-old # a comment"):
        file = tmp_path / "keys"
        file.write_text(before)
        key, entry = new_key("dave", None, False)
        append_entry(file, entry)
        keys = load_keys((), str(file))
        assert keys.find(key.encode()) is not None
        assert (keys.find(b"sk-old") is not None) == bool(before)


def test_no_message_repeats_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for entries in ("sk-a sk-b", "name=alice sk-b", "sk-a name=x sk-b=c"):
        monkeypatch.setenv("MEMSERVE_API_KEYS", entries)
        with pytest.raises(ConfigError) as refused:
            load_keys((), None)
        assert "sk-" not in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="keys"):
        load_keys((), str(file))


def test_the_log_says_whose_key_it_was(
    start_cluster: StartCluster, caplog: pytest.LogCaptureFixture
) -> None:
    key, entry = new_key("alice", None, False)
    cluster = start_cluster(FakeEngine(), gateway=GatewayConfig(port=0, api_keys=(entry,)))
    with caplog.at_level("INFO", "memserve.gateway.app"):
        shown = f"Bearer {key}"
        answer = stranger(cluster.url, "POST", "/v1/completions", ASKED, Authorization=shown)
        assert answer.status == 200
        until(lambda: " key=alice " in caplog.text)
    assert key not in caplog.text


def test_without_keys_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (None, ""):  # as `memserve up` hands on that there are none
        if given is None:
            monkeypatch.delenv("MEMSERVE_API_KEYS", raising=False)
        else:
            monkeypatch.setenv("MEMSERVE_API_KEYS", given)
        assert not load_keys((), None).wanted
    monkeypatch.setenv("MEMSERVE_API_KEYS", " , ")
    assert load_keys((), None).wanted
