"""Run the notebooks: check all, pre-train what is missing, execute each, list its figures."""

import ast
import base64
import contextlib
import io
import json
import logging
import os
import re
import subprocess
import symtable
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy as copied
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import joblib
import nbformat
from ipykernel.kernelspec import write_kernel_spec
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

from dtlib import profiles, storage
from dtlib.compare import compare
from dtlib.config import RunConfig
from dtlib.errors import UserError, explained
from dtlib.settings import fit, parse_settings
from dtlib.storage import cache_root, code_hash, notebook_hash, write_text


class Job(NamedTuple):
    """A notebook to run, the values of all its parameters, and those that the user set."""

    path: Path
    values: dict[str, object]
    chosen: dict[str, object]
    profile_values: str  # the profile's digest when this was planned
    notebook: NotebookNode  # as it was then, whatever its file becomes meanwhile


def read_notebook(path: Path) -> NotebookNode:
    """Return a notebook. Raises UserError for a file that is none."""
    with explained(f"{path} is no whole notebook", "bring it back or move it away", Exception):
        return nbformat.read(path, as_version=4)


def defaults(path: Path, notebook: NotebookNode | None = None) -> dict[str, object]:
    """Return names and values of a notebook's cell tagged "parameters". Raises UserError."""
    cells = (notebook or read_notebook(path)).cells
    what = f"Notebook {path.stem} needs one cell tagged 'parameters'"
    with explained(what, "write lines like seeds = [0]", ValueError, SyntaxError, AttributeError):
        (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        lines = ast.parse(cell.source).body
        return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def find(folder: Path, wanted: list[str] | None) -> list[Path]:
    """Return the notebooks of ``folder`` with these numbers or names, in order; all by default.

    Raises UserError for an unknown name, and for a number that two notebooks have.
    """
    known = sorted(folder.glob("[0-9a][0-9_]*.ipynb"))  # 00_…, and the first: a_hundred_lines
    if not known:
        raise UserError(f"There is no notebook in {folder}: expected names such as 00_first.ipynb.")
    found = set()
    for name in wanted or [path.stem[:2] for path in known]:
        named = [path for path in known if name.zfill(2) in (path.stem, path.name)]
        fits = named or [path for path in known if name.zfill(2) == path.stem[:2]]
        listed = ", ".join(path.stem for path in fits or known)
        if not fits:
            raise UserError(f"Unknown notebook {name!r}: the notebooks are {listed}.")
        if len(fits) > 1:
            advice = "give a whole name, or move the copy away"
            raise UserError(f"The number {name} belongs to several notebooks, {listed}: {advice}.")
        found.update(fits)
    return sorted(found)


def plan(folder: Path, profile: str, wanted: list | None, settings: dict | list) -> list[Job]:
    """Return what to run, checked. ``settings``, a dict or texts to parse, replace the profile's.

    Training settings among them go into ``overrides``. Raises UserError.
    """
    own, trained = profiles.load_profile(profile), profiles.settings(profile)
    today = profiles.values_digest(profile)
    contents = {path: read_notebook(path) for path in find(folder, wanted or own["only"])}
    notebooks = {path: defaults(path, contents[path]) for path in contents}
    known = {name: value for values in notebooks.values() for name, value in values.items()}
    known = (trained if "overrides" in known else {}) | known
    known.pop("profile", None)
    if not isinstance(settings, dict):
        settings = parse_settings(settings, known)
    if unknown := [name for name in settings if name not in known]:
        names = ", ".join(sorted(known))
        raise UserError(f"Unknown parameter {unknown[0]!r}: the parameters are {names}.")
    texts = "".join(path.read_text("utf-8", "replace") for path in folder.glob("*.ipynb"))
    if unknown := [name for name in own["notebooks"] if f"{name} = " not in texts]:
        print(f"Profile {profile} sets what no notebook has: {', '.join(unknown)}.", flush=True)
    jobs, wishes = [], own["notebooks"] | settings | {"profile": profile}
    for path, values in notebooks.items():
        values |= {name: fit(name, wishes[name], values[name]) for name in wishes if name in values}
        if empty := [name for name in ("seeds", "tasks") if values.get(name) == []]:
            raise UserError(
                f"Parameter {empty[0]} is empty: notebook {path.stem} needs one at least."
            )
        if "overrides" in values:
            moved = {name: settings[name] for name in settings if name not in values}
            values["overrides"] |= {name: moved[name] for name in moved if name in trained}
            for arguments in (profiles.training, profiles.without_context):
                arguments(profile, values["overrides"])  # checks them
        chosen = {name: values[name] for name in settings if name in values}
        jobs.append(Job(path, values, chosen, today, contents[path]))
    return jobs


class _AskedFor(Exception):
    """Ends a notebook's cell once it is known which runs it asks for."""


def asked_for(job: Job) -> list[RunConfig]:
    """Return the runs that a notebook first asks ``runs.fine_tuned`` for, and train none.

    Executes that cell and the earlier ones that it needs, with its values for the parameters.
    Raises UserError with what the notebook itself would say.
    """
    from dtlib import runs  # slow to import

    found, scope, chosen, wanted = [], {}, [], set()

    def note(configs: list[RunConfig], *_: object, **__: object) -> None:
        found.extend(configs)
        raise _AskedFor

    cells = [c for c in job.notebook.cells if c.cell_type == "code"]
    for cell in reversed(cells):
        defined, used = _names(cell.source)
        if "runs.fine_tuned(" in cell.source:
            chosen, wanted = [cell], used  # the first such cell is the last one here
        elif defined & wanted:
            chosen, wanted = [cell, *chosen], used | wanted
    what, advice = f"Notebook {job.path.stem} fails before it asks for runs", "run it to see where"
    asked, quiet = contextlib.suppress(_AskedFor), contextlib.redirect_stdout(io.StringIO())
    with explained(what, advice, Exception), patch.object(runs, "fine_tuned", note), asked, quiet:
        for cell in chosen:
            exec(cell.source, scope)
            scope.update(job.values if "parameters" in cell.metadata.get("tags", []) else {})
    return found


def _names(source: str) -> tuple[set[str], set[str]]:
    """Global names that a cell defines, and those that it uses."""
    tables = [symtable.symtable(source, "cell", "exec")]
    top = tables[0].get_symbols()
    for table in tables:
        tables += table.get_children()
    symbols = [symbol for table in tables for symbol in table.get_symbols()]
    defined = {symbol.get_name() for symbol in top if symbol.is_assigned() or symbol.is_imported()}
    return defined, {s.get_name() for s in symbols if s.is_global() and s.is_referenced()}


def run(
    profile: str,
    notebooks: list[str] | None = None,
    settings: dict | list[str] = (),
    figures: str = "figures",
    only_plan: bool = False,
    scheduler: str = "",
    slurm: str = "",
) -> dict[str, float]:
    """Run ``notebooks`` (numbers or names; default all) into ``figures``; return their seconds.

    First pre-trains the models that they need. Prints a plan for profiles that take hours, and
    does no more with ``only_plan``. With ``scheduler`` or ``slurm`` (see cluster.connected) all
    runs are trained there first, and notebooks then run side by side here. Raises UserError.
    """
    storage.sweep_cache()
    root, elsewhere = storage.repository(), scheduler or slurm
    here, own = Path(__file__).parent, root / "dtlib"
    if own.is_dir() and not own.samefile(here):  # the kernels, which start in root, take own
        raise UserError(f"{sys.executable} runs {here}, not {own}: run the Python of {root} there.")
    jobs = plan(root / "notebooks", profile, notebooks, settings)
    jobs.sort(key=_comes_last)
    _check_order(jobs)
    lacks = [text for job in jobs for text in profiles.missing(profile, job.values)]
    lacks = [text for text in lacks if not (elsewhere and text == profiles.NO_CARD)]
    if lacks and not only_plan:
        lacks = "; ".join(dict.fromkeys(lacks))
        raise UserError(f"The {profile} profile cannot run here; it lacks: {lacks}.")
    points = {p: None for job in jobs for p in profiles.to_be_pretrained(profile, job.values)}
    if only_plan or profile not in ("smoke", "laptop"):
        print(_costs(profile, jobs, list(points), bool(lacks)))
    if only_plan:
        return {}
    with contextlib.ExitStack() as stack:
        if elsewhere:
            from dtlib import cluster  # needs Dask

            stack.enter_context(cluster.connected(scheduler, slurm))
        if points:
            from dtlib.pretraining.training import pretrain_all

            print(f"Pre-training first: {', '.join(point.name for point in points)}.")
            pretrain_all(sorted(points, key=lambda point: -point.steps * point.batch_size))
        if elsewhere and len(jobs) > 1:
            seconds = _side_by_side(jobs, root / figures, settings)
        else:
            seconds = {job.path.stem: _run_one(job, root / figures) for job in jobs}
    for name, value in {**seconds, "total": sum(seconds.values())}.items():
        print(f"{name:<32}{value:>9.1f} s")
    print(compare(root / figures / profile))
    return seconds


def _comes_last(job: Job) -> bool:
    """Return whether a notebook reads the results of the others."""
    return bool(_about(job.notebook).get("after others"))


def _check_order(jobs: list[Job]) -> None:
    """Raise UserError if a notebook would read results that others make with other settings."""
    last = [job for job in jobs if _comes_last(job)]
    if last and any(job.chosen for job in jobs if job not in last):
        what = f"Notebook {last[0].path.stem} reads results at the profile's own settings"
        raise UserError(f"{what}: leave out --set, or name the other notebooks alone.")


def _costs(profile: str, jobs: list[Job], points: list, lacking: bool) -> str:
    """Say what the jobs cost. Unless files come later, a wrong value raises UserError."""
    from dtlib import planning  # slow to import

    asked, unknown = {}, []
    for job in jobs:
        try:
            asked |= dict.fromkeys(asked_for(job))
        except UserError as error:
            if not (lacking or points):
                raise
            unknown.append(f"Not counted: the runs of {job.path.stem} ({error})")
    return "\n".join([planning.describe(profile, list(asked), points), *unknown])


def _run_one(job: Job, figures: Path) -> float:
    """Execute a notebook, list its figures; return the seconds it took."""
    root, folder = job.path.parents[1], figures / job.values["profile"] / job.path.stem
    with alone(folder):
        began, commit = time.monotonic(), commit_of(root)
        before = {file: file.stat().st_mtime_ns for file in folder.glob("*")}
        execute(job, root, folder)
        list_figures(job.path, job.notebook, folder, before, commit)
    return time.monotonic() - began


def _side_by_side(jobs: list[Job], figures: Path, settings: list[str]) -> dict[str, float]:
    """Train all runs of the jobs; then run notebooks at once, each by a command of its own.

    Notebooks whose metadata say "after others" come last. Raises UserError.
    """
    from dtlib.runs import fine_tuned  # slow to import

    fine_tuned([config for job in jobs for config in asked_for(job)])
    options = ["--figures", str(figures), *(f"--set={text}" for text in settings)]

    def run_one(job: Job) -> float:
        began, options_here = time.monotonic(), ["--profile", job.values["profile"], *options]
        if notebook_hash(job.path) != code_hash(job.notebook.cells):
            raise UserError(
                f"Notebook {job.path.stem} changed since the batch began: run it again."
            )
        command = [sys.executable, "-m", "dtlib", "figures", job.path.stem, *options_here]
        done = subprocess.run(command, capture_output=True, text=True, cwd=job.path.parents[1])
        if done.returncode:
            raise UserError(done.stderr.strip().split("Error: ")[-1])
        print(f"{job.path.stem} is done.", flush=True)
        return time.monotonic() - began

    last = [job for job in jobs if _comes_last(job)]
    first = [job for job in jobs if job not in last]
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:
        seconds = [*pool.map(run_one, first), *pool.map(run_one, last)]
    return {job.path.stem: one for job, one in zip([*first, *last], seconds, strict=True)}


def _about(notebook: NotebookNode) -> dict:
    """Return what a notebook's metadata say to the batch."""
    return notebook.metadata.get("dtlib", {})


def alone(folder: Path) -> contextlib.AbstractContextManager:
    """Hold a folder of figures against other batches, whatever their cache and way to it."""
    return storage.locked(folder.resolve())


def commit_of(root: Path) -> str:
    """Return the commit of the code as it lies there now; "" where ``root`` is not git's root."""
    git = "git rev-parse --show-toplevel HEAD && git status --porcelain -uall -- dtlib notebooks"
    git = subprocess.run(git, shell=True, cwd=root, capture_output=True, text=True)
    top, commit, *changed = git.stdout.splitlines() if not git.returncode else ["", ""]
    return commit + ", with changes" * bool(changed) if Path(top) == root.resolve() else ""


def execute(job: Job, root: Path, folder: Path) -> None:
    """Execute a notebook with this interpreter in ``root``; write ``folder``/executed.ipynb.

    Raises UserError if a cell fails; unfinished.ipynb then holds what was executed. Nothing of the
    user's own IPython is read: its startup files could change any number.
    """
    import papermill  # slow to import

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns wrongly about parameters
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it echoes each Ctrl-C at length
    folder.mkdir(parents=True, exist_ok=True)
    name, copy = job.path.stem, folder / "unfinished.ipynb"
    settings = {"cwd": root, "kernel_name": "python3", "language": "python"}
    # The second shows progress inside a cell.
    settings |= {"progress_bar": {"desc": name}, "stderr_file": sys.stderr}
    with storage.writing(copy), storage.temporary_folder() as home:
        extra = ["--log-level=CRITICAL", "--IPKernelApp.exec_PYTHONSTARTUP=False"]
        write_kernel_spec(Path(home, "kernels/python3"), extra_arguments=extra)
        about = {"DTLIB_FIGURES": str(folder.parents[1]), "DTLIB_OVERRIDES": json.dumps(job.chosen)}
        about |= {"DTLIB_CACHE": str(cache_root()), "JUPYTER_RUNTIME_DIR": home}
        about |= {"DTLIB_NOTEBOOK": name, "DTLIB_VALUES": job.profile_values}
        about |= {"DTLIB_HASH": code_hash(job.notebook.cells), "IPYTHONDIR": home}
        about["OMP_NUM_THREADS"] = "1"  # no digit depends on the number of cores
        output = str(copy).replace("{", "{{").replace("}", "}}")
        connection = {"connection_file": f"{home}/kernel.json"}  # else it survives kill -9
        settings["config"] = Config(KernelManager=connection)
        notebook = copied(job.notebook)  # papermill writes into it
        try:
            with patch.dict(os.environ, about, JUPYTER_PATH=home):
                papermill.execute_notebook(notebook, output, job.values, **settings)
        except papermill.PapermillExecutionError as error:
            first, last = error.source.strip().splitlines()[0], error.evalue.strip().split("\n")[-1]
            what = f"Notebook {name} failed in cell [{error.exec_count}] ({first}): {error.ename}"
            raise UserError(f"{what}: {last} (the whole traceback is in {copy})") from error
        except RuntimeError as error:  # the kernel died
            reason = f"{error}, perhaps for lack of memory; see {copy}"
            raise UserError(f"Notebook {name} stopped: {reason}.") from error
    executed = to_read(nbformat.read(copy, as_version=4), root)
    executed.metadata["dtlib"] = {"profile": job.values["profile"], "notebook": name}
    for cell in executed.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, job.path.parent, folder)
    write_text(folder / "executed.ipynb", nbformat.writes(executed) + "\n")
    copy.unlink()


def to_read(notebook: NotebookNode, root: Path) -> NotebookNode:
    """Return an executed notebook without times, progress bars and paths of this machine."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook.metadata = nbformat.from_dict(about)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.id = tags[0] if "injected-parameters" in tags else cell.id  # else a random one
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [_small(output) for output in cell.outputs if _is_shown(output)]
        cell.source = _placeless(cell.source, root)
        for texts in [part for o in cell.get("outputs", []) for part in (o, o.get("data", {}))]:
            for kind in texts.keys() & {"text", "evalue"} | {k for k in texts if k[:5] == "text/"}:
                texts[kind] = _placeless(texts[kind], root)
    return notebook


def _placeless(text: str, root: Path) -> str:
    return text.replace(str(cache_root()), "CACHE").replace(f"{root}/", "")


def with_links(text: str, before: Path, after: Path) -> str:
    """Return Markdown whose links to files, relative to ``before``, lead there from ``after``."""

    def lead(found: re.Match) -> str:
        target = before / found[0]
        return Path(os.path.relpath(target, after)).as_posix() if target.exists() else found[0]

    return re.sub(r"(?<=\]\()(?!\w+:)[^)#\s]+", lead, text)


def _is_shown(output: NotebookNode) -> bool:
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return output.get("name") != "stderr" and not widget


def _small(output: NotebookNode) -> NotebookNode:
    data = output.get("data", {})
    if len(data) > 1:
        data.pop("text/plain", None)  # there is a picture or a table
    if picture := data.get("image/png"):
        small = io.BytesIO()
        image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
        image.quantize(256).save(small, "png", optimize=True)  # a third of the bytes
        data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


def list_figures(
    path: Path, notebook: NotebookNode, folder: Path, before: dict[Path, int], commit: str
) -> None:
    """Write figures.json: for each figure its notebook, its cell's tag and the ``commit``.

    ``before``: when each earlier file was changed. Removes figures that have not changed since.
    Raises UserError if a promised file is not new, and for a figure without its tagged cell.
    """

    def is_new(file: Path) -> bool:
        return file.exists() and file.stat().st_mtime_ns != before.get(file)

    promised = _about(notebook).get("figures", [])
    files = [folder / f"{name}.{end}" for name in promised for end in ("png", "pdf", "csv")]
    for file in [*files, folder / "results.json"]:
        if not is_new(file):
            raise UserError(f"Notebook {path.stem} did not write {file}, which it promises.")
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    found = {}
    for png in sorted(folder.glob("*.png")):
        if not is_new(png):
            for file in [png.with_suffix(f".{end}") for end in ("png", "pdf", "csv")]:
                if file.exists() and not is_new(file):  # a figure that became a table keeps its csv
                    file.unlink()
            continue
        own = [tag for tag in tags if f"figure-{png.stem}_".startswith(f"{tag}_")]
        if not own:
            raise UserError(f"Notebook {path.stem} has no cell tagged figure-{png.stem}.")
        cell = max(own, key=len)
        found[png.stem] = {"notebook": path.stem, "cell": cell, "commit": commit}
    write_text(folder / "figures.json", found)
