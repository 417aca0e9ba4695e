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
	@echo "make demo     install, then the whole story on the Streets lab, about 8 minutes: output/demo/index.html"
	@echo "make test     install, lint, then the default test suite (CPU, no weights, no network)"
	@echo "make lint     ruff check, ruff format --check, mypy"
	@echo "make format   let ruff rewrite what it can"
	@echo "make bench    the scripts in benchmarks/ but the longest four and the browser, one JSON line each"
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

# The demo, for one: make demo STEPS=2000 trains longer, BASE and SHIPPED name other weights.
BASE := models/streets_base.safetensors
SHIPPED := models/control_streets.safetensors
JUDGE := models/streets_judge.safetensors
FRAMES := 600
MAPS := 60
STEPS := 300
SAMPLING := --sampler dpm++2m --steps 12 --batch_size 8
FRESH = $(DEMO)/lightning_logs/version_0/checkpoints/step=$(shell printf %06d $(STEPS)).safetensors
DEMO_PARTS := streets streets_game scene control_ini.safetensors lightning_logs fresh shipped prompts cards commands.tsv \
  index.html pictures images

# $(call step,SECTION,COMMAND) runs a command and writes it down, with the time, for that section of the page.
define step
@printf '%s\t%s\t%s\n' "$$(date +%s)" '$(strip $(1))' '$(strip $(2))' >>$(DEMO)/commands.tsv
$(strip $(2))
endef

# All of an earlier demo goes first, so that old and new never mix.
demo: install
	@mkdir -p $(DEMO) && rm -rf $(addprefix $(DEMO)/,$(DEMO_PARTS))
	$(PY) tool_doctor.py
	$(call step,data,$(PY) tool_make_streets.py --train $(FRAMES) --val $(MAPS) --out $(DEMO)/streets)
	$(call step,data,$(PY) tool_make_streets.py --domain game --train 0 --val 5 --out $(DEMO)/streets_game)
	$(call step,training,$(PY) tool_add_control.py $(BASE) $(DEMO)/control_ini.safetensors)
	$(call step,training,$(PY) tutorial_train.py --dataset streets --resume_path $(DEMO)/control_ini.safetensors \
	  --max_steps $(STEPS) --logger_freq 100 --default_root_dir $(DEMO) data.root=$(DEMO)/streets \
	  train.val_freq=25 train.val_samples=24 train.warmup=20)
	$(call step,samples,$(PY) generate.py --ckpt $(FRESH) \
	  --hint $(DEMO)/streets/gtFine/val --out $(DEMO)/fresh $(SAMPLING))
	$(call step,samples,$(PY) generate.py --ckpt $(SHIPPED) \
	  --hint $(DEMO)/streets/gtFine/val --out $(DEMO)/shipped $(SAMPLING))
	$(call step,judge,$(PY) tool_judge_streets.py --judge $(JUDGE) --images $(DEMO)/fresh \
	  --labels $(DEMO)/streets --out $(DEMO)/cards/fresh.json)
	$(call step,judge,$(PY) tool_judge_streets.py --judge $(JUDGE) --images $(DEMO)/shipped \
	  --labels $(DEMO)/streets --out $(DEMO)/cards/shipped.json)
	$(call step,prompts,for light in clear rain fog snow night; do $(PY) tool_make_streets.py --seed 3 \
	  --conditions $$light --train 0 --val 1 --out $(DEMO)/scene || exit; done)
	$(call step,prompts,$(PY) generate.py --ckpt $(SHIPPED) \
	  --hint $(DEMO)/scene/gtFine/val --out $(DEMO)/prompts $(SAMPLING))
	$(call step,page,$(PY) tool_demo_page.py $(DEMO))

# Lint comes first, so that the last line is pytest's own summary.
test: lint
	$(PY) -m pytest -n 2 --dist loadfile

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(PACKAGES)

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install
	@set -e; for script in $(sort $(filter-out %/common.py %/peers.py %/full_size.py %/fast_quality.py %/prior_loss.py %/prior_table.py %/web_page.py,$(wildcard benchmarks/*.py))); do echo "== $$script" >&2; PYTHONPATH=. $(PY) $$script; done

soak: install
	$(PY) -m pytest -m "slow or soak"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
