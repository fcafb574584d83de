"""`memserve doctor` on clusters as people start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from memserve.secrets import SECRET_VARIABLE
from tests.e2e.test_disaggregation import running
from tests.fakes import metric, save_tiny_tokenizer, until
from tests.tiny_models import save_tiny_model

DEADLINE = 60.0
PROVED = 'memserve_scheduler_handover_proofs_total{what="worked"}'
CLUSTER = """
[model]
path = "{model}"
served_name = "tiny"
dtype = "float32"
device = "cpu"
[gateway]
port = 0
[[instance]]
role = "prefill"
profile = "off"
hbm_blocks = 64
dram_blocks = 8
[[instance]]
role = "decode"
profile = "off"
hbm_blocks = 64
dram_blocks = 8
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("models"))
    save_tiny_tokenizer(directory)
    return directory


def doctor(url: str, *more: str, **environment: str) -> tuple[int, str]:
    """Its exit code, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "memserve", "doctor", "--url", url, *more],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


def found(url: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    code, text = doctor(url, "--json", **environment)
    return code, json.loads(text)


def test_a_cluster_that_works_has_nothing_wrong_with_it(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "cluster.toml"
    config.write_text(CLUSTER.format(model=model))
    with running(config) as url:
        until(lambda: metric(url, PROVED) == 1)
        end = time.monotonic() + DEADLINE
        while True:
            code, findings = found(url)
            # What else runs on this machine may have left memory behind.
            bad = [
                each for each in findings if each["check"] != "memory" and each["status"] != "ok"
            ]
            if not bad:
                break
            # Events may still be on their way.
            assert time.monotonic() < end, bad
        assert code == 0
        assert {each["check"] for each in findings} == {
            *("gateway", "secret", "version", "member", "kv", "events", "reach", "handover"),
            *("clock", "memory"),
        }
        assert set(findings[0]) == {"check", "status", "member", "text", "advice"}
        reached = {each["member"]: each["text"] for each in findings if each["check"] == "reach"}
        assert "decode-1 (shm, " in reached["prefill-0"]
        assert "prefill-0 (shm, " in reached["decode-1"]

        code, text = doctor(url)
        assert code == 0
        assert f"ok   gateway: {url} answers, version" in text

        code, findings = found(url, **{SECRET_VARIABLE: "another"})
        assert code == 1
        (secret,) = (each for each in findings if each["check"] == "secret")
        assert secret["status"] == "fail"
        assert "MEMSERVE_SECRET" in secret["advice"]
    code, findings = found(url)
    assert code == 1
    assert [each["check"] for each in findings] == ["gateway", "memory"]
    assert findings[0]["status"] == "fail"
