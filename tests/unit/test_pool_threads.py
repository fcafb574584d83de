"""One writer and many readers: what a reader has matched is what was written."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from memserve.errors import OutOfBlocks
from memserve.pool.pool import BlockPool
from tests.pool_harness import LAYOUT, keys_of, kv_of, prompt

ROUNDS = 300


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_all(*workers: Callable[[], None]) -> None:
    """Run each in a thread; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def random_prompt(rng: np.random.Generator) -> list[int]:
    return prompt(*rng.integers(0, 3, rng.integers(1, 6)).tolist())


def test_readers_never_see_another_prompts_kv() -> None:
    written = {key: kv_of([key]) for key in _all_keys()}
    with BlockPool(LAYOUT, 24, 12, dram_segment_blocks=4) as pool:

        def write() -> None:
            rng = np.random.default_rng(0)
            for _ in range(ROUNDS):
                tokens = random_prompt(rng)
                keys = keys_of("", tokens)
                with pool.match(tokens, in_hbm=True) as match:
                    try:
                        rest = pool.alloc_mem(len(keys) - len(match.refs))
                    except OutOfBlocks:
                        continue
                    if len(rest):
                        kv = torch.cat([written[key] for key in keys[len(match.refs) :]])
                        pool.write(rest, kv)
                    result = pool.insert(tokens, np.concatenate((match.refs, rest)))
                pool.free_mem(result.duplicate)

        def read(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(ROUNDS):
                tokens = random_prompt(rng)
                with pool.match(tokens) as match:
                    got = pool.read(match.refs)
                    for kv, key in zip(got, keys_of("", tokens), strict=False):
                        assert torch.equal(kv, written[key][0])

        def disturb() -> None:
            rng = np.random.default_rng(9)
            for _ in range(ROUNDS // 3):
                pool.swap_out(int(rng.integers(4)))
                pool.delete(random_prompt(rng))
                pool.shrink_dram(4)
                pool.grow_dram(12 - pool.stats().dram.total)

        run_all(write, disturb, *[lambda seed=seed: read(seed) for seed in (1, 2, 3)])
        pool.check_integrity()
        stats = pool.stats()
        assert (stats.matches, stats.hbm.active, stats.hbm.detached) == (0, 0, 0)


def test_each_block_goes_to_one_thread() -> None:
    with BlockPool(LAYOUT, 40) as pool:

        def use() -> None:
            for _ in range(ROUNDS):
                refs = pool.alloc_mem(8)
                kv = torch.randn(8, *LAYOUT.block_shape)
                pool.write(refs, kv)
                assert torch.equal(pool.read(refs), kv)
                pool.free_mem(refs)

        run_all(use, use, use, use)
        pool.check_integrity()


def _all_keys() -> list[tuple[str, tuple[int, ...]]]:
    ends = [()]
    for _ in range(5):
        ends += [(*end, block) for end in ends for block in range(3)]
    return sorted({key for end in ends for key in keys_of("", prompt(*end))})
