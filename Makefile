# make audit   set up, train the default network on real digits, audit it, print where the report is
# make test    set up and run the tests
# make check   all that CI checks: lint, types, tests, docs, and the built wheel in a clean place
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=

.PHONY: audit test check lint types docs wheel results test-aihwkit test-zoo clean

audit: $(VENV)/.ready
	$(BIN)/evenkeel audit --out audit $(ARGS)

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest $(ARGS)

check: lint types test docs wheel

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-test
	$(BIN)/mypy

docs: $(VENV)/.ready-docs
	$(BIN)/zensical build --clean --strict

# The wheel as a user gets it: installed from the file, run from another folder.
wheel: $(VENV)/.ready-test
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[demo]"
	cd dist && ../$(VENV)-wheel/bin/evenkeel audit --out wheel-audit --device gaussian:0.1 --chips 2 --remedy none,calibrate
	rm -rf $(VENV)-wheel dist/wheel-audit

# A network converted by IBM's aihwkit, calibrated by evenkeel; in an environment of its own, as
# aihwkit's wheel must be installed without what it declares to need.
test-aihwkit: $(VENV)-aihwkit/.ready
	$(VENV)-aihwkit/bin/python -m pytest --confcutdir=tests_aihwkit tests_aihwkit $(ARGS)

$(VENV)-aihwkit/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-aihwkit
	$(VENV)-aihwkit/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]" pytest pytest-timeout
	$(VENV)-aihwkit/bin/python -m pip install --quiet --disable-pip-version-check --no-deps aihwkit==1.1.0 tqdm==4.70.1
	touch $@

# timm's and torchvision's networks; in an environment of their own, as torchvision's wheel wants
# another torch, and must be installed without what it declares to need.
test-zoo: $(VENV)-zoo/.ready
	$(VENV)-zoo/bin/python -m pytest --confcutdir=tests_zoo tests_zoo $(ARGS)

$(VENV)-zoo/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-zoo
	$(VENV)-zoo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]" pytest pytest-timeout
	$(VENV)-zoo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.29.1 timm==1.0.31
	$(VENV)-zoo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt huggingface_hub==2.4.0 pyyaml transformers==5.24.0
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"

$(VENV)/.ready: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) -c constraints.txt -e ".[demo,memory,results,tasks,train]" --group test
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-test
	$(PIP) -c constraints.txt --group docs
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-aihwkit $(VENV)-zoo dist site audit

# The figures of the method cards, again.
DIGITS := $(BIN)/evenkeel audit --out .cache/results --chips 16
results: $(VENV)/.ready
	$(DIGITS) --json results/remedies_digits.json \
	  --device pcm gaussian:0.05 gaussian:0.1 gaussian:0.15 gaussian:0.2 log_normal:0.2 log_normal:0.4 \
	           gain:0.7 gain:0.4 stuck_at:0.01:0.01 stuck_at:0.02:0.02 \
	  --remedy none,drift,drift:column,pooled,clip,clip+calibrate,calibrate,drift+calibrate,calibrate:adabs
	$(DIGITS) --json results/few_samples_digits.json --age 0,1y \
	  --device pcm gaussian:0.02 gaussian:0.1 gaussian:0.15 gain:0.7 \
	  --remedy none,calibrate:samples=8,calibrate:samples=32,calibrate:samples=128,calibrate \
	  --remedy calibrate:samples=8:shrinkage=none:gate=false,calibrate:samples=32:shrinkage=none:gate=false
	$(BIN)/python docs/figure.py .cache/results/resnet8_digits.safetensors .cache/results/audit.db
