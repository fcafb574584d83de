"""Hot prefixes: what prompts shared, who holds it in which memory, and of whom."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from memserve.api.namespaces import salted
from memserve.scheduler.hot_prefixes import HotPrefixes, reading_prefixes, tenant_of
from memserve.scheduler.prefix_view import PrefixHolder, PrefixReport, merged_reports
from memserve.scheduler.prompt_tree import PromptTree
from memserve.types import (
    GENERATION_BITS,
    INDEX_BITS,
    SHARED,
    InstanceId,
    Medium,
    Namespace,
    TokenArray,
)

P0, D1 = InstanceId("p0"), InstanceId("d1")
STEP = 4


def tokens(*parts: tuple[int, int]) -> TokenArray:
    """Tokens of runs: (first, count)."""
    return np.concatenate([np.arange(a, a + n, dtype=np.int32) for a, n in parts])


def reference(index: int, medium: Medium) -> int:
    return (medium << (GENERATION_BITS + INDEX_BITS)) | (index << GENERATION_BITS) | 1


def read(tree: PromptTree, n: int, now: float = 100.0) -> tuple[HotPrefixes, int]:
    """The report, and how often it paused."""
    return ended(reading_prefixes(tree, n, now))


def ended(reading: Generator[None, None, HotPrefixes]) -> tuple[HotPrefixes, int]:
    pauses = 0
    while True:
        try:
            next(reading)
            pauses += 1
        except StopIteration as end:
            found: HotPrefixes = end.value
            return found, pauses


def a_tree() -> PromptTree:
    tree = PromptTree()
    tree.join(P0, STEP, references=True)
    tree.join(D1, STEP)
    return tree


def test_a_shared_prefix_counts_the_prompts_behind_the_first() -> None:
    tree = a_tree()
    system = (1000, 8)
    for number in range(5):
        prompt = tokens(system, (2000 + 100 * number, 4))
        tree.expect(P0, SHARED, prompt, float(number + 1))
        tree.expect(D1, SHARED, prompt, float(number + 1))  # of the same request
    found, _ = read(tree, 10)
    (hot,) = found.prefixes
    assert (hot.view.hits, hot.view.tokens, hot.view.own_tokens) == (4, 8, 8)
    assert hot.view.age == 95.0
    assert np.frombuffer(hot.own, np.int32).tolist() == tokens(system).tolist()
    assert hot.view.holders == (PrefixHolder(P0), PrefixHolder(D1))  # not confirmed yet


def test_what_saves_more_tokens_comes_first_and_the_rest_is_left_out() -> None:
    tree = a_tree()
    for at, (first, blocks, uses) in enumerate([(0, 1, 9), (100, 5, 3), (200, 2, 2)]):
        for use in range(uses + 1):
            tree.expect(P0, SHARED, tokens((first, blocks * STEP)), 1.0 + 10 * at + use)
    found, _ = read(tree, 2)
    assert [each.view.hits for each in found.prefixes] == [3, 9]  # 60 tokens, 36, and not 16
    assert [view.hits for view in found.report.prefixes] == [3, 9]


def test_holders_are_told_by_medium() -> None:
    tree = a_tree()
    prompt = tokens((0, 3 * STEP))
    media = (Medium.HBM, Medium.DRAM, Medium.DRAM)
    names = [reference(index, medium) for index, medium in enumerate(media)]
    assert tree.stored(P0, SHARED, None, names, prompt)
    assert tree.stored(D1, SHARED, None, [b"a", b"b", b"c"], prompt, "GPU")
    assert tree.stored(D1, SHARED, None, [b"a"], prompt[:STEP], "CPU")
    tree.expect(P0, SHARED, prompt, 1.0)
    (hot,) = read(tree, 1)[0].prefixes
    assert hot.view.holders == (
        PrefixHolder(P0, {"HBM": 1, "DRAM": 2}),
        PrefixHolder(D1, {"GPU": 3, "CPU": 1}),
    )


def test_tenants_are_told_by_space_and_not_by_their_salts() -> None:
    tree = a_tree()
    for salt, blocks, first in (("alice's own salt", 3, 0), ("bob", 1, 10)):
        names = [reference(first + index, Medium.HBM) for index in range(blocks)]
        assert tree.stored(P0, salted(salt), None, names, tokens((0, blocks * STEP)))
    report = read(tree, 5)[0].report
    assert [(each.blocks, each.held) for each in report.tenants] == [(3, 3), (1, 1)]
    assert report.tenants[0].tenant == tenant_of(salted("alice's own salt"))
    assert "alice" not in repr(report)
    assert tenant_of(SHARED) == "shared"
    assert tenant_of(Namespace("salt:\udcff"))  # as a client may send it


def test_a_large_tree_is_read_in_pieces_and_may_change_meanwhile() -> None:
    tree = a_tree()
    for number in range(2000):
        tree.expect(P0, SHARED, tokens((number, STEP)), 1.0 + number)
        tree.expect(P0, SHARED, tokens((number, STEP)), 2001.0 + number)
    reading = reading_prefixes(tree, 3, 5000.0)
    next(reading)
    tree.leave(P0)
    found, pauses = ended(reading)
    assert found.prefixes == []
    assert pauses >= 3
    assert read(tree, 3)[0].report == PrefixReport()


def test_workers_add_up_their_hits() -> None:
    reports = []
    for uses in (2, 5):
        tree = a_tree()
        for use in range(uses + 1):
            tree.expect(P0, SHARED, tokens((0, STEP)), 1.0 + use)
        reports.append(read(tree, 5)[0].report)
    (view,) = merged_reports(reports, 5).prefixes
    assert (view.hits, view.age) == (7, 94.0)
