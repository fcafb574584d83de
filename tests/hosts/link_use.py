"""How much of a link of 1 Gbit/s large hand-overs use: `python -m tests.hosts.link_use`, as root.

P and the gateway on host A, D on host B. The prompt's KV is cached at P and not kept at D
(`--caching p`), so that each request moves all of it again and computes next to nothing.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from transformers import LlamaConfig

from memserve.secrets import SECRET_VARIABLE
from memserve.types import Role
from tests.fakes import save_tiny_tokenizer
from tests.handoff_harness import prompt_of
from tests.hosts.cluster import HostCluster, Operator
from tests.hosts_harness import GIGABIT, Hosts
from tests.tiny_models import COMMON, save_tiny_model

# KV as of a model of some billions of parameters: 48 KiB a token, 768 KiB a block.
CONFIG = LlamaConfig(
    **{**COMMON, "num_key_value_heads": 4, "max_position_embeddings": 8192},
    num_hidden_layers=12,
    head_dim=128,
)
PROMPTS = (512, 2048, 6144)
TURNS = 5


def main() -> None:
    os.environ[SECRET_VARIABLE] = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as directory, Hosts("AB", Path(directory)) as hosts:
        a, b = hosts
        model = save_tiny_model("large-kv", Path(directory), config=CONFIG)
        save_tiny_tokenizer(model)
        cluster = HostCluster(hosts, model, os.environ[SECRET_VARIABLE])
        gateway = cluster.gateway(a)
        sizes = (
            "--hbm-blocks=900",
            "--dram-blocks=16",
            "--max-batch-tokens=8192",
            "--caching=p",
            *sys.argv[1:],
        )
        cluster.instance(a, "p", Role.PREFILL, gateway, flags=sizes)
        cluster.instance(b, "d", Role.DECODE, gateway, flags=sizes)
        with a.entered():
            operator = Operator(cluster, gateway)
            operator.until_ready("p", "d")
            print("| tokens | KV, MB | hand-over, s | of the link | link, MB | request, s |")
            print("| --- | --- | --- | --- | --- | --- |")
            for tokens in PROMPTS:
                print(measure(operator, tokens), flush=True)


def measure(operator: Operator, tokens: int) -> str:
    """A row: medians of turns, the first left out."""
    link = operator.cluster.hosts["B"]
    prompt = prompt_of(tokens, seed=tokens)
    handovers, wholes, crossed = [], [], []
    size = 0
    for _ in range(TURNS + 1):
        before, begin = link.traffic(), time.perf_counter()
        usage = operator.complete(prompt, 2)["usage"]["memserve"]
        wholes.append(time.perf_counter() - begin)
        crossed.append(link.traffic().since(before).received)
        # What is cached leaves while the rest is computed.
        handovers.append(usage["prefill_seconds"] + usage["transfer_seconds"])
        size = usage["bytes_received"]
    handover = median(handovers[1:])
    share = size * 8 / GIGABIT / handover
    return (
        f"| {tokens} | {size / 1e6:.1f} | {handover:.3f} | {share:.1%} | "
        f"{median(crossed[1:]) / 1e6:.1f} | {median(wholes[1:]):.3f} |"
    )


if __name__ == "__main__":
    main()
