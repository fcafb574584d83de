"""Proof that KV moves between prefill and decode instances, with hand-overs of test prompts.

A hand-over that moves no KV raises no error: the decode instance computes the prompt and answers.
So the gateway hands over a small prompt that no instance has cached, and checks whether KV bytes
arrived. A pair for which none did is reported as degraded, and tried again until it works.

Each gateway, and each of its workers, makes proofs of its own: workers share only members, and
any worker may be asked for `/health`. A proof costs one prompt of three blocks for each life of
an instance.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from memserve.api import msgpack
from memserve.api.generate import (
    GENERATE_PATH,
    CallKind,
    GenerateCall,
    PrefillPeer,
    SamplingParams,
)
from memserve.api.handoff import MEET_PATH, MeetCall, MeetResult
from memserve.api.limits import MAX_INT32
from memserve.api.metric import Label, MetricSpec, Page, counter, gauge
from memserve.api.peer_client import PeerClient, PeerError
from memserve.api.request_stats import RequestStats
from memserve.api.status import InstanceState, Limits, MemberKind
from memserve.clock import Clock
from memserve.cluster.member import DegradedPair, Member
from memserve.cluster.membership import Membership
from memserve.tokens import from_ids
from memserve.types import Epoch, InstanceId, Role, TokenArray
from memserve.vital import Vitals

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between looks at the members: the interval of their polls
# Between looks while no member has joined, left or changed its state or role: by then another one's
# limits or fingerprint are known, too.
FOLLOW_SECONDS = 10.0
# Seconds until a pair that does not work is tried again; doubled each time, up to MAX_PAUSE.
FIRST_PAUSE = 10.0
MAX_PAUSE = 300.0
# Seconds that a proof is put off while sequences wait at an instance of the pair; not for ever,
# since a pair that is always busy matters most.
BUSY_PAUSE = 10.0
MAX_PUT_OFF = 6  # times in a row
# Timeout of a proof: three blocks behind whatever runs already. Longer than the transfer's own
# timeouts, so that their errors are reported.
PROOF_SECONDS = 60.0
MEET_SECONDS = 15.0  # timeout of a round trip between two pools, which have timeouts of their own
# Pairs that are remembered: one for each of a quarter of `membership.MAX_MEMBERS`.
MAX_PAIRS = 1024

BLOCKS = 3  # of a proof's prompt
TOKENS = 2  # of its answer: for a single token, the decode instance would need no KV
NOTHING_MOVED = "no KV arrived where it is decoded"
NO_ANSWER = "the decode instance did not answer"

_DEGRADED = gauge(
    "memserve_scheduler_degraded_pairs",
    "pairs",
    "Pairs of a prefill and a decode instance between which the last test hand-over moved no KV: "
    "prompts are computed where they are decoded. `GET /health` names the pairs.",
)
_PROOFS = counter(
    "memserve_scheduler_handover_proofs_total",
    "hand-overs",
    "Test hand-overs that the gateway has made, by whether KV arrived.",
    Label("what", ("worked", "failed")),
)

_meetings = msgspec.msgpack.Decoder(MeetResult)


class _Usage(msgspec.Struct, frozen=True):
    memserve: RequestStats


class _Answer(msgspec.Struct, frozen=True):
    """The part of an answer that a proof reads."""

    usage: _Usage


_answers = msgspec.json.Decoder(_Answer)
_GONE = ("", Role.COLOCATED)


class MemberEpoch(NamedTuple):
    """An instance from one start to its end."""

    id: InstanceId
    epoch: Epoch


class Pair(NamedTuple):
    """A prefill and a decode instance, from their starts on."""

    prefill: MemberEpoch
    decode: MemberEpoch


def pairs_of(members: Sequence[Member], known: Iterable[Pair] = ()) -> list[Pair]:
    """Return the pairs to prove: among members with one KV fingerprint, each prefill and each
    decode instance is in at least one. `known` pairs whose members are still there stay, so that
    a member that joins or leaves makes no other pair be proved again.

    At most one for each member, and MAX_PAIRS. Members without KV to hand over are in none.
    """
    groups: defaultdict[str, dict[Role, list[MemberEpoch]]]
    groups = defaultdict(lambda: {role: [] for role in Role})
    place: dict[MemberEpoch, tuple[str, Role]] = {}
    for member in members:
        if member.kv is not None and member.epoch is not None:
            life = MemberEpoch(member.id, member.epoch)
            groups[member.kv][member.role].append(life)
            place[life] = member.kv, member.role
    pairs = []
    uses: Counter[MemberEpoch] = Counter()
    for pair in known:
        (kv, one), (other_kv, other) = place.get(pair.prefill, _GONE), place.get(pair.decode, _GONE)
        if kv == other_kv and (one, other) == (Role.PREFILL, Role.DECODE):
            pairs.append(pair)
            uses.update(pair)
    for group in groups.values():
        prefill, decode = group[Role.PREFILL], group[Role.DECODE]
        if not prefill or not decode:
            continue
        for life in (*prefill, *decode):
            if not uses[life] and len(pairs) < MAX_PAIRS:
                first = place[life][1] is Role.PREFILL
                partner = min(decode if first else prefill, key=lambda each: uses[each])
                pair = Pair(life, partner) if first else Pair(partner, life)
                pairs.append(pair)
                uses.update(pair)
    return pairs


@dataclass(slots=True)
class _PairState:
    """State of a pair's proof."""

    due: float  # clock time of the next try; unused once it is proven
    pause: float = FIRST_PAUSE  # seconds until the try after the next failure
    put_off: int = 0  # times in a row
    proven: bool = False
    degraded: DegradedPair | None = None


class HandoverProof:
    """Proves pairs one after the other, while `run` runs. Belongs to the event loop. Its calls go
    to instances directly, and are not in the gateway's queue, turns or request metrics."""

    metrics: tuple[MetricSpec, ...] = (_DEGRADED, _PROOFS)

    def __init__(
        self, membership: Membership, peers: PeerClient, clock: Clock, model: str, vitals: Vitals
    ) -> None:
        """`model`: the served name, for the calls."""
        self._membership = membership
        self._peers = peers
        self._clock = clock
        self._model = model
        self._vitals = vitals
        self._pairs: dict[Pair, _PairState] = {}
        self._followed = Epoch(-1)  # of the membership, at the last look
        self._looked = 0.0  # clock time of that
        self._random = random.SystemRandom()  # so that no two processes make the same prompt
        self.worked = self.failed = 0

    async def run(self) -> None:
        """Follow the members and prove pairs that are due, until cancelled."""
        while True:
            now = self._clock.now()
            # Not before each proof: a cluster that starts has as many of them as members.
            if self._membership.epoch != self._followed or now - self._looked >= FOLLOW_SECONDS:
                self.follow()
            pair = self._next()
            if pair is None:
                await asyncio.sleep(LOOK_SECONDS)
                continue
            # `vitals` counts an unexpected failure; the pair is tried again.
            proof = self._vitals.errand("hand-over's proof", self.prove(pair))
            try:
                await asyncio.wait((proof,))
            finally:
                proof.cancel()

    def degraded(self) -> tuple[DegradedPair, ...]:
        """Return the pairs whose last proof has failed."""
        found = (state.degraded for state in self._pairs.values())
        return tuple(each for each in found if each is not None)

    def proven(self) -> list[Pair]:
        """Return the pairs that work, or whose limits are too small for a hand-over."""
        return [pair for pair, state in self._pairs.items() if state.proven]

    async def report(self, page: Page) -> None:
        page.add(_DEGRADED, len(self.degraded()))
        page.add(_PROOFS, self.worked, "worked")
        page.add(_PROOFS, self.failed, "failed")

    def follow(self) -> None:
        """Update the pairs from the members: add new lives to prove, drop lives that have ended."""
        # With members in doubt: an instance that missed a poll is still in its life.
        members = [
            member
            for member in self._membership.members
            if member.state is InstanceState.READY and member.limits is not None
        ]
        now = self._looked = self._clock.now()
        self._followed = self._membership.epoch
        self._pairs = {
            pair: self._pairs.get(pair) or _PairState(now)
            for pair in pairs_of(members, self._pairs)
        }

    async def prove(self, pair: Pair) -> None:
        """Have a pair hand a prompt over, and store the result."""
        state = self._pairs[pair]
        state.due = self._clock.now() + state.pause  # even if this try raises
        prefill, decode = self._member(pair.prefill), self._member(pair.decode)
        if prefill is None or decode is None or self._puts_off(state, prefill, decode):
            return
        call = self._call(prefill, decode)
        if call is None:  # its limits are too small for a hand-over
            state.proven = True
            return
        failure = await self._failure(call, prefill, decode)
        if failure is not None or self._membership.epoch != self._followed:
            self.follow()
        if pair not in self._pairs:  # an instance has gone meanwhile, which may be why
            return
        if failure is None:
            self.worked += 1
            if state.degraded is not None:
                log.info("KV moves from %s to %s now", prefill.id, decode.id)
            state.proven, state.degraded = True, None
        elif not self._puts_off(state, prefill, decode):
            self.failed += 1
            if state.degraded is None:
                log.warning(
                    "%s and %s are degraded: %s%s. Prompts are computed where they are decoded",
                    prefill.id,
                    decode.id,
                    failure.why,
                    f" ({failure.detail})" if failure.detail else "",
                )
            state.degraded = failure
            state.due = self._clock.now() + state.pause
            state.pause = min(2 * state.pause, MAX_PAUSE)

    # --- inside ---------------------------------------------------------------------------

    def _next(self) -> Pair | None:
        """Return the pair that has been due for longest; None: none is due."""
        waiting = {p: each.due for p, each in self._pairs.items() if not each.proven}
        pair = min(waiting, key=lambda each: waiting[each], default=None)
        return pair if pair is not None and waiting[pair] <= self._clock.now() else None

    def _member(self, life: MemberEpoch) -> Member | None:
        member = self._membership.find(life.id)
        return member if member is not None and member.epoch == life.epoch else None

    def _puts_off(self, state: _PairState, *members: Member) -> bool:
        """Return whether the proof is put off, since sequences wait at one of the members."""
        busy = any(m.stats is not None and m.stats.engine.waiting for m in members)
        if not busy or state.put_off == MAX_PUT_OFF:
            state.put_off = 0
            return False
        state.put_off += 1
        state.due = self._clock.now() + BUSY_PAUSE
        return True

    def _call(self, prefill: Member, decode: Member) -> GenerateCall | None:
        """Return a call with a random prompt, in a namespace of its own. None: the instances
        accept no prompt of BLOCKS blocks."""
        limits = [member.limits for member in (prefill, decode) if member.limits is not None]
        tokens = BLOCKS * max(limit.block_tokens for limit in limits)
        if tokens + TOKENS > min(limit.max_tokens for limit in limits):
            return None
        ours = {prefill.kind, decode.kind} == {MemberKind.MEMSERVE}
        name = os.urandom(16).hex()
        return GenerateCall(
            id=f"proof-{name}",
            kind=CallKind.COMPLETION,
            model=self._model,
            created=int(time.time()),
            prompts=(self._prompt(limits, tokens),),
            sampling=SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True),
            cache_salt=f"proof-{name}",
            # Behind all clients. A vLLM server without priority scheduling refuses a priority.
            priority=MAX_INT32 if ours else 0,
            prefill=(PrefillPeer(prefill.id, prefill.address, prefill.pool_address),),
        )

    def _prompt(self, limits: Sequence[Limits], tokens: int) -> TokenArray:
        """Return random token ids, [tokens] int32, from the middle of the vocabulary: special
        tokens are at its ends."""
        size = min(limit.vocab_size for limit in limits)
        low, high = size // 4, max(size // 2, size // 4 + 1)
        return from_ids([self._random.randrange(low, high) for _ in range(tokens)])

    async def _failure(
        self, call: GenerateCall, prefill: Member, decode: Member
    ) -> DegradedPair | None:
        """Run a proof's call. Return why no KV moved; None: KV moved."""
        try:
            answer = await self._peers.call(
                "POST",
                decode.address + GENERATE_PATH,
                _answers.decode,
                msgpack.encode(call),
                media=msgpack.MEDIA,
                seconds=PROOF_SECONDS,
            )
        except PeerError as error:
            return DegradedPair(prefill.id, decode.id, NO_ANSWER, str(error))
        if answer.usage.memserve.bytes_received:
            return None
        detail = await self._obstacle(decode, prefill) or await self._obstacle(prefill, decode)
        return DegradedPair(prefill.id, decode.id, NOTHING_MOVED, detail)

    async def _obstacle(self, one: Member, other: Member) -> str:
        """Return why the pool of `one` cannot reach the pool of `other`, as `one` reports; "" if
        it can."""
        call = MeetCall(PrefillPeer(other.id, other.address))
        try:
            await self._peers.call(
                "POST",
                one.address + MEET_PATH,
                _meetings.decode,
                msgpack.encode(call),
                media=msgpack.MEDIA,
                seconds=MEET_SECONDS,
            )
        except PeerError as error:
            return f"{one.id}: {error}"
        return ""
