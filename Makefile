# Every target does its own set-up: the first one on a fresh machine makes .venv and installs into it (some
# minutes, about 6 GB). `make PYTHON=python3.12 install` chooses the Python; `make VENV=dir install` the folder.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
REQUIREMENTS := requirements.txt requirements-dev.txt
DEMO := output/demo
PACKAGES := $(wildcard cldm ldm datasets metrics webui)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench soak clean

help:
	@echo "make install  make $(VENV) and install everything (repeated only when a requirements file changes)"
	@echo "make demo     install, then render, train and sample for a minute with a random miniature"
	@echo "make test     install, lint, then the default test suite (CPU, no weights, no network)"
	@echo "make lint     ruff check, ruff format --check, mypy"
	@echo "make format   let ruff rewrite what it can"
	@echo "make bench    the scripts in benchmarks/, one JSON line each"
	@echo "make soak     the long tests: whole trainings and full sample counts"
	@echo "make clean    remove $(VENV) and the tools' caches"

install: $(STAMP)

$(PY):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found; install Python 3.10 or newer, or name yours: make PYTHON=python3.12 install" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), but 3.10 or newer is needed; name one: make PYTHON=python3.12 install" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  rm -rf $(VENV); exit 1; }

$(STAMP): $(REQUIREMENTS) | $(PY)
	$(PY) -m pip install --disable-pip-version-check $(REQUIREMENTS:%=-r %)
	@touch $@

# Random weights, as none are shipped yet: what it shows is that rendering, training and sampling run here.
demo: install
	$(PY) tool_doctor.py
	$(PY) tool_make_streets.py --train 64 --val 8 --out $(DEMO)/streets
	$(PY) tutorial_train.py --dataset streets --resume_path random --max_steps 20 --logger_freq 10 \
	  --default_root_dir $(DEMO) data.root=$(DEMO)/streets sample.steps=5
	$(PY) generate.py --ckpt "$$(ls -t $(DEMO)/lightning_logs/*/checkpoints/*.safetensors | head -1)" \
	  --hint $(DEMO)/streets/gtFine/val --out $(DEMO)/images --overwrite
	@echo "look at $(DEMO)/images/contact_sheet_001.png and $(DEMO)/lightning_logs/*/image_log"

# Lint comes first, so that the last line is pytest's own summary.
test: lint
	$(PY) -m pytest

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(PACKAGES)

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install
	@set -e; for script in $(sort $(filter-out %/common.py %/peers.py %/full_size.py,$(wildcard benchmarks/*.py))); do echo "== $$script" >&2; PYTHONPATH=. $(PY) $$script; done

soak: install
	$(PY) -m pytest -m "slow or soak"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
