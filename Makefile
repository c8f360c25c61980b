# Everything here needs only make, git and Python 3.11 or newer; each target does its own set-up.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# A real server for `make contract`, e.g. make contract COMFYUI_URL=http://127.0.0.1:8188
COMFYUI_URL ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check contract explore prove

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## Run sample jobs through a daemon and a simulated ComfyUI
	$(BIN)/comfyd demo

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## Format, lint, types and import directions
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

contract: $(STAMP)  ## Compare the simulator, or a real server (COMFYUI_URL=...), with what ComfyUI was recorded to say
	COMFYUI_URL="$(COMFYUI_URL)" $(BIN)/python -m pytest tests/contract

explore: $(STAMP)  ## Explore orders of events for longer than the tests do (about 25 minutes)
	$(BIN)/python -m tests.core.explore

.PHONY: observe
# WRITE=1 also writes docs/observed-alerts.md. Needs Debian's prometheus and prometheus-alertmanager.
observe: $(STAMP)  ## Make everything go wrong, and see every alert fire and resolve (about 9 minutes)
	$(BIN)/python -m tests.observe $(if $(WRITE),--write)

prove: $(STAMP)  ## Kill daemon and servers, lose journals, fill disks, run 10,000 jobs (about 30 minutes)
	$(BIN)/python -m pytest -s tests/endtoend/prove_kills.py tests/endtoend/prove_server_loss.py \
		tests/endtoend/prove_many_servers.py tests/endtoend/prove_journal_loss.py \
		tests/endtoend/prove_full_disk.py tests/endtoend/prove_everything.py \
		tests/endtoend/prove_latency.py tests/endtoend/prove_scale.py

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "comfyd needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
