# Everything runs inside .venv, which is made on first use and brought up to date when pyproject.toml or constraints.txt
# change; otherwise nothing is installed and no network is needed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/pipelines/quickstart.yaml
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The stamp's name holds a checksum of what was installed from: content, because a checkout changes every file's time.
KEY     := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
RUNTIME := $(VENV)/.installed-runtime-$(KEY)
DEV     := $(VENV)/.installed-dev-$(KEY)
PARITY  := $(VENV)/.installed-parity-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help quickstart install isolation dev test test-slow invariance parity test-gpu benchmark benchmark-gpu lint type format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: install ## run the whole pipeline on the embedded task (CONFIG=another.yaml for another)
	$(BIN)/rlhf-lightning pipeline --config $(CONFIG)

# An installation with more extras serves for less.
install: $(or $(wildcard $(PARITY)),$(wildcard $(DEV)),$(RUNTIME)) ## install the package into .venv

isolation: ## install bubblewrap, which keeps programs of completions apart (where apt-get may)
	@command -v bwrap >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		timeout 300 sh -c 'apt-get -qq update && apt-get -qq install -y bubblewrap' >/dev/null 2>&1; } || \
		echo "bubblewrap is not installed and apt-get cannot install it here: its tests are skipped"

dev: $(or $(wildcard $(PARITY)),$(DEV)) ## install the package and the developers' tools into .venv

test: dev ## run the tests but the slow ones (WORKERS=0 for one process, ARGS="-k name" for some)
	$(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal --durations=40 --durations-min=3 $(ARGS)

test-slow: dev ## run the slow tests: kills, ranks, sweeps
	$(BIN)/python -m pytest -q -m slow -n $(WORKERS) --dist worksteal $(ARGS)

invariance: dev ## run the tests of what must not change a result, and print them as a table
	RLHF_LIGHTNING_ALL_RANKS=1 $(BIN)/python -m pytest -q -p tests.invariance.table tests/invariance \
		tests/distributed tests/integration/test_resume.py $(ARGS)

parity: $(PARITY) ## run the comparisons with TRL
	$(BIN)/python -m pytest -q tests/parity $(ARGS)

test-gpu: dev ## run the tests that need a CUDA device, and print speed and memory
	@$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
		echo "no CUDA device: the GPU tests are skipped; only what of them runs on a CPU is run"
	$(BIN)/python -m pytest -q -s tests/gpu $(ARGS)

benchmark-gpu: dev ## on one GPU, in eight minutes: equality with the CPU, the GPU tests, speed (ARGS=--rehearse without one)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

benchmark: $(PARITY) ## measure speed and memory compared with TRL
	$(BIN)/python benchmarks/training.py dpo $(ARGS)
	$(BIN)/python benchmarks/training.py sft $(ARGS)
	$(BIN)/python benchmarks/training.py reward --ranked 4 --micro_batch_tokens 2048 $(ARGS)
	$(BIN)/python benchmarks/training.py simpo --ranked 4 --micro_batch_tokens 2048 $(ARGS)
	$(BIN)/python benchmarks/training.py kto --micro_batch_tokens 2048 $(ARGS)
	$(BIN)/python benchmarks/online.py $(ARGS)

lint: dev ## check style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

type: dev ## check types
	$(BIN)/mypy

format: dev ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and built files; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3 on PATH: install Python 3.11 or later, or pass PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: pass PYTHON=/path/to/a/later/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): EXTRAS :=
$(DEV): EXTRAS := [dev]
$(PARITY): EXTRAS := [dev,parity]
$(RUNTIME) $(DEV) $(PARITY): | $(BIN)/python
	@echo "installing into $(VENV) (once; a few minutes where wheels must be fetched)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.$(EXTRAS)'
	@rm -f $(VENV)/.installed-*
	@touch $@
