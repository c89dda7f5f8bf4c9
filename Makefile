# Every target works alone and first, from a clean clone: it makes .venv and installs what it needs.
PYTHON ?= $(shell for p in python3.13 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
SHARED ?= ../shared/data
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help demo test test-slow lint typecheck bench clean
help:
	@echo 'make demo       fit three donors, calibrate a target, print the verdict, write reports/demo/'
	@echo 'make test       the tests (under 10 minutes on 2 cores)'
	@echo 'make test-slow  the slow tests: simulation-based calibration of the sampled model, full data sets'
	@echo 'make lint       ruff: rules and formatting'
	@echo 'make typecheck  mypy, strict'
	@echo 'make bench      accuracy, coverage and speed beside other packages, on the recordings in $(SHARED)'

$(VENV)/.python:
	@test -n '$(PYTHON)' || { echo 'hfdtl_bayes needs Python 3.12 or newer; tried python3.13, python3.12 and python3 (found:' \
		"$$(python3 --version 2>&1)). Install one (for example: pyenv install 3.13, or your system's python3.13 and" \
		'python3.13-venv packages) and run make again, or name it: make PYTHON=/path/to/python3.13' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lint]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/hfdtl-bayes demo --out reports/demo

test: $(VENV)/.installed-test
	$(PYTEST)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed-lint
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/transfer.py $(SHARED)/gpu_steps $(SHARED)/vllm_cpu
	$(BIN)/python benchmarks/interval_coverage.py $(SHARED)/vllm_cpu $(SHARED)/gpu_steps
	$(BIN)/python benchmarks/closed_loop.py $(SHARED)/gpu_steps --seeds 3
	$(BIN)/python benchmarks/end_to_end.py $(SHARED)/vllm_cpu --draws 200
	$(BIN)/python benchmarks/inference.py $(SHARED)/gpu_steps --rows-per-donor 2000 --draws-factor 0.5 --limit 600

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
