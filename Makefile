# make demo, make test, make check: each sets up its own environment in .venv the first time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# Set-up is done again when what it installs has changed, and not otherwise.
KEY := $(shell cat pyproject.toml runtime/pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
READY := $(VENV)/.ready-$(KEY)

.PHONY: demo test check setup clean

demo: $(READY)
	$(BIN)/python -m edgevlm.demo

# A process for each core, and in each one thread: together they would get in each other's way.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml

setup: $(READY)

# torch by itself and first: asked for by another package, it brings gigabytes of CUDA with it.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is older than Python 3.10"; echo "  hint: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "set-up, once: installing $(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@echo "set-up, once: installing edgevlm and what it needs"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e ./runtime -e ".[compile,test,bench]"
	@rm -f $(VENV)/.ready-*
	@touch $@

clean:
	rm -rf build dist $(VENV)
