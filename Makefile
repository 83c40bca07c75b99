# Two commands for newcomers: `make demo` shows it, `make test` proves it. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch first and pinned: a plain `torch` pulls gigabytes of CUDA where only a CPU is wanted.
TORCH ?= torch==2.13.0
WORKERS ?= 2
# One thread per test process: small models do not gain from more, and idle BLAS threads spin.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check lint fast tiny-vlm clean

demo: $(VENV)/.light
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: $(VENV)/.full
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(VENV)/.full lint fast

lint: $(VENV)/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

fast: $(VENV)/.full
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

# The tiny VLM again, from nothing: train (a few minutes on one core), then export.
tiny-vlm: $(VENV)/.full
	$(BIN)/python examples/tiny_vlm/train.py --out examples/tiny_vlm/checkpoint
	$(BIN)/vlmguard convert examples/tiny_vlm/checkpoint examples/tiny_vlm/onnx-community --force

$(VENV)/.light: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[cpu]"
	touch $@

$(VENV)/.full: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[cpu,torch,test]"
	touch $@ $(VENV)/.light

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
