"""deploy/: what boards and alert rules ask for is what a gateway serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from memserve.api.histogram import Histogram
from memserve.api.metric import MetricKind, MetricSpec
from tests import metrics_document
from tests.fakes import FakeCluster, FakeEngine, tiny_tokenizer
from tests.promql import Selector, grouped, selectors, shown

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARDS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((DEPLOY / "grafana").glob("*.json"))
}
RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text("utf-8"))
RULE_TESTS: dict[str, Any] = yaml.safe_load(
    (DEPLOY / "prometheus/alerts_test.yml").read_text("utf-8")
)
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RECORDS = {
    rule["record"]: rule["expr"]
    for group in RULES["groups"]
    for rule in group["rules"]
    if "record" in rule
}
OF_PROMETHEUS = {"instance", "job", "worker"}  # labels that a scrape, or a gateway's workers, add
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="apt-get install prometheus")

# What vLLM 0.32's example board for Grafana queries, with `model_name` for a label.
VLLM_BOARD = {
    *("vllm:e2e_request_latency_seconds", "vllm:inter_token_latency_seconds"),
    *("vllm:time_to_first_token_seconds", "vllm:request_queue_time_seconds"),
    *("vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds"),
    *("vllm:request_prompt_tokens", "vllm:request_generation_tokens"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    "vllm:request_max_num_generation_tokens",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, set[str]]]:
    """Names of series on a gateway's page, with their labels."""
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with FakeCluster(tokenizer, [FakeEngine()]) as cluster:
        with urllib.request.urlopen(f"{cluster.url}/metrics") as answer:
            page = answer.read().decode()
        names: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                names[sample.name] = set(sample.labels)
            if not family.samples:  # nothing of the kind has happened yet
                name = family.name + "_total" * (family.type == "counter")
                names[name] = {label.name for label in metrics_document.ALL[name].labels}
        yield names


def spec_of(metric: str) -> MetricSpec:
    found = metrics_document.ALL.get(metric)
    if found is None:
        found = metrics_document.ALL[re.sub(r"_(bucket|sum|count)$", "", metric)]
        assert found.kind is MetricKind.HISTOGRAM, metric
    return found


def check_selector(selector: Selector, served: Mapping[str, set[str]]) -> set[str]:
    """The labels of what a selector asks for; it must be there, with each label and value."""
    labels = served[selector.metric]
    values = {label.name: label.values for label in spec_of(selector.metric).labels}
    values["le"] = Histogram.bounds
    for matcher in selector.matchers:
        assert matcher.label in labels | OF_PROMETHEUS, selector
        possible = values.get(matcher.label)
        for value in matcher.alternatives:
            assert not possible or value in possible, selector
    return labels


def check(expression: str, served: Mapping[str, set[str]], legend: str = "") -> None:
    """An expression asks for what is there, and groups by and shows labels that are there."""
    labels = set(OF_PROMETHEUS)
    found = list(selectors(expression))
    assert found, expression
    for selector in found:
        if selector.metric in RECORDS:
            inner = RECORDS[selector.metric]
            labels |= grouped(inner)
        elif selector.metric == "up":
            assert {matcher.label for matcher in selector.matchers} <= OF_PROMETHEUS
        else:
            labels |= check_selector(selector, served)
    assert grouped(expression) <= labels, expression
    kept = re.match(r"\s*(?:sum|max|min|avg)(?: by \(([^)]*)\)|\()", expression)
    if kept is not None and " and" not in expression:  # an aggregate has the labels it is by
        labels = {name.strip() for name in (kept[1] or "").split(",")}
    assert shown(legend) <= labels, (expression, legend)


def panels(board: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for panel in board["panels"]:
        if panel["type"] != "row":
            yield panel


EXPRESSIONS = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{name}: {panel['title']}")
    for name, board in BOARDS.items()
    for panel in panels(board)
    for target in panel["targets"]
]


def test_there_are_two_boards() -> None:
    assert set(BOARDS) == {"memserve-overview", "memserve-kv"}
    assert len({board["uid"] for board in BOARDS.values()}) == 2


@pytest.mark.parametrize(("expression", "legend"), EXPRESSIONS)
def test_a_panel_asks_for_what_is_served(
    expression: str, legend: str, served: Mapping[str, set[str]]
) -> None:
    check(expression, served, legend)
    # Gateways and workers all tell of all instances: whoever adds up takes each of them once.
    for selector in selectors(expression):
        if "instance_id" in {label.name for label in spec_of(selector.metric).labels}:
            shell = r"(max|min) by \([^)]*instance_id[^)]*\) \(((rate|increase)\()?"
            assert re.search(shell + selector.metric, expression), expression


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_s_variables_and_places_are_right(
    name: str, served: Mapping[str, set[str]]
) -> None:
    board = BOARDS[name]
    known = {variable["name"] for variable in board["templating"]["list"]}
    assert known == {"datasource", "gateway", "instance_id"}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            assert asked[2] in served[asked[1]] | OF_PROMETHEUS
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"])))
    assert used <= known | {"__rate_interval"}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("record", RECORDS)
def test_a_recorded_figure_is_made_of_what_is_served(
    record: str, served: Mapping[str, set[str]]
) -> None:
    check(RECORDS[record], served)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_asks_for_what_is_served(
    alert: Mapping[str, Any], served: Mapping[str, set[str]]
) -> None:
    for text in alert["annotations"].values():
        check(alert["expr"], served, text)
    assert alert["labels"]["severity"] in ("critical", "warning")


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = [case for test in RULE_TESTS["tests"] for case in test.get("alert_rule_test", ())]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    rests = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    names = {alert["alert"] for alert in ALERTS}
    assert names <= fires
    assert names - rests <= {"MemserveTransfersFail"}  # whose test has an instance that is well


def test_vllm_s_board_finds_its_metrics(served: Mapping[str, set[str]]) -> None:
    missing = {
        name
        for name in VLLM_BOARD
        if not {"model_name"} <= served.get(name, served.get(f"{name}_bucket", set()))
    }
    assert missing == {"vllm:request_max_num_generation_tokens"}  # docs/metrics.md says why
    text = (DEPLOY.parent / "docs/metrics.md").read_text("utf-8")
    assert all(f"`{name}`" in text for name in missing)


@pytest.mark.parametrize(
    ("expression", "legend"),
    [
        ("sum(rate(memserve_request_total[5m]))", ""),
        ("sum(rate(memserve_request_seconds[5m]))", ""),
        ('memserve_requests_total{code="200"}', ""),
        ('memserve_instance_blocks{medium="disk"}', ""),
        ('memserve_instance_state{state=~"ready|gone"}', ""),
        ('memserve_request_seconds_bucket{le="2"}', ""),
        ("sum by (state) (memserve_instance_waiting_sequences)", ""),
        ("sum by (status) (rate(memserve_requests_total[5m]))", "{{endpoint}}"),
    ],
)
def test_a_wrong_query_is_noticed(
    expression: str, legend: str, served: Mapping[str, set[str]]
) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check(expression, served, legend)


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint-fatal", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_takes_what_is_in_deploy(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [str(PROMTOOL), *arguments],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_parses_the_panels(tmp_path: Path) -> None:
    rules = []
    for number, parameters in enumerate(EXPRESSIONS):
        expression = str(parameters.values[0]).replace("$__rate_interval", "5m")
        rules.append({"record": f"panel:{number}", "expr": expression})
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), "utf-8")
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
