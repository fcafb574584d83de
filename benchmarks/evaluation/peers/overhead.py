"""Cost of the pool where nothing is shared: prompts that no cache has, to one vLLM server as it is,
with the connector, and with the connector behind our instance and gateway.

`python -m evaluation.peers.overhead`, after `make vllm` and `make peers-install PEERS=routers`. All
servers run on the first core, and are asked in turns, one request at a time.
"""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AsyncExitStack
from statistics import mean, median

from evaluation.peers.servers import ROUTER_SECONDS, ours, ready, start_router, start_vllm
from evaluation.peers.vllm import START_SECONDS
from memserve.bench.measure import BenchmarkError
from memserve.bench.openai_client import OpenAIClient
from memserve.bench.report import tpot
from memserve.bench.vllm_engine import LARGE_KV, SOURCE, own_instance, vllm_arguments
from memserve.clock import MonotonicClock
from memserve.config import ModelConfig
from memserve.models.resolve import resolve_model
from memserve.vllm.server import tier_settings

_ROUNDS = 4
_REQUESTS = 6  # of a round
_PROMPT, _ANSWER = 500, 48  # tokens
_TOKENS = range(300, 200_000)  # ids of prompts
_DRAM = "512MiB"
_clock = MonotonicClock()


async def _measure() -> None:
    model = resolve_model(ModelConfig(path="demo"), print)
    arguments = vllm_arguments(LARGE_KV, 512)
    tier = ("--kv-transfer-config", json.dumps(tier_settings(_DRAM)))
    skipped: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        plain = start_vllm(stack, model.path, "bfloat16", (0,), arguments=arguments)
        connector = start_vllm(
            *(stack, model.path, "bfloat16", (0,)),
            arguments=(*arguments, *tier),
            variables={"PYTHONPATH": str(SOURCE)},
        )
        pair = [("vLLM", plain), ("vLLM with the connector", connector)]
        urls = await ready(pair, skipped, START_SECONDS, print)
        router = [("vLLM, vllm-router", start_router(stack, [plain.url]))]
        urls |= await ready(router, skipped, ROUTER_SECONDS, print)
        own = ours(model, "bfloat16", [own_instance(0, _DRAM, arguments)], print)
        urls["memserve"] = await stack.enter_async_context(own)
        if skipped:
            raise BenchmarkError(str(skipped))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
        for number in range(_ROUNDS + 1):
            for name in random.sample(list(urls), len(urls)):
                served = str(model.path) if name == "memserve" else "peer"
                round_ = await _round(urls[name], served)
                if number:  # the first one warms up
                    found[name].append(round_)
    for name, rounds in found.items():
        ttft, tpot = ([one[at] * 1e3 for one in rounds] for at in (0, 1))
        print(
            f"{name:24} TTFT {median(ttft):5.0f} ms ({min(ttft):.0f} to {max(ttft):.0f})  "
            f"TPOT {median(tpot):5.2f} ms ({min(tpot):.2f} to {max(tpot):.2f})"
        )


async def _round(url: str, served: str) -> tuple[float, float]:
    """Return the means of TTFT and TPOT, in seconds."""
    first, each = [], []
    async with OpenAIClient(url, served, _clock) as client:
        for _ in range(_REQUESTS):
            prompt = random.choices(_TOKENS, k=_PROMPT)
            asked = _clock.now()
            answer = await client.complete(prompt, _ANSWER)
            if answer.error is not None:
                raise BenchmarkError(answer.error)
            first.append(answer.chunk_times[0] - asked)
            each.append(tpot(answer) or 0.0)
    return mean(first), mean(each)


if __name__ == "__main__":
    asyncio.run(_measure())
