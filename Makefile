# figures · test · lab · bench · clean: each builds .venv first if it is missing or out of date.
PROFILE   ?= laptop
NOTEBOOKS ?=
# A name on PATH can be a version manager's empty shell, so python3.11 must run before it is chosen.
PYTHON    ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)

.PHONY: figures test lab bench clean

figures: .venv/installed          # make figures PROFILE=smoke NOTEBOOKS="00 03"
	.venv/bin/python -m dtlib figures --profile $(PROFILE) $(NOTEBOOKS)

test: .venv/installed
	.venv/bin/python -m pytest -q

lab: .venv/installed
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[lab]'
	.venv/bin/python -m jupyterlab notebooks

bench: .venv/installed
	.venv/bin/python benchmarks/run.py

# Collected data and finished runs live in the user's cache folder (`python -m dtlib doctor` says where) and stay.
clean:
	rm -rf .venv build dtlib.egg-info .pytest_cache figures/smoke

# d4rl's own dependencies no longer install; the tests only need the reader inside it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[test]'
	.venv/bin/python -m pip install -q -c constraints.txt --no-deps d4rl
	touch $@
