"""The mutation helper itself: its documents are what they say, and most mutants nearly valid."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from memserve.transfer.wire import Beat, Envelope, Offer
from tests.fuzz.documents import Pairs, Raw, from_json, from_msgpack, to_json, to_msgpack
from tests.fuzz.mutate import Mutator, mutators

DOCUMENT = {
    "id": "decode-1",
    "epoch": 1764123456,
    "ratio": 0.5,
    "draining": False,
    "nothing": None,
    "roles": ["prefill", "decode"],
    "pool": {"layers": 3, "dtype": "float32", "offers": [{"name": "shm"}, {"name": "tcp"}]},
}
JSON = json.dumps(DOCUMENT).encode()
ENVELOPE = msgspec.msgpack.encode(Envelope("decode-1", 17, 0, Beat(True)))


def attempts(number: int = 500) -> list[Mutator]:
    return [Mutator(0, "self", each) for each in range(number)]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, 127, 128, -1, -32, -33, 2**63, 2**64 - 1, -(2**63), 1.5, ""),
        *("x" * 31, "x" * 32, "x" * 300, "x" * 70_000, b"", b"x" * 300, b"x" * 70_000),
        *([], [[]], list(range(20)), [0] * 70_000, {}, {"a": {"b": [1]}}),
        {str(n): n for n in range(20)},
        DOCUMENT,
    ],
)
def test_msgpack_that_is_not_damaged_is_valid(value: Any) -> None:
    data = msgspec.msgpack.encode(value)
    assert msgspec.msgpack.decode(to_msgpack(from_msgpack(data))) == value


def test_json_that_is_not_damaged_is_valid() -> None:
    assert json.loads(to_json(from_json(JSON))) == DOCUMENT


def test_documents_hold_what_no_encoder_writes() -> None:
    twice = Pairs([("a", 1), ("a", Raw(b"1e999"))])
    assert to_json(twice) == b'{"a":1,"a":1e999}'
    assert to_json([b'\xff"', "\ud800"]) == b'["\xff\\"","\xed\xa0\x80"]'
    assert msgspec.msgpack.decode(to_msgpack([2**64])) == [float(2**64)]
    with pytest.raises(msgspec.DecodeError):
        msgspec.msgpack.decode(to_msgpack([Raw(b"\xc1")]))


def test_the_same_seed_damages_in_the_same_way() -> None:
    def run(seed: int) -> list[bytes]:
        made = [Mutator(seed, "self", number) for number in range(100)]
        return [each.json(JSON) + each.msgpack(ENVELOPE) + each.bytes(JSON) for each in made]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_what_is_valid_is_left_alone() -> None:
    tree = from_json(JSON)
    for mutator in attempts(200):
        mutator.tree(tree)
    assert to_json(tree) == to_json(from_json(JSON))


def test_most_mutants_of_json_are_json_and_differ() -> None:
    mutants = [mutator.json(JSON) for mutator in attempts()]
    read = []
    for mutant in mutants:
        try:
            read.append(msgspec.json.decode(mutant))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    assert len(set(mutants)) > 400
    assert len(read) > 250
    assert sum(isinstance(each, dict) for each in read) > 200


def test_many_mutants_of_a_message_are_messages() -> None:
    """What decodes, and is another message, is what a peer may say."""
    decode = msgspec.msgpack.Decoder(Envelope).decode
    found = set()
    for mutator in attempts():
        try:
            found.add(decode(mutator.msgpack(ENVELOPE)))
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError):
            continue
    assert len(found) > 25


def test_messages_within_bytes_are_damaged_as_messages() -> None:
    inner = msgspec.msgpack.encode(["memserve-segment", 17, {"bytes": 4096}])
    outer = msgspec.msgpack.encode(Offer("shm", inner))
    found = []
    for mutator in attempts(1000):
        try:
            offer = msgspec.msgpack.decode(mutator.msgpack(outer), type=Offer)
            found.append(msgspec.msgpack.decode(offer.description))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    assert (
        sum(isinstance(each, list) and each != msgspec.msgpack.decode(inner) for each in found) > 40
    )


def test_every_kind_of_damage_occurs() -> None:
    mutants = [mutator.json(JSON) for mutator in attempts(2000)]
    assert any(len(mutant) > 50_000 for mutant in mutants), "a huge string"
    assert any(b"[" * 1_000 in mutant or b'{"a":' * 1_000 in mutant for mutant in mutants), "depth"
    assert any(b"NaN" in mutant for mutant in mutants), "a number"
    assert any(mutant.count(b'"epoch"') == 2 for mutant in mutants), "a key twice"
    assert any(b'"pool"' not in mutant and mutant.endswith(b"}") for mutant in mutants), "dropped"
    assert any(not _utf8(mutant) for mutant in mutants), "text that is none"
    assert any(JSON.startswith(mutant) for mutant in (m.bytes(JSON) for m in attempts())), "cut off"


def _utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_frames_are_damaged_too() -> None:
    frames = [b"header", ENVELOPE]
    mutants = [each.frames(frames, each.msgpack) for each in attempts()]
    assert any(len(mutant) != 2 for mutant in mutants)
    assert any(len(mutant) == 2 and mutant[0] != b"header" for mutant in mutants)
    assert sum(mutant[:-1] == [b"header"] for mutant in mutants) > 350


def test_text_is_damaged_by_lines() -> None:
    mutants = [each.text('[model]\npath = "demo"\n[gateway]\nport = 8000\n') for each in attempts()]
    assert any(mutant.count(b"[model]\n") > 1 for mutant in mutants)
    assert any(b"[gateway]" not in mutant for mutant in mutants)


def test_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMSERVE_FUZZ_EXAMPLES", raising=False)
    assert sum(1 for _ in mutators("self")) == 2_000
    assert sum(1 for _ in mutators("self", 10)) == 10
    monkeypatch.setenv("MEMSERVE_FUZZ_EXAMPLES", "30")
    assert sum(1 for _ in mutators("self", 10)) == 30
