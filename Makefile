PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: demo test test-oldest test-browser lint bench figures clean

demo: $(VENV)/.examples  ## train two networks on real MNIST images, quantize them, say where to look
	$(BIN)/python examples/01_callback.py

test: $(VENV)/.dev  ## every test and every documented example
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-browser: $(VENV)/.browser  ## TensorBoard and report.html in a headless Chromium; screenshots go to build/screenshots
	$(BIN)/python -m pytest tests/browser -rs

test-oldest: $(OLDEST)/.done  ## what touches Lightning, under the oldest versions that are supported, in an environment of its own
	$(OLDEST)/bin/python -m pytest tests/integration tests/bridge tests/test_options.py $(wildcard tests/test_callback*.py) \
		tests/utilities/test_isolation.py tests/utilities/test_keywords.py

lint: $(VENV)/.dev  ## style, spelling, the direction of imports, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.dev $(VENV)/.bench  ## accuracy of a quantized ResNet-20, cost of curvature; needs the data folder that benchmarks/results.py takes with --data
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/curvature.py

figures: $(VENV)/.dev  ## pictures of the documentation, from real runs; those of docs/ need the data folder too
	$(BIN)/python examples/01_callback.py --network cnn --log-dir build/demo
	$(BIN)/python docs/scripts/demo_pictures.py build/demo
	$(BIN)/python docs/scripts/figures.py
	$(BIN)/python docs/scripts/gallery_resnet20.py build/gallery/resnet20
	$(BIN)/python docs/scripts/gallery.py build/demo build/gallery/resnet20

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

# Debian's Chromium, else the one that Playwright downloads; without either the tests are skipped and say so.
$(VENV)/.browser: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[browser]"
	command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| { apt-get update && apt-get install --yes --no-install-recommends chromium; } \
		|| $(BIN)/playwright install chromium \
		|| echo "No Chromium can be installed here: install one and run this again."
	touch $@

$(OLDEST)/.done: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -e . "pytest>=8" lightning==2.5.0 pytorch-lightning==2.5.0 torch==2.4.0 torchvision==0.19.0 torchmetrics==1.4.0 "jsonargparse[signatures]==4.35.0" mlxtend
	touch $@

clean:  ## remove the environments and what the demo wrote
	rm -rf $(VENV) $(OLDEST) demo_logs
