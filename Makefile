PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint bench figures clean

demo: $(VENV)/.examples  ## train two networks on real MNIST images, quantize them, say where to look
	$(BIN)/python examples/01_callback.py

test: $(VENV)/.dev  ## every test and every documented example
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev $(VENV)/.bench  ## accuracy of a quantized ResNet-20, cost of curvature; needs the data folder that benchmarks/ptq.py describes
	$(BIN)/python benchmarks/ptq.py --model resnet20 --avg-bits 3 2.5 2.25
	$(BIN)/python benchmarks/curvature.py

figures: $(VENV)/.dev  ## pictures of the documentation, from real runs; needs the data folder too
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/gallery.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A stamp a set of extras: installed once, and again when pyproject.toml changes.
$(VENV)/.examples: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[examples]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	touch $@

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) demo_logs
