# Everything a contributor or CI runs, under one name each. The environment is made on first use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-slow test-oldest test-newest quality crash fuzz soak ops ops-perf ops-arm sanitize lint types docs docs-serve check bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "making $(VENV): downloads PyTorch and other libraries, compiles the engine; silent for a few minutes"
	@$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

demo: $(READY)  ## train a sparse model on real code, let it write, time it against dense ones
	$(BIN)/sparsecli train quickstart --output runs/quickstart --resume auto
	$(BIN)/sparsecli generate --model runs/quickstart --prompt "def test_" --max-new-tokens 96 --temperature 0.7 --repetition-penalty 1.15 --stats
	$(BIN)/sparsecli bench --dense --sparse

test: $(READY)  ## the default test suite: offline, a few minutes
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(READY)  ## the long tests: every shipped recipe trained and measured
	$(BIN)/python -m pytest -m slow

# Models and training with the oldest and the newest libraries that pyproject.toml allows, each in an environment of its
# own, on the engine of this one. TORCH replaces PyTorch's version: `make test-oldest TORCH=torch==2.13.0`.
VERSIONED := tests/test_model.py tests/test_encoder_decoder.py tests/test_trainers.py tests/test_transformers.py tests/test_resume.py
TORCH ?= $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/torch==\1/p' pyproject.toml)

test-oldest: $(READY)  ## the oldest allowed versions of everything
	@mkdir -p build
	$(BIN)/python -c "import tomllib; print(*(name.replace('>=', '==') for name in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] if not name.startswith('torch')), sep='\n')" > build/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet "$(TORCH)" --requirement build/oldest.txt pytest hypothesis pytest-xdist
	.venv-oldest/bin/pip install --quiet --no-deps --editable .
	.venv-oldest/bin/python -m pytest --numprocesses 2 --dist worksteal $(VERSIONED)

test-newest: $(READY)  ## the newest versions of the libraries; PyTorch's default build brings CUDA
	$(PYTHON) -m venv .venv-newest
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > build/newest.txt
	.venv-newest/bin/pip install --quiet --upgrade --requirement build/newest.txt pytest hypothesis pytest-xdist
	.venv-newest/bin/pip install --quiet --no-deps --editable .
	.venv-newest/bin/python -m pytest --numprocesses 2 --dist worksteal $(VERSIONED)

quality: $(READY)  ## quickstart, its dense twin and the dense twin with a convolution, three seeds each
	$(BIN)/python -m pytest -m slow tests/test_quality.py

# Their counts and seeds are options: make fuzz ARGS="--inputs 500 --seed 1". See docs/robustness.md.
crash: $(READY)  ## kills of training, conversion and import; full disks, closed pipes, two processes at once
	PYTHONPATH=tests $(BIN)/python -m robustness.crash $(ARGS)

fuzz: $(READY)  ## damaged and forged files, flipped bytes
	PYTHONPATH=tests $(BIN)/python -m robustness.fuzz $(ARGS)

soak: $(READY)  ## one server under load for long
	PYTHONPATH=tests $(BIN)/python -m robustness.soak $(ARGS)

NATIVE := sparsecli/decode/native
HEADERS := $(wildcard $(NATIVE)/*.h $(NATIVE)/*/*.h $(NATIVE)/*/*.inl)
OPS := $(patsubst $(NATIVE)/%.cpp,%.o,$(wildcard $(NATIVE)/ops/*.cpp) $(NATIVE)/tests/ops.cpp)
CXXFLAGS := -std=c++20 -O3 -fno-math-errno -w -pthread -I $(NATIVE)
QEMU ?= qemu-aarch64-static

# The harness of the engine's ops: each instruction set against plain twins, see $(NATIVE)/tests/ops.cpp.
ops: build/ops/harness  ## every op of every instruction set that this processor has
	$<

ops-perf: build/ops/harness  ## how fast they are
	$< perf

ops-arm: build/ops-arm/harness  ## the same for 64-bit Arm, cross-compiled, under an emulator
	$(QEMU) -cpu max $< --quick
	$(QEMU) -cpu cortex-a53 $< --quick

build/ops/harness: $(addprefix build/ops/,$(OPS))
	$(CXX) $^ -o $@ -pthread

build/ops/%.o: $(NATIVE)/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -c $< -o $@

build/ops-arm/harness: $(addprefix build/ops-arm/,$(OPS))
	aarch64-linux-gnu-g++ -static $^ -o $@ -pthread

build/ops-arm/%.o: $(NATIVE)/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	aarch64-linux-gnu-g++ $(CXXFLAGS) -c $< -o $@

# Undefined behaviour ends the process at once; Python's own leaks are none of ours. `--jobs 2` halves the build.
SANITIZED := build/sanitized/_native.so
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer

sanitize: $(READY) $(SANITIZED) build/sanitized/harness  ## ops and engine under address and undefined-behaviour sanitizers (g++)
	build/sanitized/harness --quick
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 SPARSECLI_NATIVE_LIBRARY=$(SANITIZED) SPARSECLI_TESTED_SETS=1 \
	$(BIN)/python -m pytest -s -k "not (equal_the_twin and terraformer)" tests/test_kernels.py tests/test_quantized_models.py tests/test_gguf.py tests/test_decode.py tests/test_decode_windows.py tests/test_decode_source.py tests/test_decode_hashed.py tests/test_packing.py

$(SANITIZED): $(patsubst $(NATIVE)/%.cpp,build/sanitized/%.o,$(wildcard $(NATIVE)/*.cpp $(NATIVE)/*/*.cpp))
	$(CXX) -shared $(SANITIZERS) $(filter-out %tests/ops.o,$^) -o $@ -pthread

build/sanitized/harness: $(addprefix build/sanitized/,$(OPS))
	$(CXX) $(SANITIZERS) $^ -o $@ -pthread

build/sanitized/%.o: $(NATIVE)/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -g -O1 -w -fPIC -pthread -I $(NATIVE) $(SANITIZERS) -c $< -o $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files "*.h" "*.cpp" "*.inl")

types: $(READY)
	$(BIN)/mypy

docs: $(READY)  ## the documentation as a site in build/site; a broken link or a missing page is an error (with --quiet it is not)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-serve: $(READY)  ## the same at http://127.0.0.1:8000, built again at every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

check: lint types test

bench: $(READY)
	$(BIN)/sparsecli bench --dense --sparse

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
