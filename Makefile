# Two commands for a newcomer: `make demo` and `make test`. Each makes the environment first when it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of torch, where the index has one, spares gigabytes of CUDA libraries.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test gpu-test check format clean triton-releases sanitize

$(VENV)/.package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed: $(VENV)/.package
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

# The package alone: the tools of development take as long again to install.
demo: $(VENV)/.package
	$(BIN)/statespan demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --durations=15

# The tests that run on a GPU, on a machine with one: the slowest first, one after another to whoever is free, but for
# those that take much of its memory; see tests/conftest.py.
GPU_TEST_PROCESSES ?= 16
gpu-test: $(VENV)/.installed
	$(BIN)/python -m pytest --gpu -n $(GPU_TEST_PROCESSES) --maxschedchunk 1 --durations=15

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

# Compiles every Triton kernel with every release that is supported: an environment of its own for each, over the main one.
TRITON_RELEASES ?= 3.6.0 3.7.0 3.7.1 3.8.0 3.9.0
build/triton/%/.installed: $(VENV)/.installed
	$(BIN)/python -m venv build/triton/$*
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(build/triton/$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth
	build/triton/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==$*
	touch $@

triton-releases: $(TRITON_RELEASES:%=build/triton/%/.installed)
	for release in $(TRITON_RELEASES); do \
		echo "Triton $$release"; \
		PYTHONPATH=src build/triton/$$release/bin/python -m pytest -n auto tests/ops/test_triton_kernels.py -k compiles || exit 1; \
	done

# Every GPU kernel at tiny shapes under NVIDIA's checkers; compute-sanitizer comes with the CUDA toolkit. The first run
# compiles.
SANITIZER ?= compute-sanitizer
sanitize: $(VENV)/.installed
	$(BIN)/python tests/ops/sanitize.py
	$(SANITIZER) --tool memcheck --report-api-errors no --error-exitcode 1 $(BIN)/python tests/ops/sanitize.py
	$(SANITIZER) --tool racecheck --error-exitcode 1 $(BIN)/python tests/ops/sanitize.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
