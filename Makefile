# `make serve` and `make test` need nothing but Python 3.11 or newer; the rest is installed here.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Newer than what it was made from: nothing is installed twice.
INSTALLED := $(VENV)/.installed
BENCH_JSON ?= build/bench
# The evaluation is a package of its own, which is not installed.
EVALUATION := PYTHONPATH=benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m evaluation

VLLM := build/peers/vllm
# Helm as a library, for the tests of the chart. It asks for a newer Python than it needs, so it has an
# environment of its own.
HELM := build/helm
HELM_SDKPY := 0.1.32
# Processes of tests beside each other: each takes whole files, whose tests share servers, in their
# order, so that the long ones (tests/e2e, tests/fault) come first.
WORKERS ?= 2
PYTEST = $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-core test-vllm lint format bench peers peers-install vllm paper soak
.PHONY: api-docs readme clean docs-test install-check metrics-docs config-docs clients-test ui-test picture
.PHONY: browser helm chart-docs gpu-test

help:
	@echo "make setup   a virtual environment in $(VENV), with everything (PYTHON=... chooses the Python)"
	@echo "make serve   serve the demo model on http://127.0.0.1:8000 (ARGS='--port 9000 ...')"
	@echo "make test    lint, types, layers and all tests, also those with a vLLM, which it installs"
	@echo "             (4 GB; WORKERS=2 tests at a time; ARGS='-k pool ...' for pytest)"
	@echo "make test-core   the same without vLLM;   make test-vllm   what test-core leaves out"
	@echo "make docs-test   the commands of the tutorial and the how-to pages, on port 8000"
	@echo "make clients-test   have agents' and clients' libraries, which it installs (500 MB), talk to it"
	@echo "make ui-test     memserve top and dashboard, in a Chromium; says what it needs"
	@echo "make picture     README's picture of a running dashboard, anew"
	@echo "make gpu-test   what a GPU computes: kernels, engine, swaps, hand-overs (ARGS='-k swap ...')"
	@echo "make lint    the same without the tests;   make format   put the code into shape"
	@echo "make bench   microbenchmarks of the pool, transfers and the engine, as JSON in $(BENCH_JSON)"
	@echo "make vllm    vLLM alone, on this machine's CPU, for the tests that need one (4 GB)"
	@echo "make peers   measure beside vLLM and others, which it installs (4 GB; ARGS='--quick ...')"
	@echo "make peers-install   only install them (PEERS='vllm ...': only these)"
	@echo "make paper   the paper's evaluation, as a report in build/paper (DATA=FOLDER; ARGS='--quick')"
	@echo "make soak    a whole cluster under mixed load for an hour (ARGS='--minutes 10 ...')"
	@echo "make api-docs   docs/api.md's tables anew, from what the gateway takes"
	@echo "make install-check   build sdist and wheel, install the wheel elsewhere, and serve from it (3 GB)"
	@echo "make config-docs   docs/configuration.md's tables anew, from the code"
	@echo "make metrics-docs   docs/metrics.md's tables anew, from the code"
	@echo "make chart-docs   the Helm chart's schema and deploy/README.md's table anew, from config.py"
	@echo "make helm    Helm as a library, for the tests of the chart (120 MB)"
	@echo "make readme  benchmarks/README.md anew, from benchmarks/results"
	@echo "make clean   remove what these made, the environment included"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "memserve needs Python 3.11 or newer; say which: make setup PYTHON=/path/to/python"; exit 1; }
	@echo "==> creating $(VENV) with $$("$(PYTHON)" --version)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "==> installing memserve and what it needs (minutes, the first time)"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--constraint constraints.txt --editable '.[demo,bench,traces,ui,ray,dev]'
	@# With what it asks for, NIXL would bring CUDA libraries that torch's build may not fit.
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--constraint constraints.txt --no-deps nixl nixl-cu12
	@touch $@
	@echo "==> installed; the command is $(BIN)/memserve"

serve: setup
	@$(BIN)/memserve up $(ARGS)

lint: setup
	@echo "==> ruff format"
	@$(BIN)/ruff format --check .
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> import layers"
	@$(BIN)/lint-imports --no-logo --no-cache  # a cached graph misses edits

# A download beside computations; each says what it has to say when it is done.
test: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint vllm helm
	@echo "==> pytest"
	@$(PYTEST) -m 'not docs' $(ARGS)

test-core: lint helm
	@echo "==> pytest"
	@$(PYTEST) -m 'not real_vllm and not docs' $(ARGS)

test-vllm: vllm
	@$(PYTEST) -m real_vllm $(ARGS)

# With the PyTorch that is installed: `pip install torch` in the environment, for a build with CUDA.
gpu-test:
	@"$(PYTHON)" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "$(PYTHON) finds no GPU: no CUDA build of PyTorch, or no device (nvidia-smi shows them)"; exit 1; }
	@MEMSERVE_TEST_DEVICE=cuda PYTHONPATH=src:benchmarks$${PYTHONPATH:+:$$PYTHONPATH} "$(PYTHON)" -m pytest \
		--numprocesses $(WORKERS) --dist loadfile \
		tests/property/test_attention.py tests/property/test_engine.py tests/property/test_pool_machine.py \
		tests/unit/test_gpu_*.py tests/unit/test_*_cuda.py tests/unit/test_pool_tiers.py \
		tests/unit/test_engine_generate.py tests/unit/test_engine_kv.py tests/unit/test_engine_perplexity.py \
		tests/unit/test_engine_scoring.py \
		tests/unit/test_instance_handoff*.py $(ARGS)

docs-test: setup
	@$(BIN)/pytest tests/docs $(ARGS)

# Each in an environment of its own: they ask for different versions of the same packages.
clients-test: setup
	@echo "==> installing clients in build/clients (minutes, the first time)"
	@PYTHONPATH=benchmarks $(BIN)/python -m tests.clients.install
	@echo "==> pytest"
	@MEMSERVE_TEST_CLIENTS=1 $(BIN)/pytest tests/clients $(ARGS)

# The browser is no part of `make setup`: 400 MB that serving and the other tests do not need.
ui-test: setup browser
	@$(BIN)/pytest tests/unit/test_top.py tests/unit/test_dashboard_views.py \
		tests/security/test_dashboard_guard.py tests/e2e/test_dashboard.py $(ARGS)

picture: setup browser
	@PYTHONPATH=src $(BIN)/python -m tests.dashboard_picture

browser: setup
	@command -v chromium chromium-browser >/dev/null && $(BIN)/python -c 'import playwright' 2>/dev/null \
		|| { echo "the dashboard's tests and its picture need a Chromium (apt-get install chromium)" \
			"and Playwright ($(BIN)/pip install playwright)"; exit 1; }

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@mkdir -p $(BENCH_JSON)
	@echo "==> pool"
	@$(BIN)/memserve bench pool --json $(BENCH_JSON)/pool.json
	@echo "==> transfer"
	@$(BIN)/memserve bench transfer --json $(BENCH_JSON)/transfer.json
	@echo "==> engine"
	@$(BIN)/memserve bench engine --json $(BENCH_JSON)/engine.json
	@echo "==> results are in $(BENCH_JSON)"

peers: peers-install
	@$(EVALUATION) peers $(ARGS)

peers-install: setup
	@echo "==> installing peers in build/peers (minutes)"
	@$(EVALUATION).peers.install $(PEERS)

paper: setup
	@test -n "$(DATA)" || { echo "which data? make paper DATA=FOLDER, with loogle/ and react/ in it"; exit 1; }
	@$(EVALUATION) paper build/paper --data "$(DATA)" $(ARGS)

soak: setup
	@$(EVALUATION) soak $(ARGS)

api-docs: setup
	@PYTHONPATH=src $(BIN)/python -m tests.api_fields

config-docs: setup
	@PYTHONPATH=src $(BIN)/python -m tests.config_document

metrics-docs: setup
	@PYTHONPATH=src $(BIN)/python -m tests.metrics_document

chart-docs: setup
	@PYTHONPATH=src $(BIN)/python -m tests.chart_schema

helm: $(HELM)/.installed-$(HELM_SDKPY)

$(HELM)/.installed-$(HELM_SDKPY): | setup
	@echo "==> installing helm-sdkpy in $(HELM)"
	@test -x $(HELM)/bin/python || $(BIN)/python -m venv $(HELM)
	@$(HELM)/bin/python -m pip install --disable-pip-version-check --quiet --ignore-requires-python \
		--constraint constraints.txt helm-sdkpy==$(HELM_SDKPY)
	@touch $@

readme: setup
	@$(EVALUATION) readme

install-check: setup
	@$(BIN)/python tests/install_check.py

vllm: setup
	@echo "==> installing vLLM in $(VLLM) (minutes)"
	@$(EVALUATION).peers.install vllm
	@test -e $(VLLM)/.installed \
		|| { echo "vLLM could not be installed: make test-core runs all tests that need none"; exit 1; }

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
