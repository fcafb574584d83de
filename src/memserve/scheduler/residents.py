"""`Residents`: KV that requests hold or will hold in one instance's HBM, and when it gets free."""

from __future__ import annotations

import msgspec

from memserve.types import Namespace, RequestId, TokenArray


class Resident(msgspec.Struct, eq=False):
    """One request's share of HBM."""

    namespace: Namespace
    prompt: TokenArray
    kv_tokens: int  # without tokens shared with other requests there
    output_tokens: int  # expected; 0: a prefill only, which ends with its prompt
    decodes_since: float | None = None  # seconds of the clock; None: the prompt is not computed


class Residents:
    """The `Resident` of each request on one instance."""

    __slots__ = ("_by_request", "kv_tokens")

    def __init__(self) -> None:
        self._by_request: dict[RequestId, Resident] = {}
        self.kv_tokens = 0  # sum over all

    def __len__(self) -> int:
        return len(self._by_request)

    def add(self, request: RequestId, resident: Resident) -> None:
        self._by_request[request] = resident
        self.kv_tokens += resident.kv_tokens

    def prefilled(self, request: RequestId, now: float) -> None:
        """Report that a prompt is computed: the request decodes now, or is removed if it is a
        prefill only. Unknown requests are ignored."""
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
        """Predicted seconds until `excess` tokens are free, if all queued prompts are computed
        after `queue` seconds and a decode step takes `step` seconds."""
        ends = []
        for resident in self._by_request.values():
            lasts = resident.output_tokens * step
            since = resident.decodes_since
            # An answer longer than expected may end at any time: a quarter of its predicted time.
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
        """Largest number of leading `tokens`, which must be cached here, that a request's prompt
        has too: these are in HBM already."""
        most = 0
        for held in self._by_request.values():
            size = min(len(held.prompt), len(tokens))
            # Skip prompts that cannot beat the best so far, by comparing one token.
            if held.namespace != namespace or size <= most or held.prompt[most] != tokens[most]:
                continue
            differs = held.prompt[:size] != tokens[:size]
            first = int(differs.argmax())
            most = max(most, first if differs[first] else size)
        return most
