"""vLLM servers that hand KV to each other: the tokens of the model, however it went."""

from __future__ import annotations

from pathlib import Path

import pytest

from memserve.pool.segment import SHM_DIRECTORY
from tests.fakes import metric, save_tiny_tokenizer, until
from tests.tiny_models import Reference, save_tiny_model
from tests.vllm_cluster import MISSING, START_SECONDS, Instances, prompt_of, up

pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=f"vLLM is {MISSING}, or `make vllm`"),
    pytest.mark.timeout(START_SECONDS + 120),
]
RETURNS = 'memserve_instance_handoff_returns_total{instance="decode-1",outcome="done"}'
PAIR = Instances("role = 'prefill'\ndram = '16MiB'"), Instances("role = 'decode'\ndram = '16MiB'")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(directory)
    return directory


def test_a_chat_s_kv_goes_from_prefill_to_decode_and_back(qwen3: Path, tmp_path: Path) -> None:
    reference = Reference(qwen3)
    before = set(SHM_DIRECTORY.glob("memserve-*"))
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
    until(lambda: not set(SHM_DIRECTORY.glob("memserve-*")) - before)
