# Every target sets up what it needs; nothing has to be prepared but Python 3.11+ and make.
PYTHON ?= python3
# Pinned and installed before anything that depends on it: an unpinned torch pulls in gigabytes of CUDA.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Many tests wait for servers and processes of theirs: one more at a time than there are cores. A file's servers
# are started once, since one worker runs all of it; in their own order, for the longest come first.
WORKERS ?= $(shell expr $$(nproc) + 1)
# PYTEST_ARGS narrows them down, such as PYTEST_ARGS="-k spool".
PYTEST_ARGS ?=
# Such as BENCH_ARGS="--short" or "--models mlp,gpt --threads 1 --rounds 20".
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench bench-agent bench-collector bench-fleet bench-slo bench-findings bench-alerts soak-outage soak-kills soak-harm soak-sigterm soak-fuzz simulate-verdicts screenshot servers clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Train healthy and sick models on real data and report on them
	$(BIN)/gradwatch demo

test: $(VENV)/.dev lint servers ## Lint, then run all tests
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.dev ## Check style, types, generated files and known vulnerabilities of dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict alerts/build.py
	$(BIN)/mypy --strict dashboards/build.py
	PYTHONPATH=. $(BIN)/mypy --strict benchmarks/alert_latency.py
	$(BIN)/mypy --strict benchmarks/agent_overhead.py benchmarks/agent_memory.py benchmarks/collector.py benchmarks/fleet_size.py benchmarks/slo.py benchmarks/verdicts.py benchmarks/findings.py
	$(BIN)/python alerts/build.py --check
	$(BIN)/python dashboards/build.py --check
	$(BIN)/python docs/build.py --check
	$(BIN)/python scripts/audit-dependencies

format: $(VENV)/.dev ## Format the code and rebuild generated files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python alerts/build.py
	$(BIN)/python dashboards/build.py
	$(BIN)/python docs/build.py

bench: $(VENV)/.dev ## Print rough figures in five minutes: the agent's overhead, what the collector takes and keeps
	$(BIN)/python benchmarks/agent_overhead.py --short
	$(BIN)/python benchmarks/collector.py --short

bench-agent: $(VENV)/.bench ## Compare the agent's cost with its peers', on an idle machine: an hour and a quarter
	$(BIN)/python benchmarks/agent_overhead.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/agent_memory.py $(filter --short,$(BENCH_ARGS))

bench-collector: $(VENV)/.mlflow ## Measure what the collector takes, keeps and needs, on an idle machine, beside MLflow
	$(BIN)/python benchmarks/collector.py --mlflow $(VENV)/mlflow/bin/python $(BENCH_ARGS)

bench-fleet: $(VENV)/.dev ## Print what a day of one run of a fleet takes on disk, before and after it is rolled up
	$(BIN)/python benchmarks/fleet_size.py $(BENCH_ARGS)

bench-slo: $(VENV)/.dev ## Measure what reports and ticks cost over the registry of a large fleet: a quarter of an hour
	$(BIN)/python benchmarks/slo.py $(BENCH_ARGS)

bench-alerts: $(VENV)/.dev servers ## Measure how long it takes from a fault in training to the page, in five minutes
	PYTHONPATH=. $(BIN)/python benchmarks/alert_latency.py $(BENCH_ARGS)

bench-findings: $(VENV)/.dev ## Train healthy and sick models of seven families, and count what is found of them: an hour
	$(BIN)/python benchmarks/findings.py $(BENCH_ARGS)

soak-outage: $(VENV)/.dev ## Train through an hour's worth of exports without a collector, and replay them
	$(BIN)/python -m tests.soak.outage $(BENCH_ARGS)

soak-kills: $(VENV)/.dev ## Kill the collector 500 times while data comes in, and look for what is lost or doubled
	$(BIN)/python -m tests.soak.kills $(BENCH_ARGS)

soak-harm: $(VENV)/.dev ## Measure what training takes longer for where the collector misbehaves, in ten minutes
	$(BIN)/python -m tests.soak.harm $(BENCH_ARGS)

soak-sigterm: $(VENV)/.dev ## Measure how much longer SIGTERM takes to kill what is watched, in ten minutes
	$(BIN)/python -m tests.soak.sigterm $(BENCH_ARGS)

soak-fuzz: $(VENV)/.dev ## Send the collector a million spoiled requests, and look for what it does not bear
	$(BIN)/python -m tests.soak.fuzz $(BENCH_ARGS)

simulate-verdicts: $(VENV)/.dev ## Simulate how often an alert on few runs is false, and write it into docs/slo.md
	$(BIN)/python benchmarks/verdicts.py

screenshot: $(VENV)/.dev servers ## Take the picture of the run page that README opens with, of the demo's data
	$(BIN)/python scripts/screenshot

servers: ## Install Debian's Prometheus, Alertmanager, HAProxy, PgBouncer and Chromium for the tests, where that is allowed
	@scripts/install-servers

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.torch:
	scripts/make-venv $(PYTHON) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.demo

# A program of its own, with its own dependencies.
$(VENV)/.mlflow: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/mlflow
	$(VENV)/mlflow/bin/pip install --quiet --disable-pip-version-check mlflow
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@
