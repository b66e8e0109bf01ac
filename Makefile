# Everything needs only git, Python (3.11 or newer) and make; the virtual environment is made once.
PYTHON ?= python3
BIN := .venv/bin
# The tests run one process per core; each keeps to one thread.
export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow lint bench bench-adaptive docs clean
demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -n auto

test-slow: .venv/ready
	$(BIN)/python -m pytest -n auto -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each command writes its tables to docs/tables, every table as soon as it is whole.
bench: .venv/ready
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/draws.py
	$(BIN)/python benchmarks/particles.py
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/compiled_pyro.py
	$(BIN)/python benchmarks/variance.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/control_variate.py
	$(BIN)/python benchmarks/discrete.py
	$(BIN)/python benchmarks/jumps.py
	$(BIN)/python benchmarks/toy.py
	$(BIN)/python benchmarks/vae.py
	$(BIN)/python benchmarks/digits.py

# About ten minutes.
bench-adaptive: .venv/ready
	$(BIN)/python benchmarks/adaptive.py

docs: .venv/ready
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[numpyro,pyro,test,bench,docs]'
	touch $@

clean:
	rm -rf .venv build dist docs/_build docs/api docs/gallery .pytest_cache .mypy_cache .ruff_cache
