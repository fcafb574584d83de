"""Random traffic over a small pool: every answer is the one `generate` gives, nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from tempfile import mkdtemp

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memserve.engine.model import Model
from memserve.types import RequestId
from tests.engine_harness import load, running_engine
from tests.tiny_models import Reference, save_tiny_model


@lru_cache(maxsize=1)
def gemma() -> tuple[Model, Reference]:
    """Mixed sliding and full layers: the architecture with the most ways to be wrong."""
    directory = save_tiny_model("gemma3", Path(mkdtemp(prefix="memserve-test-")))
    return load(directory), Reference(directory)


@cache
def expected(prompt: tuple[int, ...]) -> list[int]:
    return gemma()[1].generate(list(prompt), MAX_TOKENS)


MAX_TOKENS = 24


@dataclass(frozen=True)
class Call:
    """One client: a prompt made of shared pieces, and what becomes of it."""

    pieces: tuple[int, ...]
    tokens: int
    namespace: str
    cancel_after: int | None
    swap_out: int  # blocks moved to DRAM before this call

    @property
    def prompt(self) -> tuple[int, ...]:
        # Pieces of 1 to 40 tokens, so that prefixes end anywhere in a block.
        return tuple(
            3 + (7 * piece + i) % 500 for piece in self.pieces for i in range(1 + piece * 13)
        )


calls = st.builds(
    Call,
    pieces=st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple),
    tokens=st.integers(1, MAX_TOKENS),
    namespace=st.sampled_from(["", "", "tenant"]),
    cancel_after=st.none() | st.integers(0, 5),
    swap_out=st.sampled_from([0, 0, 3, 100]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    calls=st.lists(calls, min_size=1, max_size=12),
    hbm_blocks=st.integers(13, 40),
    dram_blocks=st.sampled_from([0, 5, 60]),
    chunk=st.sampled_from([5, 16, 64, 512]),
    together=st.integers(1, 6),
)
def test_answers_do_not_depend_on_the_cache(
    calls: list[Call], hbm_blocks: int, dram_blocks: int, chunk: int, together: int
) -> None:
    model, _ = gemma()
    with running_engine(
        model,
        hbm_blocks=hbm_blocks,
        dram_blocks=dram_blocks,
        max_tokens=chunk,
        mixed_tokens=chunk,
        max_running=together,
    ) as engine:
        pending: list[tuple[Call, str]] = []
        for call in calls:
            if call.swap_out:
                engine.pool.swap_out(call.swap_out)
            request = engine.submit(call.prompt, call.tokens, namespace=call.namespace)
            if call.cancel_after is None:
                pending.append((call, request))
            else:
                if call.cancel_after < call.tokens:
                    engine.outputs.wait_tokens(request, call.cancel_after)
                engine.engine.cancel([RequestId(request)])
        for call, request in pending:
            assert engine.finish(request) == [expected(call.prompt)[: call.tokens]]
