# Everything runs in .venv, which the first target makes. PYTHON is the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
KLEIN_KV := $(BIN)/klein-kv
DEMO ?= demo
TYPING := build/typing

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[export,cpu,rtx,bench,dev]'
	touch $@

# Two processes of up to 4 GB; a file's tests stay together, with what they share.
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

# Random weights end to end: checkpoint, graphs, engines, three images, proof against diffusers.
demo: .venv/.installed
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/python benchmarks/photos.py $(DEMO)/photos
	$(KLEIN_KV) fixture $(DEMO)/checkpoint --size tiny --seed 0
	$(KLEIN_KV) export $(DEMO)/checkpoint $(DEMO)/fp32 --dtype fp32 --variant kv
	$(KLEIN_KV) export $(DEMO)/checkpoint $(DEMO)/bf16 --dtype bf16 --variant kv
	$(KLEIN_KV) build $(DEMO)/bf16 --target rtx5090
	$(KLEIN_KV) generate $(DEMO)/fp32 -p "a red kite over the sea" \
		-o $(DEMO)/text.png --height 256 --width 256 --steps 4 --seed 0
	$(KLEIN_KV) generate $(DEMO)/fp32 -p "the same portrait at night" \
		-r $(DEMO)/photos/astronaut.png \
		-o $(DEMO)/one-reference.png --height 256 --width 256 --steps 4 --seed 0
	$(KLEIN_KV) generate $(DEMO)/fp32 -p "she holds the cup of coffee" \
		-r $(DEMO)/photos/astronaut.png -r $(DEMO)/photos/coffee.png \
		-o $(DEMO)/two-references.png --height 320 --width 256 --steps 4 --seed 0
	$(KLEIN_KV) verify $(DEMO)/fp32 $(DEMO)/checkpoint
	@echo
	@echo "images of random weights:  $(DEMO)/text.png $(DEMO)/one-reference.png" \
		"$(DEMO)/two-references.png"
	@echo "ONNX graphs:               $(DEMO)/fp32 (for CPUs), $(DEMO)/bf16 (for GPUs)"
	@echo "RTX 5090 engines:          $(DEMO)/bf16/engines/rtx5090-bf16"

clean:
	rm -rf build dist $(DEMO) .mypy_cache .pytest_cache .ruff_cache
