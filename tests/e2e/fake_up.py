"""`memserve up` whose instances have no model: `python -m tests.e2e.fake_up up CONFIG`."""

from __future__ import annotations

from functools import partial

from memserve import cli
from memserve.cluster import local

if __name__ == "__main__":
    local.LocalCluster = partial(  # type: ignore[misc,assignment]
        local.LocalCluster, module="tests.e2e.fake_memserve"
    )
    cli.main()
