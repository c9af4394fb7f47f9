PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test export readme clean

demo: $(VENV)/.ready   ## synthetic people, training, evaluation, pictures
	$(BIN)/pyramidreid demo

test: export OMP_NUM_THREADS = 1
test: export PYTHONWARNINGS = ignore
test: $(VENV)/.ready   ## notebooks and modules in sync, README fresh, every notebook run, pytest
	$(BIN)/python dev/check_sync.py
	$(BIN)/python dev/readme.py --check
	$(BIN)/nbdev-test nbs --n-workers 2 --timing
	$(BIN)/python -m pytest -q

export: $(VENV)/.ready ## modules from notebooks
	$(BIN)/nbdev-export

readme: $(VENV)/.ready ## README.md from nbs/index.ipynb
	$(BIN)/python dev/readme.py

$(VENV)/.ready: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo
