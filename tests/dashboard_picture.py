"""The picture of a running dashboard in README.md: `make picture`.

Starts a cluster of a tiny model, keeps it busy with conversations, and takes a screenshot in a
Chromium. It needs what `make ui-test` needs.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fakes import save_tiny_tokenizer
from tests.tiny_models import save_tiny_model

PICTURE = Path(__file__).parent.parent / "docs/dashboard.png"
MAX_BYTES = 150_000
SIZE = {"width": 1180, "height": 620}
BUSY_SECONDS = 45.0  # until caches have filled
CLIENTS = 8
TOML = """
[model]
path = "{model}"
served_name = "tiny"
dtype = "float32"
[gateway]
port = 0
[dashboard]
port = 0
[[instance]]
role = "prefill"
count = 2
hbm_blocks = 400
dram_blocks = 300
profile = "off"
[[instance]]
role = "decode"
count = 2
hbm_blocks = 400
dram_blocks = 300
profile = "off"
"""


@contextmanager
def cluster(directory: Path) -> Iterator[tuple[str, str]]:
    """The gateway's URL and the dashboard's link."""
    model = save_tiny_model("llama", directory)
    save_tiny_tokenizer(model)
    config = directory / "cluster.toml"
    config.write_text(TOML.format(model=model))
    process = subprocess.Popen(
        [sys.executable, "-m", "memserve", "up", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = link = ""
        for line in process.stdout:
            if " on http://" in line:
                url = line.partition(" on ")[2].partition(";")[0]
            if "dashboard is at" in line:
                link = line.split()[-1]
                break
        yield url, link
    finally:
        process.terminate()
        process.wait()


def converse(url: str, seed: int, over: threading.Event) -> None:
    """Conversations that begin with one of three system prompts."""
    draw = random.Random(seed)
    while not over.is_set():
        prompt = [3 + (seed % 3 + 1) * n % 200 for n in range(160)]
        for _ in range(5):
            prompt += [draw.randrange(3, 200) for _ in range(40)]
            asked: dict[str, object] = {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": 24,
                "ignore_eos": True,
            }
            asked["stream"] = True  # gateways know the TTFT of streams alone
            body = json.dumps(asked).encode()
            head = {"content-type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", body, head)
            with contextlib.suppress(OSError), urllib.request.urlopen(request) as answer:
                answer.read()
            prompt += [draw.randrange(3, 200) for _ in range(24)]
            over.wait(draw.uniform(0.2, 1.0))


def take(link: str) -> None:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    flags = ["--headless", "--no-sandbox", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        page = browser.new_page(viewport=SIZE)
        page.goto(link)
        page.wait_for_selector("svg.flows path.returned", state="attached")
        page.wait_for_timeout(BUSY_SECONDS * 1000)
        page.screenshot(path=PICTURE)
        browser.close()


def main() -> None:
    over = threading.Event()
    with tempfile.TemporaryDirectory() as directory, cluster(Path(directory)) as (url, link):
        clients = [
            threading.Thread(target=converse, args=(url, seed, over)) for seed in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            take(link)
        finally:
            over.set()
            for client in clients:
                client.join()
    size = PICTURE.stat().st_size
    print(f"{PICTURE}: {size} bytes, {time.strftime('%Y-%m-%d')}")
    if size > MAX_BYTES:
        raise SystemExit(f"more than {MAX_BYTES}")


if __name__ == "__main__":
    main()
