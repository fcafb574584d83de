"""JSON and msgpack documents as trees that can hold what no encoder writes: keys that are there
twice, text that is not UTF-8, numbers that no type has room for, and bytes as they are."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

import msgspec

# None, bool, int, float, str, bytes, and the classes below.
Node = Any


@dataclass(frozen=True, slots=True)
class Raw:
    """Encoded as it is."""

    data: bytes


class Pairs(list[tuple[Node, Node]]):
    """An object (msgpack: a map), in order, with whatever keys."""


def from_json(text: bytes | str) -> Node:
    """The tree of a valid document."""
    return json.loads(text, object_pairs_hook=Pairs)


def from_msgpack(data: bytes) -> Node:
    """The tree of a valid document."""
    return _tree(msgspec.msgpack.decode(data))


def to_json(node: Node) -> bytes:
    """Strings with lone surrogates become UTF-8 that is none; so do bytes that are none."""
    match node:
        case Raw():
            return node.data
        case Pairs():
            return b"{" + b",".join(to_json(k) + b":" + to_json(v) for k, v in node) + b"}"
        case list():
            return b"[" + b",".join(map(to_json, node)) + b"]"
        case bytes():
            return b'"' + node.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
        case str():
            return encode_basestring(node).encode("utf-8", "surrogatepass")
        case bool() | float() | None:
            return json.dumps(node).encode()
        case _:
            return str(node).encode()


def to_msgpack(node: Node) -> bytes:
    """Integers beyond 64 bits become floats."""
    match node:
        case Raw():
            return node.data
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if node else b"\xc2"
        case int():
            return _integer(node)
        case float():
            return b"\xcb" + struct.pack("!d", node)
        case str():
            return _sized(node.encode("utf-8", "surrogatepass"), 0xA0, 31, b"\xd9", b"\xda\xdb")
        case bytes():
            return _sized(node, 0, -1, b"\xc4", b"\xc5\xc6")
        case Pairs():
            body = b"".join(to_msgpack(key) + to_msgpack(value) for key, value in node)
            return _counted(len(node), 0x80, b"\xde\xdf") + body
        case _:
            return _counted(len(node), 0x90, b"\xdc\xdd") + b"".join(map(to_msgpack, node))


def _tree(value: Any) -> Node:
    if isinstance(value, dict):
        return Pairs((_tree(key), _tree(each)) for key, each in value.items())
    if isinstance(value, list):
        return [_tree(each) for each in value]
    if isinstance(value, msgspec.msgpack.Ext):
        return Raw(msgspec.msgpack.encode(value))
    return value


def _integer(value: int) -> bytes:
    if 0 <= value < 128 or -32 <= value < 0:
        return struct.pack("!B", value & 0xFF)
    if 0 <= value < 1 << 64:
        return b"\xcf" + struct.pack("!Q", value)
    if -(1 << 63) <= value < 0:
        return b"\xd3" + struct.pack("!q", value)
    return to_msgpack(float(value) if abs(value) < 1 << 1023 else float("inf"))


def _sized(data: bytes, short: int, shortest: int, by_byte: bytes, longer: bytes) -> bytes:
    size = len(data)
    if size <= shortest:
        return bytes([short | size]) + data
    if size < 1 << 8:
        return by_byte + struct.pack("!B", size) + data
    return _long(size, longer) + data


def _counted(count: int, short: int, longer: bytes) -> bytes:
    return bytes([short | count]) if count < 16 else _long(count, longer)


def _long(size: int, codes: bytes) -> bytes:
    if size < 1 << 16:
        return codes[:1] + struct.pack("!H", size)
    return codes[1:] + struct.pack("!I", size)
