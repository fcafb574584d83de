"""vLLM servers that hand KV to each other: the tokens of the model, however it went."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from memserve.config import Caching
from tests.fakes import metric, save_tiny_tokenizer, until
from tests.tiny_models import Reference, save_tiny_model
from tests.vllm_cluster import (
    BLOCK,
    MISSING,
    START_SECONDS,
    Cluster,
    Instances,
    descendants,
    gateway,
    post,
    prompt_of,
    segments,
    server,
    until_gone,
    up,
)

pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(MISSING is not None, reason=f"vLLM is {MISSING}, or `make vllm`"),
    pytest.mark.timeout(START_SECONDS + 120),
]
RETURNS = 'memserve_instance_handoff_returns_total{instance_id="decode-1",outcome="done"}'
RECEIVED = 'memserve_instance_handoff_blocks_total{instance_id="decode-1",kind="received"}'
PAIR = Instances("role = 'prefill'\ndram = '16MiB'"), Instances("role = 'decode'\ndram = '16MiB'")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(directory)
    return directory


def test_a_chat_s_kv_goes_from_prefill_to_decode_and_back(qwen3: Path, tmp_path: Path) -> None:
    reference = Reference(qwen3)
    with up(qwen3, tmp_path, *PAIR, policy="least-load") as cluster:
        history, figures = prompt_of(1, 150), []
        for turn in range(3):
            wanted = reference.generate(history, 40)
            answer = cluster.complete(history, 40)
            assert answer.tokens == wanted
            figures.append(answer)
            history = history + wanted + prompt_of(turn + 2, 20)
            until(lambda: metric(cluster.url, RETURNS) == turn + 1)  # noqa: B023
        # 150, 210, 270 tokens; P has what D made, but for the last token's block.
        assert [answer.cached for answer in figures] == [0, 160, 224]
        assert [answer.figures["blocks_received"] for answer in figures] == [4, 1, 1]
        # A seed that D cannot go on with: the same tokens as on P alone, since it is exact.
        seeded = [cluster.complete(history, 12, temperature=0.8, seed=5).tokens for _ in range(2)]
        assert seeded[0] == seeded[1]
        assert cluster.complete(history, 1).tokens == reference.generate(history, 1)
        # What passes through is handed over, too: its KV is there before its body.
        prompt = prompt_of(9, 150)
        body = {"model": str(qwen3), "prompt": prompt, "max_tokens": 8, "temperature": 0}
        body |= {"spaces_between_special_tokens": False, "return_token_ids": True}
        received = metric(cluster.url, RECEIVED)
        done = post(cluster.url, "/v1/completions", body | {"ignore_eos": True})
        assert done["choices"][0]["token_ids"] == reference.generate(prompt, 8)
        assert done["usage"]["prompt_tokens_details"]["cached_tokens"] == 128
        # The gateway polls: what came before may be counted only now, too.
        until(lambda: metric(cluster.url, RECEIVED) >= received + 4)
        held = segments()
        assert held
    until_gone(held)


def check(cluster: Cluster, reference: Reference, seeds: range) -> None:
    """Prompts with common beginnings, several at a time, each answered as the model does."""
    work = [(prompt_of(seed % 3, 100) + prompt_of(seed, 10 + seed), 12) for seed in seeds]
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda one: cluster.complete(*one), work))
    assert [answer.tokens for answer in answers] == [reference.generate(*one) for one in work]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_windows_and_ranks_that_differ_are_no_hindrance(tmp_path: Path) -> None:
    """Gemma 3, computed by two tensor-parallel ranks, decoded by one."""
    model = save_tiny_model("gemma3", tmp_path / "model")
    save_tiny_tokenizer(model)
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    two = replace(PAIR[0], arguments=(*PAIR[0].arguments, "--tensor-parallel-size", "2"))
    two = replace(two, environment=f"VLLM_CPU_OMP_THREADS_BIND={cores}")
    with up(model, tmp_path, two, PAIR[1], policy="least-load") as cluster:
        reference = Reference(model)
        history = prompt_of(1, 150)
        for turn, received in enumerate((4, 1)):
            wanted = reference.generate(history, 40)
            answer = cluster.complete(history, 40)
            assert answer.tokens == wanted
            assert answer.figures["blocks_received"] == received
            history = history + wanted + prompt_of(turn + 2, 20)
            until(lambda: metric(cluster.url, RETURNS) == turn + 1)  # noqa: B023
        check(cluster, reference, range(20, 28))


def test_unequal_blocks_are_never_exchanged(qwen3: Path, tmp_path: Path) -> None:
    reference = Reference(qwen3)
    with up(qwen3, tmp_path, replace(PAIR[0], block=2 * BLOCK), PAIR[1]) as cluster:
        history = prompt_of(1, 150)
        for turn in range(2):
            wanted = reference.generate(history, 20)
            assert cluster.complete(history, 20).tokens == wanted
            history = history + wanted + prompt_of(turn + 2, 20)
        check(cluster, reference, range(20, 28))
        assert metric(cluster.url, RECEIVED) == 0
        assert cluster.log.read_text().count("holds other KV than some") == 1


@pytest.mark.parametrize("caching", ["off", "p"])
def test_what_is_kept_is_as_the_file_says(qwen3: Path, tmp_path: Path, caching: Caching) -> None:
    reference = Reference(qwen3)
    with up(qwen3, tmp_path, *PAIR, caching=caching, policy="least-load") as cluster:
        prompt = prompt_of(1, 150)
        for cached in (0, 128 if caching == "p" else 0):
            answer = cluster.complete(prompt, 8)
            assert answer.tokens == reference.generate(prompt, 8)
            assert (answer.cached, answer.figures["blocks_received"]) == (cached, 4)
        check(cluster, reference, range(20, 28))
        kept = 4 if caching == "p" else 0

        def held(role: str) -> float:
            name = f'memserve_instance_blocks{{instance_id="{role}",medium="dram",state="cached"}}'
            return metric(cluster.url, name)

        # A while after the end it is forgotten again, for what came late.
        until(lambda: held("decode-1") == 0)
        until(lambda: held("prefill-0") >= kept if kept else held("prefill-0") == 0)


def test_engines_that_are_killed_cost_time_alone(qwen3: Path, tmp_path: Path) -> None:
    reference = Reference(qwen3)
    tables = (*PAIR, PAIR[1])
    with up(qwen3, tmp_path, *tables, policy="least-load") as cluster:
        check(cluster, reference, range(20, 26))
        engines = descendants(cluster.process.pid, "VLLM::EngineCore")
        assert len(engines) == 3
        held = segments()
        assert held
        for victim in engines[:2]:
            killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
            killer.start()
            check(cluster, reference, range(26, 46))
            killer.join()
            check(cluster, reference, range(46, 52))

        def whole() -> bool:
            alive = descendants(cluster.process.pid, "VLLM::EngineCore")
            states = [each["state"] for each in cluster.members()]
            return len(alive) == 3 and states == ["ready"] * 3

        until(whole)
        check(cluster, reference, range(52, 60))
        held |= segments()
    until_gone(held)


def test_servers_join_by_one_flag_each(qwen3: Path, tmp_path: Path) -> None:
    """A gateway alone, and vLLM servers that somebody else has started."""
    reference = Reference(qwen3)
    with gateway(qwen3, tmp_path, policy="least-load") as cluster:
        with server(qwen3, cluster.url, "prefill"), server(qwen3, cluster.url, "decode") as decode:
            until(
                lambda: [each["state"] for each in cluster.members()] == ["ready"] * 2, pause=0.25
            )
            roles = {each["role"]: each for each in cluster.members()}
            assert {each["kind"] for each in roles.values()} == {"vllm"}
            assert all(each["pool"] for each in roles.values())
            prompt = prompt_of(1, 150)
            answer = cluster.complete(prompt, 40)
            assert answer.tokens == reference.generate(prompt, 40)
            assert answer.figures["blocks_received"] == 4
            check(cluster, reference, range(20, 28))
            # Whoever reaches the server itself can name no order.
            body = {"model": str(qwen3), "prompt": prompt, "max_tokens": 4, "temperature": 0}
            body |= {"kv_transfer_params": {"memserve": {"order": 1}}, "return_token_ids": True}
            done = post(decode, "/v1/completions", body)
            assert done["choices"][0]["token_ids"] == answer.tokens[:4]
            held = segments()
            assert held
        until(lambda: not any(each["state"] == "ready" for each in cluster.members()), pause=0.25)
    until_gone(held)
