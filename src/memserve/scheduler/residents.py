"""The KV that requests hold, or will, in one instance's HBM, and when it should be free again."""

from __future__ import annotations

import msgspec

from memserve.types import Namespace, RequestId, TokenArray


class Resident(msgspec.Struct, eq=False):
    """One request's share of HBM."""

    namespace: Namespace
    prompt: TokenArray
    kv_tokens: int  # besides what it shares with others there
    output_tokens: int  # 0: leaves when its prompt is computed
    decodes_since: float | None = None  # None: its prompt is not computed


class Residents:
    """Those of one instance."""

    __slots__ = ("_by_request", "kv_tokens")

    def __init__(self) -> None:
        self._by_request: dict[RequestId, Resident] = {}
        self.kv_tokens = 0  # in all

    def __len__(self) -> int:
        return len(self._by_request)

    def add(self, request: RequestId, resident: Resident) -> None:
        self._by_request[request] = resident
        self.kv_tokens += resident.kv_tokens

    def prefilled(self, request: RequestId, now: float) -> None:
        """It decodes, or leaves. Unknown ones are ignored."""
        resident = self._by_request.get(request)
        if resident is None:
            return
        if resident.output_tokens:
            resident.decodes_since = now
        else:
            self.remove(request)

    def remove(self, request: RequestId) -> None:
        resident = self._by_request.pop(request, None)
        if resident is not None:
            self.kv_tokens -= resident.kv_tokens

    def wait(self, excess: float, queue: float, step: float, now: float) -> float:
        """Seconds until `excess` tokens should have left, where all prompts are computed in
        `queue` seconds and a decode step takes `step`."""
        ends = []
        for resident in self._by_request.values():
            lasts = resident.output_tokens * step
            since = resident.decodes_since
            # An answer that is longer than expected may end at any time.
            ends_in = queue + lasts if since is None else max(since + lasts - now, lasts / 4)
            ends.append((ends_in, resident.kv_tokens))
        wait = 0.0
        for ends_in, tokens in sorted(ends):
            if excess <= 0:
                break
            wait = ends_in
            excess -= tokens
        return wait

    def shared(self, namespace: Namespace, tokens: TokenArray) -> int:
        """How many leading `tokens` one of them has in HBM too, if they are cached there."""
        most = 0
        for held in self._by_request.values():
            size = min(len(held.prompt), len(tokens))
            # Most have nothing more in common than the best so far: one token tells.
            if held.namespace != namespace or size <= most or held.prompt[most] != tokens[most]:
                continue
            differs = held.prompt[:size] != tokens[:size]
            first = int(differs.argmax())
            most = max(most, first if differs[first] else size)
        return most
