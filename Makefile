# Everything needs only git, Python (3.11 or newer) and make; the virtual environment is made once.
PYTHON ?= python3
BIN := .venv/bin
# The tests run one process per core; each keeps to one thread.
export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow test-oldest lint bench bench-adaptive bench-convergence bench-guidance bench-gpu docs package clean
demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

# A core of the tests, with the oldest versions of the host libraries.
test-oldest:
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[numpyro,pyro,test]'
	build/oldest/bin/python -m pytest -n auto tests/test_drop_in.py tests/test_estimated.py tests/test_report.py tests/test_bounds.py tests/test_numpyro_svi.py tests/test_pyro_svi.py

# The wheel and the sdist, into dist/. The tests of the sdist then run on the wheel, in an environment of its own.
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
	$(BIN)/python benchmarks/marginal.py
	$(BIN)/python benchmarks/vae.py
	$(BIN)/python benchmarks/linear_baseline.py
	$(BIN)/python benchmarks/counting.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/scaling.py

# About ten minutes.
bench-adaptive: .venv/ready
	$(BIN)/python benchmarks/adaptive.py

# About twenty-five minutes.
bench-convergence: .venv/ready
	$(BIN)/python benchmarks/convergence.py
	$(BIN)/python benchmarks/convergence_figure.py

# Ten to twenty minutes for each of four studies; one of them by STUDY="--study right".
bench-guidance: .venv/ready
	$(BIN)/python benchmarks/guidance.py $(STUDY)

# About five minutes; without a GPU it says so and stops.
bench-gpu: .venv/ready
	$(BIN)/python benchmarks/gpu.py

# Several minutes: it runs the examples of the gallery.
docs: .venv/ready
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[numpyro,pyro,test,bench,docs]'
	touch $@

clean:
	rm -rf .venv build dist docs/_build docs/api docs/gallery .pytest_cache .mypy_cache .ruff_cache
