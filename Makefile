# Everything sets itself up in $(VENV) first, which is quick when it is there already:
#   make demo        train, test and draw a small Swin Mask R-CNN and a small Swin UPerNet
#   make test        format, lint and the quick tests; `make test-slow` runs the slow ones too
#   make lint        format and lint only
#   make clean       remove $(VENV)
# Choose with PYTHON=python3.12, VENV=folder, JOBS=number of compilers and tests at once.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
# Each step leaves a stamp when it has succeeded, so that a failed or interrupted set-up goes on where it stopped.
DONE := $(VENV)/done

.PHONY: demo test test-slow lint setup clean
.DELETE_ON_ERROR:

demo: setup
	$(PY) tools/demo.py

# One process per core, with one thread each: more threads than cores hinder each other.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

test: lint
	$(PYTEST)

test-slow: lint
	$(PYTEST) -m 'slow or not slow'

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

setup: $(DONE)/all

clean:
	rm -rf $(VENV)

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or later is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/torch: $(DONE)/venv constraints.txt
	@echo 'installing torch'
	$(PIP) torch numpy setuptools wheel ninja
	@touch $@

# torch and the tools to compile must be there before: mmcv builds against them.
$(DONE)/mmcv: $(DONE)/torch .ci/install_mmcv.py
	@MAX_JOBS=$(JOBS) $(PY) .ci/install_mmcv.py $(VENV)/mmcv_build.log -c constraints.txt
	@touch $@

# opencv-python needs libGL, which machines without a display lack; the headless build of the same version, installed
# last, takes its place. The libraries in oracles/ are references for tests and stay out of the environment: torchvision's
# operators do not load beside another build of torch, and half of a library misleads the others (see tests/zoo.py).
$(DONE)/all: $(DONE)/mmcv setup.py pyproject.toml
	@echo 'installing mmdet, mmseg and the tools for tests'
	$(PIP) --no-build-isolation -e '.[all,dev]'
	$(PIP) -q --force-reinstall --no-deps opencv-python-headless
	$(PIP) -q --no-deps --upgrade --target $(VENV)/oracles torchvision timm onedl-mmpretrain
	$(PY) -m swin_mm.doctor
	@touch $@
