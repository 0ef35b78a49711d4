# make test and make demo need Python >= 3.10 and nothing else: they build .venv first, and only once.
# make gpu uses neither network nor .venv: PYTHON must already have torch, triton and pytest.

PYTHON ?= python3
TORCH := torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
RESULTS ?= benchmarks/results
BENCH ?= benchmarks

.PHONY: help test test-export demo bench lint gpu gpu-test gpu-bench clean
.DELETE_ON_ERROR:

help:
	@echo "make test    the tests, on the CPU"
	@echo "make test-export  adds the extra 'export' (TFLite, ONNX) to .venv and runs its tests"
	@echo "make demo    compress the small network that comes along: python -m compsrt.train"
	@echo "make bench   the benchmarks; JSON goes to $(RESULTS)/"
	@echo "make lint    ruff and pyright"
	@echo "make gpu     tests and benchmarks that need CUDA, with PYTHON's own packages: gpu-test, gpu-bench"
	@echo "             (BENCH=benchmarks/bench_packed_model.py: of these alone)"
	@echo "make clean   remove .venv, caches and build output"

# The stamp is written last: a build that failed half-way is taken up again by the next make.
.venv/.installed: pyproject.toml constraints.txt
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) $(TORCH)
	$(PIP) -e ".[test,demo]"
	@touch $@

.venv/.installed-dev: .venv/.installed
	@rm -f $@
	$(PIP) -e ".[dev]"
	@touch $@

# torch is there already, without CUDA; nothing of the extra asks for another one.
.venv/.installed-export: .venv/.installed
	@rm -f $@
	$(PIP) -e ".[export]"
	@touch $@

# One thread a worker: two workers with a pool of threads each would fight over the same cores.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests

test-export: .venv/.installed-export
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/test_export*.py

demo: .venv/.installed
	$(BIN)/python -m compsrt.train

bench: .venv/.installed
	@mkdir -p $(RESULTS)
	$(BIN)/python -m pytest benchmarks --benchmark-only \
		--benchmark-json=$(RESULTS)/$$(date -u +%Y%m%dT%H%M%SZ).json

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

gpu: gpu-test gpu-bench

# Compilers take most of the time, so with pytest-xdist eight processes share the device. Where
# compute-sanitizer is at hand, it looks at one small call of every kernel.
gpu-test:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests \
		$$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8 --dist worksteal")
	@command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; exit 0; }; \
	for tool in memcheck racecheck; do \
		PYTHONPATH=. compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(PYTHON) -m pytest -q -m gpu -k "strides or borders" tests || exit 1; \
	done

gpu-bench:
	@mkdir -p $(RESULTS)
	PYTHONPATH=. $(PYTHON) -m pytest $(BENCH) --benchmark-only --benchmark-json=$(RESULTS)/gpu.json

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find compsrt tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
