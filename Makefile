# Each target sets up what it needs. Only a package registry is used.
#
#   make demo                     the main job on the embedded corpus   (SEEDS=3, CORPUS=path.jsonl, OUT=folder)
#   make test                     the tests, in three processes   (JOBS=8)
#   make long                     tests that take minutes: kill -9 of runs and of one of two ranks, compiled FSDP, HSDP
#   make check                    ruff, formatting, mypy
#   make fullsize                 two steps of SmolLM-360M on the CPU against the plan: 12 GB of memory, a few minutes
#   make releasesize              time and memory of drop_sinks and export_hf at 1.7B: 13 GB of disk, a few minutes
#   make bench                    speed against stock LitGPT, side by side: training, then preparing data (CORPUS=folder)

PYTHON ?= python3
VENV ?= .venv
SEEDS ?= 1
CORPUS ?=
JOBS ?= 3
OUT ?= runs/demo$(if $(CORPUS),-$(basename $(notdir $(CORPUS))))

.PHONY: setup demo test long check bench fullsize releasesize clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e ".[test]"
	touch $@

demo: setup
	$(VENV)/bin/litgpt-memsinks demo --seeds $(SEEDS) --out_dir $(OUT) $(if $(CORPUS),--corpus $(CORPUS))

test: setup
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

long: setup
	$(VENV)/bin/python -m pytest -m long -n $(JOBS) --dist loadfile

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup
	KINETO_LOG_LEVEL=99 $(VENV)/bin/litgpt-memsinks bench  # PyTorch's profiler says nothing of itself
	$(VENV)/bin/litgpt-memsinks bench_data $(if $(CORPUS),--corpus $(CORPUS))

fullsize: setup
	$(VENV)/bin/litgpt-memsinks full_size

releasesize: setup
	$(VENV)/bin/litgpt-memsinks release_size

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
