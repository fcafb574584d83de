"""Stand-ins for what is slow or needs weights: a tokenizer with a tiny vocabulary, an engine
without a model, and a gateway with instances on threads of the test's process."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from memserve.api.generate import FinishReason
from memserve.api.serving import MAX_BODY_BYTES, Shutdown, bind, serve_http, url_of
from memserve.api.status import EngineTotals, MemberKind, PoolTotals
from memserve.clock import MonotonicClock
from memserve.config import ClusterConfig, GatewayConfig, ModelConfig, ReasoningParser
from memserve.engine.request import (
    EngineInfo,
    EngineRequest,
    OutputSink,
    TokenLogprobs,
    TokenOutput,
    Usage,
)
from memserve.errors import EngineStopped, QueueFull, RequestError
from memserve.gateway.run import Gateway
from memserve.grammars.compiler import GrammarCompiler
from memserve.instance.grammars import Grammars
from memserve.instance.instance import Instance
from memserve.instance.parts import Identity, Parts
from memserve.instance.run import handler_of
from memserve.models.tokenizer import Tokenizer
from memserve.secrets import cluster_secret, forget_secret
from memserve.tracing.span import Tracer
from memserve.types import Epoch, InstanceId, RequestId, Role
from memserve.vllm.forwarder import Forwarder
from memserve.vllm.place import ServerPlace

MODEL = "tiny"
TEXT = "the quick brown fox jumps over the lazy dog. A naïve café, 10 €; 你好 👍\n"
T = TypeVar("T")


def save_tiny_tokenizer(directory: Path, chat_template: str | None = None) -> None:
    """A byte-level BPE tokenizer of a few hundred tokens, as a model directory has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", "<eos>"],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.save(str(directory / "tokenizer.json"))
    settings: dict[str, object] = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "add_bos_token": True,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def tiny_tokenizer(directory: Path, chat_template: str | None = None) -> Tokenizer:
    save_tiny_tokenizer(directory, chat_template)
    return Tokenizer.load(directory)


@dataclass(slots=True)
class _Sequence:
    request: EngineRequest
    answer: Sequence[int]
    tokens: int = 0  # generated, by another run too


@dataclass
class FakeEngine:
    """An engine whose every sequence says `answer`, over and over, one token a step.

    `gate` stops the steps while it is cleared.
    """

    answer: Sequence[int] | Callable[[EngineRequest], Sequence[int]] = (2, 3, 4)
    eos_token_ids: tuple[int, ...] = (1,)
    step_seconds: float = 0.0
    max_waiting: int = 64
    max_running: int = 64
    max_model_len: int = 256
    pool_tokens: int = 1024
    vocab_size: int = 320
    cached_tokens: int = 0
    fails: str | None = None  # the error that every sequence ends with
    gate: threading.Event = field(default_factory=threading.Event)
    cancels: list[RequestId] = field(default_factory=list)
    submitted: list[EngineRequest] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._stopped = False
        self._crash = False
        self._thread: threading.Thread | None = None
        self._generated = self._finished = 0
        self.gate.set()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model=MODEL,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            pool_tokens=self.pool_tokens,
            block_tokens=16,
            dtype="float32",
            device="cpu",
            threads=1,
            eos_token_ids=self.eos_token_ids,
        )

    def start(self, sink: OutputSink) -> None:
        self.sink = sink  # for tests that have more to say than the answer
        self._thread = threading.Thread(target=self._run, args=(sink,), daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        with self._changed:
            self.check(requests)
            for request in requests:
                answer = self.answer(request) if callable(self.answer) else self.answer
                self._waiting.append(_Sequence(request, answer, len(request.output)))
                self.submitted.append(request)
            self._changed.notify_all()

    def check(self, requests: Sequence[EngineRequest]) -> None:
        if self._stopped:
            raise EngineStopped("stopped")
        if len(self._waiting) + len(requests) > self.max_waiting:
            raise QueueFull(len(self._waiting), self.max_waiting)
        for request in requests:
            if len(request.prompt) + len(request.output) >= self.info.max_tokens:
                raise RequestError("too long", "prompt")

    def cancel(self, ids: Sequence[RequestId]) -> None:
        with self._changed:
            for queue in (self._waiting, self._running):
                for sequence in [s for s in queue if s.request.id in ids]:
                    queue.remove(sequence)
                    self.cancels.append(sequence.request.id)
            self._changed.notify_all()

    def stats(self) -> EngineTotals:
        return EngineTotals(
            running=len(self._running),
            waiting=len(self._waiting),
            steps=self.steps,
            computed_prompt_tokens=sum(len(r.prompt) for r in self.submitted),
            cached_prompt_tokens=self.cached_tokens,
            generated_tokens=self._generated,
            preemptions=0,
            finished=self._finished,
            cancelled=len(self.cancels),
            busy_seconds=0.0,
        )

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.gate.set()
        if self._thread is not None:
            self._thread.join()

    def crash(self) -> None:
        """End the thread as an error in a step would."""
        with self._changed:
            self._crash = self._stopped = True
            self._changed.notify_all()

    def _run(self, sink: OutputSink) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting or self._running)
            self.gate.wait()
            with self._changed:
                if self._stopped:
                    break
                room = self.max_running - len(self._running)
                self._running += self._waiting[:room]
                del self._waiting[:room]
                outputs = [self._step(sequence) for sequence in list(self._running)]
                self.steps += 1
            sink(outputs)
            if self.step_seconds:
                threading.Event().wait(self.step_seconds)
        reason = FinishReason.ERROR if self._crash else FinishReason.CANCELLED
        left = self._running + self._waiting
        if left:
            usage = Usage(0, 0, 0)
            sink([TokenOutput(s.request.id, (), usage, finish_reason=reason) for s in left])

    def _step(self, sequence: _Sequence) -> TokenOutput:
        request, sampling = sequence.request, sequence.request.sampling
        usage = Usage(len(request.prompt), min(self.cached_tokens, len(request.prompt) - 1), 0)
        if self.fails is not None:
            self._running.remove(sequence)
            error = FinishReason.ERROR
            return TokenOutput(request.id, (), usage, finish_reason=error, error=self.fails)
        token = sequence.answer[sequence.tokens % len(sequence.answer)]
        sequence.tokens += 1
        self._generated += 1
        ends = () if sampling.ignore_eos else self.eos_token_ids
        ended = token in (*ends, *sampling.stop_token_ids) and sequence.tokens > sampling.min_tokens
        finish = FinishReason.STOP if ended else None
        if finish is None and sequence.tokens == sampling.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            self._running.remove(sequence)
            self._finished += 1
        return TokenOutput(
            request.id,
            (token,),
            usage,
            logprobs=()
            if sampling.logprobs is None
            else (self._logprobs(token, sampling.logprobs),),
            finish_reason=finish,
            stop_token=token if ended else None,
            prompt_logprobs=self._prompt_logprobs(request)
            if sequence.tokens == 1 + len(request.output)
            else (),
        )

    def _prompt_logprobs(self, request: EngineRequest) -> tuple[TokenLogprobs, ...]:
        count = request.sampling.prompt_logprobs
        if count is None or len(request.output):
            return ()
        return tuple(self._logprobs(token, count) for token in request.prompt[1:].tolist())

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        others = tuple(((token + i) % self.vocab_size, -0.5 - i) for i in range(count))
        return TokenLogprobs(chosen=-0.5, rank=1, top=others)


def metric(url: str, name: str) -> float:
    """What a gateway's `/metrics` say."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


def until(condition: Callable[[], bool], pause: float = 0.005) -> None:
    """Wait for what other threads or processes do; the limit is the test's own. `pause`: seconds
    between looks, longer where a look takes the time of what is waited for."""
    while not condition():
        time.sleep(pause)


def url_told(output: IO[str]) -> str | None:
    """The gateway's address in what `memserve up` prints; None where it ends without one."""
    for line in output:
        for word in line.split():
            if word.startswith("http://"):
                return word.rstrip(";").rstrip("/")
    return None


def gateway_socket() -> socket.socket:
    """Listens on a port of its own, without the secret of a killed cluster that had it before."""
    sock = bind("127.0.0.1", 0)
    forget_secret(sock.getsockname()[1])
    return sock


class FakeCluster:
    """A gateway and instances with fake engines, on one event loop in a thread of its own."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        engines: Sequence[FakeEngine],
        gateway: GatewayConfig | None = None,
        servers: Mapping[int, ServerPlace] | None = None,
        tracer: Tracer | None = None,
        reasoning_parser: ReasoningParser = "auto",
    ) -> None:
        """`servers`: the vLLM servers of those instances that have one. What they are given as
        token ids goes to their engines all the same. `tracer`: of the gateway and the instances."""
        self._tracer = tracer
        self._servers_of = servers or {}
        self.engines = engines
        self.urls: list[str] = []
        self.instances: list[Instance] = []
        self.url = ""
        self._tokenizer = tokenizer
        self._config = ClusterConfig(
            model=ModelConfig(served_name=MODEL, reasoning_parser=reasoning_parser),
            gateway=gateway or GatewayConfig(port=0),
        )
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeCluster:
        self._thread.start()
        assert self._ready.wait(30)
        if self._failure is not None:
            raise self._failure
        self.until_ready(len(self.engines))
        return self

    def __exit__(self, *error: object) -> None:
        self.call(self._stop)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def call(self, work: Callable[[], T]) -> T:
        """Run a function on the cluster's loop."""

        async def run() -> T:
            return work()

        return self.wait(run())

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def drain_gateway(self) -> None:
        """What SIGTERM does to a gateway."""
        self.call(self._shutdowns[-1].request)

    async def close_instance(self, number: int) -> None:
        """Let an instance end, and its port be anybody's."""
        self._shutdowns[number].request()
        await self._servers[number]

    def until_ready(self, instances: int) -> None:
        """Wait until the gateway sends requests to so many."""
        until(lambda: len(self.call(self.gateway.membership.ready)) == instances)

    def _stop(self) -> None:
        for engine in self.engines:
            engine.gate.set()
        for shutdown in self._shutdowns:
            shutdown.request()
            shutdown.request()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failure = error
            self._ready.set()
            raise

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._shutdowns: list[Shutdown] = []
        self._servers: list[asyncio.Task[None]] = []
        for number, engine in enumerate(self.engines):
            await self._start_instance(number, engine)
        async with Gateway(self._config, self._tokenizer, tracer=self._tracer) as gateway:
            self.gateway = gateway
            for url in self.urls:
                gateway.membership.join(url)
            sock = gateway_socket()
            self.url = url_of(sock)
            shutdown = Shutdown()
            self._shutdowns.append(shutdown)
            serving = asyncio.create_task(gateway.serve(sock, shutdown))
            self._ready.set()
            await serving
        await asyncio.gather(*self._servers)
        for instance in self.instances:
            await instance.close()
        for engine in self.engines:
            await asyncio.to_thread(engine.stop)

    async def _start_instance(self, number: int, engine: FakeEngine) -> None:
        place = self._servers_of.get(number)
        identity = Identity(
            InstanceId(f"i{number}"),
            Epoch(number + 1),
            Role.COLOCATED,
            MODEL,
            MemberKind.MEMSERVE if place is None else MemberKind.VLLM,
        )
        instance = Instance(identity, MonotonicClock())
        forwarder = None if place is None else Forwarder(place, engine.info)
        # Compiled as anywhere; the engine without a model obeys none.
        grammars = Grammars(GrammarCompiler(self._tokenizer, engine.vocab_size))
        parts = Parts(
            engine,
            self._tokenizer,
            PoolTotals,
            grammars.close,
            forwarder=forwarder,
            grammars=grammars if forwarder is None else None,
        )
        await instance.start(parts)
        sock = bind("127.0.0.1", 0)
        shutdown = Shutdown()

        async def drain() -> None:
            instance.lifecycle.end()
            await shutdown.wait_for(instance.lifecycle.idle(), 30)

        self.urls.append(url_of(sock))
        self.instances.append(instance)
        self._shutdowns.append(shutdown)
        handler = handler_of(instance, cluster_secret(), sock, tracer=self._tracer)
        self._servers.append(
            asyncio.create_task(
                serve_http(handler, sock, shutdown, drain, MAX_BODY_BYTES, admit=handler.admit)
            )
        )
