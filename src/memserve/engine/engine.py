"""The built-in engine: one thread that generates tokens for requests, step by step."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch

from memserve.api.generate import FinishReason
from memserve.api.status import EngineTotals
from memserve.clock import Clock, MonotonicClock
from memserve.engine.batch import BatchLimits, BatchScheduler
from memserve.engine.block_table import BlockTable
from memserve.engine.fence import FencedObserver, KernelFence
from memserve.engine.model import Model
from memserve.engine.observer import PrefillObserver
from memserve.engine.request import (
    EngineInfo,
    EngineRequest,
    OutputSink,
    TokenOutput,
    validate_requests,
)
from memserve.engine.runner import Runner
from memserve.engine.sampler import Sample
from memserve.engine.scoring import scored_rows
from memserve.engine.sequence import Sequence
from memserve.errors import EngineStopped, QueueFull
from memserve.pool.device_queue import NoKernels, kernels_of
from memserve.pool.pool import BlockPool
from memserve.types import RequestId

log = logging.getLogger(__name__)

# Retry interval while sequences wait and no step can run because transfers or readers hold the
# memory: short compared with a step, long compared with a lock.
STARVED_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Engine settings that the operator chooses."""

    name: str  # of the model, in the API
    threads: int  # of PyTorch's CPU kernels
    limits: BatchLimits
    max_waiting: int
    max_model_len: int | None = None  # default: the model's own limit
    cuda_graphs: bool = True  # of decode steps, on a GPU


@dataclass(frozen=True, slots=True)
class _Submit:
    requests: Seq[EngineRequest]
    at: float  # seconds of the engine's clock


@dataclass(frozen=True, slots=True)
class _Cancel:
    ids: Seq[RequestId]


class _Stop:
    pass


_Command = _Submit | _Cancel | _Stop


class Engine:
    """Implementation of `EngineProtocol` on PyTorch. The engine's thread owns the model and the
    sequences, and makes all of the engine's writes to the pool.
    """

    def __init__(
        self,
        model: Model,
        pool: BlockPool,
        settings: EngineSettings,
        clock: Clock | None = None,
    ) -> None:
        self.pool = pool
        self._model = model
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._prepared = threading.Event()  # the thread computes, or has failed
        self._accepting = False
        self._queued = 0  # sequences submitted and not yet taken by the thread
        self._lock = threading.Lock()  # guards `_accepting` and `_queued`
        self._kernels = kernels_of(model.device)
        self._runner = Runner(model, pool, self._kernels)
        self._fence: KernelFence | None = None  # on a GPU, while the thread runs
        self._scheduler = BatchScheduler(settings.limits, scored_rows(model.shape.vocab_size))
        self._counters = _Counters()
        self._arrivals = 0
        self._starved = False  # the last `plan` found nothing that can run
        self._stepped: float | None = None  # end of the last step, unless the engine paused since
        self._info = self._describe()

    @property
    def info(self) -> EngineInfo:
        return self._info

    def _describe(self) -> EngineInfo:
        layout = self.pool.layout
        longest = self._model.shape.max_position
        return EngineInfo(
            model=self._settings.name,
            vocab_size=self._model.shape.vocab_size,
            max_model_len=min(longest, self._settings.max_model_len or longest),
            pool_tokens=self.pool.stats().hbm.total * layout.block_tokens,
            block_tokens=layout.block_tokens,
            dtype=layout.dtype,
            device=str(self._model.device),
            threads=self._settings.threads,
            max_running=self._settings.limits.max_running,
            mixed_batch_tokens=self._settings.limits.mixed_tokens,
            max_waiting=self._settings.max_waiting,
            eos_token_ids=self._model.shape.eos_token_ids,
        )

    @property
    def threads(self) -> list[threading.Thread]:
        """Threads of a started engine that must stay alive until `stop`."""
        engine = [] if self._thread is None else [self._thread]
        return engine if self._fence is None else [*engine, self._fence.thread]

    def start(self, sink: OutputSink) -> None:
        """Start the engine's thread and wait until it can compute, on a GPU for seconds; outputs go
        to `sink`, called from that thread."""
        assert self._thread is None
        self._accepting = True
        self._thread = threading.Thread(target=self._run, args=(sink,), name="engine", daemon=True)
        self._thread.start()
        self._prepared.wait()

    def submit(self, requests: Seq[EngineRequest]) -> None:
        """Queue the sequences of one call, all or none.

        Raises RequestError for a sequence that can never run, QueueFull, EngineStopped.
        """
        validate_requests(requests, self._info)
        with self._lock:
            self._make_sure_of_room(len(requests))
            self._queued += len(requests)
            self._commands.put(_Submit(tuple(requests), self._clock.now()))

    def check(self, requests: Seq[EngineRequest]) -> None:
        """Raise the errors that `submit` would raise now, without queueing."""
        validate_requests(requests, self._info)
        with self._lock:
            self._make_sure_of_room(len(requests))

    def _make_sure_of_room(self, count: int) -> None:
        if not self._accepting:
            raise EngineStopped("the engine has stopped")
        waiting = self._queued + self._scheduler.waiting
        if waiting + count > self._settings.max_waiting:
            raise QueueFull(waiting, self._settings.max_waiting)

    def cancel(self, ids: Seq[RequestId]) -> None:
        """Stop sequences within one step and free their blocks. Unknown ids are ignored."""
        self._commands.put(_Cancel(tuple(ids)))

    def stats(self) -> EngineTotals:
        """Totals since start and current queue lengths. Read without a lock: each field is one
        number."""
        return EngineTotals(
            running=self._scheduler.running,
            waiting=self._queued + self._scheduler.waiting,
            preemptions=self._scheduler.preemptions,
            **asdict(self._counters),
        )

    def stop(self) -> None:
        """End the thread after its current step; unfinished sequences get a CANCELLED output."""
        with self._lock:
            self._accepting = False
        self._commands.put(_Stop())
        if self._thread is not None:
            self._thread.join()

    # --- the engine's thread ----------------------------------------------------------

    def _run(self, sink: OutputSink) -> None:
        torch.set_num_threads(self._settings.threads)
        reason, error = FinishReason.CANCELLED, None
        if not isinstance(self._kernels, NoKernels):
            self._fence = KernelFence(self._kernels)
        try:
            with torch.inference_mode():
                limits = self._settings.limits
                self._runner.prepare(limits.max_running if self._settings.cuda_graphs else 0)
                self._prepared.set()
                while self._take_commands():
                    outputs = self._step()
                    if outputs:
                        sink(outputs)
        except Exception as failure:
            # Every client must get an error instead of waiting for ever.
            log.exception("the engine failed")
            reason, error = FinishReason.ERROR, f"the engine failed: {failure}"
        finally:
            # Kernels of a failed step may still write to blocks that `_shut_down` frees, so wait
            # for them. RuntimeError: the device is lost and writes nothing.
            with suppress(RuntimeError):
                self._runner.finish()
            self._shut_down(sink, reason, error)
            self._prepared.set()
            if self._fence is not None:
                self._fence.close()

    def _take_commands(self) -> bool:
        """Carry out all queued commands; block only while there is nothing to compute.

        Returns False after a stop command.
        """
        try:
            if not self._scheduler.running and not self._scheduler.waiting:
                self._stepped = None
                command = self._commands.get()
            elif self._starved:
                command = self._commands.get(timeout=STARVED_SECONDS)
            else:
                command = self._commands.get_nowait()
            while True:
                if isinstance(command, _Stop):
                    return False
                if isinstance(command, _Cancel):
                    self._cancel(command.ids)
                else:
                    self._accept(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            return True

    def _accept(self, command: _Submit) -> None:
        sequence: Sequence | None = None
        for request in command.requests:
            sequence = Sequence(
                request,
                self._arrivals,
                BlockTable(self.pool, request.namespace, request.ephemeral),
                self._model.shape.eos_token_ids,
                self._info.max_tokens,
                command.at,
                self._fenced(request.observer),
                like=sequence,
            )
            self._arrivals += 1
            self._scheduler.add(sequence)
        with self._lock:
            self._queued -= len(command.requests)

    def _fenced(self, observer: PrefillObserver | None) -> PrefillObserver | None:
        if observer is None or self._fence is None:
            return observer
        return FencedObserver(observer, self._fence)

    def _cancel(self, ids: Seq[RequestId]) -> None:
        for request_id in ids:
            if self._scheduler.remove(request_id) is not None:
                self._counters.cancelled += 1

    def _step(self) -> list[TokenOutput]:
        started = self._clock.now()
        plan = self._scheduler.plan()
        self._starved = plan is None
        if plan is None:
            self._stepped = None
            return []
        samples = self._runner.run(plan)
        computed = self._clock.now()
        counters = self._counters
        prompt_tokens = context_tokens = 0
        decodes = True
        outputs = []
        for sequence, count in ((s.sequence, s.count) for s in plan.scheduled):
            if sequence.fresh:
                sequence.queue_seconds = started - sequence.submitted
                received = min(sequence.cached_tokens, sequence.request.received_tokens)
                counters.received_prompt_tokens += received
                counters.cached_prompt_tokens += sequence.cached_tokens - received
            sequence.computed_at(computed, count)
            prompt_tokens += sequence.advance(count)
            context_tokens += sequence.computed
            decodes = decodes and count == 1  # else a prompt, or what a preemption lost of one
            chosen = samples.get(sequence.id)
            if chosen is not None:
                outputs.append(self._emit(sequence, chosen))
        ended = self._clock.now()
        counters.steps += 1
        counters.busy_seconds += ended - started
        counters.computed_prompt_tokens += prompt_tokens
        if decodes and not prompt_tokens:
            counters.decode_steps += 1
            counters.decode_tokens += len(outputs)
            counters.decode_context_tokens += context_tokens
            counters.decode_seconds += ended - (started if self._stepped is None else self._stepped)
        self._stepped = ended
        return outputs

    def _emit(self, sequence: Sequence, chosen: Sample) -> TokenOutput:
        if chosen.failure is not None:
            return self._fail(sequence, chosen.failure)
        finish = sequence.append(chosen.token)
        self._counters.generated_tokens += 1
        if finish is not None:
            self._scheduler.remove(sequence.id)
            self._counters.finished += 1
        return TokenOutput(
            id=sequence.id,
            token_ids=(chosen.token,),
            usage=sequence.usage,
            logprobs=() if chosen.logprobs is None else (chosen.logprobs,),
            prompt_logprobs=sequence.take_scores(),
            finish_reason=finish,
            stop_token=chosen.token if chosen.token in sequence.sampler.end_tokens else None,
        )

    def _fail(self, sequence: Sequence, error: str) -> TokenOutput:
        self._scheduler.remove(sequence.id)
        self._counters.finished += 1
        return TokenOutput(
            sequence.id,
            (),
            sequence.usage,
            finish_reason=FinishReason.ERROR,
            error=error,
            at_fault=True,
        )

    def _shut_down(self, sink: OutputSink, reason: FinishReason, error: str | None) -> None:
        with self._lock:
            self._accepting = False
        while True:  # requests submitted before `_accepting` was cleared
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                break
            if isinstance(command, _Submit):
                self._accept(command)
        left = self._scheduler.drain()
        if left:
            sink([TokenOutput(s.id, (), s.usage, finish_reason=reason, error=error) for s in left])


@dataclass(slots=True)
class _Counters:
    steps: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    busy_seconds: float = 0.0
    received_prompt_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_context_tokens: int = 0
    decode_seconds: float = 0.0
