"""A gateway or an instance with a fake engine as a process: `python -m tests.e2e.serve_fake`.

Arguments: `instance NAME TOKENIZER_DIRECTORY ENGINE_AS_JSON GATEWAY_URL...`, or
`gateway TOKENIZER_DIRECTORY INSTANCE_URL...`. The address comes as the first line of output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from memserve.api.status import PoolTotals
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from memserve.errors import ModelError
from memserve.gateway.run import run_gateway
from memserve.instance.parts import Identity, Parts
from memserve.instance.run import run_instance
from memserve.models.tokenizer import Tokenizer
from memserve.types import InstanceId
from tests.fakes import MODEL, FakeEngine

CONFIG = ClusterConfig(model=ModelConfig(served_name=MODEL), gateway=GatewayConfig(port=0))


def instance(name: str, directory: str, engine: str, *join: str) -> int:
    def build(config: ClusterConfig, settings: InstanceConfig, identity: Identity) -> Parts:
        if engine == "none":
            raise ModelError("there is no such model")
        made = FakeEngine(**json.loads(engine))
        return Parts(made, Tokenizer.load(Path(directory)), PoolTotals, lambda: None)

    return run_instance(CONFIG, InstanceConfig(), InstanceId(name), join=join, build=build)


def gateway(directory: str, *members: str) -> int:
    return run_gateway(CONFIG, members, Tokenizer.load(Path(directory)))


if __name__ == "__main__":
    _, kind, *arguments = sys.argv
    sys.exit(instance(*arguments) if kind == "instance" else gateway(*arguments))
