"""Report of a gateway's prompt trees: the prefixes that save most prefill, and blocks by tenant.

Generators compute it in steps, so that an event loop can do other work in between.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Generator
from hashlib import blake2b
from typing import NamedTuple

from memserve.scheduler.holder_tree import Node
from memserve.scheduler.prefix_view import PrefixHolder, PrefixReport, PrefixView, TenantSpace
from memserve.scheduler.prompt_tree import NODES_AT_ONCE, PromptTree
from memserve.types import SHARED, Namespace

MAX_PREFIXES = 100  # in one report
KEPT_TENANTS = 20
_ID_BYTES, _TENANT_BYTES = 8, 6


class HotPrefix(NamedTuple):
    """A prefix of a report, and its last edge's tokens as int32 bytes."""

    view: PrefixView
    own: bytes


class HotPrefixes(NamedTuple):
    """A report with its tokens."""

    report: PrefixReport
    prefixes: list[HotPrefix]


def reading_prefixes(tree: PromptTree, n: int, now: float) -> Generator[None, None, HotPrefixes]:
    """Return the `n` prefixes whose hits saved the most tokens; a step reads NODES_AT_ONCE nodes.
    `now`: by the clock of `PromptTree.expect`. Changes between the steps may be included or not."""
    best: list[tuple[int, int, Node]] = []  # a heap: tokens saved, id
    blocks: Counter[Namespace] = Counter()
    held: Counter[Namespace] = Counter()
    nodes = tree.nodes()
    for first in range(0, len(nodes), NODES_AT_ONCE):
        if first:
            yield
        for node in nodes[first : first + NODES_AT_ONCE]:
            if node.parent is None:
                continue
            count, namespace = len(node), node.tree.namespace
            blocks[namespace] += count
            held[namespace] += count * len(node.blocks)
            if node.hits:
                entry = (node.hits * len(node.edge), node.id, node)
                if len(best) < n:
                    heapq.heappush(best, entry)
                elif best and entry > best[0]:
                    heapq.heapreplace(best, entry)
    found = []
    for _, _, node in sorted(best, reverse=True):
        yield
        if node.parent is not None:
            found.append(_hot(tree, node, now))
    tenants = [
        TenantSpace(tenant_of(namespace), blocks[namespace], held[namespace])
        for namespace, _ in held.most_common(KEPT_TENANTS)
    ]
    views = tuple(each.view for each in found)
    return HotPrefixes(PrefixReport(views, tuple(tenants), len(held) - len(tenants)), found)


def tenant_of(namespace: Namespace) -> str:
    """Return a tenant's name for a namespace, which does not reveal the tenant's salt."""
    if namespace == SHARED:
        return "shared"
    return blake2b(namespace.encode(errors="surrogatepass"), digest_size=_TENANT_BYTES).hexdigest()


def _hot(tree: PromptTree, node: Node, now: float) -> HotPrefix:
    step, tokens = node.tree.block_bytes, node.tree.block_tokens
    tenant = tenant_of(node.tree.namespace)
    edges: list[bytes] = []
    above: Node | None = node
    while above is not None:
        edges.append(above.edge)
        above = above.parent
    digest = blake2b(tenant.encode(), digest_size=_ID_BYTES)
    for edge in reversed(edges):
        digest.update(edge)
    holders = []
    for slot in sorted({*node.blocks, *node.expected}):
        instance, table = tree.table(slot)
        numbers = node.blocks.get(slot)
        holders.append(PrefixHolder(instance, {} if numbers is None else table.media(numbers)))
    view = PrefixView(
        id=digest.hexdigest(),
        tenant=tenant,
        tokens=(node.start + len(node)) * tokens,
        own_tokens=len(node.edge) // step * tokens,
        hits=node.hits,
        age=max(now - node.used, 0.0),
        holders=tuple(holders),
    )
    return HotPrefix(view, node.edge)
