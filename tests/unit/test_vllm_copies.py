"""Copies between vLLM's KV pages and the pool's memory: which bytes, in which runs, and when."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from memserve.vllm.connector.copies import (
    Copies,
    CudaCopyStream,
    HostCopies,
    Pages,
    Pending,
    StreamCopies,
    copies_of,
)
from memserve.vllm.connector.metadata import Indices
from tests.fake_vllm_scheduler import LateStream

BLOCKS, PLACES, PAGE = 12, 10, 64


def host(layers: int, ranks: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (PLACES, layers, ranks, PAGE), dtype=np.uint8)


def tensors(layers: int, device: str = "cpu") -> list[torch.Tensor]:
    seed = torch.Generator().manual_seed(2)
    each = (torch.randint(0, 256, (BLOCKS, PAGE), generator=seed) for _ in range(layers))
    return [one.to(torch.uint8).to(device) for one in each]


def ids(*numbers: int) -> Indices:
    return np.array(numbers, dtype=np.int64)


OWN, PLACED = ids(7, 2, 3, 9, 11), ids(4, 5, 6, 1, 9)
# Layers, ranks, the layers of the group: one run of bytes for several blocks, for one, for a page.
SHAPES = [(3, 1, slice(0, 3)), (3, 1, slice(1, 3)), (3, 2, slice(0, 3)), (1, 2, slice(0, 1))]


@pytest.mark.parametrize(("layers", "ranks", "group"), SHAPES)
@pytest.mark.parametrize("late", [False, True])
def test_copies_move_these_pages_and_no_others(
    layers: int, ranks: int, group: slice, late: bool
) -> None:
    stream = LateStream(Random(1))
    copies: Copies = StreamCopies(stream) if late else HostCopies()
    memory, own = host(layers, ranks), tensors(layers)
    pages = Pages(own[group], OWN, memory[:, group, ranks - 1], PLACED)
    saved = memory.copy()
    for at, place in zip(OWN, PLACED, strict=True):
        for number in range(layers)[group]:
            saved[place, number, ranks - 1] = own[number][at].numpy()
    copies.save(pages, Pending())
    run(stream)
    assert np.array_equal(memory, saved)

    memory[...] = host(layers, ranks)
    loaded = [layer.clone() for layer in own]
    for at, place in zip(OWN, PLACED, strict=True):
        for number in range(layers)[group]:
            loaded[number][at] = torch.from_numpy(memory[place, number, ranks - 1])
    copies.load(pages, Pending())
    run(stream)
    assert all(torch.equal(a, b) for a, b in zip(own, loaded, strict=True))


def run(stream: LateStream) -> None:
    while stream.ran < stream.launched:
        stream.run_some()


def test_a_save_takes_what_is_there_when_it_begins() -> None:
    """The blocks are another request's as soon as the next step begins."""
    stream, memory, own = LateStream(Random(1)), host(2, 1), tensors(2)
    wanted = [layer[OWN].clone() for layer in own]
    pending = Pending()
    copies = StreamCopies(stream)
    copies.save(Pages(own, OWN, memory[:, :, 0], PLACED), pending)
    copies.close(pending)
    for layer in own:
        layer.zero_()
    assert not pending.ended
    run(stream)
    assert pending.ended
    for number, layer in enumerate(wanted):
        assert np.array_equal(memory[PLACED, number, 0], layer.numpy())


def test_a_cpu_s_copies_have_ended_when_they_return() -> None:
    pending = Pending()
    copies = copies_of(torch.device("cpu"))
    copies.close(pending)
    assert pending.ended


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("layers", "ranks", "group"), SHAPES)
def test_a_gpu_s_copies_are_ordered_with_its_kernels(layers: int, ranks: int, group: slice) -> None:
    device = torch.device("cuda")
    copies = StreamCopies(CudaCopyStream(device))
    pinned = torch.from_numpy(host(layers, ranks)).pin_memory()
    memory, own = pinned.numpy(), tensors(layers, "cuda")
    pages = Pages(own[group], OWN, memory[:, group, ranks - 1], PLACED)
    wanted = [layer.cpu() for layer in own]
    torch.cuda._sleep(200_000_000)  # the kernels that compute are far behind
    for layer in own:
        layer.add_(1)
    pending = Pending()
    copies.save(pages, pending)
    copies.close(pending)
    for layer in own:
        layer.zero_()  # the next step's
    assert not pending.ended
    torch.cuda.synchronize()
    assert pending.ended
    for number in range(layers)[group]:
        saved = torch.from_numpy(memory[PLACED, number, ranks - 1])
        assert torch.equal(saved, wanted[number][OWN] + 1)
    torch.cuda._sleep(200_000_000)
    for layer in own:
        layer.fill_(9)  # of a step before: what is loaded must come behind it
    copies.load(pages, pending)
    copies.close(pending)
    torch.cuda.synchronize()
    for number in range(layers)[group]:
        got = own[number][torch.from_numpy(OWN).cuda()].cpu().numpy()
        assert np.array_equal(got, memory[PLACED, number, ranks - 1])
