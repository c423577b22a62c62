# make demo       installs into .venv, runs every script on the quick preset, prints all rows at the end
# make test       installs into .venv, checks style and imports, runs the tests (offline once installed)
# make docs       writes the tables of README and docs/ anew, from the rows in reference/
# make clean      removes what minutes bring back: .venv, and the caches of Python, pytest, ruff and import-linter
# make distclean  removes results/ as well: rows, images and packed models, hours of work

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check
IMAGES ?= 400
DEMO = --preset quick --images $(IMAGES) $(OPTIONS)
RUN = .venv/bin/python

.PHONY: demo test lint format docs clean distclean

# $(call step,NUMBER,SCRIPT AND OPTIONS): its bars are shown, and what it prints goes to a file; the report has all rows
step = @printf '\n[%s of 6] python %s\n' "$(1)" "$(2) $(DEMO)"; $(RUN) $(2) $(DEMO) >> results/demo.log

demo: .venv/installed
	@mkdir -p results && : > results/demo.log
	$(call step,1,simplediffusion.py --format int8)
	$(call step,2,whole_threshold.py --format int4 --threshold 0.01)
	$(call step,3,layer_group.py --format int4 --groups 12/3456)
	$(call step,4,layer_ratio.py --format int4 --ratio 0.25)
	$(call step,5,layer_math.py --format int4 --alpha 0.5)
	$(call step,6,layer_budget.py --times 10 16)
	$(RUN) -m common report --preset quick
	@echo "what each script printed: results/demo.log"
	@echo "next, after source .venv/bin/activate: python layer_budget.py --preset quick --times 10 13 16"

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
