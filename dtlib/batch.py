"""Run the notebooks with papermill: check all first, use this interpreter, stop at a failing cell, leave no stale figure."""

import ast
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from pydantic import TypeAdapter, ValidationError

from dtlib.errors import UserError, no_room
from dtlib.plots import repository
from dtlib.profiles import PROFILES, missing, to_be_made


def convert(name: str, value: object, default: object) -> object:
    """``value`` in the type of ``default`` (None: any): ints pass for floats, text is read, a list's also bare."""
    if default is None or (isinstance(default, dict) and isinstance(value, str)):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            value = ast.literal_eval(value)
    if default is None:
        return value
    if isinstance(default, list) and isinstance(value, str) and value:
        value = [item.strip(" '\"") for item in value.strip(" []()").split(",") if item.strip()]
    if isinstance(default, list) and isinstance(value, (list, tuple)):
        return [convert(name, item, default[0] if default else None) for item in value]
    try:
        adapter = TypeAdapter(type(default))
        return adapter.validate_strings(value) if isinstance(value, str) else adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(f"Parameter {name} got {value!r}: expected {type(default).__name__}, such as {default!r}.") from error


def defaults(notebook: nbformat.NotebookNode, name: str) -> dict[str, object]:
    """Names and values of the notebook's cell tagged "parameters", which may hold nothing but plain values."""
    try:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}
    except (ValueError, SyntaxError, AttributeError) as error:
        raise UserError(f"Notebook {name} needs one cell tagged 'parameters' of lines like epochs = 3 ({error}).") from error


def find(folder: Path, wanted: list[str] | None) -> list[Path]:
    """The notebooks of ``folder`` named in ``wanted`` by number or name, in order; all of them if it is empty."""
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not known:
        raise UserError(f"There is no notebook in {folder}: expected names such as 00_sanity_check.ipynb.")
    names = {alias: path for path in known for alias in (path.stem, path.name, path.stem[:2], str(int(path.stem[:2])))}
    if unknown := [name for name in wanted or [] if name not in names]:
        raise UserError(f"Unknown notebook {unknown[0]!r}: the notebooks are {', '.join(path.stem for path in known)}.")
    return sorted({names[name] for name in wanted}) if wanted else known


def plan(folder: Path, profile: str, wanted: list[str] | None, overrides: dict[str, object],
         elsewhere: bool = False) -> list[tuple]:
    """What to run, here or ``elsewhere``: (path, notebook, all its parameters), checked. An override must be a parameter of
    some notebook."""
    if profile not in PROFILES:
        raise UserError(f"Unknown profile {profile!r}: the profiles are {', '.join(PROFILES)}.")
    jobs, known, wishes = [], set(), {**PROFILES[profile], **overrides, "profile": profile}
    for path in find(folder, wanted):
        notebook = nbformat.read(path, as_version=4)
        values = defaults(notebook, path.stem)
        known |= set(values) - {"profile"}
        values |= {name: convert(name, wishes[name], values[name]) for name in values if name in wishes}
        needed, given = notebook.metadata.get("dtlib", {}).get("initialisations", 0), values.get("initialisations", [])
        if len(given) < needed:
            roles = " with ".join(["a random start", "language", "images"][:needed])
            raise UserError(f"Notebook {path.stem} compares {roles}, in this order, and got the initialisations "
                            f"{', '.join(given) or '(none)'}: give at least {needed}.")
        jobs.append((path, notebook, values))
    if unknown := [name for name in overrides if name not in known]:
        raise UserError(f"Unknown parameter {unknown[0]!r}: the parameters are {', '.join(sorted(known))}.")
    if not elsewhere and (lacks := dict.fromkeys(lack for *_, values in jobs for lack in missing(profile, values))):
        raise UserError(f"The {profile} profile cannot run here; it lacks: {'; '.join(lacks)}.")
    return jobs


class _AskedFor(Exception):
    """Ends a notebook's cell once it is known which runs it wants."""


def asked_for(notebook: nbformat.NotebookNode, values: dict[str, object]) -> list:
    """The RunConfigs that a notebook first asks ``runs.fine_tuned`` for, found by executing that cell after the first one,
    with its parameters' ``values``; for a process of its own. Starting points that do not exist yet count as if they did.
    """
    from dtlib import runs
    found, digests = [], runs._digests

    def known(config: runs.RunConfig) -> str:
        with contextlib.suppress(UserError):
            return digests(config)
        return "to be made"

    def note(configs: list[runs.RunConfig], *_: object, **__: object) -> None:
        found.extend(configs)
        raise _AskedFor

    runs.fine_tuned, runs._digests, scope = note, known, {}
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    if asking := next((source for source in code if "runs.fine_tuned(" in source), None):
        with contextlib.suppress(_AskedFor, UserError):  # the notebook itself will say what is wrong
            exec(code[0], scope)
            exec(asking, scope | values | {"device": "auto"})
    return found


def cost_of(profile: str, jobs: list[tuple], points: list) -> str:
    """What ``cost.say_plan`` says of the runs that ``jobs`` ask for."""
    from dtlib import cost, runs  # slow to import
    from dtlib.workers import Workers
    with Workers(1, "run the notebooks one by one") as pool:
        given = [pool.submit(asked_for, notebook, values) for _, notebook, values in jobs]
        asked = list(dict.fromkeys(config for future in given for config in future.result()))
    return cost.say_plan(profile, asked, [c for c in asked if not (runs.runs_root() / c.name).exists()], points)


def run(profile: str, notebooks: list | None = None, overrides: dict | None = None, figures: str = "figures",
        only_plan: bool = False) -> dict:
    """Run ``notebooks`` (numbers or names, default all) into ``figures``; print and return each one's seconds.

    Starting points that are needed and absent are made first. Of the profiles that take hours a plan is printed; and of each
    with ``only_plan``, after which nothing runs.
    """
    from dtlib.kernels import preload  # these are slow to import
    metadata = {} if only_plan else preload()
    import papermill
    logging.getLogger("papermill").setLevel(logging.ERROR)  # its own reader of parameter cells warns wrongly
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # echoes each Ctrl-C at length
    root, seconds, overrides = repository(), {}, overrides or {}
    jobs = plan(root / "notebooks", profile, notebooks, overrides, only_plan)
    points = list(dict.fromkeys(config for *_, values in jobs for config in to_be_made(values)))
    if only_plan or profile in ("full", "gpu", "paper"):
        print(cost_of(profile, jobs, points))
    if only_plan:
        return seconds
    if points:
        from dtlib import cost, pretrain  # slow to import
        print(f"Starting points that do not exist yet are made first: {', '.join(config.name for config in points)}.")
        pretrain.pretrain_all(sorted(points, key=lambda config: -cost.of_pretraining(config).operations))  # the longest first
    for path, notebook, values in jobs:
        began, folder = time.time(), root / figures / profile / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        copy, chosen = folder / "executed.ipynb", {name: values[name] for name in overrides if name in values}
        variables = {"DTLIB_FIGURES": str(root / figures), "DTLIB_OVERRIDES": json.dumps(chosen)}
        try:
            with tempfile.TemporaryDirectory() as home, patch.dict(os.environ, variables, JUPYTER_PATH=home), no_room(copy):
                write_kernel_spec(Path(home, "kernels", "python3"), {"metadata": metadata},
                                  extra_arguments=["--log-level=CRITICAL"])  # this interpreter; as for asyncio above
                papermill.execute_notebook(notebook, str(copy).replace("{", "{{").replace("}", "}}"), values, cwd=root,
                                           kernel_name="python3", language="python", progress_bar={"desc": path.stem},
                                           stderr_file=sys.stderr)  # progress inside a cell
        except papermill.PapermillExecutionError as error:
            first, last = error.source.strip().splitlines()[0], error.evalue.strip().rpartition("\n")[-1]
            raise UserError(f"Notebook {path.stem} failed in cell [{error.exec_count}] ({first}): {error.ename}: {last} "
                            f"(the whole traceback is in {copy})") from error
        except RuntimeError as error:  # the kernel died
            raise UserError(f"Notebook {path.stem} stopped: {error}, perhaps for lack of memory; see {copy}.") from error
        promised = notebook.metadata.get("dtlib", {}).get("figures", [])
        for file in [*(folder / f"{f}.{end}" for f in promised for end in ("png", "pdf", "csv")), folder / "results.json"]:
            if not file.exists() or file.stat().st_mtime < began:
                raise UserError(f"Notebook {path.stem} ended without writing {file}, which it promises.")
        seconds[path.stem] = time.time() - began
    for name, value in {**seconds, "total": sum(seconds.values())}.items():
        print(f"{name:<32}{value:>9.1f} s")
    return seconds
