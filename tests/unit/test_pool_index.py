"""The index: whole blocks, the tokens themselves, and no more memory than needed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from memserve import KVLayout, Medium
from memserve.pool.pool import BlockPool
from tests.pool_harness import BLOCK, LAYOUT, cached_blocks, keys_of, kv_of, prompt, store


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    with BlockPool(LAYOUT, 32, 8) as pool:
        yield pool
        pool.check_integrity()


def test_a_match_is_the_longest_prefix_in_whole_blocks(pool: BlockPool) -> None:
    store(pool, prompt(1, 2, 3))
    for tokens, blocks in [
        (prompt(1, 2, 3), 3),
        (prompt(1, 2, 3)[:-1], 2),
        (prompt(1, 2, 3, 4), 3),
        (prompt(1, 2, 9), 2),
        (prompt(9, 2, 3), 0),
        (prompt(2, 3), 0),
        ([], 0),
    ]:
        assert cached_blocks(pool, tokens) == blocks


def test_one_changed_token_in_a_block_is_another_prompt(pool: BlockPool) -> None:
    tokens = prompt(1, 2, 3)
    store(pool, tokens)
    for at in range(len(tokens)):
        other = list(tokens)
        other[at] ^= 1
        assert cached_blocks(pool, other) == at // BLOCK


def test_a_match_may_span_both_media(pool: BlockPool) -> None:
    store(pool, prompt(1, 2, 3))
    assert pool.swap_out(1) == 1
    with pool.match(prompt(1, 2, 3)) as match:
        assert match.tokens == 3 * BLOCK
        assert torch.equal(pool.read(match.refs), kv_of(keys_of("", prompt(1, 2, 3))))


def test_namespaces_never_share(pool: BlockPool) -> None:
    store(pool, prompt(1, 2), "a")
    assert cached_blocks(pool, prompt(1, 2), "a") == 2
    assert cached_blocks(pool, prompt(1, 2), "b") == 0
    assert cached_blocks(pool, prompt(1, 2)) == 0
    assert pool.delete([], "b") == 0
    assert pool.delete([], "a") == 2
    assert pool.stats().namespaces == 0


def test_insert_tells_new_from_duplicate(pool: BlockPool) -> None:
    store(pool, prompt(1, 2))
    refs = pool.alloc_mem(3)
    result = pool.insert(prompt(1, 2, 3), refs)
    assert result.duplicate.tolist() == refs[:2].tolist()
    assert result.new.tolist() == refs[2:].tolist()
    pool.free_mem(result.duplicate)


def test_matched_blocks_may_be_inserted_again(pool: BlockPool) -> None:
    store(pool, prompt(1, 2))
    with pool.match(prompt(1, 2)) as match:
        rest = pool.alloc_mem(1)
        result = pool.insert(prompt(1, 2, 3), np.concatenate((match.refs, rest)))
    assert result.new.tolist() == rest.tolist()
    assert len(result.duplicate) == 0


def test_insert_can_pin_what_it_inserted(pool: BlockPool) -> None:
    store(pool, prompt(1))
    refs = pool.alloc_mem(2)
    result = pool.insert(prompt(1, 2), refs, pin=True)
    assert result.match is not None
    assert result.match.refs[1] == refs[1]
    pool.free_mem(result.duplicate)
    assert pool.delete([]) == 0
    result.match.release()
    assert pool.delete([]) == 2


def test_a_pinning_insert_prefers_the_copy_in_hbm(pool: BlockPool) -> None:
    store(pool, prompt(1, 2), medium=Medium.DRAM)
    with pool.match(prompt(1, 2)) as reader:
        refs = pool.alloc_mem(2)
        pool.write(refs, kv_of(keys_of("", prompt(1, 2))))
        result = pool.insert(prompt(1, 2), refs, pin=True)
        assert result.new.tolist() == refs.tolist()
        assert result.match is not None
        assert result.match.refs.tolist() == refs.tolist()
        assert pool.stats().dram.detached == 2  # the reader keeps the old copy
        assert torch.equal(pool.read(reader.refs), pool.read(refs))
        pool.check_integrity()
    assert pool.stats().dram.free == 8
    result.match.release()


def test_a_reader_can_put_back_what_the_index_lost(pool: BlockPool) -> None:
    store(pool, prompt(1), medium=Medium.DRAM)
    reader = pool.match(prompt(1))
    pool.swap_in(reader.refs)  # the index has a copy of its own now
    assert pool.delete(prompt(1)) == 1
    result = pool.insert(prompt(1), reader.refs)
    assert result.new.tolist() == reader.refs.tolist()
    assert pool.stats().dram.detached == 0
    reader.release()
    assert cached_blocks(pool, prompt(1)) == 1


def test_memory_follows_what_is_stored(pool: BlockPool) -> None:
    store(pool, prompt(1, 2, 3, 4))
    assert pool.stats().nodes == 1
    store(pool, prompt(1, 2, 5))
    assert pool.stats().nodes == 3
    store(pool, prompt(1, 2, 5, 6))  # a leaf grows in place
    assert pool.stats().nodes == 3
    assert pool.delete(prompt(1, 2, 5)) == 2
    assert pool.stats().nodes == 1  # merged back
    assert pool.delete(prompt(1)) == 4
    assert pool.stats().nodes == 0


@pytest.mark.parametrize(
    ("stored", "deleted", "gone"),
    [
        ([(1, 2, 3)], (1, 2, 3), 3),
        ([(1, 2, 3)], (1,), 3),  # everything that begins with it
        ([(1, 2, 3), (1, 2, 4)], (1, 2, 3), 1),  # not what another prompt shares
        ([(1, 2, 3), (1, 2, 4)], (1, 2), 4),
        ([(1, 2)], (1, 2, 3), 2),  # its own blocks, though its end is not cached
        ([(1, 2)], (1, 3), 0),
        ([(1, 2), (1, 3)], (1, 4), 0),
        ([(1, 2), (5,)], (), 3),
    ],
)
def test_delete_takes_a_prompt_and_what_continues_it(
    pool: BlockPool, stored: list[tuple[int, ...]], deleted: tuple[int, ...], gone: int
) -> None:
    for blocks in stored:
        store(pool, prompt(*blocks))
    assert pool.delete(prompt(*deleted)) == gone


def test_less_than_a_block_deletes_nothing(pool: BlockPool) -> None:
    store(pool, prompt(1, 2))
    assert pool.delete(prompt(1)[:-1]) == 0
    assert pool.delete([]) == 2


@pytest.mark.parametrize("order", [((1, 2, 3), (1, 2, 4, 5)), ((1, 2, 4, 5), (1, 2, 3))])
def test_pinned_blocks_and_what_leads_to_them_stay(
    pool: BlockPool, order: tuple[tuple[int, ...], ...]
) -> None:
    for blocks in order:
        store(pool, prompt(*blocks))
    with pool.match(prompt(1, 2, 4)):
        assert pool.delete(prompt(1)) == 2  # blocks 3 and 5
        assert cached_blocks(pool, prompt(1, 2, 4, 5)) == 3
    assert pool.delete(prompt(1)) == 3


def test_every_prefix_of_many_prompts_is_found() -> None:
    rng = np.random.default_rng(0)
    layout = KVLayout(1, 1, 1, "int8", 16)
    # Two different blocks: paths meet and part at every depth.
    prompts = [rng.integers(0, 2, 12, dtype=np.int32).repeat(16) for _ in range(60)]
    with BlockPool(layout, 60 * 12) as pool:
        for tokens in prompts:
            refs = pool.alloc_mem(12)
            pool.free_mem(pool.insert(tokens, refs).duplicate)
        for tokens in prompts:
            for blocks in range(13):
                with pool.match(tokens[: blocks * 16]) as match:
                    assert len(match.refs) == blocks
        pool.check_integrity()
