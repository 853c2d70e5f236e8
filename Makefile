# Every target sets up what it needs. VENV and PYTHON may be overridden.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STARKV := $(BIN)/starkv
MODEL  ?= gui-tiny
# fp32, int8, int4, int4-awq or int4-small; the model card's choice if empty.
QUANT  ?=
# Folder with the weights of MODEL, instead of the Hugging Face cache or Hub.
CHECKPOINT ?=
# Not empty: weights of the model's true sizes are made up, to measure with.
RANDOM_WEIGHTS ?=
# auto, ort or trt.
BACKEND ?= auto
# With BACKEND=trt: TensorRT to plan for, such as 10.3, and not empty: plan only, on any machine.
TARGET  ?=
DRY_RUN ?=
# Share of a prompt's KV rows to keep, such as 0.2; all of them if empty.
BUDGET ?=
# int8 or int4: how kept rows are stored; share of the channels that low-rank rows have, such as 0.5.
KV_QUANT ?=
KV_RANK  ?=
DEVICE ?= auto
# PyTorch and Triton of the environment if it is set up, else the machine's own.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/dev-ready),$(BIN)/python,$(PYTHON))
# Checkout of the official STaR-KV repository, to measure against.
OFFICIAL ?=
PACKED := $(if $(KV_QUANT),--kv-quant '$(KV_QUANT)') $(if $(KV_RANK),--kv-rank '$(KV_RANK)')
KV     := $(if $(BUDGET),--kv-budget '$(BUDGET)') $(PACKED)
IMAGE  ?= examples/screen.png
PROMPT ?= Click the red star.
# Of `make serve`.
PORT   ?= 8080
# Through the environment, so that quotes in a prompt reach the command as they are.
export IMAGE PROMPT

# Of `make plugin`: TensorRT's directory, where to build, GPU architectures such as 80;90.
# Without them: where it is found, and all that starkv supports.
TENSORRT_ROOT ?=
BUILD_DIR     ?= build/plugin
CUDA_ARCHS    ?=
# More options of plugins_trt/CMakeLists.txt, such as -DSTARKV_FETCH_TENSORRT_HEADERS=ON.
CMAKE_OPTIONS ?=
CUDA_SOURCES = $(wildcard $(foreach end,h cpp cu cuh,plugins_trt/*/*.$(end)))
# Empty where the system's cmake and ninja serve.
NEW_CMAKE   = awk 'NR == 1 {split($$3, v, "."); exit !(v[1] + 0 > 3 || v[2] >= 24)}'
BUILD_TOOLS = $(shell cmake --version 2>&1 | $(NEW_CMAKE) && command -v ninja >/dev/null \
	|| echo $(VENV)/build-ready)

# Of `make gui-table`: questions of each task, where to, and more options of benchmarks/gui/table.py.
COUNT ?= 1000
OUT   ?= runs/gui-table
TABLE ?=

.DEFAULT_GOAL := help
.PHONY: help demo engine run chat serve bench plugin validate gui-table gpu-check trt-check test lint train clean

help:  ## Show the targets.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/run-ready: pyproject.toml
	@echo "setting up $(VENV) (a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,export]'
	@touch $@

# JetPack has TensorRT as a package of the system's Python: the environment looks there last.
TENSORRT_FOLDER = $(shell $(PYTHON) -c 'import os, tensorrt; print(os.path.dirname(tensorrt.__path__[0]))' 2>&-)
# Old ones run on new drivers, too.
CUDA_BINDINGS   = 'cuda-bindings>=12.6.1,<13' 'polygraphy>=0.49.26'
$(VENV)/trt-ready: pyproject.toml $(VENV)/run-ready
	@if [ -n '$(TENSORRT_FOLDER)' ]; then \
		echo "using TensorRT of $(TENSORRT_FOLDER)"; \
		echo '$(TENSORRT_FOLDER)' \
			> "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/tensorrt.pth"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CUDA_BINDINGS); \
	else \
		echo "adding TensorRT (gigabytes)"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,export,trt]'; \
	fi
	@touch $@

$(VENV)/dev-ready: pyproject.toml $(VENV)/run-ready
	@echo "adding PyTorch and the test tools (minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/build-ready: $(VENV)/run-ready
	@echo "adding cmake and ninja, which are missing here or too old"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'cmake>=3.24' 'ninja>=1.11'
	@touch $@

demo: $(VENV)/run-ready  ## Export, quantize, build and run the embedded model on a screenshot.
	$(STARKV) export gui-tiny --out exports/demo
	$(STARKV) build exports/demo --backend ort --out engines/demo
	$(STARKV) run --engine engines/demo --image "$$IMAGE" --prompt "$$PROMPT" --draw demo.png

engine: $(VENV)/run-ready $(if $(filter trt,$(BACKEND)),$(if $(DRY_RUN),,$(VENV)/trt-ready))
engine:  ## Build an engine: MODEL=… [QUANT=…] [KV_QUANT=int8] [BACKEND=trt [TARGET=10.3] [DRY_RUN=1]] [CHECKPOINT=folder].
	$(STARKV) build '$(MODEL)' --backend $(BACKEND) $(if $(QUANT),--quant $(QUANT)) $(PACKED) \
		$(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(if $(RANDOM_WEIGHTS),--random-weights) \
		$(if $(TARGET),--target-version '$(TARGET)') $(if $(DRY_RUN),--dry-run)

run: $(VENV)/run-ready  ## Ask an engine: [MODEL=…] [IMAGE=…] [PROMPT=…] [BUDGET=0.2].
	$(STARKV) run --engine '$(MODEL)' --image "$$IMAGE" --prompt "$$PROMPT" $(KV)

chat: $(VENV)/run-ready  ## Talk to an engine about a screenshot: [MODEL=…] [IMAGE=…] [BUDGET=0.2].
	$(STARKV) chat --engine '$(MODEL)' --image "$$IMAGE" $(KV)

$(VENV)/serve-ready: pyproject.toml $(VENV)/run-ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,export,serve]'
	@touch $@

serve: $(VENV)/serve-ready  ## Serve an engine to OpenAI's clients: [MODEL=…] [PORT=8080] [BUDGET=0.2].
	$(STARKV) serve --engine '$(MODEL)' --port '$(PORT)' $(KV)

bench: $(VENV)/run-ready  ## Measure an engine: [MODEL=…] [BUDGET=0.2].
	$(STARKV) bench --engine '$(MODEL)' $(KV)

plugin: export PATH := $(abspath $(BIN)):$(PATH)
plugin: $(BUILD_TOOLS)  ## Build CUDA kernels and TensorRT plugins: [TENSORRT_ROOT=…] [CUDA_ARCHS=…].
	@cmake -S plugins_trt -B '$(BUILD_DIR)' -G Ninja -DTENSORRT_ROOT='$(TENSORRT_ROOT)' \
		-DSTARKV_CUDA_ARCHS='$(CUDA_ARCHS)' $(CMAKE_OPTIONS)
	@cmake --build '$(BUILD_DIR)'
	@cat '$(BUILD_DIR)/summary.txt'

validate: $(VENV)/dev-ready  ## Compare all implementations of the operators: [DEVICE=auto|cpu|cuda].
	$(STARKV) validate ops --device $(DEVICE)

gui-table: $(VENV)/dev-ready  ## Every KV method and budget on synthetic tasks: [COUNT=1000] [OUT=…] [TABLE=--ablations].
	$(BIN)/python benchmarks/gui/table.py --engine '$(MODEL)' $(if $(QUANT),--quant $(QUANT)) --count $(COUNT) \
		--out '$(OUT)' $(TABLE)

gpu-check:  ## On a machine with a GPU: build, test, sanitize, compare and measure the kernels. Installs nothing.
	$(GPU_PYTHON) benchmarks/gpu_check.py $(if $(OFFICIAL),--official '$(OFFICIAL)')

# TensorRT goes into the environment only where there is a GPU to use it.
trt-check: $(VENV)/dev-ready $(if $(shell command -v nvidia-smi),$(VENV)/trt-ready)
trt-check:  ## Everything about TensorRT that this machine can prove, without a GPU, too: [ONLY=names].
	$(BIN)/python benchmarks/trt_check.py $(if $(ONLY),--only '$(ONLY)')

test: $(VENV)/dev-ready lint  ## Lint, check types, run all tests.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/dev-ready  ## Lint and check types and import directions.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

train: $(VENV)/dev-ready  ## Train gui-tiny from scratch (hours on a CPU; see models/gui-tiny/README.md).
	$(BIN)/python models/gui-tiny/train/train.py --out models/gui-tiny

clean:  ## Remove what the other targets made, but not the engines.
	rm -rf $(VENV) build dist *.egg-info exports demo.png
