"""A real vLLM's KV events: a script of requests, and what they are checked against.

`python -m tests.vllm_events` records it anew into `tests/data` (needs `make vllm`; a minute).
The recording is what came over its socket and what it said was cached, for tests that always run.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import msgspec
import zmq

from evaluation.peers.process import serving
from evaluation.peers.vllm import START_SECONDS, VllmSettings, kv_events_flag, vllm_command
from evaluation.peers.vllm import vllm_environment as environment
from memserve.bench.vllm_engine import python_of
from memserve.hosts import free_port
from tests.tiny_models import save_tiny_model

RECORDING = Path(__file__).parent / "data" / "vllm-0.32-kv-events.msgpack"
BLOCK = 32
TOPIC = "kv-events"
_BLOCKS = 18  # little room: the script makes it evict
_LENGTH = 256
_SETTLE_SECONDS = 1.0


class Step(msgspec.Struct, frozen=True):
    """One request, or, without a prompt, the order to forget everything."""

    prompt: list[int]
    salt: str | None = None


class Recorded(msgspec.Struct, frozen=True):
    step: Step
    cached: int  # tokens of the prompt, as vLLM says
    frames: list[list[bytes]]  # that came after it


class Recording(msgspec.Struct, frozen=True):
    vllm: str
    block_tokens: int
    steps: list[Recorded]


class Server(msgspec.Struct, frozen=True):
    url: str
    endpoint: str
    replay_endpoint: str


def script() -> list[Step]:
    """Shared prefixes, a salt, more than there is room for, and a reset."""
    a, b, c = (_tokens(seed, 150) for seed in (1, 2, 3))
    steps = [
        *(Step(a), Step(a), Step(a[:70] + b[:40]), Step(a[:64]), Step(a[:64] + c[:64])),
        *(Step(b, "x"), Step(b), Step(b, "x"), Step(b + a[:60])),
    ]
    steps += [Step(_tokens(10 + number, 100)) for number in range(4)]
    steps += [Step(a), Step(b, "x"), Step(_tokens(13, 100)), Step(b + a[:60])]
    return [*steps, Step([]), Step(a), Step(a + c[:90])]


def reusable(matched: int, step: Step) -> int:
    """Of so many tokens that are held, those that vLLM takes: whole blocks, and never all of a
    prompt, because its last token has to be computed."""
    return min(matched, (len(step.prompt) - 1) // BLOCK * BLOCK)


def stored(step: Step) -> int:
    """How many tokens of the prompt are held once its events have come."""
    return len(step.prompt) // BLOCK * BLOCK


@contextmanager
def vllm_server(python: Path) -> Iterator[Server]:
    """A vLLM with a tiny model of random weights, and events."""
    port, events, replay = (free_port() for _ in range(3))
    with TemporaryDirectory(prefix="memserve-test-vllm-") as folder:
        settings = VllmSettings(
            model=str(save_tiny_model("qwen3", Path(folder))),
            port=port,
            dtype="float32",
            block_tokens=BLOCK,
            max_model_len=_LENGTH,
            extra=(
                *("--num-gpu-blocks-override", str(_BLOCKS), "--skip-tokenizer-init"),
                *kv_events_flag(f"tcp://*:{events}", f"tcp://*:{replay}", TOPIC),
            ),
        )
        # The development mode has the call that resets the cache.
        variables = environment(1, (0,)) | {"VLLM_SERVER_DEV_MODE": "1"}
        with serving("vllm", vllm_command(python, settings), variables, port) as server:
            server.wait_ready(START_SECONDS)
            endpoints = f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}"
            yield Server(server.url, *endpoints)


async def take(session: aiohttp.ClientSession, url: str, step: Step) -> int:
    """Do it; how many tokens were cached."""
    if not step.prompt:
        async with session.post(f"{url}/reset_prefix_cache") as answer:
            assert answer.status == 200, await answer.text()
            return 0
    body = {"model": "peer", "prompt": step.prompt, "max_tokens": 1, "detokenize": False}
    if step.salt is not None:
        body["cache_salt"] = step.salt
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        said = await answer.json()
        assert answer.status == 200, said
        return int(said["usage"]["prompt_tokens_details"]["cached_tokens"])


def _tokens(seed: int, count: int) -> list[int]:
    return [random.Random(seed * 1000 + at).randrange(4, 128) for at in range(count)]


async def _record(server: Server) -> list[Recorded]:
    found = []
    context = zmq.Context()
    with context.socket(zmq.SUB) as events:
        events.subscribe(TOPIC.encode())
        events.connect(server.endpoint)
        await asyncio.sleep(_SETTLE_SECONDS)  # until it is subscribed
        async with aiohttp.ClientSession() as session:
            for step in script():
                cached = await take(session, server.url, step)
                frames = []
                while events.poll(int(1000 * _SETTLE_SECONDS)):
                    frames.append(events.recv_multipart())
                found.append(Recorded(step, cached, frames))
    context.term()
    return found


def main() -> None:
    with vllm_server(python_of("vllm")) as server:
        steps = asyncio.run(_record(server))
    RECORDING.write_bytes(msgspec.msgpack.encode(Recording("0.32.0", BLOCK, steps)))
    print(f"{RECORDING}: {RECORDING.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
