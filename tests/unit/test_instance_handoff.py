"""Hand-over between instances: who keeps which KV, what is sent, and that answers are the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from memserve.api.generate import PrefillPeer
from memserve.api.handoff import PrefillCall
from memserve.api.namespaces import private
from memserve.api.status import PeerMoves
from memserve.config import Caching
from memserve.tokens import from_ids
from memserve.transfer import kv_link
from memserve.types import SHARED, InstanceId, Namespace, RequestId, Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import BLOCK, Node, call_of, node, pair, prompt_of
from tests.tiny_models import Reference, save_tiny_model
from tests.waiting import until

STEPS: tuple[Caching, ...] = ("off", "p", "pd", "full")
PROMPT = prompt_of(70, seed=1)  # four whole blocks and six tokens
NEXT = prompt_of(20, seed=2)  # what the next turn adds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_link, "LINGER_SECONDS", 0.3)


def whole(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


async def first_turn(p: Node, d: Node, caching: Caching) -> list[int]:
    """The tokens of a conversation after its first turn, when all is where it belongs."""
    answer = await d.complete(*PROMPT, tokens=30, prefill=[p])
    await until(lambda: d.totals.returns == (caching == "full"), "the return")
    await p.settled()
    assert answer.cached == 0
    return PROMPT + answer.tokens[0]


@pytest.mark.parametrize("caching", STEPS)
async def test_each_step_keeps_what_it_says(
    model: Path, reference: Reference, caching: Caching
) -> None:
    async with pair(model, caching) as (p, d):
        conversation = await first_turn(p, d, caching)
        assert conversation[70:] == reference.generate(PROMPT, 30)
        asked, made = whole(70), whole(99)  # the last token has no KV
        kept = {"off": (0, 0), "p": (asked, 0), "pd": (asked, made), "full": (made, made)}
        assert (p.has(conversation), d.has(conversation)) == kept[caching]
        assert (p.cached, d.cached) == tuple(tokens // BLOCK for tokens in kept[caching])
        assert d.totals.blocks_received == asked // BLOCK
        assert d.totals.blocks_returned == ((made - asked) // BLOCK if caching == "full" else 0)
        assert d.engine.stats().computed_prompt_tokens == 1 + 70 - asked  # one for the self-test


@pytest.mark.parametrize("caching", STEPS)
async def test_a_next_turn_computes_and_sends_only_what_is_missing(
    model: Path, reference: Reference, caching: Caching
) -> None:
    async with pair(model, caching) as (p, d):
        conversation = await first_turn(p, d, caching)
        before, computed = d.totals, p.engine.stats().computed_prompt_tokens
        prompt = conversation + NEXT
        answer = await d.complete(*prompt, tokens=8, prefill=[p])
        assert answer.tokens == [reference.generate(prompt, 8)]
        found = {"off": 0, "p": whole(70), "pd": whole(70), "full": whole(99)}[caching]
        assert answer.cached == found
        assert p.engine.stats().computed_prompt_tokens - computed == len(prompt) - found
        if caching == "full":
            assert len(prompt) - found < len(NEXT) + 2 * BLOCK
        here = whole(99) if caching in ("pd", "full") else 0
        assert d.totals.blocks_already_present - before.blocks_already_present == here // BLOCK
        sent = d.totals.blocks_received - before.blocks_received
        assert sent == (whole(len(prompt)) - here) // BLOCK
        blocks = d.totals.blocks_received, d.totals.blocks_returned
        received, returned = (count * d.totals.block_bytes for count in blocks)
        assert d.moves == {p.peer.id: PeerMoves(received, returned)}
        assert (returned > 0) is (caching == "full")


async def test_prompts_share_a_prefix_and_salts_share_nothing(model: Path) -> None:
    async with pair(model) as (p, d):
        system, one, two = prompt_of(40, 3), prompt_of(20, 4), prompt_of(20, 5)
        await d.complete(*system, *one, prefill=[p])
        assert (await d.complete(*system, *two, prefill=[p])).cached == whole(40)
        assert d.totals.blocks_already_present == 2
        salted = await d.complete(*system, *one, prefill=[p], cache_salt="tenant")
        assert salted.cached == 0
        again = await d.complete(*system, *one, prefill=[p], cache_salt="tenant")
        assert again.cached == whole(60)


@pytest.mark.parametrize("caching", ["p", "full"])
async def test_what_a_server_will_compute_from_a_body_is_brought_there(
    model: Path, caching: Caching
) -> None:
    async with pair(model, caching) as (p, d):
        remote = d.instance._served.remote if d.instance._served is not None else None
        assert remote is not None
        space = private("body") if caching == "p" else SHARED
        await remote.bring(call_of(PROMPT, prefill=[p]), space)
        assert d.has(PROMPT, space) == p.has(PROMPT) == whole(70)
        assert (d.totals.blocks_received, d.totals.returns) == (whole(70) // BLOCK, 0)
        # Where nobody computes it, whoever has it is asked for it, and nobody is no error.
        other = prompt_of(70, 9)
        await remote.bring(
            call_of(
                other,
                prefill=[PrefillPeer(InstanceId("x"), "http://127.0.0.1:1", "tcp://127.0.0.1:9")],
            ),
            space,
        )
        await remote.bring(call_of(other), space)
        assert d.has(other, space) == 0
        await p.complete(*other)
        await remote.bring(msgspec.structs.replace(call_of(other), fetch=p.peer), space)
        assert d.has(other, space) == whole(69)


SAMPLED = {"temperature": 1.0, "seed": 7, "top_p": 0.95, "repetition_penalty": 1.2}


@pytest.mark.parametrize("caching", ["off", "full"])
@pytest.mark.parametrize("n", [1, 3])
async def test_samples_are_those_of_one_instance_alone(
    model: Path, caching: Caching, n: int
) -> None:
    async with pair(model, caching) as (p, d), node(model, Role.COLOCATED) as alone:
        options = {**SAMPLED, "n": n, "logprobs": 3, "tokens": 12, "presence_penalty": 0.5}
        expected = await alone.complete(*PROMPT, **options)
        answer = await d.complete(*PROMPT, prefill=[p], **options)
        assert answer.tokens == expected.tokens
        assert answer.reasons == expected.reasons
        assert len({tuple(tokens) for tokens in answer.tokens}) == n
        for got, wanted in zip(answer.body["choices"], expected.body["choices"], strict=True):
            assert got["text"] == wanted["text"]
            scores, others = got["logprobs"], wanted["logprobs"]
            assert scores["tokens"] == others["tokens"]
            assert scores["token_logprobs"] == pytest.approx(others["token_logprobs"], abs=1e-4)
            first, other = scores["top_logprobs"][0], others["top_logprobs"][0]
            assert first == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("caching", ["off", "p", "full"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("ending", ["stop token", "max_tokens"])
async def test_an_answer_may_end_with_its_first_token(
    model: Path, reference: Reference, caching: Caching, n: int, ending: str
) -> None:
    async with pair(model, caching) as (p, d):
        (token,) = reference.generate(PROMPT, 1)
        stops = {"stop_token_ids": (token,), "tokens": 9}
        options = stops if ending == "stop token" else {"tokens": 1}
        answer = await d.complete(*PROMPT, prefill=[p], n=n, **options)
        assert answer.tokens == [[token]] * n
        assert answer.reasons == ["length" if ending == "max_tokens" else "stop"] * n
        await p.settled()
        if caching == "off":
            await until(lambda: not p.cached + d.cached, "nothing left of it")
        if caching == "p":
            await until(lambda: not d.cached, "nothing left of it at the decode instance")


async def test_two_that_ask_with_one_id_get_their_own_answers(
    model: Path, reference: Reference
) -> None:
    """A gateway that gives up on one decode instance asks another one, with the same id; the
    first one may have asked already."""
    async with pair(model) as (p, d), node(model, Role.DECODE) as other:

        def asked_by(asker: Node, prompt: list[int]) -> PrefillCall:
            call = call_of(prompt)
            return PrefillCall(
                id=RequestId("same"),
                prompt=from_ids(prompt),
                sampling=call.sampling,
                namespace=SHARED,
                ephemeral=False,
                target=asker.link.address,
                target_namespace=Namespace("mine"),
            )

        prompts = [PROMPT, prompt_of(50, 9)]
        answers = await asyncio.gather(
            *(
                p.instance.prefill(asked_by(asker, prompt))
                for asker, prompt in zip((d, other), prompts, strict=True)
            )
        )
        assert [a.token for a in answers] == [reference.generate(q, 1)[0] for q in prompts]
        assert [a.blocks_sent for a in answers] == [4, 3]
