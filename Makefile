# make prove: environment, install, the main job, a report.   make test: environment, install, ruff, mypy, pytest.
# make gpu: environment, install, and what only a GPU can show, in minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MEGATRON := $(shell sed -n 's/^megatron-core/&/p' constraints.txt)
EARLIER := 0.17.1 0.18.2
TRITON := 3.4.0 3.5.1
BARE := --quiet --no-deps --ignore-requires-python --python-version 3.12 --only-binary=:all: --upgrade

.PHONY: prove gpu test test-earlier targets clean

prove: $(VENV)/prove.done
	$(BIN)/headfold prove --report report

gpu: $(VENV)/prove.done
	$(BIN)/headfold gpu --report report

test: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# The project's speed targets: two CPU cores, float32, b=1, sq=sk=4096, h=32, d=128, on a quiet machine.
targets: $(VENV)/prove.done
	$(BIN)/headfold speed --targets --threads 2

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("headfold needs Python >= 3.10, got %d.%d; run make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: the constraint is its CPU build where the index has one, and nothing later may replace it.
$(VENV)/torch.done: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	touch $@

$(VENV)/prove.done: pyproject.toml $(VENV)/torch.done
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cli]'
	touch $@

# megatron-core asks for packages that its DSA module does not use, and for Python >= 3.12; it runs without either.
$(VENV)/test.done: pyproject.toml $(VENV)/torch.done
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then \
		$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt megatron-core; \
	else \
		$(BIN)/python -m pip install $(BARE) $(MEGATRON) \
			--target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	fi
	@# Tests of an absent package skip: here none may be absent.
	$(BIN)/python -W ignore -c 'import attn_gym, transformers, megatron.core.transformer.experimental_attention_variant.dsa'
	touch $@

# The earlier generations of Megatron-Core, and of Triton as torch 2.8 and 2.9 bring it, each in a folder of its own that
# comes first on the path. Kernels are compiled, and not run.
test-earlier: $(VENV)/test.done
	set -e; for version in $(EARLIER); do \
		test -d $(VENV)/megatron-$$version || $(BIN)/python -m pip install $(BARE) \
			--target $(VENV)/megatron-$$version megatron-core==$$version; \
		PYTHONPATH=$(VENV)/megatron-$$version $(BIN)/pytest tests/test_megatron_earlier.py; \
	done
	set -e; for version in $(TRITON); do \
		test -d $(VENV)/triton-$$version || $(BIN)/python -m pip install --quiet --no-deps \
			--target $(VENV)/triton-$$version triton==$$version; \
		PYTHONPATH=$(VENV)/triton-$$version $(BIN)/pytest -m "slow or not slow" -k triton_at_hand \
			tests/test_triton_compile.py tests/test_triton_launch.py; \
	done

clean:
	rm -rf $(VENV) report
