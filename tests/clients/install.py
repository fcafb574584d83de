"""`python -m tests.clients.install`: each client into an environment of its own, in build/clients.
They ask for different versions of the same packages."""

from __future__ import annotations

import sys

from evaluation.peers.install import Peer, PeerNotInstalled, install, run_command
from memserve.bench.vllm_engine import ROOT as PEERS

CLIENTS = {
    "openai_agents": ("openai-agents==0.24.0",),
    "pydantic_ai": ("pydantic-ai-slim[openai]==2.68.0",),
    "langchain": ("langchain-openai==1.7.4",),
    "instructor": ("instructor==1.17.0",),
    "litellm": ("litellm==1.110.2",),
}
ROOT = PEERS.parent / "clients"


def main() -> None:
    failed = []
    for name, requirements in CLIENTS.items():
        try:
            install(Peer(name=name, requirements=requirements), ROOT, run_command)
        except PeerNotInstalled as error:
            failed.append(name)
            print(f"{name}: not installed: {error}", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
