# Two commands: `make demo` trains a small model on real text, `make test` checks everything.
# Both build .venv first.

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest -q
# Text for users and the package: also checked against the project's own dictionary of words to avoid.
PROSE := README.md CONTRIBUTING.md CHANGELOG.md Makefile docs examples megatron_llr tools benchmarks
# Reference figures of the official LLR code, if available.
export LLR_GOLDEN_DIR ?= $(abspath $(wildcard ../shared/golden))
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-te setup lint side-by-side unit dist soak gpu clean

setup:
	@tools/bootstrap.sh

demo: setup
	@bash examples/demo.sh

test: setup lint side-by-side dist

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/shellcheck tools/*.sh examples/*.sh examples/*.sbatch examples/common/*.sh \
		examples/container/*.sbatch .ci/run
	.venv/bin/codespell
	.venv/bin/codespell --dictionary .codespell-dictionary.txt $(PROSE)

unit:
	$(PYTEST) --ignore tests/dist --ignore tests/te tests

# Tests of the command line wait for their processes half of the time, so all other tests of up to two
# ranks run in parallel with them.
side-by-side:
	@log=$$(mktemp); \
	{ $(PYTHON) tests/torchrun.py 1 && $(PYTEST) tests/unit tests/docs && \
		$(PYTHON) tests/torchrun.py 2; } >$$log 2>&1 & others=$$!; \
	$(PYTEST) --durations 25 tests/cli; cli=$$?; \
	wait $$others; status=$$?; echo "== world size 1, unit, docs, world size 2"; cat $$log; rm $$log; \
	[ $$cli -eq 0 ] && [ $$status -eq 0 ]

# One launch per world size; a test runs at the world sizes that it names. Three data-parallel replicas
# affect only where shards are cut.
dist:
	@echo "== world size 4"
	@$(PYTHON) tests/torchrun.py 4
	@for world in 3 6; do \
		echo "== world size $$world"; \
		$(PYTHON) tests/torchrun.py $$world tests/dist/test_llama.py || exit 1; \
	done

# A job that is killed at random moments and restarted; its short form is in tests/cli/test_kill.py.
SOAK_SECONDS ?= 3600
SOAK_SEED ?= 0
soak: setup
	$(PYTHON) tests/soak/soak.py --seconds $(SOAK_SECONDS) --seed $(SOAK_SEED)

# For a machine with a GPU and no network; run tools/gpu_wheels.sh first, where there is a network.
WHEELS ?= wheels
gpu:
	@tools/bootstrap_gpu.sh $(WHEELS)
	@.venv-gpu/bin/python -m benchmarks.gpu $(GPU_ARGS)

# With Transformer Engine's real classes, in a separate environment that is built once.
test-te: setup
	@tools/bootstrap_te.sh
	.venv-te/bin/python -m pytest -q tests/te

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
