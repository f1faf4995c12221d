# make demo: set up, train a tiny model on real text, let it write.   make test: set up, run all tests.
# make course-runs: train what the notebooks look at.                make notebooks: run them, keep what they show.
PYTHON ?= python3
VENV   := .venv
BIN    := $(if $(filter Windows_NT,$(OS)),$(VENV)/Scripts,$(VENV)/bin)

.PHONY: demo test soak lint notebooks course-runs clean

demo: $(VENV)/ready
	$(BIN)/python train_tiny.py
	$(BIN)/python sample.py --prompt "The"

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not soak" -n auto --dist loadfile

soak: $(VENV)/ready
	$(BIN)/python -m pytest -m soak

lint: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/ready
	$(BIN)/python notebooks/execute.py

course-runs: $(VENV)/ready
	$(BIN)/python notebooks/course.py

# PyTorch first and by its pin, so that nothing pulls a larger build; then this project and what its tests need.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,notebooks]"
	$(BIN)/python -c "open('$(VENV)/ready', 'w').close()"

clean:
	$(PYTHON) -c "import shutil; shutil.rmtree('$(VENV)', ignore_errors=True)"
