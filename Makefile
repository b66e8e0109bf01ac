# You need git, make and Python 3.11 or newer. The first target creates the virtual environment.
PYTHON ?= python3
BIN := .venv/bin
# The tests run one process per core, so each process gets one thread.
export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow test-oldest lint bench bench-adaptive bench-convergence bench-guidance bench-gpu docs package clean
demo: .venv/ready
	$(BIN)/python examples/demo.py

# glibc returns the memory of each large array to the system, and clearing it for the next array takes a twentieth of the tests' time.
test test-slow test-oldest: export MALLOC_MMAP_THRESHOLD_ := 4000000000
test test-slow test-oldest: export MALLOC_TRIM_THRESHOLD_ := 4000000000

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

# The tests with the oldest versions of the host libraries.
test-oldest:
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[numpyro,pyro,test,docs]'
	build/oldest/bin/python -m pytest -n auto --dist worksteal

# Builds the wheel and the sdist in dist/, and tests the wheel with the tests of the sdist, in a clean environment.
package:
	rm -rf dist build/package
	$(PYTHON) -m venv build/package
	build/package/bin/python -m pip install --quiet build
	build/package/bin/python -m build --outdir dist .
	build/package/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[numpyro,pyro,test]"
	mkdir build/package/sdist
	tar -xzf dist/*.tar.gz -C build/package/sdist --strip-components=1
	cd build/package/sdist && ../bin/python -P -m flowvi && ../bin/pytest -n auto tests/test_imports.py tests/test_drop_in.py tests/test_exact.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

# More than half an hour. Each command writes a table to docs/tables as soon as it is complete.
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
	$(BIN)/python benchmarks/marginal.py
	$(BIN)/python benchmarks/vae.py
	$(BIN)/python benchmarks/linear_baseline.py
	$(BIN)/python benchmarks/counting.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/scaling.py

# About ten minutes.
bench-adaptive: .venv/ready
	$(BIN)/python benchmarks/adaptive.py

# About half an hour.
bench-convergence: .venv/ready
	$(BIN)/python benchmarks/convergence.py
	$(BIN)/python benchmarks/convergence_figure.py

# Four studies of ten to twenty minutes. STUDY="--study right" runs one of them.
bench-guidance: .venv/ready
	$(BIN)/python benchmarks/guidance.py $(STUDY)

# About five minutes. Without a GPU it prints a message and stops.
bench-gpu: .venv/ready
	$(BIN)/python benchmarks/gpu.py

# Several minutes, because it runs the examples of the gallery.
docs: .venv/ready
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[numpyro,pyro,test,bench,docs]'
	touch $@

clean:
	rm -rf .venv build dist docs/_build docs/api docs/gallery .pytest_cache .mypy_cache .ruff_cache
