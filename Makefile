PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
JOBS   ?= 2

.PHONY: demo test test-slow test-all lint export readme docs clean

demo: $(VENV)/.ready       ## train on synthetic people, evaluate, save three pictures
	$(BIN)/pyramidreid demo

test test-slow: export OMP_NUM_THREADS = 1
test test-slow: export PYTHONWARNINGS = ignore

test: lint                 ## all checks a change needs
	$(BIN)/python dev/notebooks.py --jobs $(JOBS)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m 'not slow'

test-slow: $(VENV)/.ready  ## the rest: slow cells and slow tests
	$(BIN)/python dev/notebooks.py --jobs $(JOBS) --slow-only
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow

test-all: test test-slow   ## both

lint: $(VENV)/.ready       ## modules in sync with notebooks, style, imports between rooms, README up to date
	$(BIN)/python dev/check_sync.py
	$(BIN)/python dev/readme.py --check
	$(BIN)/ruff check --quiet .
	$(BIN)/python dev/style.py
	$(BIN)/lint-imports
	$(BIN)/python dev/rooms.py --check

export: $(VENV)/.ready     ## write the modules from the notebooks
	$(BIN)/python dev/export.py

readme: $(VENV)/.ready     ## write README.md from nbs/index.ipynb
	$(BIN)/python dev/readme.py

docs: $(VENV)/.ready       ## build the documentation site in docs/
	$(BIN)/python dev/docs.py

$(VENV)/.ready: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo docs
