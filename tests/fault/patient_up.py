"""`memserve up` whose instances have no model, and which starts what crashes again for ever:
`python -m tests.fault.patient_up up CONFIG`."""

from __future__ import annotations

from functools import partial

from memserve import cli
from memserve.cluster.restarts import RestartLimits
from memserve.gateway import workers
from tests.e2e import fake_memserve

PATIENT = RestartLimits(first_pause=0.05, longest_pause=0.2, max_crashes=1_000_000)

if __name__ == "__main__":
    fake_memserve.run._built_in = fake_memserve.build
    cli.LocalBackend = partial(  # type: ignore[misc,assignment]
        cli.LocalBackend, limits=PATIENT, module="tests.fault.patient_up"
    )
    workers.Workers = partial(workers.Workers, limits=PATIENT)  # type: ignore[misc,assignment]
    cli.main()
