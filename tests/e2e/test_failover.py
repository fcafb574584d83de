"""Streams whose instance is killed, or stops, in the middle: the client sees a pause."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Served, StartCluster
from tests.e2e.test_lifecycle import client_of, get
from tests.fakes import MODEL, FakeCluster, metric, until

Spawn = Callable[..., Served]
COMPLETION: dict[str, Any] = {
    "model": MODEL,
    "prompt": [5, 6, 7],
    "max_tokens": 40,
    "stream": True,
    "stream_options": {"include_usage": True},
}
CHAT: dict[str, Any] = {
    **{key: value for key, value in COMPLETION.items() if key != "prompt"},
    "messages": [{"role": "user", "content": "Go on."}],
    "n": 2,
}


class Heard:
    """What a client has of a stream."""

    def __init__(self, client: openai.OpenAI, asked: dict[str, Any]) -> None:
        create: Any = client.chat.completions if "messages" in asked else client.completions
        self._stream = iter(create.create(**asked))
        self.texts: dict[int, str] = {}
        self.roles: list[int] = []
        self.finishes: list[tuple[int, str]] = []
        self.usage: tuple[int, int] | None = None

    def chunks(self, count: int | None = None) -> Heard:
        """Take so many chunks, or all that are left."""
        for number, chunk in enumerate(self._stream, 1):
            for choice in chunk.choices:
                said = choice.text if hasattr(choice, "text") else choice.delta.content
                if not hasattr(choice, "text") and choice.delta.role:
                    self.roles.append(choice.index)
                self.texts[choice.index] = self.texts.get(choice.index, "") + (said or "")
                if choice.finish_reason:
                    self.finishes.append((choice.index, choice.finish_reason))
            if chunk.usage:
                assert self.usage is None
                self.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            if number == count:
                break
        return self


@pytest.fixture
def pair(start_cluster: StartCluster, spawn: Spawn) -> tuple[FakeCluster, list[Served]]:
    """A gateway in front of two slow instances, in processes of their own."""
    cluster = start_cluster()
    served = [spawn("instance", [cluster.url], name, step_seconds=0.02) for name in ("a", "b")]
    cluster.until_ready(2)
    return cluster, served


def running(served: list[Served]) -> Served:
    """The instance that has the request."""

    def busy(one: Served) -> bool:
        return bool(get(one.url, "/stats")[1]["engine"]["running"])

    until(lambda: any(map(busy, served)))
    return next(one for one in served if busy(one))


@pytest.mark.parametrize(
    ("asked", "how"),
    [
        pytest.param(CHAT, signal.SIGKILL, id="chat with two choices, killed"),
        pytest.param(COMPLETION, signal.SIGSTOP, id="completion, hanging"),
    ],
)
def test_the_stream_goes_on_as_if_nothing_had_happened(
    pair: tuple[FakeCluster, list[Served]], asked: dict[str, Any], how: signal.Signals
) -> None:
    cluster, served = pair
    with client_of(cluster.url) as client:
        undisturbed = Heard(client, asked).chunks()
        heard = Heard(client, asked).chunks(5)
        running(served).process.send_signal(how)
        heard.chunks()
    assert heard.texts == undisturbed.texts
    assert sorted(heard.finishes) == sorted(undisturbed.finishes)
    assert sorted(heard.roles) == sorted(undisturbed.roles)
    assert heard.usage == undisturbed.usage
    assert metric(cluster.url, "memserve_failovers_total") == 1
    assert metric(cluster.url, "memserve_failover_pause_seconds_count") == 1
    assert metric(cluster.url, "memserve_streams_broken_total") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_goes_on_too(pair: tuple[FakeCluster, list[Served]], stream: bool) -> None:
    """Also one that is not streamed: the gateway has its stream."""
    cluster, served = pair
    told: list[Any] = []
    asked: dict[str, Any] = {"model": MODEL, "input": "Go on.", "max_output_tokens": 40}

    def ask() -> None:
        with client_of(cluster.url) as client:
            if stream:
                *_, last = client.responses.create(**asked, stream=True)
                told.append(last.response)
            else:
                told.append(client.responses.create(**asked))

    thread = threading.Thread(target=ask)
    thread.start()
    lost = running(served)  # the other has nothing to do
    until(lambda: get(lost.url, "/stats")[1]["engine"]["generated_tokens"] > 5)
    lost.process.kill()
    thread.join()
    (response,) = told
    assert response.usage.output_tokens == 40
    assert response.status == "incomplete"
    assert metric(cluster.url, "memserve_failovers_total") == 1
    with client_of(cluster.url) as client:
        whole = client.responses.create(**asked)
    assert response.output_text == whole.output_text
