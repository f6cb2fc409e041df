# Every target does its own set-up, in .venv/, the first time and whenever the dependencies changed.
#   PYTHON=python3.12     the Python to build .venv from
#   TORCH=torch==2.12.0   a certain torch instead of the rule in .ci/setup_venv.py
#   PYTEST_ARGS="-k mask" anything for pytest
PYTHON ?= python3
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
BENCH_ARGS ?=
SANITIZE_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PYTHON_CODE := .ci benchmarks common examples flash2 flash_attn flash_attn_2_cuda.py flash_attn_interface hopper tests setup.py
DEVICE_CODE = $(shell find common flash2 hopper \( -name build -o -name _prebuilt \) -prune -o \( -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' \) -print)
# What decides whether .venv is up to date. Sources do not: the installation is editable.
SETUP_INPUTS := setup.py pyproject.toml .ci/setup_venv.py
ifdef TORCH
export TORCH
endif

.DEFAULT_GOAL := help
.PHONY: help demo test compile-check lint typecheck format docs wheels bench bench-backward bench-decode bench-features bench-host bench-context-parallel sanitize clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24

demo: $(VENV)/.ready  ## report this machine, self-check, and attention with head dims (64, 128)
	@$(RUN) -m flash_attn_interface
	@$(RUN) examples/demo.py

# One thread per worker: the tests' tensors are small, and the simulator brings its own workers.
test: $(VENV)/.ready  ## all tests that this machine can run; those for a GPU are skipped without one
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

compile-check: $(VENV)/.ready  ## the compile tests, also those too long for `make test` (minutes)
	$(RUN) -m pytest -n $(PYTEST_WORKERS) -m "slow or not slow" $(wildcard tests/test_compile*.py) $(PYTEST_ARGS)

lint: $(VENV)/.ready-lint typecheck  ## ruff, clang-format and mypy, without changing anything
	$(RUN) -m ruff check $(PYTHON_CODE)
	$(RUN) -m ruff format --check $(PYTHON_CODE)
	$(VENV)/bin/clang-format --dry-run --Werror $(DEVICE_CODE)

# mypy is shown the packages under the names that they are imported by once installed.
typecheck: $(VENV)/.ready-lint  ## mypy, strict
	@rm -rf build/site && mkdir -p build/site/flash_attn_interface
	@for file in flash_attn_interface/*; do ln -s "$(CURDIR)/$$file" build/site/flash_attn_interface/; done
	@ln -s "$(CURDIR)/common" build/site/flash_attn_interface/_common
	@ln -s "$(CURDIR)/flash2" build/site/flash_attn_interface/_flash2
	@ln -s "$(CURDIR)/flash_attn" build/site/flash_attn
	@ln -s "$(CURDIR)/flash_attn_2_cuda.py" build/site/
	cd build && $(CURDIR)/$(RUN) -m mypy --config-file ../pyproject.toml -p flash_attn_interface -p flash_attn -m flash_attn_2_cuda

format: $(VENV)/.ready-lint  ## rewrite the sources as `make lint` wants them
	$(RUN) -m ruff check --fix $(PYTHON_CODE)
	$(RUN) -m ruff format $(PYTHON_CODE)
	$(VENV)/bin/clang-format -i $(DEVICE_CODE)

# Without a network; a warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/.ready-docs  ## the documentation site, in build/docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Several minutes on two CPUs the first time. TORCH names the torch of the bare environment.
wheels: $(VENV)/.ready  ## both wheels with the listed kernels, in dist/, tried in a bare environment
	$(RUN) .ci/make_wheels.py dist

bench: $(VENV)/.ready-bench  ## forward benchmark beside its peers; needs a GPU
	$(RUN) benchmarks/bench_forward.py $(BENCH_ARGS)

bench-backward: $(VENV)/.ready-bench  ## backward benchmark beside its peers; needs a GPU
	$(RUN) benchmarks/bench_backward.py $(BENCH_ARGS)

bench-decode: $(VENV)/.ready-bench  ## decoding benchmark beside its peers; needs a GPU
	$(RUN) benchmarks/bench_decode.py $(BENCH_ARGS)

bench-features: $(VENV)/.ready-bench  ## what masks, grouped heads, packing and odd head dims cost; needs a GPU
	$(RUN) benchmarks/bench_forward.py --features $(BENCH_ARGS)

bench-host: $(VENV)/.ready  ## host time per call, compile and start-up time; needs a GPU
	$(RUN) benchmarks/bench_host_overhead.py $(BENCH_ARGS)

bench-context-parallel: $(VENV)/.ready-bench  ## efficiency of context parallelism; needs two GPUs or more
	$(RUN) benchmarks/bench_context_parallel.py $(BENCH_ARGS)

sanitize: $(VENV)/.ready  ## compute-sanitizer over all kernels; needs a GPU and a CUDA toolkit's compute-sanitizer
	$(RUN) tests/sanitize.py $(SANITIZE_ARGS)

clean:  ## remove .venv, build results and tool caches; the per-user kernel cache is left alone
	rm -rf $(VENV) build dist *.egg-info hopper/build hopper/*.egg-info */_prebuilt .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: $(SETUP_INPUTS)
	@$(PYTHON) .ci/setup_venv.py $(VENV) test
	@touch $@

$(VENV)/.ready-lint: $(VENV)/.ready
	@$(PYTHON) .ci/setup_venv.py $(VENV) lint
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@$(PYTHON) .ci/setup_venv.py $(VENV) docs
	@touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	@$(PYTHON) .ci/setup_venv.py $(VENV) bench
	@touch $@
