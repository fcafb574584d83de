"""The `memserve` command with engines that have no model: `python -m tests.e2e.fake_memserve`.

MEMSERVE_FAKE_ENGINE holds the engine's arguments as JSON. An instance whose model directory
has a file `broken` does not load; one of which there is a file `slow-ID` loads until that is gone.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

from memserve import cli
from memserve.api.status import PoolTotals
from memserve.cluster.local import run_local_cluster
from memserve.config import ClusterConfig, InstanceConfig
from memserve.errors import ModelError
from memserve.instance import run
from memserve.instance.instance import Identity, Parts
from memserve.models.tokenizer import Tokenizer
from tests.fakes import FakeEngine


def build(config: ClusterConfig, settings: InstanceConfig, identity: Identity) -> Parts:
    directory = Path(config.model.path)
    if (directory / "broken").exists():
        raise ModelError("the weights are broken")
    while (directory / f"slow-{identity.id}").exists():
        time.sleep(0.01)
    engine = FakeEngine(**json.loads(os.environ.get("MEMSERVE_FAKE_ENGINE", "{}")))
    return Parts(engine, Tokenizer.load(directory), PoolTotals, lambda: None)


if __name__ == "__main__":
    run._built_in = build
    cli.run_local_cluster = partial(run_local_cluster, module="tests.e2e.fake_memserve")
    cli.main()
