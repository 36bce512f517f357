PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
# Their threads watch many jobs at once; the other tests fork, which after that would hang.
SLURM := tests/test_launch_slurm.py tests/test_slurm_cluster.py

.PHONY: setup demo test test-slow lint format clean

setup: $(SETUP)

$(SETUP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,cpu,onnx]"
	touch $@

demo: $(SETUP)
	bash demo.sh

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(SETUP)
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal $(SLURM:%=--ignore=%)
	$(BIN)/python -m pytest -m slow $(SLURM)

lint: $(SETUP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(SETUP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv runs
