"""Pools that lay out the same KV differently exchange it: other shards, aggregated or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from memserve import KVLayout, MemPool
from memserve.config import TransferMode
from memserve.errors import LayoutMismatch, NotOwned, PeerRefused, TransferError
from memserve.transfer.regions import PathName
from memserve.types import RefArray
from tests.transfer_harness import LOCAL, PATIENCE, eventually, quiet

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

MODEL = KVLayout(layers=2, kv_heads=4, head_dim=8, dtype="float32", block_tokens=4, model="m")
BLOCKS = 5
TOKENS = list(range(BLOCKS * MODEL.block_tokens))
KV = torch.randn(BLOCKS, *MODEL.block_shape, generator=torch.Generator().manual_seed(0))
PATHS: list[PathName] = ["shm", "nixl"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> PathName:
    name: PathName = request.param
    if name == "nixl" and find_spec("nixl") is None:
        pytest.skip("NIXL is not installed: pip install --no-deps nixl nixl-cu12")
    return name


def group(shards: int, aggregated: bool = True) -> list[KVLayout]:
    """The layouts of the ranks of a tensor-parallel group."""
    heads = MODEL.kv_heads // shards
    return [
        replace(
            MODEL, kv_heads=heads, head_start=rank * heads, total_kv_heads=4, aggregated=aggregated
        )
        for rank in range(shards)
    ]


def part(layout: KVLayout) -> torch.Tensor:
    """What a pool of this layout holds of the KV."""
    return KV[..., layout.heads.start : layout.heads.stop, :]


@contextmanager
def pools(name: str, layouts: Sequence[KVLayout], path: PathName) -> Iterator[list[MemPool]]:
    with ExitStack() as stack:
        made = [
            stack.enter_context(
                MemPool(layout, 16, instance=f"{name}{rank}", path=path, secret="of the tests")
            )
            for rank, layout in enumerate(layouts)
        ]
        yield made
        for pool in made:
            quiet(pool)


def filled(pool: MemPool) -> RefArray:
    refs = pool.alloc_mem(BLOCKS)
    pool.write(refs, part(pool.layout))
    return refs


def meet(sources: Sequence[MemPool], targets: Sequence[MemPool]) -> None:
    """Those that hold heads in common connect, the others cannot."""
    for target in targets:
        address = target.serve(LOCAL)
        name = target.owner.instance
        for source in sources:
            if set(source.layout.heads) & set(target.layout.heads):
                source.connect(name, address)
            else:
                with pytest.raises(LayoutMismatch, match="KV heads"):
                    source.connect(name, address)


@pytest.mark.parametrize("aggregated", [(True, False), (False, True)])
@pytest.mark.parametrize(("sources", "targets"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 1)])
def test_every_rank_gets_its_heads_from_those_that_have_them(
    path: PathName, sources: int, targets: int, aggregated: tuple[bool, bool]
) -> None:
    ours, theirs = group(sources, aggregated[0]), group(targets, aggregated[1])
    with pools("s", ours, path) as senders, pools("t", theirs, path) as receivers:
        meet(senders, receivers)
        for receiver in receivers:
            target = receiver.alloc_mem(BLOCKS)
            refs = np.random.default_rng(1).permutation(target)
            transfers = [
                sender.transfer(receiver.owner.instance, filled(sender), refs)
                for sender in senders
                if set(sender.layout.heads) & set(receiver.layout.heads)
            ]
            for transfer in transfers:
                transfer.result(PATIENCE)
            assert torch.equal(receiver.read(refs), part(receiver.layout))
            receiver.insert(TOKENS, refs)
            with receiver.match(TOKENS) as match:
                assert torch.equal(receiver.read(match.refs), part(receiver.layout))


@pytest.mark.parametrize("mode", ["by-layer", "by-request-agg"])
def test_insert_where_the_source_has_all_that_the_target_holds(
    path: PathName, mode: TransferMode
) -> None:
    with pools("s", [MODEL], path) as (whole,), pools("t", group(2, False), path) as shards:
        meet([whole], shards)
        source = filled(whole)
        for shard in shards:
            name = shard.owner.instance
            transfer = whole.transfer_with_insert(name, TOKENS, source, mode=mode)
            transfer.result(PATIENCE)
            assert transfer.sent == BLOCKS
            with shard.match(TOKENS) as match:
                assert torch.equal(shard.read(match.refs), part(shard.layout))
            assert shard.stats().hbm.active == 0
            plain = whole.transfer(name, source).result(PATIENCE)
            assert torch.equal(shard.read(plain), part(shard.layout))
            whole.free_mem(plain)


def test_blocks_are_not_published_with_heads_of_another_prompt() -> None:
    """A shard's part of new blocks is not the whole: what else is in them is somebody's."""
    with pools("s", group(2), "shm") as shards, pools("t", [MODEL], "shm") as (whole,):
        meet(shards, [whole])
        for shard in shards:
            source = filled(shard)
            for refused in (
                lambda shard=shard, source=source: shard.transfer("t0", source),
                lambda shard=shard, source=source: shard.transfer_with_insert("t0", TOKENS, source),
                lambda shard=shard, source=source: shard.open_transfer("t0", source, tokens=TOKENS),
            ):
                with pytest.raises(LayoutMismatch, match="heads") as error:
                    refused()
                assert shard.layout.fingerprint in str(error.value)
                assert whole.layout.fingerprint in str(error.value)
        assert whole.stats().hbm.active == 0


def test_two_that_write_the_same_heads_of_a_block_are_kept_apart() -> None:
    ours = [*group(2), group(4)[0]]  # the first and the last overlap
    with pools("s", ours, "shm") as senders, pools("t", [MODEL], "shm") as (whole,):
        meet(senders, [whole])
        target = whole.alloc_mem(BLOCKS)
        name = whole.owner.instance
        open_transfers = [
            sender.open_transfer(name, filled(sender), target) for sender in senders[:2]
        ]
        eventually(lambda: whole.peer_stats().incoming == 2, "both of other heads")
        with pytest.raises(NotOwned):
            senders[2].transfer(name, filled(senders[2]), target).result(PATIENCE)
        whole.free_mem(target[:2])
        for transfer in open_transfers:
            assert whole.stats().hbm.active == BLOCKS  # while one of them may write
            with pytest.raises(NotOwned):
                whole.insert(TOKENS, target)
            transfer.write()
            transfer.commit()
            transfer.result(PATIENCE)
        assert whole.stats().hbm.active == BLOCKS - 2
        assert torch.equal(whole.read(target[2:]), KV[2:])


def test_kv_of_another_meaning_is_refused_before_anything_is_said() -> None:
    others = [replace(MODEL, model="n"), replace(MODEL, dtype="float16"), replace(MODEL, layers=3)]
    with MemPool(MODEL, 4, instance="t") as target:
        address = target.serve(LOCAL)
        for other in others:
            with MemPool(other, 4, instance="s") as source:
                with pytest.raises(LayoutMismatch) as error:
                    source.connect("t", address)
                assert source.layout.fingerprint in str(error.value)
                assert target.layout.fingerprint in str(error.value)
                with pytest.raises(TransferError):
                    source.transfer("t", source.alloc_mem(1))
        with MemPool(MODEL, 4, instance="s") as source, pytest.raises(PeerRefused):
            source.connect("u", address)
