"""The memory pool alone: microseconds per call, against an index of chained block hashes.

The KV is tiny (one byte per element, one element per head), so that the book-keeping is measured,
and millions of blocks fit into any machine.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import msgspec
import numpy as np
from rich.table import Table

from memserve.config import Positive, doc
from memserve.errors import IntegrityError
from memserve.pool.layout import KVLayout
from memserve.pool.pool import BlockPool
from memserve.tokens import as_tokens
from memserve.types import RefArray, TokenArray

BLOCK_TOKENS = 16
PolicyName = Literal["lru", "cost"]

VOCABULARY = 128_000
STORED_BLOCKS = (1_000, 10_000, 100_000)  # sizes of the pools in which eviction is timed
SAMPLES = 1_000  # of each timed call

_LAYOUT = KVLayout(
    layers=1, kv_heads=1, head_dim=1, dtype="int8", block_tokens=BLOCK_TOKENS, model="bench"
)
# Of the prompts that fill a pool for the eviction test: shared prefix and rest, in blocks.
_SHARED_BLOCKS, _OWN_BLOCKS = 16, 48


class PoolWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts that begin with one of a few shared prefixes."""

    prompts: Annotated[Positive, doc("how many are stored")] = 10_000
    prompt_tokens: Annotated[Positive, doc("of one prompt")] = 4096
    prefixes: Annotated[Positive, doc("different beginnings")] = 50
    prefix_tokens: Annotated[Positive, doc("of one beginning")] = 1024
    turns: Annotated[Positive, doc("of a conversation, branching at each")] = 20

    @property
    def prompt_blocks(self) -> int:
        return self.prompt_tokens // BLOCK_TOKENS


QUICK = PoolWorkload(prompts=200, prompt_tokens=1024, prefixes=5, prefix_tokens=256)


class EvictionPoint(msgspec.Struct, frozen=True):
    """Time of an allocation of one block when none is free."""

    policy: PolicyName
    stored_blocks: int
    microseconds: float


class PoolBenchReport(msgspec.Struct, frozen=True):
    """Medians of a call in microseconds; tokens are int32 arrays."""

    workload: PoolWorkload
    insert: float
    match: float
    release: float
    tokens_from_list: float  # conversion of a Python list of tokens, in addition
    hashed_insert: float  # the same prompts in the index of chained hashes
    hashed_match: float
    bytes_per_prompt: float  # growth of resident memory, mean
    hashed_bytes_per_prompt: float
    conversation_match: float
    alloc: float  # of the blocks of one prompt
    free: float
    evictions: tuple[EvictionPoint, ...]


class ChainedHashes:
    """The usual prefix index: a dictionary by SHA-256 of parent hash and block tokens.

    As in vLLM's prefix cache, without its per-block objects and serialisation.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}

    def _hashes(self, tokens: TokenArray) -> Iterator[bytes]:
        data = tokens.tobytes()
        step = 4 * BLOCK_TOKENS
        parent = b""
        for at in range(0, len(data) - step + 1, step):
            parent = hashlib.sha256(parent + data[at : at + step]).digest()
            yield parent

    def insert(self, tokens: TokenArray, blocks: Sequence[int]) -> None:
        for key, block in zip(self._hashes(tokens), blocks, strict=True):
            self._blocks.setdefault(key, block)

    def match(self, tokens: TokenArray) -> list[int]:
        found = []
        for key in self._hashes(tokens):
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found


def run_pool_bench(
    workload: PoolWorkload | None = None,
    stored_blocks: Sequence[int] = STORED_BLOCKS,
    progress: Callable[[str], None] = lambda _: None,
) -> PoolBenchReport:
    """Measure the pool and the chained hashes, with the same prompts."""
    workload = workload or PoolWorkload()
    progress(f"{workload.prompts} prompts into the pool")
    with BlockPool(_LAYOUT, _blocks_needed(workload), instance="bench") as pool:
        before = _resident_bytes()
        insert = _time_inserts(pool, workload)
        bytes_per_prompt = (_resident_bytes() - before) / workload.prompts
        sample = _sample(workload)
        match, release = _time_matches(pool, sample)
        alloc, free = _time_alloc(pool, workload.prompt_blocks)
        progress("conversations")
        conversation = _time_conversations(pool, workload.turns)
        listed = sample[0].tolist()
        from_list = median(_timed(partial(as_tokens, listed)) for _ in range(SAMPLES))
    progress(f"{workload.prompts} prompts into chained hashes")
    hashed = _time_hashed(workload, sample)
    policies: tuple[PolicyName, ...] = ("lru", "cost")
    points = []
    for policy, stored in itertools.product(policies, stored_blocks):
        progress(f"eviction, {policy}, {stored} blocks stored")
        points.append(EvictionPoint(policy, stored, _time_eviction(policy, stored)))
    return PoolBenchReport(
        workload=workload,
        insert=insert,
        match=match,
        release=release,
        tokens_from_list=from_list,
        hashed_insert=hashed[0],
        hashed_match=hashed[1],
        bytes_per_prompt=bytes_per_prompt,
        hashed_bytes_per_prompt=hashed[2],
        conversation_match=conversation,
        alloc=alloc,
        free=free,
        evictions=tuple(points),
    )


def pool_bench_table(report: PoolBenchReport) -> Table:
    """Return the report as a table."""
    work = report.workload
    table = Table(
        title=f"{work.prompts} prompts of {work.prompt_tokens} tokens, {work.prefixes} shared "
        f"prefixes of {work.prefix_tokens}; medians"
    )
    for column in ("", "pool", "chained hashes", "ratio"):
        table.add_column(column, justify="right")
    for name, ours, theirs, unit in (
        ("insert", report.insert, report.hashed_insert, "us"),
        ("match", report.match, report.hashed_match, "us"),
        ("memory per prompt", report.bytes_per_prompt, report.hashed_bytes_per_prompt, "bytes"),
    ):
        # With few prompts the process needs no more pages, so memory does not grow.
        ratio = f"{theirs / ours:.1f}" if ours > 0 else "-"
        table.add_row(name, f"{ours:.1f} {unit}", f"{theirs:.1f} {unit}", ratio)
    for name, value in (
        ("release a match", report.release),
        (f"match, {work.turns} turns", report.conversation_match),
        (f"allocate {work.prompt_blocks} blocks", report.alloc),
        (f"free {work.prompt_blocks} blocks", report.free),
        ("tokens from a list", report.tokens_from_list),
    ):
        table.add_row(name, f"{value:.1f} us", "", "")
    for point in report.evictions:
        name = f"evict one of {point.stored_blocks} ({point.policy})"
        table.add_row(name, f"{point.microseconds:.1f} us", "", "")
    return table


def _blocks_needed(workload: PoolWorkload) -> int:
    shared = workload.prefixes * workload.prefix_tokens // BLOCK_TOKENS
    own = workload.prompts * (workload.prompt_tokens - workload.prefix_tokens) // BLOCK_TOKENS
    conversations = SAMPLES * 4 * workload.turns
    return shared + own + conversations + 2 * workload.prompt_blocks


def _prompts(workload: PoolWorkload) -> Iterator[TokenArray]:
    """Yield the workload's prompts, the same ones in each call."""
    rng = np.random.default_rng(0)
    prefixes = rng.integers(0, VOCABULARY, (workload.prefixes, workload.prefix_tokens), np.int32)
    own = workload.prompt_tokens - workload.prefix_tokens
    for number in range(workload.prompts):
        rest = rng.integers(0, VOCABULARY, own, np.int32)
        yield np.concatenate((prefixes[number % workload.prefixes], rest))


def _sample(workload: PoolWorkload) -> list[TokenArray]:
    step = max(1, workload.prompts // SAMPLES)
    return list(itertools.islice(_prompts(workload), 0, None, step))


def _time_inserts(pool: BlockPool, workload: PoolWorkload) -> float:
    times = []
    for tokens in _prompts(workload):
        refs = pool.alloc_mem(workload.prompt_blocks)
        started = time.perf_counter_ns()
        result = pool.insert(tokens, refs)
        times.append(time.perf_counter_ns() - started)
        pool.free_mem(result.duplicate)
    return median(times) / 1e3


def _time_matches(pool: BlockPool, prompts: Sequence[TokenArray]) -> tuple[float, float]:
    matches, releases = [], []
    for tokens in prompts:
        started = time.perf_counter_ns()
        match = pool.match(tokens)
        found = time.perf_counter_ns()
        match.release()
        releases.append(time.perf_counter_ns() - found)
        matches.append(found - started)
        if match.tokens != len(tokens):
            raise IntegrityError(f"{match.tokens} of {len(tokens)} stored tokens matched")
    return median(matches) / 1e3, median(releases) / 1e3


def _time_alloc(pool: BlockPool, blocks: int) -> tuple[float, float]:
    allocs, frees = [], []
    for _ in range(SAMPLES):
        started = time.perf_counter_ns()
        refs = pool.alloc_mem(blocks)
        done = time.perf_counter_ns()
        pool.free_mem(refs)
        frees.append(time.perf_counter_ns() - done)
        allocs.append(done - started)
    return median(allocs) / 1e3, median(frees) / 1e3


def _time_conversations(pool: BlockPool, turns: int) -> float:
    """Return the median microseconds of matching a conversation's whole history. Each turn has two
    answers in the index, so that the path has a branch, and an edge, for every turn."""
    rng = np.random.default_rng(1)
    times = []
    for _ in range(SAMPLES // 4):
        history = rng.integers(0, VOCABULARY, 4 * BLOCK_TOKENS, np.int32)
        for _ in range(turns):
            answers = rng.integers(0, VOCABULARY, (2, 4 * BLOCK_TOKENS), np.int32)
            for answer in answers:
                _store(pool, np.concatenate((history, answer)))
            history = np.concatenate((history, answers[0]))
        for _ in range(4):
            started = time.perf_counter_ns()
            match = pool.match(history)
            times.append(time.perf_counter_ns() - started)
            match.release()
    return median(times) / 1e3


def _store(pool: BlockPool, tokens: TokenArray) -> None:
    with pool.match(tokens) as match:
        rest = pool.alloc_mem(len(tokens) // BLOCK_TOKENS - len(match.refs))
        pool.insert(tokens, np.concatenate((match.refs, rest)))


def _time_hashed(
    workload: PoolWorkload, sample: Sequence[TokenArray]
) -> tuple[float, float, float]:
    """Return the medians of insert and match in microseconds, and bytes per prompt."""
    index = ChainedHashes()
    blocks: Iterator[int] = itertools.count()
    before = _resident_bytes()
    times = []
    for tokens in _prompts(workload):
        refs = list(itertools.islice(blocks, workload.prompt_blocks))
        times.append(_timed(partial(index.insert, tokens, refs)))
    size = (_resident_bytes() - before) / workload.prompts
    matches = [_timed(partial(index.match, tokens)) for tokens in sample]
    return median(times), median(matches), size


def _time_eviction(policy: PolicyName, stored: int) -> float:
    rng = np.random.default_rng(2)
    shared = rng.integers(0, VOCABULARY, (8, _SHARED_BLOCKS * BLOCK_TOKENS), np.int32)
    with BlockPool(_LAYOUT, stored, instance="bench", eviction=policy) as pool:
        while pool.stats().hbm.free >= _SHARED_BLOCKS + _OWN_BLOCKS:
            rest = rng.integers(0, VOCABULARY, _OWN_BLOCKS * BLOCK_TOKENS, np.int32)
            _store(pool, np.concatenate((shared[rng.integers(8)], rest)))
        kept: list[RefArray] = [pool.alloc_mem(pool.stats().hbm.free)]
        times = []
        for _ in range(min(SAMPLES, stored // 2)):
            started = time.perf_counter_ns()
            refs = pool.alloc_mem(1)
            times.append(time.perf_counter_ns() - started)
            kept.append(refs)
        return median(times) / 1e3


def _timed(call: Callable[[], object]) -> float:
    """Return the microseconds of one call."""
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
