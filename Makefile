# Two commands for newcomers: `make demo` shows it, `make test` proves it. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch first and pinned: a plain `torch` pulls gigabytes of CUDA where only a CPU is wanted.
TORCH ?= torch==2.13.0
WORKERS ?= 2
# One thread per test process: small models do not gain from more, and idle BLAS threads spin.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check lint fast long fuzz soak zoo coverage-check bench integration integrations tiny-vlm report-picture clean

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

# What `make test` leaves out, but for the zoo's matrix: benchmarks that run, engines of every family.
long: $(VENV)/.full
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "long or zoo" --ignore tests/zoo/test_matrix.py

# Damaged models, directions and manifests through the command line; kill -9 at random moments of everything that writes, and
# many requests at once. docs/security.md has the last results.
CASES ?= 5000
fuzz: $(VENV)/.full
	$(BIN)/python tests/hostile/fuzz.py --cases $(CASES) --docs docs/security.md

KILLS ?= 200
soak: $(VENV)/.full
	$(BIN)/python tests/hostile/kills.py --kills $(KILLS) --engines --docs docs/security.md
	$(BIN)/python tests/hostile/load.py --docs docs/security.md

fast: $(VENV)/.full
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not zoo and not long"

# The whole matrix: every graph of the zoo, asked everything; then docs/coverage.md, which also says what failed.
zoo: $(VENV)/.full
	rm -rf build/zoo
	$(BIN)/python tests/zoo/make_optimum.py build/optimum
	VLMGUARD_OPTIMUM="$(abspath build/optimum)" VLMGUARD_ZOO_RESULTS="$(abspath build/zoo)" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "" \
		tests/zoo/test_matrix.py; tested=$$?; \
	$(BIN)/python tests/zoo/coverage.py build/zoo docs/coverage.md && exit $$tested

# Whether docs/coverage.md is what the last `make zoo` found.
coverage-check: $(VENV)/.full
	$(BIN)/python tests/zoo/coverage.py build/zoo docs/coverage.md --check

# Every benchmark with few repetitions, and the draft of its page: shows that they run. docs/performance.md says how to measure.
bench: $(VENV)/.full
	for name in rewriting inference hooks extraction spellings serving; do \
		$(BIN)/python benchmarks/$$name.py --quick --out build/bench/$$name.json \
			$$(test $$name != rewriting || echo --compare) || exit 1; done
	$(BIN)/python benchmarks/gpu.py --quick --shape tiny --runtime onnxruntime-cpu --out build/bench/gpu.json
	$(BIN)/python benchmarks/report.py --quick --results build/bench --docs build/bench

# Where apps run it: integrations/NAME/run.sh installs what it needs below build/integrations/NAME, and compares that runtime with
# onnxruntime. All of them, and then the table of docs/runtimes.md, which also says which did not run.
integration: $(VENV)/.full
	@test -f "integrations/$(NAME)/run.sh" || { echo "NAME is '$(NAME)'; choose one of" \
		$(patsubst integrations/%/run.sh,%,$(wildcard integrations/*/run.sh)); exit 2; }
	rm -f build/integrations/$(NAME).json
	$(BIN)/python -m integrations.cases
	PATH="$(abspath $(BIN)):$$PATH" bash integrations/$(NAME)/run.sh

integrations: $(VENV)/.full
	failed=""; for run in integrations/*/run.sh; do \
		name=$$(basename $$(dirname $$run)); $(MAKE) integration NAME=$$name || failed="$$failed $$name"; done; \
	$(BIN)/python -m integrations.results && { test -z "$$failed" || { echo "failed:$$failed"; exit 1; }; }

# The tiny VLM again, from nothing: train (a few minutes on one core), then export.
tiny-vlm: $(VENV)/.full
	$(BIN)/python examples/tiny_vlm/train.py --out examples/tiny_vlm/checkpoint
	$(BIN)/vlmguard convert examples/tiny_vlm/checkpoint examples/tiny_vlm/onnx-community --force

# docs/report.png: the report of the tiny VLM, in Chromium (Debian's package `chromium`).
report-picture: $(VENV)/.full
	rm -rf build/report
	$(BIN)/vlmguard-export examples/tiny_vlm/onnx-community build/report/tiny-vlm-guarded
	$(BIN)/vlmguard report build/report/tiny-vlm-guarded -o build/report/report.html \
		--prompts examples/tiny_vlm/prompts/evaluation.jsonl
	$(BIN)/python tests/report_picture.py build/report/report.html docs/report.png

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
