# make quickstart   its own environment, then the whole workflow: 4 to 8 minutes on two cores
# make test         its own environment, then the tests (all but those marked slow: make test-slow)
# make check        formatter, linter and type checker (ruff and mypy)
# PYTHON=/path/to/python3.12 chooses the interpreter the environment is made with.

SHELL := /bin/bash
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVED := $(VENV)/.installed-sglang
DEV := $(VENV)/.installed-dev

REAL := $(VENV)/.installed-real

.PHONY: help env quickstart smoke real check check-format check-lint check-types
.PHONY: test test-cpu test-slow test-unit test-dist test-cuda_stub test-run test-sglang test-gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,4s/^# //p' Makefile
	@echo "make smoke        two arms in under two minutes"
	@echo "make real         all stages on a pretrained model, then its tests"
	@echo "make test-unit | test-dist | test-cuda_stub | test-run | test-sglang | test-gpu | test-slow | clean"

# The first Python 3.12 of: PYTHON, the ones on PATH, pyenv's installed versions.
$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; \
	fits() { "$$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; }; \
	if [ -n "$$python" ]; then \
	  fits "$$python" || { echo "PYTHON=$$python is not a working Python 3.12: give the path of one" >&2; exit 1; }; \
	else \
	  for candidate in python3.12 python3 python $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12.*/bin/python 2>/dev/null | sort -rV); do \
	    if fits "$$candidate"; then python=$$candidate; break; fi; \
	  done; \
	  [ -n "$$python" ] || { echo "no Python 3.12 found on PATH or among pyenv's versions: install one, or give PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	fi; \
	"$$python" -c 'import venv, ensurepip' 2>/dev/null || { echo "$$python lacks the venv module: install it (on Debian: python3.12-venv)" >&2; exit 1; }; \
	echo "making $(VENV) with $$("$$python" --version) ($$python)"; \
	"$$python" -m venv --clear $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# The tests talk to a real SGLang server; the quickstart does without these 3 GB.
$(SERVED): $(STAMP)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,sglang]'
	@touch $@

# Formatter, linter and type checker. mypy reads the types of the installed packages, hence the environment first.
$(DEV): $(STAMP)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

env: $(STAMP)

# All three run, also when one fails. The hooks of .pre-commit-config.yaml call them one by one.
check:
	@$(MAKE) -k --no-print-directory check-format check-lint check-types

check-format: $(DEV)
	$(RUN)/ruff format --check .

check-lint: $(DEV)
	$(RUN)/ruff check .

check-types: $(DEV)
	$(RUN)/mypy

quickstart: env
	$(RUN)/s2d run configs/quickstart.yaml

# A pretrained model of 135 million parameters through all four stages (docs/real-model.md); 1 GB of files in real-model/.
$(REAL): $(STAMP)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,real]'
	@touch $@

real: $(REAL)
	$(RUN)/python benchmarks/real_model.py real-model
	$(RUN)/s2d run configs/real.yaml
	$(RUN)/s2d generate runs/real four_stages --prompt "Anna has 5 coins and gets 3 more. How many coins does Anna have now?"
	$(RUN)/python -m pytest -q -m slow tests/real

smoke: env
	$(RUN)/s2d run configs/smoke.yaml

# Two folders at a time, because the last files of a folder leave cores idle; each prints when it has ended. tests/unit has
# one process more than cores, for tests that wait. SGLang's servers need the cores alone.
test: test-gpu test-cpu test-sglang

test-cpu: env
	@$(MAKE) -j2 --output-sync=target --no-print-directory test-unit test-dist test-run test-cuda_stub

test-slow: $(SERVED)
	$(RUN)/python -m pytest -q -m slow

test-unit: env
	$(RUN)/python -m pytest -q -m "not slow" -n $$(($$(nproc) + 1)) --maxprocesses 8 --dist loadfile tests/unit

test-dist: env
	$(RUN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/dist

test-cuda_stub: env
	$(RUN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/cuda_stub

test-run: env
	$(RUN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --durations=15 tests/run --ignore-glob="*_sglang_*" --ignore-glob="*_server_ends*"

test-sglang: $(SERVED)
	$(RUN)/python -m pytest -q -m "not slow" --durations=15 tests/run/test_sglang_*.py tests/run/test_server_ends.py

test-gpu: env
	$(RUN)/python -m pytest -q -rs tests/gpu

clean:
	rm -rf $(VENV) runs build *.egg-info
