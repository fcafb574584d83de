"""From engine outputs to an answer: text, stops, usage, and what is told to whom."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from memserve.api.answer.format import AnswerFormat, ReasoningFormat
from memserve.api.answer.template_parser import TemplateParser
from memserve.api.generate import CallKind, FinishReason, GenerateCall, SamplingParams
from memserve.api.status import Latencies
from memserve.engine.request import EngineInfo, EngineRequest, TokenLogprobs, TokenOutput, Usage
from memserve.instance.generation import Generation, engine_requests
from memserve.models.response_template import Delimiter
from memserve.models.tokenizer import Tokenizer
from memserve.tokens import from_ids
from tests.fakes import tiny_tokenizer

EOS = 1
LOGPROBS = TokenLogprobs(-1.0, 1, ())
ENGINE = EngineInfo("m", 320, 256, 1024, 16, "float32", "cpu", 1, (EOS,))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return tiny_tokenizer(directory)


def call(**fields: Any) -> GenerateCall:
    given: dict[str, Any] = {"prompts": ((5, 6, 7),), "kind": CallKind.COMPLETION, **fields}
    given["prompts"] = tuple(map(from_ids, given["prompts"]))
    return GenerateCall(id="c", model="m", created=1, **given)


def output(
    request: EngineRequest,
    ids: Sequence[int],
    finish: FinishReason | None = None,
    *,
    stop_token: int | None = None,
    cached: int = 0,
    logprobs: bool = False,
) -> TokenOutput:
    return TokenOutput(
        request.id,
        tuple(ids),
        Usage(3, cached, 0),
        logprobs=(LOGPROBS,) * len(ids) if logprobs else (),
        finish_reason=finish,
        stop_token=stop_token,
    )


class Driven:
    """A generation that is fed by hand."""

    def __init__(self, call: GenerateCall, tokenizer: Tokenizer) -> None:
        self.requests = engine_requests(call, 0)
        self.latencies = Latencies()
        self.generation = Generation(call, tokenizer, ENGINE, self.latencies, 0.0)
        self.streamed = b""

    def feed(self, *outputs: TokenOutput, now: float = 1.0) -> list[Any]:
        data = self.generation.feed(outputs, now)
        self.streamed += data
        return events(data)

    def body(self) -> Any:
        assert self.generation.finished
        return json.loads(self.generation.body())


def events(data: bytes) -> list[Any]:
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) if line != b"[DONE]" else "DONE" for line in lines]


def texts(chunks: Iterable[Any]) -> str:
    return "".join(c["choices"][0]["text"] for c in chunks if c != "DONE" and c["choices"])


def test_sequences_of_a_call_have_their_own_names_and_seeds() -> None:
    asked = call(prompts=((1,), (2,)), n=2, sampling=SamplingParams(seed=7), cache_salt="s")
    requests = engine_requests(asked, 0)
    assert [r.id for r in requests] == ["c.0-0-0", "c.0-0-1", "c.0-1-0", "c.0-1-1"]
    assert [r.sampling.seed for r in requests] == [7, 8, 7, 8]
    assert [r.follows for r in requests] == [None, "c.0-0-0", None, "c.0-1-0"]
    assert {r.namespace for r in requests} == {"salt:s"}
    assert requests[2].prompt.tolist() == [2]


def test_without_caching_no_two_sequences_share_anything() -> None:
    requests = engine_requests(call(n=2), 0, shared=False)
    assert all(request.ephemeral for request in requests)
    assert requests[0].namespace != requests[1].namespace
    assert requests[1].follows is None
    # Whatever a client chooses as its salt, it is in no sequence's namespace.
    [salted] = engine_requests(call(cache_salt=requests[0].namespace), 0)
    assert salted.namespace != requests[0].namespace


def test_the_largest_seed_has_a_successor() -> None:
    requests = engine_requests(call(n=2, sampling=SamplingParams(seed=2**63 - 1)), 0)
    assert requests[1].sampling.seed == -(2**63)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_streaming_or_not_gives_the_text_of_all_tokens(
    tokenizer: Tokenizer, stream: bool, at_once: int
) -> None:
    text = " naïve café 你好 👍"
    ids = tokenizer.encode(text, add_special_tokens=False)
    driven = Driven(call(stream=stream), tokenizer)
    (request,) = driven.requests
    for start in range(0, len(ids), at_once):
        driven.feed(output(request, ids[start : start + at_once]))
    driven.feed(output(request, [EOS], FinishReason.STOP, stop_token=EOS))
    if stream:
        chunks = events(driven.streamed)
        assert texts(chunks) == text
        assert chunks[-1] == "DONE"
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    else:
        (choice,) = driven.body()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
        assert driven.body()["usage"]["completion_tokens"] == len(ids) + 1


@pytest.mark.parametrize(
    ("include", "text"), [(False, " fox jumps over th"), (True, " fox jumps over the lazy")]
)
def test_a_stop_string_over_two_tokens_ends_the_sequence(
    tokenizer: Tokenizer, include: bool, text: str
) -> None:
    ids = tokenizer.encode(" fox jumps over the lazy dog", add_special_tokens=False)
    asked = call(
        stream=True,
        n=2,
        stop=("e lazy",),
        include_stop_str_in_output=include,
        return_token_ids=True,
    )
    driven = Driven(asked, tokenizer)
    stopped, other = driven.requests
    chunks = driven.feed(output(stopped, ids))
    assert driven.generation.stopped == [stopped.id]
    assert driven.generation.unfinished == [other.id]
    assert texts(chunks) == text
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "e lazy")
    # Tokens up to the one that completed the stop string, and none after it.
    assert tokenizer.decode(last["token_ids"]) == " fox jumps over the lazy"
    # What the engine makes before it hears of it is dropped.
    assert driven.feed(output(stopped, ids)) == []


def test_no_stop_string_is_looked_for_in_what_min_tokens_forces_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" fox fox fox", add_special_tokens=False)
    driven = Driven(call(stop=("fox",), sampling=SamplingParams(min_tokens=2)), tokenizer)
    driven.feed(output(driven.requests[0], ids))
    assert driven.body()["choices"][0]["text"] == " fox fox "


def test_text_that_might_become_a_stop_string_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" the lazy", add_special_tokens=False)
    driven = Driven(call(stop=("lazy dog",)), tokenizer)
    driven.feed(output(driven.requests[0], ids, FinishReason.LENGTH))
    (choice,) = driven.body()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" the lazy", "length")


@pytest.mark.parametrize(
    ("named", "skip", "include", "text", "reason"),
    [
        ((), True, False, " fox", None),
        ((), False, False, " fox", None),
        ((), False, True, " fox<eos>", None),
        ((EOS,), True, True, " fox", EOS),
    ],
)
def test_a_stop_token_has_text_only_where_it_was_asked_for(
    tokenizer: Tokenizer,
    named: tuple[int, ...],
    skip: bool,
    include: bool,
    text: str,
    reason: int | None,
) -> None:
    asked = call(
        sampling=SamplingParams(stop_token_ids=named),
        skip_special_tokens=skip,
        include_stop_str_in_output=include,
    )
    driven = Driven(asked, tokenizer)
    ids = [*tokenizer.encode(" fox", add_special_tokens=False), EOS]
    driven.feed(output(driven.requests[0], ids, FinishReason.STOP, stop_token=EOS))
    (choice,) = driven.body()["choices"]
    assert (choice["text"], choice["stop_reason"]) == (text, reason)


def test_chat_begins_every_choice_with_its_role_once(tokenizer: Tokenizer) -> None:
    driven = Driven(call(kind=CallKind.CHAT, stream=True, n=2), tokenizer)
    for _ in range(2):
        driven.feed(*(output(request, [20]) for request in driven.requests))
    driven.feed(*(output(r, [20], FinishReason.LENGTH) for r in driven.requests))
    chunks = [c for c in events(driven.streamed) if c != "DONE"]
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert roles == [0, 1]


def test_usage_counts_each_prompt_once_and_the_cache_s_part_of_it(tokenizer: Tokenizer) -> None:
    asked = call(prompts=((5, 6, 7), (8, 9)), n=2, stream=True, include_usage=True)
    driven = Driven(asked, tokenizer)
    for index, request in enumerate(driven.requests):
        # Samples after the first share its prefill: that is not the cache's merit.
        driven.feed(output(request, [20, 21], FinishReason.LENGTH, cached=2 + index % 2))
    usage = events(driven.streamed)[-2]["usage"]
    assert usage["prompt_tokens"] == 5
    assert usage["completion_tokens"] == 8
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize("sent", ["<s>the quick</s>", None])
def test_echo_puts_the_prompt_as_it_was_sent_before_each_answer(
    sent: str | None, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("the quick")
    driven = Driven(call(prompts=(tuple(prompt),), echo=(sent,), stream=True), tokenizer)
    ids = tokenizer.encode(" brown fox", add_special_tokens=False)
    for token_id in ids:
        driven.feed(output(driven.requests[0], [token_id]))
    assert texts(events(driven.streamed)) == (sent or "the quick") + " brown fox"


def scored(request: EngineRequest, token: int, count: int) -> TokenOutput:
    """An output with scores of the prompt: -1, -2 ... for its tokens, and `count` others each."""
    scores = tuple(
        TokenLogprobs(-1.0 - at, 9, tuple((300 + i, -0.25 * (i + 1)) for i in range(count)))
        for at in range(len(request.prompt) - 1)
    )
    return TokenOutput(
        request.id,
        (token,),
        Usage(len(request.prompt), 0, 0),
        logprobs=(TokenLogprobs(-0.5, 1, ((token, -0.5),)),),
        finish_reason=FinishReason.LENGTH,
        prompt_logprobs=scores,
    )


TEXTS = "the 🫶 lazy dog", "<s>the quick", " two  spaces", "naïve 你好"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_scores(text: str, stream: bool, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(text)
    (token,) = tokenizer.encode("!", add_special_tokens=False)
    sampling = SamplingParams(max_tokens=1, logprobs=1, prompt_logprobs=2)
    asked = call(prompts=(prompt,), echo=(text,), stream=stream, sampling=sampling)
    driven = Driven(asked, tokenizer)
    found = driven.feed(scored(driven.requests[0], token, 2))
    choice = found[0]["choices"][0] if stream else driven.body()["choices"][0]
    assert choice["text"] == text + "!"
    scores = choice["logprobs"]
    assert scores["token_logprobs"] == [None, *(-1.0 - at for at in range(len(prompt) - 1)), -0.5]
    first, *others, last = scores["top_logprobs"]
    assert first is None
    for name, top in zip(scores["tokens"][1:-1], others, strict=True):
        assert list(top) == [name, tokenizer.token_text(300)]
    assert last == {"!": -0.5}
    # Each token begins at its own text; parts of one character all begin where that does.
    offsets = scores["text_offset"]
    assert offsets[:2] == [0, 0]  # <bos>, and the text's first token
    assert offsets == sorted(offsets)
    for name, offset in zip(scores["tokens"][1:], offsets[1:], strict=True):
        if not name.startswith("bytes:"):
            assert (text + "!")[offset:].startswith(name)
    assert offsets[-1] == len(text)


def test_scores_of_an_echo_of_token_ids_lie_in_their_text(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the 🫶 lazy")
    sampling = SamplingParams(max_tokens=1, logprobs=0, prompt_logprobs=0)
    driven = Driven(call(prompts=(prompt,), echo=(None,), sampling=sampling), tokenizer)
    driven.feed(scored(driven.requests[0], 5, 0))
    (choice,) = driven.body()["choices"]
    offsets = dict(
        zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
    )
    assert choice["text"].startswith("the 🫶 lazy")
    assert offsets["<bos>"] == 0
    assert choice["text"][offsets[" lazy"] :].startswith(" lazy")


@pytest.mark.parametrize("kind", CallKind)
def test_prompt_logprobs_are_vllms(kind: CallKind, tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(max_tokens=1, logprobs=2, prompt_logprobs=2)
    asked = call(kind=kind, prompts=((5, 300, 7),), sampling=sampling, prompt_logprobs=1)
    driven = Driven(asked, tokenizer)
    driven.feed(scored(driven.requests[0], 6, 2))
    body = driven.body()
    where = body if kind is CallKind.CHAT else body["choices"][0]
    text = tokenizer.token_text
    assert where["prompt_logprobs"] == [
        None,
        {"300": {"logprob": -1.0, "rank": 9, "decoded_token": text(300)}},
        {
            "7": {"logprob": -2.0, "rank": 9, "decoded_token": text(7)},
            "300": {"logprob": -0.25, "rank": 1, "decoded_token": text(300)},
        },
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.STOP])
def test_an_answer_of_the_prompt_alone_has_no_tokens(
    stream: bool, finish: FinishReason, tokenizer: Tokenizer
) -> None:
    asked = call(
        echo=("as sent",),
        stream=stream,
        include_usage=True,
        return_token_ids=True,
        sampling=SamplingParams(max_tokens=1),
        prompt_only=True,
    )
    driven = Driven(asked, tokenizer)
    told = driven.feed(output(driven.requests[0], [EOS], finish, stop_token=EOS))
    choice = (told[0] if stream else driven.body())["choices"][0]
    usage = (told[1] if stream else driven.body())["usage"]
    assert (choice["text"], choice["finish_reason"]) == ("as sent", "length")
    assert choice["token_ids"] == []
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)


@pytest.mark.parametrize("cut", range(5))
def test_a_token_begins_where_the_text_before_it_ends(cut: int, tokenizer: Tokenizer) -> None:
    """Characters of several tokens, and a stream that was cut before any of them. Parts of a
    character begin where the text that was certain before it ends."""
    text = " the 🫶 lazy"
    ids = tokenizer.encode(text, add_special_tokens=False)
    sampling = SamplingParams(logprobs=0, max_tokens=len(ids))
    before = {"resumed": (from_ids(ids[:cut]),)} if cut else {}
    driven = Driven(call(stream=True, sampling=sampling, **before), tokenizer)
    for token_id in ids[cut:]:
        driven.feed(output(driven.requests[0], [token_id], logprobs=True))
    found = [
        offset
        for chunk in events(driven.streamed)
        for offset in chunk["choices"][0]["logprobs"]["text_offset"]
    ]
    assert found == [0, 4, 4, 4, text.index(" lazy")][cut:]


def test_a_stop_string_may_begin_within_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" the lazy dog", add_special_tokens=False)
    for least, expected in ((len(ids) - 1, " the la"), (len(ids), " the lazy dog")):
        sampling = SamplingParams(min_tokens=least, max_tokens=len(ids) + 5)
        driven = Driven(call(stream=True, stop=("zy dog",), sampling=sampling), tokenizer)
        for token_id in ids:
            driven.feed(output(driven.requests[0], [token_id]))
        driven.feed(output(driven.requests[0], [], FinishReason.LENGTH))
        assert texts(events(driven.streamed)) == expected


def test_logprobs_of_held_back_text_are_not_lost(tokenizer: Tokenizer) -> None:
    asked = call(stream=True, stop=("lazy dog",), sampling=SamplingParams(logprobs=0))
    driven = Driven(asked, tokenizer)
    ids = tokenizer.encode(" the lazy", add_special_tokens=False)
    for token_id in ids:
        driven.feed(output(driven.requests[0], [token_id], logprobs=True))
    found = [
        token
        for chunk in events(driven.streamed)
        for token in chunk["choices"][0]["logprobs"]["tokens"]
    ]
    assert "".join(found) == " the lazy"


def test_an_engine_s_error_ends_the_answer(tokenizer: Tokenizer) -> None:
    driven = Driven(call(stream=True, n=2), tokenizer)
    first, second = driven.requests
    driven.feed(output(first, [20]))
    failed = TokenOutput(second.id, (), Usage(3, 0, 0), finish_reason=FinishReason.ERROR, error="X")
    driven.feed(failed)
    assert driven.generation.failure is not None
    assert "X" in str(driven.generation.failure)
    assert driven.generation.unfinished == [first.id]  # left for the owner to cancel


def test_ends_are_counted_by_reason_with_the_lengths_of_what_finished(tokenizer: Tokenizer) -> None:
    driven = Driven(call(n=5, stop=("quick",)), tokenizer)
    eos, limit, stop, failed, cancelled = driven.requests
    quick = tokenizer.encode("quick", add_special_tokens=False)
    driven.feed(output(eos, [20]), output(limit, [20]))
    driven.feed(output(eos, [EOS], FinishReason.STOP, stop_token=EOS))
    driven.feed(output(limit, [20, 20], FinishReason.LENGTH))
    driven.feed(output(stop, quick))  # the engine does not know of it
    driven.feed(
        output(failed, [], FinishReason.ERROR), output(cancelled, [], FinishReason.CANCELLED)
    )
    ended = driven.latencies.ended
    assert (ended.stop, ended.length, ended.abort, ended.error) == (2, 1, 1, 1)
    assert ended.prompt_tokens.sum == 3 * 3
    assert sum(ended.prompt_tokens.counts) == sum(ended.generated_tokens.counts) == 3
    assert ended.generated_tokens.sum == driven.generation.generated_tokens >= 2 + 3 + 1


def test_latencies_are_per_sequence(tokenizer: Tokenizer) -> None:
    driven = Driven(call(), tokenizer)
    (request,) = driven.requests
    driven.feed(output(request, [20]), now=2.0)
    driven.feed(output(request, [20, 20]), now=3.0)
    driven.feed(output(request, [20], FinishReason.LENGTH), now=3.25)
    latencies = driven.latencies
    assert latencies.first_token.sum == 2.0
    assert (latencies.inter_token.sum, sum(latencies.inter_token.counts)) == (1.25, 3)
    assert (latencies.per_token.sum, sum(latencies.per_token.counts)) == (1.25 / 3, 1)
    assert latencies.whole.sum == 3.25


def test_what_a_prompt_has_begun_is_read_once_for_all_choices(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = "<|channel|>analysis<|message|>x<|end|>" * 1600 + "<|channel|>analysis<|message|>so"
    form = AnswerFormat(reasoning=ReasoningFormat.OPENAI, begun=begun)
    asked = call(kind=CallKind.CHAT, n=128, answer=form)
    searched: list[int] = []
    search = TemplateParser._search

    def counted(parser: TemplateParser, delimiter: Delimiter, *more: Any) -> Any:
        searched.append(parser._at)
        return search(parser, delimiter, *more)

    monkeypatch.setattr(TemplateParser, "_search", counted)
    Driven(asked, tokenizer)
    # Each of the 3,201 delimiters is looked for once, and there are four of them.
    assert 3201 <= len(searched) < 3300


def test_a_sequence_of_one_token_has_no_time_per_token(tokenizer: Tokenizer) -> None:
    driven = Driven(call(), tokenizer)
    (request,) = driven.requests
    driven.feed(output(request, [20], FinishReason.LENGTH), now=2.0)
    assert not sum(driven.latencies.per_token.counts)
    assert sum(driven.latencies.whole.counts) == 1
