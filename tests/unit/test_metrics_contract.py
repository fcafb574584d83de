"""The contract of the metrics: docs/metrics.md, names, and what gateways and instances serve."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

import memserve
from memserve.api.metric import MetricKind, MetricSpec
from tests import metrics_document
from tests.fakes import MODEL, FakeCluster, FakeEngine, tiny_tokenizer
from tests.metric_page import figures

SPECS = list(metrics_document.ALL.values())
OURS = [spec for spec in SPECS if not spec.name.startswith("vllm:")]
ANSWERS = 3  # by either instance
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="apt-get install prometheus")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with FakeCluster(tokenizer, [FakeEngine(), FakeEngine()]) as cluster:
        for number in range(2 * ANSWERS):
            stream = number % 2 == 0
            body = {"model": MODEL, "prompt": "ab", "max_tokens": 4, "stream": stream}
            url, data = f"{cluster.url}/v1/completions", json.dumps(body).encode()
            with urllib.request.urlopen(url, data) as answer:
                answer.read()
        ended = {"stop": 0.0, "length": 0.0}
        while sum(ended.values()) < 2 * ANSWERS:  # what gateways know is a second old
            found = figures(page_of(cluster.url))
            for reason in ended:
                names = [("vllm:request_success_total", MODEL, i, reason) for i in ("i0", "i1")]
                ended[reason] = sum(found.get(name, 0.0) for name in names)
        yield cluster


def page_of(url: str) -> bytes:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        page: bytes = answer.read()
    return page


# --- the document ---------------------------------------------------------------------------


def test_the_document_says_what_the_code_does() -> None:
    page = metrics_document.PAGE.read_text(encoding="utf-8")
    made = metrics_document.page_with(page, metrics_document.tables())
    assert page == made, "make metrics-docs"


def test_other_pages_name_metrics_that_there_are() -> None:
    root = metrics_document.PAGE.parent.parent
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8").partition("## Names that have changed")[0]
        for name in set(re.findall(r"\bmemserve_[a-z_]*[a-z]\b", text)):
            bare = re.sub(r"_(bucket|sum|count)$", "", name)
            assert {name, bare} & set(metrics_document.ALL), (page.name, name)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_meaning_is_a_sentence_that_stands_alone(spec: MetricSpec) -> None:
    assert spec.text.endswith(".")
    assert spec.text[0].isupper() or spec.text[0].isdigit()
    assert len(spec.text.split()) >= 3
    assert not re.match(r"(Of|The same|Those|These|That|As) ", spec.text)
    for label in spec.labels:
        assert label.values or label.text


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", OURS, ids=lambda spec: spec.name)
def test_a_name_follows_prometheus_conventions(spec: MetricSpec) -> None:
    assert re.fullmatch(r"memserve(_[a-z0-9]+)+", spec.name)
    assert spec.name.endswith("_total") == (spec.kind is MetricKind.COUNTER)
    for unit in ("seconds", "bytes"):  # base units, and at the name's end
        tail = f"_{unit}_total" if spec.kind is MetricKind.COUNTER else f"_{unit}"
        assert spec.name.endswith(tail) == (spec.unit == unit)
    assert not re.search(r"_(ms|us|milliseconds|mb|kb|percent|count|sum|bucket)(_|$)", spec.name)
    for label in spec.labels:
        # `instance` and `job` are those of the page that was read.
        assert label.name not in ("instance", "job", "le", "quantile", "worker")
        assert re.fullmatch(r"[a-z_]+", label.name)
        assert all(re.fullmatch(r"[a-z_]+", value) for value in label.values)


# --- what is served -------------------------------------------------------------------------


def agree(page: bytes, specs: tuple[MetricSpec, ...]) -> None:
    """A page has the metrics that it should have, with their kinds, labels and label values."""
    families = {
        family.name + "_total" * (family.type == "counter"): family
        for family in text_string_to_metric_families(page.decode())
    }
    assert set(families) == {spec.name for spec in specs}
    for spec in specs:
        family = families[spec.name]
        assert (family.type, family.documentation) == (spec.kind, spec.text)
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            assert set(labels) == {label.name for label in spec.labels}
            for label in spec.labels:
                assert not label.values or labels[label.name] in label.values
            assert sample.value >= 0


def test_a_gateway_serves_what_the_document_says(cluster: FakeCluster) -> None:
    agree(page_of(cluster.url), metrics_document.GATEWAY_PAGE)


def test_an_instance_serves_what_the_document_says(cluster: FakeCluster) -> None:
    for url in cluster.urls:
        agree(page_of(url), metrics_document.INSTANCE_PAGE)


def test_series_stand_once_on_a_page(cluster: FakeCluster) -> None:
    for url in (cluster.url, *cluster.urls):
        lines = page_of(url).decode().splitlines()
        series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
        assert len(series) == len(set(series))
        heads = [line for line in lines if line.startswith("# TYPE")]
        assert len(heads) == len(set(heads))


def test_an_instance_s_state_is_told_by_itself_and_by_the_gateway(cluster: FakeCluster) -> None:
    for url, name in ((cluster.url, "i0"), (cluster.url, "i1"), (cluster.urls[0], "i0")):
        found = figures(page_of(url))
        states = {
            state: found["memserve_instance_state", name, state]
            for state in ("starting", "ready", "draining", "dead")
        }
        assert states == {"starting": 0, "ready": 1, "draining": 0, "dead": 0}
        assert found["memserve_build_info", memserve.__version__] == 1
    gateway = figures(page_of(cluster.url))
    assert gateway["memserve_instance_info", "i0", "colocated", "memserve"] == 1
    assert gateway["memserve_members_unmet",] == 0


# --- vLLM's names ---------------------------------------------------------------------------


def test_vllm_s_names_have_the_same_figures_as_ours(cluster: FakeCluster) -> None:
    found = figures(page_of(cluster.url))
    pairs = {
        "num_requests_running": "running_sequences",
        "num_requests_waiting": "waiting_sequences",
        "generation_tokens_total": "generated_tokens_total",
        "num_preemptions_total": "preemptions_total",
        "time_to_first_token_seconds_count": "time_to_first_token_seconds_count",
        "time_to_first_token_seconds_sum": "time_to_first_token_seconds_sum",
        "inter_token_latency_seconds_count": "inter_token_seconds_count",
        "time_per_output_token_seconds_sum": "inter_token_seconds_sum",
        "request_time_per_output_token_seconds_sum": "time_per_output_token_seconds_sum",
        "e2e_request_latency_seconds_sum": "sequence_seconds_sum",
        "request_queue_time_seconds_count": "queue_seconds_count",
        "request_prefill_time_seconds_sum": "prefill_seconds_sum",
        "request_decode_time_seconds_sum": "decode_seconds_sum",
    }
    for name in ("i0", "i1"):
        for theirs, ours in pairs.items():
            assert (
                found[f"vllm:{theirs}", MODEL, name] == found[f"memserve_instance_{ours}", name]
            ), theirs
        by_source = [
            found["memserve_instance_prompt_tokens_total", name, source]
            for source in ("computed", "cached", "received")
        ]
        assert found["vllm:prompt_tokens_total", MODEL, name] == sum(by_source)
        assert found["vllm:prefix_cache_queries_total", MODEL, name] == sum(by_source)
        assert found["vllm:prefix_cache_hits_total", MODEL, name] == by_source[1]
        assert found["vllm:kv_cache_usage_perc", MODEL, name] == 0


def test_ends_and_lengths_of_sequences_are_counted(cluster: FakeCluster) -> None:
    found = figures(page_of(cluster.url))

    def both(name: str, *labels: str) -> float:
        return sum(found[name, MODEL, instance, *labels] for instance in ("i0", "i1"))

    ends = {
        reason: both("vllm:request_success_total", reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert ends == {"stop": 0, "length": 2 * ANSWERS, "abort": 0, "error": 0}
    assert both("vllm:request_generation_tokens_sum") == 4 * 2 * ANSWERS
    assert both("vllm:request_generation_tokens_bucket", "2.0") == 0
    assert both("vllm:request_generation_tokens_bucket", "5.0") == 2 * ANSWERS
    assert both("vllm:request_prompt_tokens_count") == 2 * ANSWERS


def test_an_endpoint_picker_finds_on_an_instance_what_it_reads(cluster: FakeCluster) -> None:
    page = page_of(cluster.urls[0]).decode()
    found = figures(page)
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        assert found[f"vllm:{name}", MODEL, "0"] == 0
    assert re.search(
        r'^vllm:cache_config_info\{block_size="16",num_gpu_blocks="0",engine="0"\} 1\.0$',
        page,
        re.M,
    )
    assert re.search(
        r'^vllm:lora_requests_info\{max_lora="0",waiting_lora_adapters="",running_lora_adapters=""\}'
        r" \d+\.\d+$",
        page,
        re.M,
    )


# --- promtool -------------------------------------------------------------------------------


@needs_promtool
def test_promtool_has_nothing_against_a_page(cluster: FakeCluster) -> None:
    """But against the colons in vLLM's names, which others read."""
    for url in (cluster.url, cluster.urls[0]):
        page = page_of(url)
        checked = subprocess.run(
            [str(PROMTOOL), "check", "metrics"], input=page, capture_output=True, check=False
        )
        said = (checked.stdout + checked.stderr).decode().splitlines()
        colon = "metric names should not contain ':'"
        assert [line for line in said if not line.endswith(colon)] == []
        assert {line.split()[0].partition(":")[0] for line in said} == {"vllm"}
