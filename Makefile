# Every target makes the environment it needs. Pass variables on the command line: make train-default DATA=/data/tracking

PYTHON ?= python3
DATA ?= ../shared/data

MODEL := siamcan-mobilenetv2
VENV := .venv
BENCH_VENV := .venv-bench
ROS_VENV := .venv-ros
ROS_PIP_INSTALL := -m pip --disable-pip-version-check --no-input install --quiet
PIP_INSTALL := $(ROS_PIP_INSTALL) --constraint constraints.txt
PACKAGING := setup.py setup.cfg constraints.txt

# Where ROS comes from: an installation whose setup file is sourced, the wheels of the [ros] extra, or nowhere.
ROS = $(shell $(PYTHON) -c 'import sys; from importlib.util import find_spec; print("sourced" if find_spec("rclpy") else \
  "wheels" if sys.version_info[:2] == (3, 11) and sys.platform == "linux" else "none")')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-sourced demo-wheels demo-none test test-sourced test-wheels test-none lint train-default bench \
  gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo:  ## follow a target in a made-up clip, over ROS 2 topics where that can be had; results in demo/
	@$(MAKE) --no-print-directory demo-$(ROS)

demo-sourced: $(ROS_VENV)/.ready
	$(ROS_VENV)/bin/python -m ros2_siamtrack.demo --out demo

demo-wheels: $(VENV)/.ros
	$(VENV)/bin/siamtrack-ros-demo --out demo

demo-none: $(VENV)/.runtime
	@echo "without ROS: none is sourced (source /opt/ros/DISTRO/setup.bash), and its wheels need CPython 3.11 on Linux"
	$(VENV)/bin/siamtrack demo --out demo

test:  ## run the tests, those of the ROS nodes where ROS is sourced or the wheels fit
	@$(MAKE) --no-print-directory test-$(ROS)

# A sourced ROS is on PYTHONPATH, compiled for the system's own NumPy: it would break in the other environment. Its
# launch_testing is a pytest plugin that pytest 9.1 and later refuse.
test-sourced: $(VENV)/.dev $(ROS_VENV)/.ready
	env --unset PYTHONPATH $(VENV)/bin/python -m pytest --ignore tests/ros
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(ROS_VENV)/bin/python -m pytest tests/ros

test-wheels test-none: $(VENV)/.dev
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.dev  ## ruff (rules and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

train-default: $(VENV)/.dev  ## train the shipped model on DATA, export and calibrate it, put it into the package
	$(VENV)/bin/python -m training.train training/recipes/$(MODEL).yaml --data $(DATA)
	$(VENV)/bin/python -m training.average runs/$(MODEL)/frozen.ckpt runs/$(MODEL)/last.ckpt --out runs/$(MODEL)/mean.ckpt
	$(VENV)/bin/python -m training.train training/recipes/$(MODEL)-head.yaml --data $(DATA)
	$(VENV)/bin/siamtrack-export onnx --checkpoint runs/$(MODEL)-head/last.ckpt --out build/$(MODEL) \
		--licence LicenseRef-research-only --images $(DATA)/train/photos \
		--note 'command=make train-default' --note 'data=see README.md beside this file'
	$(VENV)/bin/python -m evaluation.calibrate build/$(MODEL) --sequences $(DATA)/train/videos --write
	$(VENV)/bin/python -m evaluation.tune build/$(MODEL) --sequences $(DATA)/dev --validation $(DATA)/train/videos \
		--trials 40 --processes 2 --write
	$(VENV)/bin/python -m evaluation.calibrate build/$(MODEL) --sequences $(DATA)/train/videos --write
	$(VENV)/bin/siamtrack-export precision build/$(MODEL) --precision int8 --add --calibration-images $(DATA)/train/photos
	mkdir -p siamtrack/models/$(MODEL)
	cp build/$(MODEL)/manifest.json build/$(MODEL)/*.onnx siamtrack/models/$(MODEL)/
	$(VENV)/bin/python -m benchmarks.accuracy --data $(DATA)/dev --model $(MODEL) --peers static --out build --record

bench: $(BENCH_VENV)/.ready  ## accuracy and speed beside OpenCV's own trackers; results in benchmarks/results/
	$(BENCH_VENV)/bin/python -m benchmarks.accuracy --data $(DATA)/dev --record
	$(BENCH_VENV)/bin/python -m benchmarks.latency
	$(BENCH_VENV)/bin/python -m benchmarks.footprint
	$(BENCH_VENV)/bin/python -m benchmarks.evaluation_speed --data $(DATA)/dev

# No environment of its own: a machine with a GPU has PyTorch and CUDA as its owner wants them. What is missing comes from
# wheels in a folder, without internet.
WHEELS ?= wheels
SEQUENCES ?=
ARGUMENTS ?=

gpu-check:  ## all that only a GPU can show, as a table; WHEELS=folder, SEQUENCES="real ones", ARGUMENTS=further ones
	$(PYTHON) benchmarks/gpu_setup.py --wheels $(WHEELS) $(if $(SEQUENCES),--sequence $(SEQUENCES)) $(ARGUMENTS)

clean:  ## remove the environments, builds, caches and demo/; runs/ stays
	rm -rf $(VENV) $(BENCH_VENV) $(ROS_VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

%/bin/python:
	$(PYTHON) -m venv $*

# The demo needs no torch, so a fresh machine downloads only the runtime for it.
$(VENV)/.runtime: $(PACKAGING) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.ros: $(PACKAGING) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[ros]'
	touch $@ $(VENV)/.runtime

$(VENV)/.dev: $(PACKAGING) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[train,export,engines,eval,ros,test,dev]'
	touch $@ $(VENV)/.runtime $(VENV)/.ros

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

# Beside a sourced ROS: the system's packages count, and NumPy stays at 1.x, which Humble, Jazzy and Kilted are compiled
# for; hence none of the pins, and the last OpenCV wheel that takes such a NumPy where the system has no OpenCV.
$(ROS_VENV)/.ready: $(PACKAGING)
	$(PYTHON) -m venv --system-site-packages $(ROS_VENV)
	$(ROS_VENV)/bin/python -c "import cv2" 2>/dev/null || $(ROS_VENV)/bin/python $(ROS_PIP_INSTALL) 'opencv-python<4.12' 'numpy>=1.23,<2'
	$(ROS_VENV)/bin/python $(ROS_PIP_INSTALL) 'numpy>=1.23,<2' 'onnxruntime>=1.17' 'pyyaml>=6' 'tqdm>=4.65' 'pytest>=8,<10'
	$(ROS_VENV)/bin/python $(ROS_PIP_INSTALL) --no-deps --editable .
	touch $@
