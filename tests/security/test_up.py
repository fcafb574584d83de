"""`memserve up` has a secret of its own, and keeps it to this user and its processes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from memserve.api.serving import Shutdown
from memserve.cluster.client import ClusterClient
from memserve.cluster.cluster import Cluster
from memserve.cluster.local import LocalBackend
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from memserve.errors import ClusterError
from memserve.secrets import Secret, cluster_secret, secret_of
from tests.fakes import save_tiny_tokenizer
from tests.security.test_control_plane import stranger

MODULE = "tests.e2e.fake_memserve"
KEY = "sk-of-a-client"


async def test_each_run_has_a_secret_that_is_nobody_else_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMSERVE_SECRET", raising=False)
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    config = ClusterConfig(
        model=ModelConfig(path=str(tmp_path), served_name="m"),
        gateway=GatewayConfig(port=0, api_keys=(KEY,)),
        instance=(InstanceConfig(),),
    )
    shutdown, said = Shutdown(), list[str]()
    cluster = Cluster(
        config, LocalBackend(config, said.append, module=MODULE), shutdown, said.append
    )
    try:
        await cluster.start()
        cluster.show_output(said.append)
        own = secret_of(cluster.url)
        assert own != cluster_secret()
        async with ClusterClient(cluster.url) as client:
            (member,) = (await client.view()).instances
        for secret in (cluster_secret(), Secret(("guessed",))):
            async with ClusterClient(cluster.url, secret) as client:
                with pytest.raises(ClusterError):
                    await client.view()
        for url, path in ((cluster.url, "/cluster"), (member.address, "/info")):
            assert (await asyncio.to_thread(stranger, url, "GET", path)).status == 401
        # A client's key opens the API, and it is in no process's arguments; nor is the secret.
        for shown, status in ((KEY, 200), ("sk-other", 401)):
            answer = await asyncio.to_thread(
                stranger, cluster.url, "GET", "/v1/models", Authorization=f"Bearer {shown}"
            )
            assert answer.status == status
        for pid in cluster.pids().values():
            arguments = " ".join(psutil.Process(pid).cmdline())
            assert own.values[0] not in arguments
            assert KEY not in arguments
            assert KEY not in str(psutil.Process(pid).environ())
        assert own.values[0] not in "\n".join(said)
    finally:
        shutdown.request()
        shutdown.request()
        await cluster.stop()
    assert secret_of(cluster.url) == cluster_secret()  # its own is gone
