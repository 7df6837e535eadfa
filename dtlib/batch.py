"""Run the notebooks with papermill: check everything first, stop at the first failing cell, leave no stale figure."""

import ast
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import nbformat

from dtlib.errors import UserError, no_room
from dtlib.plots import repository
from dtlib.profiles import PROFILES, missing


def convert(name: str, value: object, default: object) -> object:
    """``value`` in the type of ``default`` (None: any): ints pass for floats, text is read, a list's also bare."""
    read = value
    if isinstance(value, str) and not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            read = ast.literal_eval(value.capitalize() if value.lower() in ("true", "false") else value)
        if isinstance(default, list) and not isinstance(read, (list, tuple)):
            read = [item.strip(" '\"") for item in value.strip(" []()").split(",")]
    if isinstance(default, list) and isinstance(read, (list, tuple)):
        return [convert(name, item, default[0]) if default else item for item in read]
    if type(default) is float and type(read) is int:
        return float(read)
    if default is not None and type(read) is not type(default):
        raise UserError(f"Parameter {name} got {value!r}: expected {type(default).__name__}, such as {default!r}.")
    return read


def defaults(notebook: nbformat.NotebookNode, name: str) -> dict[str, object]:
    """Names and values of the notebook's cell tagged "parameters", which may hold nothing but plain values."""
    try:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}
    except (ValueError, SyntaxError, AttributeError) as error:
        raise UserError(f"Notebook {name} needs one cell tagged 'parameters' with nothing but lines such as "
                        f"seeds = [0, 1] ({error}).") from error


def find(folder: Path, wanted: list[str] | None) -> list[Path]:
    """The notebooks of ``folder`` named in ``wanted`` by number or name, in order; all of them if it is empty."""
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not known:
        raise UserError(f"There is no notebook in {folder}: expected names such as 00_sanity_check.ipynb.")
    names = {alias: path for path in known for alias in (path.stem, path.name, path.stem[:2], str(int(path.stem[:2])))}
    if unknown := [name for name in wanted or [] if name not in names]:
        raise UserError(f"Unknown notebook {unknown[0]!r}: the notebooks are {', '.join(path.stem for path in known)}.")
    return sorted({names[name] for name in wanted}) if wanted else known


def plan(folder: Path, profile: str, wanted: list[str] | None, overrides: dict[str, object]) -> list[tuple]:
    """What to run: (path, notebook, all its parameters), checked. An override must be a parameter of some notebook."""
    if profile not in PROFILES:
        raise UserError(f"Unknown profile {profile!r}: the profiles are {', '.join(PROFILES)}.")
    jobs, known = [], set()
    for path in find(folder, wanted):
        notebook = nbformat.read(path, as_version=4)
        values = defaults(notebook, path.stem)
        known |= set(values) - {"profile"}
        for name, value in {**PROFILES[profile], **overrides, "profile": profile}.items():
            if name in values:
                values[name] = convert(name, value, values[name])
        jobs.append((path, notebook, values))
    if unknown := [name for name in overrides if name not in known]:
        raise UserError(f"Unknown parameter {unknown[0]!r}: the parameters are {', '.join(sorted(known))}.")
    if lacks := dict.fromkeys(lack for *_, values in jobs for lack in missing(profile, values)):
        raise UserError(f"The {profile} profile cannot run here; it lacks: {'; '.join(lacks)}.")
    return jobs


@contextlib.contextmanager
def kernel_environment(**variables: str) -> Iterator[None]:
    """``variables`` for kernels, and ``python3`` as this very interpreter, whatever kernels the user has installed."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "kernels", "python3", "kernel.json")
        spec.parent.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        spec.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
        variables["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        with patch.dict(os.environ, variables):  # and back again afterwards
            yield


def execute(path: Path, notebook: nbformat.NotebookNode, values: dict[str, object], root: Path, folder: Path) -> float:
    """Run a notebook in ``root``, see that what it promises is new in ``folder``, and return the seconds it took."""
    import papermill  # slow to import
    logging.getLogger("papermill").setLevel(logging.ERROR)  # its own reader of parameter cells warns wrongly
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # echoes each Ctrl-C at length
    began, copy = time.time(), folder / "executed.ipynb"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with no_room(copy):
            papermill.execute_notebook(notebook, str(copy).replace("{", "{{").replace("}", "}}"), values, cwd=root,
                                       kernel_name="python3", language="python", progress_bar={"desc": path.stem},
                                       stderr_file=sys.stderr)  # progress inside a cell
    except papermill.PapermillExecutionError as error:
        first, last = error.source.strip().splitlines()[0], error.evalue.strip().rpartition("\n")[-1]
        raise UserError(f"Notebook {path.stem} failed in cell [{error.exec_count}] ({first}): {error.ename}: {last} "
                        f"(the whole traceback is in {copy})") from error
    except RuntimeError as error:  # the kernel died
        raise UserError(f"Notebook {path.stem} stopped: {error}, perhaps for lack of memory; see {copy}.") from error
    figures = notebook.metadata.get("dtlib", {}).get("figures", [])
    for name in [*(f"{figure}.{end}" for figure in figures for end in ("png", "pdf", "csv")), "results.json"]:
        if not (folder / name).exists() or (folder / name).stat().st_mtime < began:
            raise UserError(f"Notebook {path.stem} ended without writing {folder / name}, which it promises.")
    return time.time() - began


def run(profile: str, notebooks: list[str] | None = None, overrides: dict[str, object] | None = None,
        figures: str | Path = "figures") -> dict[str, float]:
    """Run ``notebooks`` (numbers or names; all by default) into ``figures``; print and return the seconds of each.

    UserError: what ``plan`` objects to, before anything runs, and the first notebook that fails."""
    root, seconds, overrides = repository(), {}, overrides or {}
    for path, notebook, values in plan(root / "notebooks", profile, notebooks, overrides):
        chosen = json.dumps({name: values[name] for name in overrides if name in values})
        with kernel_environment(DTLIB_FIGURES=str(root / figures), DTLIB_OVERRIDES=chosen):
            seconds[path.stem] = execute(path, notebook, values, root, root / figures / profile / path.stem)
    rows = {**seconds, "total": sum(seconds.values())}
    print("\n".join(f"{name:<32}{value:>9.1f} s" for name, value in rows.items()))
    return seconds
