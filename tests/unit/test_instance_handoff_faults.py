"""Hand-overs that go wrong: the answer is the same, and nothing is held or left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from memserve.api.errors import ApiError
from memserve.api.generate import PrefillPeer
from memserve.api.handoff import PrefillResult
from memserve.clock import MonotonicClock
from memserve.config import Caching
from memserve.errors import LayoutMismatch
from memserve.instance.remote_prefill import RemotePrefill
from memserve.pool.layout import KVLayout
from memserve.transfer import kv_link, service
from memserve.transfer.base import Transport
from memserve.transfer.mempool import MakeTransports, MemPool
from memserve.transfer.session import LEASE
from memserve.transfer.shm import ShmTransport
from memserve.types import InstanceId, Owner, Role
from tests.fakes import save_tiny_tokenizer
from tests.faulty_transport import Drop, Fail, Fault, FaultyTransport, listed
from tests.handoff_harness import Node, call_of, completed, node, pair, prompt_of
from tests.tiny_models import Reference, save_tiny_model
from tests.waiting import until

PROMPT = prompt_of(70, seed=1)
NO_POOL = "tcp://127.0.0.1:9"  # nobody listens there
LONG = 400  # tokens of an answer that occupies an engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """The first tokens of the answer to PROMPT."""
    return Reference(model).generate(PROMPT, 12)


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_link, "LINGER_SECONDS", 1.0)


def faulty(*faults: Fault | None) -> MakeTransports:
    def make(owner: Owner, layout: KVLayout) -> list[FaultyTransport]:
        return [FaultyTransport(ShmTransport(layout), listed(*faults), MonotonicClock())]

    return make


@asynccontextmanager
async def impostor(answer: bytes) -> AsyncIterator[PrefillPeer]:
    """A prefill instance that says `answer` to whatever it is asked; nothing: it hangs up."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield PrefillPeer(InstanceId("impostor"), f"http://127.0.0.1:{port}", NO_POOL)
    finally:
        server.close()


REFUSALS = {
    "gone": b"",
    "full": b"HTTP/1.1 429 No\r\ncontent-length: 2\r\n\r\n{}",
    "broken": b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\n{}",
    "nonsense": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    "no text": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n\xff{}",
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_another_prefill_instance_is_asked_and_in_the_end_none(
    model: Path, expected: list[int], refusal: str
) -> None:
    async with pair(model) as (p, d), impostor(REFUSALS[refusal]) as bad:
        answer = await d.complete(*PROMPT, tokens=12, prefill=[bad, p])
        assert answer.tokens == [expected]
        assert (d.totals.asked, d.totals.failed, d.totals.blocks_received) == (2, 1, 4)
        other = prompt_of(70, seed=5)
        alone = await d.complete(*other, tokens=12, prefill=[bad, bad])
        assert alone.tokens == (await p.complete(*other, tokens=12)).tokens
        assert (d.totals.asked, d.totals.failed, d.totals.blocks_received) == (4, 3, 4)


async def test_a_full_queue_sends_the_prompt_elsewhere(model: Path, expected: list[int]) -> None:
    busy_settings = {"max_running": 1, "max_waiting": 1}
    async with (
        node(model, Role.PREFILL, **busy_settings) as full,  # type: ignore[arg-type]
        pair(model) as (p, d),
    ):
        with full.instance.run(call_of(prompt_of(9, 1), LONG)):
            await until(lambda: full.engine.stats().running == 1, "one that runs")
            with full.instance.run(call_of(prompt_of(9, 2), LONG)):
                answer = await d.complete(*PROMPT, tokens=12, prefill=[full, p])
        assert answer.tokens == [expected]
        assert (d.totals.asked, d.totals.failed) == (2, 1)


@asynccontextmanager
async def mute() -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A port that takes connections and says nothing, and whether there was one."""
    accepted = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], accepted
    finally:
        server.close()


async def test_a_prefill_instance_whose_pool_is_never_heard_is_given_up(
    model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CONNECT_TIMEOUT", 0.2)
    async with mute() as (port, accepted), mute() as (pool_port, _):
        address, pool = f"http://127.0.0.1:{port}", f"tcp://127.0.0.1:{pool_port}"
        silent = PrefillPeer(InstanceId("silent"), address, pool)
        async with node(model, Role.DECODE) as d:
            assert (await d.complete(*PROMPT, tokens=12, prefill=[silent])).tokens == [expected]
        assert accepted.is_set()


async def test_a_prefill_instance_without_a_pool_is_not_asked(
    model: Path, expected: list[int]
) -> None:
    async with mute() as (port, accepted), node(model, Role.DECODE) as d:
        bare = PrefillPeer(InstanceId("bare"), f"http://127.0.0.1:{port}")
        assert (await d.complete(*PROMPT, tokens=12, prefill=[bare])).tokens == [expected]
        assert not accepted.is_set()


@pytest.mark.parametrize("end", ["closed", "stalled"])
async def test_a_prefill_instance_that_is_lost_while_it_computes_is_given_up(
    model: Path, expected: list[int], end: str
) -> None:
    """Its pool says so: it leaves, or tells that the process beside it serves nobody."""
    async with mute() as (port, accepted), node(model, Role.DECODE) as d:
        with MemPool(d.pool.layout, 4, instance="p") as pool:
            pool.vouch()
            address = pool.serve("tcp://127.0.0.1:0")
            lost = PrefillPeer(InstanceId("p"), f"http://127.0.0.1:{port}", address)
            answer = asyncio.ensure_future(d.answer(*PROMPT, tokens=12, prefill=[lost]))
            await accepted.wait()
            await until(lambda: d.pool.hears("p"), "that the two have met")
            assert not answer.done()
            if end == "closed":
                pool.close()
            else:
                assert pool.vouched is not None
                pool.vouched -= LEASE
            assert (await answer).tokens == [expected]
            assert (d.totals.asked, d.totals.failed) == (1, 1)
            await d.settled()


@pytest.mark.parametrize("caching", ["off", "full"])
async def test_kv_that_does_not_arrive_is_computed(
    model: Path, expected: list[int], caching: Caching
) -> None:
    async with pair(model, caching, transports=faulty(Fail(0.5))) as (p, d):
        answer = await d.complete(*PROMPT, tokens=12, prefill=[p])
        assert answer.tokens == [expected]
        assert d.totals.blocks_received == 0
        if caching == "off":
            await until(lambda: not p.cached + d.cached, "nothing left of it")


async def test_a_prefill_instance_whose_kv_cannot_come_is_given_up(
    model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def differs(*_: object) -> None:
        raise LayoutMismatch("blocks of another size")

    monkeypatch.setattr(kv_link.PoolLink, "meet", differs)
    async with pair(model) as (p, d):
        answer = await d.complete(*PROMPT, tokens=12, prefill=[p])
        assert answer.tokens == [expected]
        assert (d.totals.asked, d.totals.failed, d.totals.blocks_received) == (1, 1, 0)


async def test_an_instance_that_was_restarted_is_met_again(
    model: Path, expected: list[int]
) -> None:
    async with node(model, Role.PREFILL, name="p") as p:
        async with node(model, Role.DECODE, name="d") as d:
            await d.complete(*PROMPT, prefill=[p])
        async with node(model, Role.DECODE, name="d") as d:
            assert (await d.complete(*PROMPT, tokens=12, prefill=[p])).tokens == [expected]
            assert d.totals.blocks_received == 4
    async with (
        node(model, Role.DECODE, name="d") as d,
        node(model, Role.COLOCATED) as alone,
    ):
        for life in (1, 2):
            async with node(model, Role.PREFILL, name="p") as p:
                prompt = prompt_of(40, life)
                answer = await d.complete(*prompt, tokens=30, prefill=[p])
                assert answer.tokens == (await alone.complete(*prompt, tokens=30)).tokens
                await until(lambda life=life: d.totals.returns == life, "the return")  # type: ignore[misc]
                assert p.has(prompt + answer.tokens[0]) == 64


# --- clients that leave -----------------------------------------------------------------------


async def nothing_is_left(caching: Caching, *nodes: Node) -> None:
    for one in nodes:
        await one.settled()
    if caching == "off":
        for one in nodes:
            await until(lambda one=one: not one.cached, "an empty index")  # type: ignore[misc]


@pytest.mark.parametrize("caching", ["off", "full"])
async def test_leaving_while_the_prompt_is_queued_cancels_it(
    model: Path, expected: list[int], caching: Caching
) -> None:
    async with pair(model, caching, max_running=1) as (p, d):
        with p.instance.run(call_of(prompt_of(9, 1), LONG)):
            await until(lambda: p.engine.stats().running == 1, "one that is in the way")
            with d.instance.run(call_of(PROMPT, prefill=[p])):
                await until(lambda: p.engine.stats().waiting == 1, "the prompt in the queue")
            await until(lambda: p.engine.stats().cancelled == 1, "the prompt's end")
        await nothing_is_left(caching, p, d)
        assert (await d.complete(*PROMPT, tokens=12, prefill=[p])).tokens == [expected]


@pytest.mark.parametrize("caching", ["off", "full"])
async def test_leaving_in_mid_transfer_stops_it(
    model: Path, expected: list[int], caching: Caching
) -> None:
    made: list[Transport] = []

    def transports(owner: Owner, layout: KVLayout) -> Sequence[Transport]:
        made.extend(faulty(Drop())(owner, layout))
        return made

    async with pair(model, caching, transports=transports) as (p, d):
        with d.instance.run(call_of(PROMPT, prefill=[p])):
            await until(lambda: any(each.in_flight for each in made), "a write")
            assert d.pool.peer_stats().incoming == 1
        await nothing_is_left(caching, p, d)
        assert (await d.complete(*PROMPT, tokens=12, prefill=[p])).tokens == [expected]


@pytest.mark.parametrize("caching", ["off", "p", "pd", "full"])
async def test_leaving_while_it_decodes_stops_it(
    model: Path, expected: list[int], caching: Caching
) -> None:
    async with pair(model, caching) as (p, d):
        with d.instance.run(call_of(PROMPT, LONG, prefill=[p], n=2)) as run:
            while d.engine.stats().running < 2:
                await run.step()
        await until(lambda: d.engine.stats().cancelled == 2, "the end of both samples")
        await nothing_is_left(caching, p, d)
        assert d.totals.returns == 0
        assert (await d.complete(*PROMPT, tokens=12, prefill=[p])).tokens == [expected]


async def test_leaving_as_the_first_token_comes_starts_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of the prefill instance and the end of the call in one turn of the loop."""
    came: asyncio.Future[PrefillResult] = asyncio.get_running_loop().create_future()

    async def asked(self: RemotePrefill, *_: object) -> PrefillResult:
        return await came

    monkeypatch.setattr(RemotePrefill, "_prefill", asked)
    async with pair(model) as (p, d):
        before = d.engine.stats()
        with d.instance.run(call_of(PROMPT, LONG, prefill=[p])):
            await asyncio.sleep(0.01)
            came.set_result(PrefillResult(5, None, 0, None, None, 0, 0, 0.0, 0.0))
        await asyncio.sleep(0.05)
        after = d.engine.stats()
        assert (after.running, after.waiting) == (0, 0)
        assert after.generated_tokens == before.generated_tokens


async def test_a_hand_over_that_breaks_is_told_to_the_client(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would wait for ever."""

    async def broken(self: RemotePrefill, *_: object) -> PrefillResult:
        raise ZeroDivisionError

    monkeypatch.setattr(RemotePrefill, "_prefill", broken)
    async with pair(model) as (p, d):
        with pytest.raises(ApiError) as told, d.instance.run(call_of(PROMPT, prefill=[p])) as run:
            await completed(run)
    assert told.value.status == 500


@pytest.mark.parametrize("caching", ["off", "pd", "full"])
async def test_whenever_clients_leave_nothing_is_left(
    model: Path, expected: list[int], caching: Caching
) -> None:
    """Many at once, each leaving at a moment of its own."""
    random = np.random.default_rng(3)

    async def come_and_go(d: Node, p: Node, seed: int, seconds: float) -> None:
        prompt = prompt_of(int(random.integers(5, 150)), seed % 7)
        with d.instance.run(call_of(prompt, 20, prefill=[p], n=1 + seed % 2)) as run:
            try:
                async with asyncio.timeout(seconds):
                    while not run.generation.finished:
                        await run.step()
            except TimeoutError:
                return

    async with pair(model, caching, hbm_blocks=64) as (p, d):
        limits = random.uniform(0, 1.0, 40)
        await asyncio.gather(*(come_and_go(d, p, seed, float(s)) for seed, s in enumerate(limits)))
        await nothing_is_left(caching, p, d)
        assert (await d.complete(*PROMPT, tokens=12, prefill=[p])).tokens == [expected]


# --- KV that goes back ------------------------------------------------------------------------


async def test_what_cannot_go_back_is_dropped_and_counted(
    model: Path,
) -> None:
    async with node(model, Role.DECODE, max_running=1) as d, node(model, Role.PREFILL) as p:
        with ExitStack() as first_exit:
            first = first_exit.enter_context(d.instance.run(call_of(PROMPT, 40, prefill=[p])))
            await first.step()
            # Both arrive before the first one's last token, and one may run at a time.
            calls = [call_of(prompt_of(9, seed), LONG) for seed in (2, 3)]
            with d.instance.run(calls[0]), d.instance.run(calls[1]):
                await until(lambda: d.engine.stats().waiting >= 1, "a queue")
                await completed(first)
                first_exit.close()
                assert (d.totals.returns, d.totals.returns_dropped) == (0, 1)
