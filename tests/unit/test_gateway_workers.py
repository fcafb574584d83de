"""What several workers say together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from memserve.cluster.membership import Membership
from memserve.errors import ConfigError
from memserve.gateway.metrics import GatewayMetrics, merged
from memserve.gateway.workers import WorkerPlace
from tests.metric_page import done


@given(st.lists(st.integers(1, 65535), min_size=1, max_size=8), st.data())
def test_a_place_survives_the_command_line(ports: list[int], data: st.DataObject) -> None:
    place = WorkerPlace(data.draw(st.integers(0, len(ports) - 1)), tuple(ports))
    assert WorkerPlace.parse(str(place)) == place
    assert len(place.siblings) == len(ports) - 1
    assert place.index not in place.siblings


@pytest.mark.parametrize("text", ["", "1", "x:1", "0:", "0:1,y", "2:1,2", "-1:1"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a worker's place"):
        WorkerPlace.parse(text)


def metrics_of(requests: int, *seconds: float) -> bytes:
    metrics = GatewayMetrics(Membership(), "session")
    metrics.requests["/v1/completions", 200] = requests
    for one in seconds:
        metrics.request_seconds.observe(one)
    return done(metrics.own())


def test_figures_of_workers_stand_side_by_side() -> None:
    text = merged({0: metrics_of(3, 0.5), 1: metrics_of(4), 10: metrics_of(0, 0.1, 20.0)}).decode()
    found = {
        (sample.name, sample.labels["worker"], sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["memserve_requests_total", "0", None] == 3
    assert found["memserve_requests_total", "1", None] == 4
    assert found["memserve_request_seconds_count", "10", None] == 2
    assert found["memserve_request_seconds_bucket", "10", "1.0"] == 1
    assert found["memserve_request_seconds_bucket", "0", "+Inf"] == 1
    assert found["memserve_request_seconds_sum", "10", None] == pytest.approx(20.1)
    # One family each, or Prometheus refuses all of it.
    assert text.count("# TYPE memserve_request_seconds histogram") == 1
    assert text.count("# TYPE memserve_requests_total counter") == 1


def test_one_worker_s_figures_are_kept_whole() -> None:
    own = metrics_of(3, 0.5)
    both = [
        [(f.name, f.type, len(f.samples)) for f in text_string_to_metric_families(text.decode())]
        for text in (own, merged({0: own}))
    ]
    assert both[0] == both[1]
