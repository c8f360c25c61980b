# Everything here needs only make, git and Python 3.11 or newer; each target does its own set-up.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# A real server for `make contract`, e.g. make contract COMFYUI_URL=http://127.0.0.1:8188
COMFYUI_URL ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check audit boards contract explore prove prove-comfyui screenshot dist systemd-test

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## Run sample jobs through a daemon and a simulated ComfyUI
	$(BIN)/comfyd demo

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## Format, lint, types, import directions and dependencies
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py

audit: $(STAMP)  ## Look for known vulnerabilities in what we depend on; AUDIT_STRICT=1 fails where it cannot
	$(BIN)/python .ci/audit.py

boards: $(STAMP)  ## Write grafana/dashboards/ from the Python beside it
	$(BIN)/python -m grafana.make

contract: $(STAMP)  ## Compare the simulator, or a real server (COMFYUI_URL=...), with what ComfyUI was recorded to say
	COMFYUI_URL="$(COMFYUI_URL)" $(BIN)/python -m pytest tests/contract

explore: $(STAMP)  ## Explore orders of events for longer than the tests do (about 50 minutes)
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

prove-comfyui: $(STAMP)  ## Every kind of job, output, cancel and deadline at a real server (COMFYUI_URL=...)
	@test -n "$(COMFYUI_URL)" || { echo "give it a server: make prove-comfyui COMFYUI_URL=http://127.0.0.1:8188"; exit 1; }
	COMFYUI_URL="$(COMFYUI_URL)" $(BIN)/python -m pytest -s tests/endtoend/prove_comfyui.py

screenshot: $(STAMP)  ## Take docs/status-page.png anew, of a daemon at work (needs chromium)
	$(BIN)/python -m docs.make_screenshot

dist: $(STAMP)  ## Build the wheel into dist/, with the versions it was tested with
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	cp constraints.txt dist/

systemd-test: $(STAMP)  ## Install it under a real systemd and break it there (root; about 5 minutes)
	$(BIN)/python -m tests.systemd

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "comfyd needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
