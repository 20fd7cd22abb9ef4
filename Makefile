# Everything runs in .venv, which the first target makes. PYTHON is the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
KLEIN_KV := $(BIN)/klein-kv
DEMO ?= demo
TYPING := build/typing

# Python compiles what it imports, once: a fraction of what pip would compile.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[export,cpu,rtx,serve,bench,dev]'
	touch $@

# Two processes of up to 4 GB; a file's tests stay together, with what they share. What is computed is
# small: threads of numpy and torch would wait for each other most of the time.
test: export OMP_NUM_THREADS := 1
test: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

# mypy finds packages by their path, so it gets the installed layout as a tree of links.
lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPING)
	mkdir -p $(TYPING)/klein_kv
	ln -s $(CURDIR)/klein_kv/* $(TYPING)/klein_kv/
	ln -s $(CURDIR)/export $(CURDIR)/engines $(CURDIR)/runtime $(TYPING)/klein_kv/
	cd $(TYPING) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache --python-executable $(CURDIR)/$(BIN)/python -p klein_kv

bench: .venv/.installed
	$(BIN)/python benchmarks/edit.py

# The trained pocket checkpoint end to end: graphs, engines, quantized weights, a sheet of edits beside
# their right answers, proof against diffusers.
SAMPLES := --images $(DEMO)/samples/references --prompts $(DEMO)/samples/prompts.txt --size 192x192
demo: .venv/.installed
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/python -m benchmarks.pocket.scenes $(DEMO)/samples
	$(KLEIN_KV) fixture $(DEMO)/checkpoint --size pocket
	$(KLEIN_KV) export $(DEMO)/checkpoint $(DEMO)/fp32 --dtype fp32 --variant kv
	$(KLEIN_KV) export $(DEMO)/checkpoint $(DEMO)/bf16 --dtype bf16 --variant kv
	$(KLEIN_KV) quantize $(DEMO)/bf16 --recipe fp8 $(SAMPLES)
	$(KLEIN_KV) quantize $(DEMO)/bf16 --recipe nvfp4 $(SAMPLES)
	$(KLEIN_KV) build $(DEMO)/bf16 --target rtx5090
	$(KLEIN_KV) verify $(DEMO)/fp32 $(DEMO)/checkpoint
	$(BIN)/python -m benchmarks.pocket.demo $(DEMO)
	@echo
	@echo "edits beside their right answers:  $(DEMO)/sheet.png, $(DEMO)/index.html"
	@echo "ONNX graphs:                       $(DEMO)/fp32 (for CPUs), $(DEMO)/bf16 (for GPUs)"
	@echo "RTX 5090 engines:                  $(DEMO)/bf16/engines/rtx5090-bf16"

clean:
	rm -rf build dist $(DEMO) .mypy_cache .pytest_cache .ruff_cache
