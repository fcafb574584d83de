"""`memserve up` whose instances have no model, and which starts what crashes again for ever:
`python -m tests.fault.patient_up up CONFIG`."""

from __future__ import annotations

from functools import partial

from memserve import cli
from memserve.cluster import local
from memserve.cluster.restarts import RestartLimits
from memserve.gateway import workers
from tests.e2e import fake_memserve

PATIENT = RestartLimits(first_pause=0.05, longest_pause=0.2, max_crashes=1_000_000)

if __name__ == "__main__":
    fake_memserve.run._built_in = fake_memserve.build
    local.LocalCluster = partial(  # type: ignore[misc,assignment]
        local.LocalCluster, limits=PATIENT
    )
    workers.Workers = partial(workers.Workers, limits=PATIENT)  # type: ignore[misc,assignment]
    cli.run_local_cluster = partial(local.run_local_cluster, module="tests.fault.patient_up")
    cli.main()
