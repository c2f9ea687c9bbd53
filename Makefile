# The commands of CONTRIBUTING.md by name; CI runs the same without make (.ci/run).
.PHONY: help install check lint types docs test slow bench wheel

help:
	@echo "make install   this checkout with what tests and docs need"
	@echo "make check     lint, types, docs and test: what a change must pass"
	@echo "make slow      the slow tests"
	@echo "make bench     every operator beside its rivals on the CPU, rows in bench/out"
	@echo "make wheel     the wheel in dist, tried in a fresh environment"

install:
	pip install -c constraints.txt -e ".[test,docs]"

check: lint types docs test

lint:
	ruff check .
	ruff format --check .

types:
	mypy

docs:
	sphinx-build -W -q -b html docs docs/_build

test:
	pytest

slow:
	pytest -m slow

bench:
	python -m bench cpu

wheel:
	SISA_BUILD_CUDA=0 tools/build_wheels.sh dist
	python tools/try_wheel.py dist/*.whl --torch 2.13.0 --python python3 --out dist/wheels.csv
