# make demo       installs into .venv, runs every script on the quick preset, prints all rows at the end
# make test       installs into .venv, checks style and imports, runs the tests (offline once installed)
# make docs       writes the tables of README and docs/ anew, from the rows in reference/
# make clean      removes what minutes bring back: .venv, and the caches of Python, pytest, ruff and import-linter
# make distclean  removes results/ as well: rows, images and packed models, hours of work

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check
IMAGES ?= 500
DEMO = --preset quick --images $(IMAGES) $(OPTIONS)
RUN = .venv/bin/python

.PHONY: demo test lint format docs clean distclean

demo: .venv/installed
	$(RUN) simplediffusion.py $(DEMO)
	$(RUN) whole_threshold.py $(DEMO) --threshold 0.01
	$(RUN) layer_group.py $(DEMO) --groups 12/3456
	$(RUN) layer_ratio.py $(DEMO) --ratio 0.25
	$(RUN) layer_math.py $(DEMO) --alpha 0.5
	$(RUN) layer_budget.py $(DEMO) --times 10
	$(RUN) -m common report --preset quick

test: .venv/installed-test lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist worksteal

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-logo

format: .venv/installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/installed-test
	PYTHONPATH=. .venv/bin/cog -r -P -I docs -p "from tables import *" README.md docs/*.md

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python requirements.txt
	$(PIP) install -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt requirements-openvino.txt
	$(PIP) install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf results
