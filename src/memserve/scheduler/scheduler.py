"""`Scheduler`, the facade: takes members and requests, returns decisions, keeps reservations."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from hashlib import blake2b

from memserve.clock import Clock
from memserve.scheduler.arrivals import Arrivals
from memserve.scheduler.candidates import Candidates, CandidateSet, whole_prefill_seconds
from memserve.scheduler.compiled import prepare
from memserve.scheduler.contract import InstanceSpec, Plan, PrefixMatches, PromptRequest
from memserve.scheduler.decisions import Decision, DecisionLog, Ranking
from memserve.scheduler.instance_load import Reservation
from memserve.scheduler.load import Load
from memserve.scheduler.policies import Placement, PolicyInput, find_policy
from memserve.types import InstanceId, RequestId

log = logging.getLogger(__name__)

DECODE_WEIGHT = 0.1  # weight of a second of decoding; a second of TTFT has weight 1
FIRST_OUTPUT_TOKENS = 128.0  # expected answer length before any answer has ended
_OUTPUT_NEWEST = 1 / 32  # least weight of the newest answer in the running mean
_OUTPUT_OUTLIER = 4.0  # cap of one answer's length, as a multiple of the expected length
_SESSION_BYTES = 16
_MAX_SESSIONS = 100_000  # remembered placements, LRU
_MAX_CANDIDATE_SETS = 16  # values of `among` whose candidates are kept
_MAX_CANDIDATES = 1_000_000  # sum over the kept sets; about 70 bytes each


class OutputLength:
    """Running mean of answer lengths, in tokens. Predictions do not use `max_tokens` alone,
    because answers often end earlier; a cap limits what a few endless answers add to the mean."""

    def __init__(self, first: float = FIRST_OUTPUT_TOKENS) -> None:
        self.expected = first
        self.seen = 0  # answers

    def ended(self, output_tokens: int) -> None:
        self.seen += 1
        weight = max(_OUTPUT_NEWEST, 1 / (self.seen + 1))
        capped = min(float(output_tokens), _OUTPUT_OUTLIER * max(self.expected, 1.0))
        self.expected += weight * (capped - self.expected)


class Scheduler:
    """Decides where requests run. For one thread at a time; no call blocks.

    Deterministic: equal calls in equal order, with equal clock and seed, give equal decisions.
    """

    def __init__(
        self,
        prefixes: PrefixMatches,
        clock: Clock,
        policy: str = "prompt-tree",
        *,
        seed: int = 0,
        decode_weight: float = DECODE_WEIGHT,
        overlapped: bool = False,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`overlapped`: KV goes to decode instances while prompts are computed. `timer` only
        measures how long decisions take. Raises ConfigError for an unknown policy."""
        self._policy = find_policy(policy)
        prepare()
        self.policy = policy
        self._prefixes = prefixes
        self._clock = clock
        self._decode_weight = decode_weight
        self._overlapped = overlapped
        self._timer = timer
        self.load = Load(seed)
        self.output_length = OutputLength()
        self.decisions = DecisionLog()
        self.arrivals = Arrivals()
        self._turn = 0
        self._sessions: OrderedDict[bytes, Placement] = OrderedDict()  # by `_session_key`
        self._candidates: dict[frozenset[InstanceId] | None, Candidates] = {}

    # --- members ------------------------------------------------------------------------

    def put(self, spec: InstanceSpec) -> None:
        """Add an instance, or replace its spec (another role, other costs). Reservations stay."""
        if self.load.put(spec):
            self._candidates.clear()

    def remove(self, instance: InstanceId) -> None:
        """Remove an instance and its reservations. Unknown ids are ignored."""
        if self.load.remove(instance):
            self._candidates.clear()

    def observe(self, instance: InstanceId, *, running: int, waiting: int) -> None:
        """Report an instance's own counts: sequences that hold memory, and sequences that wait.
        Any excess over the reservations counts as other gateways' work until the next call."""
        self.load.observe(instance, running, waiting)

    # --- requests -----------------------------------------------------------------------

    def decide(
        self, request: PromptRequest, among: Collection[InstanceId] | None = None
    ) -> Decision | None:
        """Return the decision where a request runs; reserve its work and expect its prompt there.

        `among`: the only instances that the plan may name; None: all. Pass one frozenset object
        repeatedly, since it caches its hash. A reservation that the request already has (on a
        retry) is released first. Returns None if there is no candidate.
        """
        started = self._timer()
        now = self._clock.now()
        self.load.release(request.id, now)
        candidates = self._candidates_of(among)
        if not len(candidates.candidate_set):
            return None
        output_tokens = max(min(request.output_tokens, round(self.output_length.expected)), 1)
        matches = self._prefixes.match(request.namespace, request.tokens)
        candidates.predict(
            request,
            output_tokens,
            matches,
            self._prefixes.in_host(request.namespace, request.tokens, matches),
            now,
            fetches=self._policy.fetches,
            overlapped=self._overlapped,
        )
        key = self._session_key(request)
        session = None if key is None else self._sessions.get(key)
        choice = self._policy.choose(
            PolicyInput(request, candidates, self._decode_weight, self._turn, session)
        )
        self._turn += 1
        ranking = Ranking.of(candidates, choice.scores, choice.candidate)
        plan = ranking.plan(0)
        self._reserve(request, output_tokens, plan, now)
        self.arrivals.add(now, plan.prompt_tokens, plan.cached_tokens + plan.fetched_tokens)
        decision = Decision(
            request=request.id,
            policy=self.policy,
            at=now,
            plan=plan,
            considered=len(candidates.candidate_set),
            took=self._timer() - started,
            ranking=ranking,
        )
        self.decisions.add(decision)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", decision.explanation())
        return decision

    def whole_prefill_seconds(self, prompt_tokens: int) -> float:
        """Return the seconds to compute a prompt with nothing cached, mean over instances: the cost
        for `Admission`. 0.0 without instances."""
        if not self.load.by_slot:
            return 0.0
        return float(whole_prefill_seconds(self.load, prompt_tokens).mean())

    def prefilled(self, request: RequestId) -> None:
        """Report a request's first token. A second call, or an unknown request, is ignored."""
        self.load.prefilled(request, self._clock.now())

    def finished(self, request: RequestId, output_tokens: int | None = None) -> None:
        """Release a request's reservation, whether it succeeded or not. `output_tokens`: only for
        a complete answer. A second call is ignored."""
        reservation = self.load.release(request, self._clock.now())
        if reservation is not None and output_tokens is not None:
            self.output_length.ended(output_tokens)

    def _candidates_of(self, among: Collection[InstanceId] | None) -> Candidates:
        key = None if among is None else frozenset(among)
        candidates = self._candidates.get(key)
        if candidates is None:
            candidates = Candidates(self.load, CandidateSet(self.load, key))
            kept = sum(len(each.candidate_set) for each in self._candidates.values())
            large = kept + len(candidates.candidate_set) > _MAX_CANDIDATES
            if large or len(self._candidates) == _MAX_CANDIDATE_SETS:
                self._candidates.clear()
            self._candidates[key] = candidates
        return candidates

    def _kv_tokens(self, request: PromptRequest, output_tokens: int, plan: Plan) -> int:
        """Return the KV tokens that the sequence takes up in HBM of the answering instance."""
        load, needed = self.load, len(request.tokens) + output_tokens
        slot = load.slots[plan.instance]
        if load.has_room(slot, needed):
            return needed  # HBM is not short: skip the search for shared prefixes
        held = plan.cached_tokens if plan.prefill is None else plan.prompt_tokens
        return needed - load.shared_tokens(slot, request.namespace, request.tokens[:held])

    def _session_key(self, request: PromptRequest) -> bytes | None:
        """Return a digest of the session's name, of fixed size; None without a session, or if the
        policy ignores sessions."""
        if request.session is None or not self._policy.sessions:
            return None
        return blake2b(request.session.encode(), digest_size=_SESSION_BYTES).digest()

    def _reserve(self, request: PromptRequest, output_tokens: int, plan: Plan, now: float) -> None:
        load, prefixes = self.load, self._prefixes
        load.reserve(
            Reservation(
                request=request.id,
                namespace=request.namespace,
                tokens=request.tokens,
                cached_tokens=plan.cached_tokens + plan.fetched_tokens,
                prefill_seconds=plan.terms.prefill,
                context_tokens=len(request.tokens) + output_tokens // 2,
                output_tokens=output_tokens,
                kv_tokens=self._kv_tokens(request, output_tokens, plan),
                computes=load.of(plan.computes),
                answers=load.of(plan.instance),
            ),
            now,
        )
        prefixes.expect(plan.computes, request.namespace, request.tokens, now)
        if plan.prefill is not None:
            prefixes.expect(plan.instance, request.namespace, request.tokens, now)
        key = self._session_key(request)
        if key is not None:
            self._sessions[key] = Placement(plan.instance, plan.computes)
            self._sessions.move_to_end(key)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
