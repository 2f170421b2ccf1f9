# make setup | demo | test | bench | lint | lock      (docs/development.md explains each)
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CLIENT := clients/python
READY := $(VENV)/.ready
LOCKS := requirements/cpu.lock requirements/dev.lock
SETUP_INPUTS := $(LOCKS) pyproject.toml $(CLIENT)/pyproject.toml tools/setup_venv.py
ORACLE := .venv-oracle
ORACLE_READY := $(ORACLE)/.ready

# Cheap promises first, real engines last: what fails, fails early. Every folder of tests/ that is not named runs in the middle.
TESTS_LAST := $(wildcard tests/api tests/cli tests/engine)
TESTS := $(filter-out $(TESTS_LAST) tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/))) $(wildcard tests/test_*.py) $(TESTS_LAST)
# An engine takes gigabytes, so not one process a core; each has its share of the cores.
PROCESSES ?= 2
THREADS = $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + $(PROCESSES) - 1) / $(PROCESSES) )))
PYTEST_ARGS ?=
ARGS ?=

.PHONY: help setup setup-oracle demo test bench bench-peers reproduce-app reproduce-unlearning reproduce-rules lint format lock clean

help:
	@echo 'make setup   build .venv from the pinned CPU locks (a few minutes, once)'
	@echo 'make demo    serve a small chat model on CPU and show one answer plain and one edited'
	@echo 'make test    lint, types, import direction and every test, the real engine included'
	@echo 'make bench   what editing costs, against vLLM without the plugin; an hour or more (ARGS=--quick; ARGS=--help)'
	@echo 'make bench-peers  an environment for vllm-lens, which make bench then compares with as well'
	@echo 'make reproduce-app  what taking a concept away costs, by four methods (ARGS=--quick: 3 minutes)'
	@echo 'make reproduce-unlearning  what is left of an entity under maps, clamps behind gates and a prompt (ARGS=--quick)'
	@echo 'make reproduce-rules  rules over features: multi-hop questions, indirect cues, unsafe requests (ARGS=--quick)'
	@echo 'make lint    ruff, mypy --strict, import-linter (make format rewrites)'
	@echo 'make lock    resolve requirements/*.lock anew'

setup: $(READY)

$(READY): $(SETUP_INPUTS)
	@command -v $(PYTHON) >/dev/null || { echo 'setup: $(PYTHON) is not on this machine; install Python 3.11 (Debian: apt install python3.11 python3.11-venv) or name yours: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo 'setup: $(PYTHON) is not Python 3.11, the version that requirements/*.lock pin packages for; name one that is: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'setup: $(PYTHON) cannot create a virtual environment; install its venv module (Debian: apt install python3.11-venv)' >&2; exit 1; }
	@$(BIN)/python tools/setup_venv.py $(LOCKS) . $(CLIENT)
	@touch $@

# sae-lens, which tests compare with, brings half a data-science stack: it lies on top of $(VENV), which never sees it.
setup-oracle: $(ORACLE_READY)

$(ORACLE_READY): requirements/oracle.lock $(LOCKS) | $(READY)
	@rm -rf $(ORACLE)
	@$(BIN)/python -m venv --without-pip $(ORACLE)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(ORACLE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@$(ORACLE)/bin/python tools/setup_venv.py requirements/oracle.lock
	@touch $@

demo: setup
	@$(BIN)/editserver demo

test: setup
	@$(MAKE) --no-print-directory -j2 -O lint setup-oracle
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(PROCESSES) --no-loadscope-reorder $(TESTS) $(PYTEST_ARGS)

# A quick run shows that everything works; its figures are not for a page.
bench: setup
	@$(BIN)/python -m benchmarks $(ARGS)
	@case " $(ARGS) " in "  ") $(BIN)/python -m benchmarks.page;; esac

# A peer's vLLM is another version: it lies on top of $(VENV), which never sees it.
bench-peers: setup
	@$(BIN)/python benchmarks/peers/setup.py

# Where it is interrupted, it goes on.
reproduce-app: setup
	@$(BIN)/python -m reproduce.app $(ARGS)

reproduce-unlearning: setup
	@$(BIN)/python -m reproduce.unlearning $(ARGS)

reproduce-rules: setup
	@$(BIN)/python -m reproduce.rules $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Needs only a Python with pip, so that a lock that no longer installs can be made anew.
lock:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python tools/lock.py

clean:
	rm -rf $(VENV) $(ORACLE) .venv-vllm-lens .mypy_cache .ruff_cache .pytest_cache build *.egg-info
