"""What a member says of itself is bounded where it is read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from memserve.api.kv_events import KVEventsInfo, topic_of
from memserve.api.status import (
    InstanceInfo,
    InstanceState,
    InstanceStats,
    JoinRequest,
    Limits,
    check_id,
)
from memserve.errors import ConfigError
from memserve.types import Epoch, InstanceId, Role
from tests.unit.test_cluster_membership import STATS

LIMITS = Limits(320, 256, 1024, 256, 16, "float32", "cpu", 1)
EVENTS = KVEventsInfo("tcp://127.0.0.1:5555", "tcp://[::1]:5556", "kv@p0@1", 16)
INFO = InstanceInfo(
    InstanceId("p0"),
    Epoch((1 << 63) - 1),
    Role.PREFILL,
    InstanceState.READY,
    1,
    "m",
    LIMITS,
    EVENTS,
)
_info = msgspec.json.Decoder(InstanceInfo)
_stats = msgspec.json.Decoder(InstanceStats)


def changed(value: msgspec.Struct, path: str, new: Any) -> bytes:
    tree = msgspec.to_builtins(value)
    *parents, last = path.split(".")
    at = tree
    for name in parents:
        at = at[name]
    at[last] = new
    return msgspec.json.encode(tree)


def test_what_our_instances_say_is_read() -> None:
    assert _info.decode(msgspec.json.encode(INFO)) == INFO
    assert _stats.decode(msgspec.json.encode(STATS)) == STATS
    for name in ("0.0.0.0", "*", "host-1.example", "[::]", "[fe80::1%eth0]"):
        assert _info.decode(changed(INFO, "kv_events.endpoint", f"tcp://{name}:1"))
    longest = topic_of(InstanceId("x" * 256), Epoch((1 << 63) - 1))
    assert _info.decode(changed(INFO, "kv_events.topic", longest))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(
            ("id", bad)
            for bad in ("", "x" * 257, "a\n", "a b", "\u2028", "http://a:1", "é", "a\x00")
        ),
        *(("epoch", bad) for bad in (-1, 1 << 63, 1.5)),
        *(("pid", bad) for bad in (-1, 1 << 64)),
        ("model", "m" * 1025),
        *((f"limits.{name}", bad) for bad in (0, -1, 1 << 41) for name in ("vocab_size",)),
        *((f"limits.{name}", 0) for name in ("max_model_len", "pool_tokens", "max_tokens")),
        *((f"limits.{name}", 0) for name in ("block_tokens", "threads", "max_running")),
        ("limits.block_tokens", 1 << 21),
        ("limits.dtype", "f" * 65),
        *(("kv_events.topic", bad) for bad in ("x" * (1 << 20), "a\n", "é")),
        *(("kv_events.endpoint", bad) for bad in ("ipc:///x", "inproc://x", "tcp://a", "tcp://:1")),
        ("kv_events.replay_endpoint", "tcp://127.0.0.1:1\n"),
        ("kv_events.block_tokens", 0),
    ],
)
def test_what_is_absurd_is_refused(path: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        _info.decode(changed(INFO, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("engine.running", -1),
        ("engine.steps", 1 << 64),
        ("engine.busy_seconds", -1.0),
        ("engine.busy_seconds", 1e300),
        ("pool.hbm", {"total": -1}),
        ("latencies.whole", {"counts": [1], "sum": 0}),
        ("latencies.whole", {"counts": [0] * 10_000, "sum": 0}),
    ],
)
def test_figures_that_cannot_be_are_refused(path: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        _stats.decode(changed(STATS, path, value))


def test_ids_are_checked_wherever_they_come_from() -> None:
    assert check_id("prefill-0.example:8000/a@b_c") == "prefill-0.example:8000/a@b_c"
    for bad in ("", "a b", "x" * 257, "https://a"):
        with pytest.raises(ConfigError, match="no id of an instance"):
            check_id(bad)
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(
                msgspec.json.encode({"address": "http://a", "id": bad}), type=JoinRequest
            )
