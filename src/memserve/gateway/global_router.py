"""The global scheduler as the gateway's router: members, KV events and polls in, routes out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import numpy as np

from memserve.api.generate import GenerateCall
from memserve.api.namespaces import private, salted
from memserve.api.peer_client import PeerClient
from memserve.api.status import EngineTotals, InstanceState, InstanceStats, Limits
from memserve.clock import Clock
from memserve.cluster.kv_feed import KvFeed
from memserve.cluster.member import Member
from memserve.cluster.membership import Change, MemberChange, Membership
from memserve.gateway import handover_proof
from memserve.gateway.admission_queue import AdmissionQueue
from memserve.gateway.instance_costs import InstanceCosts, LinkTimes, StepTimes, answer_tokens
from memserve.gateway.route import Route
from memserve.gateway.routing_metrics import RoutingMetrics
from memserve.planner.contract import LoadReport
from memserve.planner.report import report_of
from memserve.scheduler.admission import Admission
from memserve.scheduler.contract import InstanceSpec, Plan, PromptRequest
from memserve.scheduler.decisions import Decision
from memserve.scheduler.prompt_tree import PromptTree
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.scheduler.scheduler import Scheduler
from memserve.types import (
    Epoch,
    InstanceId,
    Namespace,
    RequestId,
    Role,
    SchedulerId,
    TokenArray,
)
from memserve.vital import Vitals

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between looks at the members' polled totals: the interval of the polls
# Prefill instances that a call names, the planned one first: more than are ever lost at once, and
# few enough for calls to be as small in a cluster of thousands.
MAX_PREFILL = 8
AT_ONCE = 32  # members whose totals are looked at without a pause: about 1 ms
# Assumed block size of a member until it has loaded its model and reported its limits.
_BLOCK_TOKENS = 16
# Factor on prefill costs while no instance has given a profile: only the number of requests then
# bounds admission; tenants still take turns in proportion.
_GUESSED = 1e-3
# Least share of prefill in a predicted TTFT at which the measured TTFT corrects prefill costs.
_PURE_PREFILL = 0.9


@dataclass(slots=True)
class _Known:
    """A member's current life, as the scheduler knows it."""

    epoch: Epoch
    spec: InstanceSpec
    steps: StepTimes = field(default_factory=StepTimes)
    links: LinkTimes = field(default_factory=LinkTimes)
    profiled: bool = False  # its costs come from its own profile, not from a guess
    asking: asyncio.Task[None] | None = None
    totals: EngineTotals | None = None
    limits: Limits | None = None


class GlobalRouter:
    """Routes calls. Belongs to the event loop, from creation to `close`."""

    def __init__(
        self,
        membership: Membership,
        peers: PeerClient,
        clock: Clock,
        policy: str,
        instance_wait: float,
        vitals: Vitals | None = None,
    ) -> None:
        """`instance_wait`: seconds without an instance until waiting requests are refused.
        `vitals` supervises the tasks."""
        self._vitals = vitals or Vitals()
        self._life = SchedulerId(uuid.uuid4().hex)  # of this worker, of all gateways' ones
        self.tree = PromptTree()
        self.scheduler = Scheduler(self.tree, clock, policy)
        self.feed = KvFeed(self.tree, peers, clock, vitals=self._vitals)
        self.queue = AdmissionQueue(Admission(), self._prefill_seconds, clock, instance_wait)
        self.metrics = RoutingMetrics(policy, self.tree, self.feed, self.queue)
        self._membership = membership
        self._clock = clock
        self._costs = InstanceCosts(peers)
        self._known: dict[InstanceId, _Known] = {}
        self._unmet_turns = itertools.count()  # round-robin over members unknown to the scheduler
        self._eligible = _Eligible((), Epoch(-1))
        self._unfollow = membership.on_change(self._changed)
        self._looking = self._vitals.task("router", self._look())

    async def close(self) -> None:
        self._unfollow()
        self._looking.cancel()
        asking = [known.asking for known in self._known.values() if known.asking is not None]
        for task in asking:
            task.cancel()
        await asyncio.wait((self._looking, *asking))
        await self.feed.close()

    def plan(self, call: GenerateCall, members: Sequence[Member]) -> Route:
        """Return a route by some of `members`, which are ready and at least one. What it reserves
        lasts until the route's `ended`. `call.resumed` has the tokens generated on earlier routes
        of this call; these have ended."""
        eligible = self._eligible
        if not eligible.are(members, self._membership.epoch):
            eligible = self._eligible = _Eligible(members, self._membership.epoch)
        request = PromptRequest(
            id=RequestId(call.id),
            tokens=_tokens(call),
            namespace=_namespace(call),
            output_tokens=call.sampling.max_tokens - _resumed(call),
            session=call.session,
            priority=call.priority,
        )
        decision = self.scheduler.decide(request, eligible.ids)
        if decision is None:  # the scheduler knows none of `members` yet
            return Route(members[next(self._unmet_turns) % len(members)])
        plan = decision.plan
        self.metrics.planned(plan, decision.took)
        by_id = eligible.by_id
        prefill: tuple[Member, ...] = ()
        if plan.prefill is not None:
            chosen = by_id[plan.prefill]
            prefill = (chosen, *eligible.behind(chosen))
        fetch = None if plan.fetch is None else by_id[plan.fetch]
        return _Reserved(self, call, decision, by_id[plan.instance], prefill, fetch)

    def decisions(self, n: int) -> list[Decision]:
        """Return the last `n` decisions, newest first."""
        return self.scheduler.decisions.last(n)

    def load(self) -> LoadReport:
        """Return what the scheduler predicts of the ready members, for the planner."""
        ready = {member.id for member in self._membership.ready()}
        return report_of(self.scheduler, self._life, self._clock.now(), ready)

    def now(self) -> float:
        """Return the clock's seconds."""
        return self._clock.now()

    def first_token(self, request: RequestId, plan: Plan, planned: float) -> None:
        """Record the first token of a plan made at `planned` (the clock's seconds)."""
        seconds = self._clock.now() - planned
        self.prefilled(request)
        self.metrics.first_token(seconds)
        terms = plan.terms
        if terms.prefill < _PURE_PREFILL * terms.first_token:
            return
        costs = self._known[plan.computes].spec.costs if plan.computes in self._known else None
        if isinstance(costs, RefinedCosts):
            others = terms.first_token - terms.prefill
            cached = plan.cached_tokens + plan.fetched_tokens
            costs.observe_prefill(plan.prompt_tokens, cached, seconds - others)

    def prefilled(self, request: RequestId) -> None:
        """Mark a request's prompt as computed, as seen or as predicted."""
        self.scheduler.prefilled(request)
        self.queue.prefilled(request)

    # --- members --------------------------------------------------------------------------

    def _changed(self, change: MemberChange) -> None:
        self.feed.observe(change)
        self.queue.resize(self._computing())
        if change.change in (Change.LEFT, Change.DIED):
            known = self._known.get(change.id)
            if known is not None and known.epoch == change.epoch:
                self._forget(change.id)
            return
        known = self._known.get(change.id)
        if known is None or known.epoch != change.epoch:
            self._forget(change.id)
            self._meet(change)
        elif known.spec.role is not change.role:
            self._put(known, replace(known.spec, role=change.role))
        known = self._known[change.id]
        member = self._membership.find(change.id)
        if member is not None and member.epoch == known.epoch:
            self._take_limits(known, member.limits)
            self._take_kv(known, member)
        if known.asking is None and change.state is not InstanceState.STARTING:
            asking = self._ask_costs(known, change.address)
            known.asking = self._vitals.errand("a question for costs", asking)

    def _meet(self, change: MemberChange) -> None:
        spec = InstanceSpec(
            id=change.id,
            role=change.role,
            costs=self._costs.unknown(),
            block_tokens=_BLOCK_TOKENS,
            host=urlsplit(change.address).hostname or change.address,
        )
        self._known[change.id] = _Known(change.epoch, spec)
        self.scheduler.put(spec)

    async def _ask_costs(self, known: _Known, address: str) -> None:
        costs = await self._costs.of(address)
        if costs is None:
            return
        known.profiled = True
        self._put(known, replace(known.spec, costs=costs))
        for other in tuple(self._known.values()):
            # This profile is now the best guess for the others, most of which have it already.
            if not other.profiled and not self._costs.is_guess(other.spec.costs):
                self._put(other, replace(other.spec, costs=self._costs.unknown()))

    def _put(self, known: _Known, spec: InstanceSpec) -> None:
        if self._known.get(spec.id) is known:
            known.spec = spec
            self.scheduler.put(spec)

    def _forget(self, instance: InstanceId) -> None:
        known = self._known.pop(instance, None)
        if known is not None and known.asking is not None:
            known.asking.cancel()
        self.scheduler.remove(instance)

    # --- polls ----------------------------------------------------------------------------

    async def _look(self) -> None:
        while True:
            for number, member in enumerate(self._membership.members):
                if number % AT_ONCE == AT_ONCE - 1:
                    await asyncio.sleep(0)
                known = self._known.get(member.id)
                if known is None or member.stats is None or known.epoch != member.epoch:
                    continue
                try:
                    self._take_in(known, member, member.stats)
                except Exception as error:  # noqa: BLE001 - one member must not stop the others
                    self._vitals.survive("a look at a member's figures", error)
            self.queue.resize(self._computing())
            await asyncio.sleep(LOOK_SECONDS)

    def _prefill_seconds(self, tokens: int) -> float:
        """Return the seconds, for admission, of a prefill of `tokens` with nothing cached."""
        seconds = self.scheduler.whole_prefill_seconds(tokens)
        told = any(known.profiled for known in self._known.values())
        return seconds if told else _GUESSED * seconds

    def _computing(self) -> int:
        """Return how many ready instances compute prompts; decode instances count only if there
        are no others."""
        roles = [member.role for member in self._membership.ready()]
        decode = roles.count(Role.DECODE)
        return len(roles) - decode or decode

    def _take_kv(self, known: _Known, member: Member) -> None:
        """Take over the KV fingerprint of a member; "" until it has loaded its model."""
        kv = member.kv if member.limits is not None else ""
        if kv == known.spec.kv:
            return
        self._put(known, replace(known.spec, kv=kv))
        others = {each.spec.kv for each in self._known.values() if each.spec.kv} - {kv}
        if kv and others:
            log.warning(
                "%s holds other KV than some other members (another engine, model or layout): "
                "requests go to all, KV moves only between those that hold the same",
                known.spec.id,
            )

    def _take_limits(self, known: _Known, limits: Limits | None) -> None:
        if limits is not None and limits != known.limits:
            known.limits = limits
            self._put(known, _with_limits(known.spec, limits))

    def _take_in(self, known: _Known, member: Member, stats: InstanceStats) -> None:
        totals = stats.engine
        self._take_limits(known, member.limits)
        self._take_kv(known, member)
        self.scheduler.observe(member.id, running=totals.running, waiting=totals.waiting)
        known.steps.learn(known.spec, totals)
        known.links.learn(known.spec, stats.pool.links)
        last, known.totals = known.totals, totals
        if last is None or known.spec.role is Role.PREFILL:
            return  # prefill instances generate only the first token of an answer
        length = answer_tokens(last, totals)
        # Answers of at most TOKENS tokens are self-tests and hand-over proofs, not clients'.
        if length is not None and length > handover_proof.TOKENS:
            self.scheduler.output_length.ended(round(length))


class _Eligible:
    """Members that a plan may choose, with look-ups by id and role. One object serves all
    requests until the cluster changes, so that look-ups are not rebuilt for each request."""

    def __init__(self, members: Sequence[Member], epoch: Epoch) -> None:
        self._members = members
        self._epoch = epoch
        self.by_id: Mapping[InstanceId, Member] = {member.id: member for member in members}
        self.ids = frozenset(self.by_id)
        self._prefill = [member for member in members if member.role is Role.PREFILL]
        self._places = {member.id: at for at, member in enumerate(self._prefill)}

    def behind(self, chosen: Member) -> list[Member]:
        """Return the prefill instances to ask if the chosen one does not answer: those that follow
        it in turn, so that the requests of a lost one spread over others."""
        at, found = self._places[chosen.id], list[Member]()
        for other in itertools.chain(self._prefill[at + 1 :], self._prefill[:at]):
            if other.kv == chosen.kv:
                found.append(other)
            if len(found) == MAX_PREFILL - 1:
                break
        return found

    def are(self, members: Sequence[Member], epoch: Epoch) -> bool:
        """Return whether this object describes `members` at the membership's `epoch`, which fixes
        ids, roles and states."""
        return self._epoch == epoch and self._members == members


class _Reserved(Route):
    """A route by a decision of the scheduler, which has reserved its predicted work.

    An answer that is not streamed shows no first token: its prompt counts as computed after the
    predicted TTFT."""

    __slots__ = ("_at", "_decision", "_expected", "_router", "_teaches")

    def __init__(
        self,
        router: GlobalRouter,
        call: GenerateCall,
        decision: Decision,
        member: Member,
        prefill: tuple[Member, ...],
        fetch: Member | None,
    ) -> None:
        super().__init__(member, prefill, fetch, decision)
        self._router = router
        self._decision = decision
        self._at = router.now()
        self._expected: asyncio.TimerHandle | None = None
        # A vLLM server's TTFT includes other work (images, grammars), so it teaches no prefill.
        self._teaches = call.forward is None
        if not call.stream:
            loop = asyncio.get_running_loop()
            expected = decision.plan.terms.first_token
            self._expected = loop.call_later(expected, router.prefilled, decision.request)

    def explain(self) -> str:
        return self._decision.summary().partition(": ")[2]  # without the request's id

    def first_token(self) -> None:
        if self._expected is not None:  # not streamed: the whole answer comes at once
            return
        self._decision.outcome.first_token = self._router.now() - self._at
        if self._teaches:
            self._router.first_token(self._decision.request, self._decision.plan, self._at)
        else:
            self._router.prefilled(self._decision.request)

    def ended(self) -> None:
        if self._expected is not None:
            self._expected.cancel()  # it must not mark a retry of the request as prefilled
        self._decision.outcome.whole = self._router.now() - self._at
        self._router.scheduler.finished(self._decision.request)


def _with_limits(spec: InstanceSpec, limits: Limits) -> InstanceSpec:
    return replace(
        spec,
        block_tokens=limits.block_tokens,
        max_running=limits.max_running,
        chunk_tokens=limits.mixed_batch_tokens,
        kv_tokens=limits.pool_tokens,
    )


def _namespace(call: GenerateCall) -> Namespace:
    """Return the namespace in which cached KV serves the call; one without any if the prompt is
    computed whole, for its scores."""
    if call.sampling.prompt_logprobs is not None and not call.resumed:
        return private(call.id)
    return salted(call.cache_salt)


def _resumed(call: GenerateCall) -> int:
    """Return how many tokens of the first choice a lost instance has generated."""
    return len(call.resumed[0]) if call.resumed else 0


def _tokens(call: GenerateCall) -> TokenArray:
    """Return the first prompt and the tokens that a lost instance generated behind it, [tokens]
    int32. The first one stands for several prompts: all run on one instance."""
    prompt = call.prompts[0]
    if not _resumed(call):
        return prompt
    return np.concatenate((prompt, call.resumed[0]))
