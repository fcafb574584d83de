"""Configuration files, damaged: they are read, or refused with a ConfigError, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memserve.config import check_config, load_config
from memserve.errors import ConfigError
from tests.fuzz.documents import Node, Pairs, Raw, from_json
from tests.fuzz.mutate import Mutator, mutators

TEXT = """# a cluster
[model]
path = "demo"
dtype = "bfloat16"
max_model_len = 4_096

[gateway]
host = "127.0.0.1"
port = 8000
workers = 2
policy = "prompt-tree"
drain_seconds = 30.5
access_log = false

[cache]
caching = "full"
block_tokens = 0x10

[[instance]]
role = "prefill"
count = 1
cpus = [0, 1]

[[instance]]
role = 'decode'
hbm_blocks = 512
dram_blocks = 0
"""
TREE = {
    "model": {"path": "demo", "dtype": "float32", "revision": "main"},
    "gateway": {"port": 8000, "policy": "session", "drain_seconds": 5.0, "access_log": True},
    "cache": {"caching": "pd", "mode": "by-layer", "block_tokens": 16},
    "instance": [{"role": "decode", "count": 2, "cpus": [0]}, {"role": "prefill"}],
}


def read(data: bytes, file: Path, mutator: Mutator | None = None) -> bool:
    """Whether it was a configuration."""
    file.write_bytes(data)
    try:
        check_config(load_config(file))
    except ConfigError as error:
        return bool(not str(error))  # it says why
    except Exception as error:  # noqa: BLE001 - whatever comes out is what is sought
        pytest.fail(f"{mutator!r}: {error!r:.300} for {data[:300]!r}")
    return True


def toml(node: Node) -> bytes:
    """A tree as TOML, in as far as it can be: tables are inline, and what is not a table or a
    list is as JSON has it."""
    match node:
        case Raw():
            return node.data
        case Pairs():
            return b"{" + b", ".join(key(k) + b" = " + toml(v) for k, v in node) + b"}"
        case list():
            return b"[" + b", ".join(map(toml, node)) + b"]"
        case bytes():
            return b'"' + node + b'"'
        case float() if node in (float("inf"), float("-inf")) or node != node:
            return str(node).encode()
        case str():
            return json.dumps(node, ensure_ascii=False).encode("utf-8", "surrogatepass")
        case _:
            return json.dumps(node).encode()


def key(node: Node) -> bytes:
    return toml(node) if isinstance(node, str | bytes) else json.dumps(str(node)).encode()


def document(tree: Node) -> bytes:
    if not isinstance(tree, Pairs):
        return toml(tree)
    return b"".join(key(name) + b" = " + toml(value) + b"\n" for name, value in tree)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cluster.toml"


def test_what_is_not_damaged_is_read(file: Path) -> None:
    assert read(TEXT.encode(), file)
    assert read(document(from_json(json.dumps(TREE))), file)


def test_damaged_text(file: Path) -> None:
    fine = sum(read(each.text(TEXT), file, each) for each in mutators("config text", 1_500))
    assert fine > 0  # or nothing but the parser has been tested


def test_damaged_structure(file: Path) -> None:
    tree = from_json(json.dumps(TREE))
    fine = sum(read(document(each.tree(tree)), file, each) for each in mutators("config tree", 500))
    assert fine > 0
