"""Synthetic requests: groups of prompts that share a prefix, in Poisson arrivals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from memserve.workloads.session import TokenRequest


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The shape of the workload: `requests` prompts, each behind one of `groups` prefixes."""

    requests: int = 64
    groups: int = 8
    prefix_tokens: int = 1024
    suffix_tokens: int = 64
    output_tokens: int = 32
    rate: float = 1.0  # requests per second, mean
    vocabulary: int = 32_000


def shared_prefix_requests(shape: SharedPrefixes, seed: int) -> Iterator[TokenRequest]:
    """Yield the requests in order of arrival; a seed always gives the same requests."""
    choice = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(choice.choices(range(shape.vocabulary), k=count))

    prefixes = [tokens(shape.prefix_tokens) for _ in range(shape.groups)]
    now = 0.0
    for number in range(shape.requests):
        now += choice.expovariate(shape.rate)
        group = choice.randrange(shape.groups)
        prompt = prefixes[group] + tokens(shape.suffix_tokens)
        yield TokenRequest(f"group-{group}-{number}", now, prompt, shape.output_tokens)
