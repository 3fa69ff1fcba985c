# Everything here works on a machine with python3 >= 3.11 (with venv) and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RIVALS := .venv-rivals
SDKS := .venv-openai-1 .venv-openai-2
UV := env -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null UV_NO_CONFIG=1 \
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command "make lock" --quiet

.PHONY: help demo test soak controls check bench bench-api bench-resilience up lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

demo: $(READY) ## 240 tickets through three simulated providers, with the bill
	@$(BIN)/backstop demo

test: $(READY) $(SDKS:=/.ready) ## all tests, on a real Postgres and a real Valkey
	@$(BIN)/pytest --numprocesses auto --dist loadfile

soak: $(READY) ## 20,000 jobs under kills and broken servers; options: make soak SOAK="--seed 7 --short"
	@PYTHONPATH=tests $(BIN)/python tests/faults/soak.py $(SOAK)

controls: $(READY) ## each guard off once: what goes red then; beside plain Celery: make controls CONTROLS=--baseline
	@PYTHONPATH=tests $(BIN)/python tests/faults/controls.py $(CONTROLS)

check: $(READY) ## lint, format, types, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY) ## throughput and latency beside a usual Celery worker
	@$(BIN)/python -m bench.throughput

bench-api: $(READY) ## polling beside a bare route, a thousand long polls, a file of 100 MB
	@$(BIN)/python -m bench.api $(BENCH)

bench-resilience: $(READY) $(RIVALS)/.ready ## bad weather: beside a naive client and LiteLLM; options: make bench-resilience BENCH="--short"
	@$(BIN)/python -m bench.resilience --svg docs/resilience.svg $(BENCH)

up: $(READY) ## servers, workers, API and Flower, until Ctrl-C
	@$(BIN)/backstop up

lock: $(READY) ## new lock files from pyproject.toml
	@$(UV) --output-file requirements.lock
	@$(UV) --all-extras --group dev --output-file requirements-dev.lock
	@$(subst pyproject.toml,bench/requirements-rivals.in,$(UV)) --output-file bench/requirements-rivals.lock
	@for sdk in openai-1 openai-2; do $(subst pyproject.toml,tests/sdk/$$sdk.in,$(UV)) --output-file tests/sdk/$$sdk.lock || exit 1; done

clean: ## without the environment and all data
	@rm -rf $(VENV) $(RIVALS) $(SDKS) .backstop .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(READY): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Backstop needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) (about a minute, once)" >&2
	@$(PYTHON) -m venv $(VENV) || { echo "This Python has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

$(RIVALS)/.ready: bench/requirements-rivals.lock
	@echo "Setting up $(RIVALS), for the rivals alone" >&2
	@$(PYTHON) -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r bench/requirements-rivals.lock
	@touch $@

$(SDKS:=/.ready): .venv-%/.ready: tests/sdk/%.lock
	@echo "Setting up .venv-$*, for the tests with that openai SDK alone" >&2
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@
