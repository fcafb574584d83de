"""A scheduler on predictable costs and matches that tests set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from memserve.clock import ManualClock
from memserve.scheduler.contract import Costs, InstanceSpec, PromptRequest, Seconds, TransferPath
from memserve.scheduler.scheduler import DECODE_WEIGHT, Scheduler
from memserve.types import SHARED, InstanceId, Namespace, RequestId, Role, TokenArray

BLOCK = 16


@dataclass(frozen=True)
class LinearCosts:
    """A millisecond for each token computed, and simple numbers for the rest."""

    token_seconds: float = 1e-3
    step_seconds: float = 10e-3
    bandwidth: Mapping[TransferPath, float] = field(
        default_factory=lambda: {"shm": 1e9, "nixl": 1e8, "host": 1e9}
    )
    kv_bytes_per_token: int = 1000

    def prefill_seconds(self, prompt_tokens: ArrayLike, cached_tokens: ArrayLike) -> Seconds:
        computed = np.asarray(prompt_tokens, float) - np.asarray(cached_tokens, float)
        seconds: Seconds = self.token_seconds * computed
        return seconds

    def decode_step_seconds(self, sequences: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        sequences = np.asarray(sequences, float)
        return self.step_seconds + 1e-4 * sequences + 1e-8 * np.asarray(context_tokens, float)

    def transfer_seconds(
        self, num_bytes: ArrayLike, pieces: ArrayLike, path: TransferPath
    ) -> Seconds:
        pieces = np.asarray(pieces, float)
        return np.asarray(num_bytes, float) / self.bandwidth[path] + 1e-6 * pieces


class Matches:
    """What tests say is cached, whatever the prompt; remembers what was expected."""

    def __init__(self) -> None:
        self.tokens: dict[InstanceId, int] = {}
        self.host: dict[InstanceId, int] = {}  # of `tokens`, in host memory
        self.expected: list[tuple[InstanceId, Namespace, int]] = []

    def match(self, namespace: Namespace, tokens: TokenArray) -> Mapping[InstanceId, int]:
        held = {id_: min(n, len(tokens) // BLOCK * BLOCK) for id_, n in self.tokens.items()}
        return {id_: n for id_, n in held.items() if n}

    def in_host(
        self, namespace: Namespace, tokens: TokenArray, matches: Mapping[InstanceId, int]
    ) -> Mapping[InstanceId, int]:
        return {id_: min(n, matches[id_]) for id_, n in self.host.items() if matches.get(id_)}

    def expect(
        self, instance: InstanceId, namespace: Namespace, tokens: TokenArray, now: float
    ) -> None:
        self.expected.append((instance, namespace, len(tokens)))


class Cluster:
    """A scheduler and its surroundings."""

    def __init__(
        self, policy: str = "prompt-tree", *, seed: int = 0, decode_weight: float = DECODE_WEIGHT
    ) -> None:
        self.clock = ManualClock(100.0)
        self.matches = Matches()
        self.costs = LinearCosts()
        self.scheduler = Scheduler(
            self.matches, self.clock, policy, seed=seed, decode_weight=decode_weight
        )

    def add(
        self,
        *names: str,
        role: Role = Role.COLOCATED,
        host: str = "h",
        costs: Costs | None = None,
        max_running: int = 64,
        kv_tokens: int | None = None,
        short_share: float = 0.5,
        kv: str | None = "",
    ) -> None:
        for name in names:
            self.scheduler.put(
                InstanceSpec(
                    InstanceId(name),
                    role,
                    costs or self.costs,
                    BLOCK,
                    host,
                    max_running,
                    kv_tokens=kv_tokens,
                    short_share=short_share,
                    kv=kv,
                )
            )

    def cache(self, **tokens: int) -> None:
        self.matches.tokens = {InstanceId(name): n for name, n in tokens.items()}


def request(
    name: object,
    prompt: int | TokenArray = 1024,
    *,
    output: int = 16,
    session: str | None = None,
    namespace: Namespace = SHARED,
) -> PromptRequest:
    tokens = np.arange(prompt, dtype=np.int32) if isinstance(prompt, int) else prompt
    return PromptRequest(
        RequestId(str(name)), tokens, output_tokens=output, session=session, namespace=namespace
    )
