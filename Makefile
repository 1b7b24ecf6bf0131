# Every target sets up $(VENV) first, which takes a second once it is there:
#   make demo        train, test and draw a small Swin Mask R-CNN and a small Swin UPerNet
#   make test        lint and the quick tests; `make test-slow` includes the slow ones
#   make lint        formatting, style, types and spelling
#   make docs        build the documentation site into site/
#   make clean       remove $(VENV)
# Options: PYTHON=python3.12, VENV=folder, JOBS=number of compilers and tests to run at once; for a new $(VENV):
# TORCH=2.8.0, another version of torch, and MMCV_WHEELS=..., see .ci/install_mmcv.py.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
TORCH ?=
export MMCV_WHEELS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt
# Each step of the set-up leaves a stamp when it succeeds, so that an interrupted set-up continues where it stopped.
DONE := $(VENV)/done

.PHONY: demo test test-slow lint docs setup clean
.DELETE_ON_ERROR:

demo: setup
	$(PY) tools/demo.py

# One process per core with one thread each; more threads than cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

test: lint
	$(PYTEST)

test-slow: lint
	$(PYTEST) -m 'slow or not slow'

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m codespell_lib

# The settings in mkdocs.yml are strict: a warning, such as a broken link, fails the build.
docs: $(DONE)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

setup: $(DONE)/all

clean:
	rm -rf $(VENV)

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or later is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

# constraints.txt; with TORCH=2.x.y, without the pins that hold for one version of torch only. torchvision 0.(x+15)
# belongs to torch 2.x.
$(VENV)/constraints.txt: $(DONE)/venv constraints.txt
	@if [ -z '$(TORCH)' ]; then cat constraints.txt; else \
	    grep -vE '^(torch|torchvision|torchao|triton)==' constraints.txt; \
	    echo 'torch==$(TORCH)'; \
	    echo "torchvision<0.$$(($(word 2,$(subst ., ,$(TORCH))) + 16))"; \
	fi > $@

$(DONE)/torch: $(VENV)/constraints.txt
	@echo 'installing torch'
	$(PIP) torch numpy setuptools wheel ninja
	@touch $@

# A wheel, or built against the torch and with the tools installed above.
$(DONE)/mmcv: $(DONE)/torch .ci/install_mmcv.py
	@MAX_JOBS=$(JOBS) $(PY) .ci/install_mmcv.py $(VENV)/mmcv_build.log -c $(VENV)/constraints.txt
	@touch $@

# opencv-python needs libGL, which machines without a display often lack. The headless build of the same version,
# installed last, replaces its files. The libraries in oracles/ are references for tests and stay out of the environment:
# torchvision's operators do not load beside another build of torch, and a library that is half usable misleads others.
# transformers, and so mmengine, would import peft and torchao at the start of every program.
$(DONE)/all: $(DONE)/mmcv setup.py pyproject.toml
	@echo 'installing mmdet, mmseg and the tools for tests'
	$(PIP) --no-build-isolation -e '.[all,dev]'
	$(PIP) -q --force-reinstall --no-deps opencv-python-headless
	$(PIP) -q --no-deps --upgrade --target $(VENV)/oracles torchvision timm onedl-mmpretrain peft accelerate psutil torchao
	$(PY) -m swin_mm.doctor
	@touch $@

$(DONE)/docs: $(DONE)/all
	@echo 'installing the documentation generator'
	$(PIP) -q mkdocs mkdocs-material 'mkdocstrings[python]'
	@touch $@
