PYTHON ?= python3
VENV   := .venv
BIN    := $(if $(filter Windows_NT,$(OS)),$(VENV)/Scripts,$(VENV)/bin)

.PHONY: help demo report test soak lint notebooks course-runs clean

# The text behind ## of every target. In Python, since Windows has neither grep nor awk.
help:  ## say what there is to make
	@$(PYTHON) -c "import re; [print(f'make {n:<13}{t}') for n, t in re.findall(r'(?m)^([\w-]+):.*?## (.+)', open('Makefile').read())]"

DATA ?= docs
demo: $(VENV)/ready  ## play; train on real text (DATA=my.txt, or tales) for minutes; fill gaps in it
	$(BIN)/python -m minillada play
	$(BIN)/python train_tiny.py --data $(DATA)
	$(BIN)/python -m minillada play run

report: $(VENV)/ready  ## write a page about the newest run: bound, samples, speed, curve
	$(BIN)/python -m minillada report

test: $(VENV)/ready  ## set up, run all tests but the long ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not soak" -n auto --dist loadfile

soak: $(VENV)/ready  ## run the long tests
	$(BIN)/python -m pytest -m soak

lint: $(VENV)/ready  ## sort imports, correct what can be corrected, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/ready  ## run the notebooks, and keep what they show
	$(BIN)/python notebooks/execute.py

course-runs: $(VENV)/ready  ## train what the notebooks look at
	$(BIN)/python notebooks/course.py

# PyTorch first and by its pin, so that nothing pulls a larger build; then this project and what its tests need.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,notebooks]"
	$(BIN)/python -c "open('$(VENV)/ready', 'w').close()"

clean:  ## delete the environment; runs stay
	$(PYTHON) -c "import shutil; shutil.rmtree('$(VENV)', ignore_errors=True)"
