# make prove: environment, install, the main job, a report.   make test: environment, install, ruff, mypy, pytest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MEGATRON := megatron-core==0.19.2

.PHONY: prove test targets clean

prove: $(VENV)/prove.done
	$(BIN)/headfold prove --report report

test: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

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

# megatron-core asks for Python >= 3.12 and for packages that its DSA module does not use; it runs without either.
$(VENV)/test.done: pyproject.toml $(VENV)/torch.done
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --python-version 3.12 --only-binary=:all: \
		--upgrade --target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" $(MEGATRON)
	touch $@

clean:
	rm -rf $(VENV) report
