"""Where a gateway sends what: to prefixes, sessions and roles; and how it says why."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from memserve.api.serving import Shutdown, url_of
from memserve.config import ClusterConfig, GatewayConfig, ModelConfig, Policy
from memserve.gateway.run import Gateway
from memserve.models.tokenizer import Tokenizer
from memserve.types import Role
from tests.fakes import gateway_socket, save_tiny_tokenizer
from tests.handoff_harness import Node, node, prompt_of
from tests.insider import peers
from tests.kv_events_harness import prefixes_of, publishing
from tests.router_harness import call_of
from tests.tiny_models import Reference, save_tiny_model
from tests.waiting import until

LONG = prompt_of(400, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


class Front:
    """A gateway in front of nodes, and a client of it."""

    def __init__(self, gateway: Gateway, url: str, http: aiohttp.ClientSession) -> None:
        self.router = gateway._router
        self.membership = gateway.membership
        self.url = url
        self.http = http

    async def ask(self, prompt: list[int], tokens: int = 4, **more: Any) -> Any:
        """The answer, whole; `more` are headers, but for `user`."""
        body = self._body(prompt, tokens)
        if "user" in more:
            body["user"] = more.pop("user")
        headers = {name.replace("_", "-"): value for name, value in more.items()}
        async with self.http.post(
            f"{self.url}/v1/completions", json=body, headers=headers
        ) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    @asynccontextmanager
    async def streaming(self, prompt: list[int], tokens: int) -> AsyncIterator[Streaming]:
        """An answer that has begun, and goes on beside what is done meanwhile."""
        body = {**self._body(prompt, tokens), "stream": True}
        async with self.http.post(f"{self.url}/v1/completions", json=body) as answer:
            streaming = Streaming(answer)
            await streaming.some()
            yield streaming

    async def get(self, path: str) -> Any:
        async with peers() as client:
            return await client.call("GET", self.url + path, json.loads)

    async def change(self, one: Node, role: Role) -> None:
        path = f"/cluster/instances/{one.instance.identity.id}"
        async with peers() as client:
            body = json.dumps({"role": role}).encode()
            await client.call("POST", self.url + path, json.loads, body)

    async def last(self) -> Any:
        """What was decided last."""
        (decision,) = await self.get("/cluster/decisions?n=1")
        return decision["chosen"]

    async def until_equal(self, *nodes: Node) -> None:
        """Until the trees have just what the indexes have."""

        def equal() -> bool:
            return all(
                self.router.feed.synchronised(each.instance.identity.id)
                and self.router.tree.held(each.instance.identity.id) == prefixes_of(each.pool)
                for each in nodes
            )

        await until(equal, "trees that equal the indexes")

    def _body(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        return {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


class Streaming:
    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        self.tokens: list[int] = []

    async def some(self) -> None:
        """More tokens, or the end."""
        had = len(self.tokens)
        async for line in self._answer.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    self.tokens += choice["token_ids"]
            if len(self.tokens) > had:
                return

    async def all(self) -> list[int]:
        before = -1
        while before != len(self.tokens):
            before = len(self.tokens)
            await self.some()
        return self.tokens


@asynccontextmanager
async def front(model: Path, *nodes: Node, policy: Policy = "prompt-tree") -> AsyncIterator[Front]:
    """A gateway that knows these nodes, and follows their events."""
    config = ClusterConfig(
        model=ModelConfig(served_name="tiny"),
        # Calls are counted, and what is cached.
        gateway=GatewayConfig(port=0, policy=policy, prove_handover=False),
    )
    sock, shutdown = gateway_socket(), Shutdown()
    async with Gateway(config, Tokenizer.load(model)) as gateway, aiohttp.ClientSession() as http:
        for each in nodes:
            gateway.membership.join(each.url)
        serving = asyncio.create_task(gateway.serve(sock, shutdown))
        made = Front(gateway, url_of(sock), http)
        try:
            await until(lambda: len(gateway.membership.ready()) == len(nodes), "the members")
            await made.until_equal(*nodes)
            yield made
            assert made.router.scheduler.load.reserved == 0
            assert not made.router.queue._tickets
        finally:
            shutdown.request()
            shutdown.request()
            await serving


def tokens_of(answer: Any) -> list[int]:
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


async def test_a_conversation_goes_where_its_prefix_is_and_a_new_one_to_the_idle_instance(
    model: Path, reference: Reference
) -> None:
    async with (
        node(model, Role.COLOCATED, name="a") as a,
        node(model, Role.COLOCATED, name="b") as b,
        front(model, a, b) as gateway,
    ):
        turns = list(LONG)
        homes = set()
        for turn in range(3):
            answer = await gateway.ask(turns, 8)
            chosen = await gateway.last()
            homes.add(chosen["instance"])
            assert tokens_of(answer) == reference.generate(turns, 8)
            assert (cached(answer) >= 400) == (turn > 0)
            assert chosen.get("cached_tokens", 0) == cached(answer)
            turns += tokens_of(answer) + prompt_of(20, seed=50 + turn)
            await gateway.until_equal(a, b)
        assert len(homes) == 1
        # Another prompt goes to the one that has nothing to do, whoever's turn it is.
        (home,) = homes
        async with gateway.streaming(LONG, 300) as busy:
            assert (await gateway.last())["instance"] == home
            for seed in (60, 61):
                await gateway.ask(prompt_of(40, seed), 2)
                assert (await gateway.last())["instance"] != home
            assert len(await busy.all()) == 300


async def test_sessions_stay_together_by_header_or_user(model: Path) -> None:
    async with (
        node(model, Role.COLOCATED, name="a") as a,
        node(model, Role.COLOCATED, name="b") as b,
        front(model, a, b, policy="session") as gateway,
    ):
        homes: dict[str, set[str]] = {"x": set(), "y": set()}
        for number, session in enumerate(["x", "y", "y", "x", "y", "x"]):
            how = {"X_Session_Id": session} if number % 2 else {"user": session}
            await gateway.ask(prompt_of(20, seed=number), 1, **how)
            homes[session].add((await gateway.last())["instance"])
        assert [len(home) for home in homes.values()] == [1, 1]
        assert homes["x"] != homes["y"]


async def test_what_one_gateway_routed_is_known_to_the_other(
    model: Path, reference: Reference
) -> None:
    async with (
        node(model, Role.COLOCATED, name="a") as a,
        node(model, Role.COLOCATED, name="b") as b,
        front(model, a, b) as one,
        front(model, a, b) as other,
    ):
        first = await one.ask(LONG)
        home = (await one.last())["instance"]
        await other.until_equal(a, b)
        for _ in range(2):  # not by turns
            answer = await other.ask(LONG)
            assert (await other.last())["instance"] == home
            assert cached(answer) == 384  # all whole blocks that leave a token to compute
            assert tokens_of(answer) == tokens_of(first) == reference.generate(LONG, 4)


async def test_a_long_prefix_is_pulled_from_an_instance_that_is_busy(
    model: Path, reference: Reference
) -> None:
    async with (
        node(model, Role.COLOCATED, name="a") as a,
        node(model, Role.COLOCATED, name="b") as b,
        node(model, Role.COLOCATED, name="c") as c,
        front(model, a, b, c) as gateway,
    ):
        router = gateway.router
        members = {member.id: member for member in gateway.membership.ready()}
        await a.complete(*LONG)
        await gateway.until_equal(a, b, c)
        # Much that was routed to it, and has not come to its end.
        others = [
            router.plan(call_of(*prompt_of(3000, seed), tokens=1), [members[a.peer.id]])
            for seed in range(5)
        ]
        answer = await gateway.ask(LONG, 12)
        chosen = await gateway.last()
        assert (chosen["instance"], chosen["fetch"]) != ("a", None)
        assert (chosen["fetch"], chosen["fetched_tokens"]) == ("a", 384)
        assert answer["usage"]["memserve"]["blocks_fetched"] == 24
        assert cached(answer) == 384
        assert tokens_of(answer) == reference.generate(LONG, 12)
        fetched = next(each for each in (b, c) if each.peer.id == chosen["instance"])
        assert fetched.engine.stats().computed_prompt_tokens < 100  # with its self-test
        for plan in others:
            plan.ended()


async def test_roles_are_exchanged_while_requests_run(model: Path, reference: Reference) -> None:
    async with (
        node(model, Role.PREFILL, name="p") as p,
        node(model, Role.DECODE, name="d") as d,
        front(model, p, d, policy="round-robin") as gateway,
    ):
        async with gateway.streaming(LONG, 200) as running:
            assert (await gateway.last())["prefill"] == "p"
            await gateway.change(p, Role.DECODE)
            # For a moment both decode: the one that is chosen computes the prompt itself.
            alone = await gateway.ask(prompt_of(40, 2), 6)
            assert "prefill" not in await gateway.last()
            await gateway.change(d, Role.PREFILL)
            swapped = await gateway.ask(prompt_of(40, 3), 6)
            chosen = await gateway.last()
            assert (chosen["prefill"], chosen["instance"]) == ("d", "p")
            assert await running.all() == reference.generate(LONG, 200)
        assert tokens_of(alone) == reference.generate(prompt_of(40, 2), 6)
        assert tokens_of(swapped) == reference.generate(prompt_of(40, 3), 6)
        assert p.totals.asked == 1  # as a decode instance, of the other one
        await p.settled()
        await d.settled()


# --- a gateway that is killed -------------------------------------------------------------------


async def _start(port: int, model: Path, *urls: str) -> Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "memserve", "gateway", "--model", str(model)),
        *("--port", str(port), *(part for url in urls for part in ("--instances", url))),
        stdout=PIPE,
        stderr=PIPE,
    )
    assert process.stdout is not None
    assert (await process.stdout.readline()).decode().strip() == f"http://127.0.0.1:{port}"
    return process


async def test_a_gateway_that_is_killed_has_its_trees_back(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    metrics = f"http://127.0.0.1:{port}/metrics"
    tokenizer = Tokenizer.load(model)
    async with (
        publishing(tokenizer, "a") as a,
        publishing(tokenizer, "b") as b,
        aiohttp.ClientSession() as http,
    ):

        async def held() -> dict[str, float]:
            async with http.get(metrics) as answer:
                lines = (await answer.text()).splitlines()
            found = [
                line.rpartition(" ")
                for line in lines
                if line.startswith("memserve_kv_feed_held_blocks{")
            ]
            return {name.split('"')[1]: float(value) for name, _, value in found}

        async def until_held(**blocks: int) -> None:
            async with asyncio.timeout(15):
                while True:
                    if await held() == blocks:
                        return
                    await asyncio.sleep(0.02)

        a.store(*range(32))
        process = await _start(port, model, a.url, b.url)
        try:
            await until_held(a=len(prefixes_of(a.pool)), b=0)
            b.store(*range(100, 148))  # by events
            await until_held(a=len(prefixes_of(a.pool)), b=len(prefixes_of(b.pool)))
            process.send_signal(signal.SIGKILL)
            await process.communicate()
            a.store(*range(48))  # while nobody listens
            process = await _start(port, model, a.url, b.url)
            assert len(prefixes_of(a.pool)) > 0 < len(prefixes_of(b.pool))
            await until_held(a=len(prefixes_of(a.pool)), b=len(prefixes_of(b.pool)))
        finally:
            process.kill()
            await process.communicate()
