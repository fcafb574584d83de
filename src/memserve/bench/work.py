"""The workload of a benchmark: sessions or requests, chosen and cut to size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from memserve.bench.report import Slo
from memserve.config import NonNegative, Positive, PositiveSeconds, doc
from memserve.errors import ConfigError
from memserve.models.resolve import ModelDirectory, Progress
from memserve.models.tokenizer import Tokenizer
from memserve.scheduler.architecture import read_architecture
from memserve.workloads.session import Session, SessionLimits, TokenRequest
from memserve.workloads.synthetic import SharedPrefixes, shared_prefix_requests
from memserve.workloads.text import TextWorkload, required_data, text_sessions
from memserve.workloads.trace import (
    TraceFormatName,
    TraceScale,
    read_trace,
    token_requests,
    trace_format,
)

Workload = Literal[TextWorkload, "trace", "synthetic"]
Work = Sequence[Session | TokenRequest]
# All models with at least so many tokens get equal requests.
MOST_TOKEN_IDS = 32_000


class ServeBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Workload, load and server of a benchmark."""

    workload: Annotated[Workload, doc("what is asked")] = "sharegpt"
    data: Annotated[str | None, doc("its file or folder; default: the installed ShareGPT")] = None
    url: Annotated[str, doc("the server's root, without /v1")] = "http://127.0.0.1:8000"
    rate: Annotated[float, Meta(gt=0), doc("sessions that begin per second, mean")] = 0.1
    trace_format: Annotated[TraceFormatName, doc("auto: by the fields of its first line")] = "auto"
    trace_block_tokens: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        doc("of a trace: tokens for each of its blocks; default: as many as in the trace"),
    ] = None
    vocabulary: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        doc("of a trace, or synthetic: token ids are below it; default: the server's, 32,000"),
    ] = None
    sessions: Annotated[Positive, doc("how many")] = 10
    seed: Annotated[NonNegative, doc("of the choice of sessions and of their arrival")] = 0
    min_turns: Annotated[Positive, doc("of a session")] = 2
    max_turns: Annotated[Positive, doc("of a session; more are cut off")] = 6
    max_output_tokens: Annotated[Positive, doc("of a turn; more are cut off")] = 64
    max_context_tokens: Annotated[Positive, doc("of a session; turns beyond are cut off")] = 2048
    replay_answers: Annotated[bool, doc("history from the data, not from the server")] = False
    warm_up: Annotated[NonNegative, doc("requests before the measured ones")] = 2

    concurrency: Annotated[
        Positive | None, doc("sessions at a time: a closed loop, instead of a rate")
    ] = None
    repeats: Annotated[
        Positive, doc("runs, each with arrivals and a cache of its own (cache_salt)")
    ] = 1
    slo_ttft: Annotated[
        PositiveSeconds | None, doc("seconds to the first token of a good request")
    ] = None
    slo_tpot: Annotated[PositiveSeconds | None, doc("seconds per token of a good request")] = None

    def slo(self) -> Slo:
        return Slo(self.slo_ttft, self.slo_tpot)

    def limits(self) -> SessionLimits:
        return SessionLimits(
            min_turns=self.min_turns,
            max_turns=self.max_turns,
            max_output_tokens=self.max_output_tokens,
            max_context_tokens=self.max_context_tokens,
        )


def load_sessions(
    config: ServeBenchConfig,
    model: ModelDirectory,
    progress: Progress,
    served_vocabulary: int | None = None,
) -> Work:
    """Return the workload. The model's tokenizer counts the tokens of texts.

    Prompts of token ids have ids of the vocabulary of `config`, else of `served_vocabulary`, else
    of `model`, and of no more than MOST_TOKEN_IDS unless `config` says so. Raises ConfigError.
    """
    progress(f"choosing {config.sessions} sessions")
    if config.workload == "synthetic" or config.workload == "trace":
        vocabulary = config.vocabulary or min(
            MOST_TOKEN_IDS, served_vocabulary or _vocabulary(model)
        )
        return (_synthetic if config.workload == "synthetic" else _trace)(config, vocabulary)
    tokenizer = Tokenizer.load(model.path)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    choose = (config.sessions, config.seed, config.limits(), count_tokens)
    return text_sessions(config.workload, config.data, *choose)


def _vocabulary(model: ModelDirectory) -> int:
    return read_architecture(model.path, model.name, "float32").vocab


def _synthetic(config: ServeBenchConfig, vocabulary: int) -> tuple[TokenRequest, ...]:
    shape = SharedPrefixes(
        requests=config.sessions,
        rate=config.rate,
        output_tokens=config.max_output_tokens,
        vocabulary=vocabulary,
    )
    return tuple(shared_prefix_requests(shape, config.seed))


def _trace(config: ServeBenchConfig, vocabulary: int) -> tuple[TokenRequest, ...]:
    """Return the first `sessions` requests of a trace, scaled to a mean of `rate` per second."""
    path = required_data(config.workload, config.data)
    form = trace_format(path, config.trace_format)
    lines = list(read_trace(path, config.sessions, form))
    if not lines:
        raise ConfigError(f"{config.data}: no requests in it")
    taken = max(lines[-1].timestamp, 1) / 1000  # seconds
    scale = TraceScale(
        block_tokens=config.trace_block_tokens or form.block_tokens,
        time=len(lines) / config.rate / taken,
        max_output_tokens=config.max_output_tokens,
        vocabulary=vocabulary,
        trace_block_tokens=form.block_tokens,
    )
    return tuple(token_requests(lines, scale))
