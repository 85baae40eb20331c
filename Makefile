# make demo    train, index, evaluate and serve: on drawn pictures, or on your own with DATA=folder
# make test    every contract, small counts
# Everything else: make help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Which torch build to install: empty = the registry's default; cpu or auto where uv can choose one.
TORCH  ?=
DATA   ?=
OUT    ?=
SERVE  ?= 1
PORT   ?= 8000
EXTRAS := train,cpu,serve,dev

.DEFAULT_GOAL := help
.PHONY: help env demo test test-long soak lint format types licences lock openapi benchmarks clean

help:
	@echo "make demo [DATA=folder] [SERVE=0] [PORT=8000] [OUT=folder]   from pictures to a search page"
	@echo "make test          every contract, small counts (minutes)"
	@echo "make test-long     the same tests with large counts"
	@echo "make soak          the same tests with very large counts (hours)"
	@echo "make lint types licences   what CI checks besides the tests"
	@echo "make env [TORCH=cpu|auto]  only the environment in $(VENV)"
	@echo "make openapi       renew docs/openapi.json"
	@echo "make benchmarks    renew docs/benchmarks.md from the result files"
	@echo "make lock          renew requirements.txt and docker/requirements-*.txt"

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing. Install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv)." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make env PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: Python's venv module is missing (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
ifeq ($(strip $(TORCH)),)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
else
	$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend $(TORCH) -e ".[$(EXTRAS)]"
endif
	@touch $@

demo: env
	$(BIN)/dml demo $(if $(DATA),"$(DATA)") $(if $(OUT),--out "$(OUT)") --port $(PORT) $(if $(filter 0 no false,$(SERVE)),--no-serve)

test: env
	DML_TEST_SCALE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-long: env
	DML_TEST_SCALE=10 $(BIN)/python -m pytest -n 2 --dist loadfile

soak: env
	DML_TEST_SCALE=200 $(BIN)/python -m pytest --timeout 7200

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: env
	$(BIN)/pyright

licences: env
	$(BIN)/python -m tests.licences

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links

lock:
	$(LOCK) --extra train --extra cpu --extra serve --extra dev -o requirements.txt pyproject.toml
	$(LOCK) --constraint requirements.txt --extra cpu --extra serve -o docker/requirements-serve.txt pyproject.toml
	$(LOCK) --constraint requirements.txt --extra cpu --extra serve --extra milvus \
	  -o docker/requirements-milvus.txt pyproject.toml
	echo 'faiss-gpu>=1.9,<2' | $(LOCK) --constraint requirements.txt -o docker/requirements-gpu.txt -

openapi: env
	$(BIN)/python -m service.openapi > docs/openapi.json

benchmarks: env
	$(BIN)/dml bench compare --write docs/benchmarks.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
