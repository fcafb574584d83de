"""Instances find out whether KV could go to each other, without sending any."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

import memserve
from memserve.api import msgpack
from memserve.api.errors import ApiError
from memserve.api.generate import PrefillPeer
from memserve.api.handoff import MEET_PATH, MeetCall, MeetResult
from memserve.api.peer_client import PeerError
from memserve.types import InstanceId, Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import Node, node, pair
from tests.insider import peers
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma3"):
        save_tiny_tokenizer(save_tiny_model(name, directory))
    return directory


async def meet(one: Node, peer: PrefillPeer) -> MeetResult:
    """As over HTTP, signed."""
    async with peers() as client:
        body = msgpack.encode(MeetCall(peer))
        decode = msgspec.msgpack.Decoder(MeetResult).decode
        return await client.call("POST", one.url + MEET_PATH, decode, body, media=msgpack.MEDIA)


async def test_pools_meet_by_shared_memory_and_nothing_is_held(models: Path) -> None:
    async with pair(models / "llama") as (p, d):
        for one, other in ((p, d), (d, p), (p, d)):
            met = await meet(one, other.peer)
            assert met.transport == "shm"
            assert 0 <= met.seconds < 5
        assert (p.cached, d.cached) == (0, 0)
        p.pool.check_integrity()


async def test_what_stands_in_the_way_is_said(models: Path) -> None:
    async with pair(models / "llama") as (p, d), node(models / "gemma3", Role.DECODE) as other:
        for peer, why in (
            (other.peer, "holds other KV"),
            (PrefillPeer(InstanceId("else"), d.url), f"is the address of {d.peer.id}"),
            (PrefillPeer(d.peer.id, "http://127.0.0.1:9"), "gave no answer"),
        ):
            with pytest.raises(PeerError, match=why) as caught:
                await meet(p, peer)
            assert caught.value.detail is not None
            assert caught.value.detail.code == "not_met"
        with pytest.raises(ApiError, match="does not meet itself"):
            await p.instance.meet(MeetCall(p.peer))


async def test_an_instance_says_where_its_pool_is_and_its_version(models: Path) -> None:
    async with pair(models / "llama") as (p, _), peers() as client:
        info = await client.call("GET", f"{p.url}/info", json.loads)
        assert info["pool_peer"] == msgspec.to_builtins(p.link.address)
        assert info["version"] == memserve.__version__
