"""Hand-over between instances whose HBM is a GPU's, which shared memory does not reach: KV arrives
in DRAM, and is swapped in. The HBM is a CPU's here, and told as if it were no shared memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from memserve.config import TransferMode
from memserve.instance import build
from memserve.pool.pool import BlockPool
from memserve.transfer import kv_link, shared_pool
from memserve.transfer.base import LocalRegion
from memserve.transfer.kv_link import PoolLink
from memserve.transfer.regions import local_regions
from memserve.types import Medium
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import BLOCK, pair, prompt_of
from tests.tiny_models import Reference, save_tiny_model
from tests.waiting import until


def regions_of_a_gpu(pool: BlockPool) -> tuple[LocalRegion, ...]:
    return tuple(
        LocalRegion(msgspec.structs.replace(each.region, segment=None), each.memory)
        if each.region.medium == Medium.HBM
        else each
        for each in local_regions(pool)
    )


class LinkOfAGpu(PoolLink):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._hbm_mappable = False


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pool, "local_regions", regions_of_a_gpu)
    monkeypatch.setattr(build, "PoolLink", LinkOfAGpu)
    monkeypatch.setattr(kv_link, "LINGER_SECONDS", 0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.mark.parametrize("mode", ["by-layer", "by-request", "by-request-agg"])
async def test_kv_arrives_in_dram_both_ways(model: Path, mode: TransferMode) -> None:
    reference = Reference(model)
    prompt = prompt_of(70, seed=1)
    async with pair(model, mode=mode) as (p, d):
        first = await d.complete(*prompt, tokens=30, prefill=[p])
        assert first.tokens == [reference.generate(prompt, 30)]
        await until(lambda: d.totals.returns == 1, "the return")
        await p.settled()
        assert d.totals.blocks_received == 70 // BLOCK
        assert d.engine.pool.stats().swapped_in == 70 // BLOCK
        assert p.engine.pool.stats().dram.cached == d.totals.blocks_returned > 0
        conversation = prompt + first.tokens[0]
        following = conversation + prompt_of(20, seed=2)
        computed = p.engine.stats().computed_prompt_tokens
        answer = await d.complete(*following, tokens=8, prefill=[p])
        assert answer.tokens == [reference.generate(following, 8)]
        assert p.engine.stats().computed_prompt_tokens - computed < 20 + 2 * BLOCK
        assert p.engine.pool.stats().swapped_in > 0
