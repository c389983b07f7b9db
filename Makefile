# Everything lives in .venv and target/; the second run of a target is quick.
PYTHON ?= python3
ARGS ?=
# All tests run in a process per core, of up to 2 GB each; those of ARGS in one.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
# Threads that wait for work leave the cores to the others.
test test-emulated: export OMP_WAIT_POLICY ?= passive
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
CUDA := $(VENV)/cuda
CUDA_PINS := $(shell sed -En 's/.*"(nvidia-[a-z-]+==[0-9.]+).*/\1/p' pyproject.toml)
KERNELS := $(shell find cuda -name '*.cu' -o -name '*.cuh')
RUST := Cargo.toml Cargo.lock $(shell find crates -name target -prune -o \( -name '*.rs' -o -name Cargo.toml \) -print)

ifndef FASTMOE_NVCC_ROOT
export FASTMOE_NVCC_ROOT := $(abspath $(CUDA)/nvidia/cu13)
TOOLCHAIN := $(CUDA)/.setup
endif
ifneq ($(FASTMOE_CUDA_ARCHS)$(shell command -v nvidia-smi),)
GPU_BUILD := $(TOOLCHAIN) $(KERNELS)
endif

.DEFAULT_GOAL := help
.PHONY: help setup develop demo test test-emulated emulated emulate emulate-bugs emulate-asan wheel kernels kernel-table toolchain pins bench bench-host bench-gpu test-gpu session-gpu lint lint-rust lint-python clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.setup ## Create .venv with the build tools

develop: $(VENV)/.develop ## Build the native module and install the package with its extras, editable

demo: develop ## Train a small Mixture-of-Experts language model (ARGS="--steps 50" is passed on)
	$(BIN)/python -m fastmoe_rs demo $(ARGS)

test: develop ## Run the Python and the Rust tests (ARGS goes to pytest)
	$(BIN)/python -m pytest $(or $(ARGS),$(PARALLEL))
	cargo test --workspace --quiet

# A copy of the package whose native module sends CPU tensors to the emulator of a GPU; no wheel has such a module.
EMULATED := $(abspath target/emulated)
EMULATED_KERNELS := $(abspath target/emulator/plain/libkernels.so)

# Left out: programs that take minutes in an emulator, and what launches no kernel or looks at those of the CPU alone.
PROGRAMS := bench demo docs examples gpu_bench gpu_programs training_guide
NO_KERNELS := cuda_instructions cuda_layouts cuda_machine_code cuda_sources docstrings doctor explain isa packaging params reference
EMULATED_TESTS := $(filter-out $(patsubst %,tests/test_%.py,$(PROGRAMS) $(NO_KERNELS)),$(wildcard tests/test_*.py))

test-emulated: develop emulated ## Run the Python tests with CPU tensors sent through the CUDA path (ARGS goes to pytest)
	FASTMOE_BACKEND=emulator FASTMOE_EMULATOR=$(EMULATED_KERNELS) FASTMOE_CHECK=1 PYTHONPATH=$(EMULATED)/python \
		$(BIN)/python -m pytest $(or $(ARGS),$(EMULATED_TESTS) $(PARALLEL))

emulated:
	FASTMOE_SKIP_CUDA=1 cargo build --profile emulated --locked --package fastmoe-py --features emulator
	$(MAKE) -C cuda/tests -j2 $(EMULATED_KERNELS)
	rm -rf $(EMULATED)/python
	cp -rs $(abspath python) $(EMULATED)/python
	ln -sf $(EMULATED)/lib_native.so $(EMULATED)/python/fastmoe_rs/_native.abi3.so

emulate: ## Run the CUDA kernels on the CPU, every access checked (RUNS=50: more schedules per test)
	$(MAKE) -C cuda/tests -j2 run

emulate-bugs: ## Seed bugs into the kernels, one at a time, and see that each is noticed
	$(MAKE) -C cuda/tests -j2 bugs

emulate-asan: ## make emulate under AddressSanitizer and UndefinedBehaviorSanitizer
	$(MAKE) -C cuda/tests -j2 run VARIANT=asan

kernels: $(TOOLCHAIN) ## Compile the CUDA kernels for every architecture, a GPU is not needed
	FASTMOE_CUDA_ARCHS=all cargo build --release --locked --package fastmoe-kernels

kernel-table: kernels develop ## Write docs/kernels.md: registers, occupancy and main loops of the compiled kernels
	$(BIN)/python cuda/tools/kernel_table.py

toolchain: $(CUDA)/.setup ## Install nvcc and a disassembler into .venv/cuda

pins:
	@echo $(CUDA_PINS)

wheel: setup $(TOOLCHAIN) ## Build the release wheel into dist/
	rm -rf dist
	$(BIN)/maturin build --release --locked --out dist

bench: develop ## Time against torch and transformers and fill in the README (ARGS="--quick" is shorter)
	$(BIN)/python bench/run.py $(ARGS)
	$(BIN)/python bench/report.py

test-gpu: develop ## Run the tests that need a GPU (ARGS="--device cpu --quick" checks the tests themselves)
	$(BIN)/python -m pytest tests/gpu $(ARGS)

bench-gpu: develop ## Time against torch and other projects on a GPU, for at most 9 minutes
	$(BIN)/python bench/gpu/run.py $(ARGS)

session-gpu: develop ## All that a GPU can tell in 560 seconds, into out/session (ARGS="--seconds 300" is shorter)
	$(BIN)/python tests/gpu/session.py $(ARGS)

bench-host: develop ## Time what a call of the CUDA path costs on the host
	FASTMOE_SKIP_CUDA=1 cargo build --release --locked --package fastmoe-py --features emulator --target-dir target/host
	$(MAKE) -C cuda/tests -j2 $(abspath target/emulator/plain/libkernels.so)
	rm -rf target/host/python && cp -r python target/host/python
	cp target/host/release/lib_native.so target/host/python/fastmoe_rs/_native.abi3.so
	$(BIN)/python bench/host_overhead.py $(ARGS)

lint: lint-rust lint-python ## Formatting, clippy, rustdoc, ruff, mypy and the check of the native stubs

lint-rust: develop
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked --quiet

lint-python: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest fastmoe_rs._native

clean: ## Remove everything that was built, .venv included
	rm -rf $(VENV) target dist out .benchmarks .pytest_cache .mypy_cache .ruff_cache
	rm -f python/fastmoe_rs/_native*.so

$(VENV)/.setup: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@command -v cargo >/dev/null || { echo "Rust is needed: https://rustup.rs" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install 'maturin>=1.9,<2'
	touch $@

# A folder of its own, as torch pins other versions of the same packages.
$(CUDA)/.setup: $(VENV)/.setup
	$(PIP) install --no-deps --upgrade --target $(CUDA) $(CUDA_PINS)
	touch $@

# Development builds have the kernels for the GPUs of this machine.
develop demo test test-gpu bench bench-gpu session-gpu lint-rust lint-python: export FASTMOE_CUDA_ARCHS ?= native
$(VENV)/.develop: $(VENV)/.setup $(RUST) $(GPU_BUILD)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --locked --extras demo,bench,dev
	touch $@
