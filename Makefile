# Every target makes the environment it needs. Pass variables on the command line: make train-default DATA=/data/tracking

PYTHON ?= python3
DATA ?= ../shared/data

MODEL := siamcan-mobilenetv2
VENV := .venv
BENCH_VENV := .venv-bench
PIP_INSTALL := -m pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt
PACKAGING := setup.py setup.cfg constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint train-default bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: $(VENV)/.runtime  ## follow a target in a made-up sequence with the shipped model; results in demo/
	$(VENV)/bin/siamtrack demo --out demo

test: $(VENV)/.dev  ## run the tests
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.dev  ## ruff (rules and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

train-default: $(VENV)/.dev  ## train the shipped model on DATA, export and calibrate it, put it into the package
	$(VENV)/bin/python -m training.train training/recipes/$(MODEL).yaml --data $(DATA)
	$(VENV)/bin/siamtrack-export onnx --checkpoint runs/$(MODEL)/last.ckpt --out build/$(MODEL) \
		--licence LicenseRef-research-only --images $(DATA)/train/photos
	$(VENV)/bin/python -m evaluation.calibrate build/$(MODEL) --sequences $(DATA)/train/videos --write
	mkdir -p siamtrack/models/$(MODEL)
	cp build/$(MODEL)/manifest.json build/$(MODEL)/*.onnx siamtrack/models/$(MODEL)/
	$(VENV)/bin/python -m benchmarks.accuracy --data $(DATA)/dev --model $(MODEL) --peers static --out build --record

bench: $(BENCH_VENV)/.ready  ## accuracy and speed beside OpenCV's own trackers; results in benchmarks/results/
	$(BENCH_VENV)/bin/python -m benchmarks.accuracy
	$(BENCH_VENV)/bin/python -m benchmarks.latency

clean:  ## remove the environments, builds, caches and demo/; runs/ stays
	rm -rf $(VENV) $(BENCH_VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

%/bin/python:
	$(PYTHON) -m venv $*

# The demo needs no torch, so a fresh machine downloads only the runtime for it.
$(VENV)/.runtime: $(PACKAGING) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.dev: $(PACKAGING) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[train,export,eval,test,dev]'
	touch $@ $(VENV)/.runtime

# CSRT and KCF are in opencv-contrib-python. It fills the same cv2 folder as opencv-python, so this environment takes
# one instead of the other: siamtrack without its requirements first, then those, read back and with that one replaced.
define BENCH_REQUIREMENTS
from importlib.metadata import requires
for line in requires("siamtrack"):
    name, _, marker = line.partition(";")
    if "extra" not in marker or "eval" in marker:
        print(name.replace("opencv-python", "opencv-contrib-python"))
endef
export BENCH_REQUIREMENTS

$(BENCH_VENV)/.ready: $(PACKAGING) | $(BENCH_VENV)/bin/python
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) --no-deps --editable .
	$(BENCH_VENV)/bin/python -c "$$BENCH_REQUIREMENTS" > $(BENCH_VENV)/requirements.txt
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) --no-warn-conflicts --requirement $(BENCH_VENV)/requirements.txt
	touch $@
