"""The real notebooks on the smoke profile: real data, training, rollouts and figures."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from unittest.mock import patch

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import cells
from IPython.display import display
from matplotlib.figure import Figure

from dtlib import batch, profiles, storage
from dtlib import figures as dtlib_figures
from dtlib.errors import UserError
from dtlib.pretraining.training import pretrain_all
from dtlib.records import runs_root
from dtlib.starts import STARTING_POINTS
from dtlib.storage import cache_root, repository

NOTEBOOKS = sorted((repository() / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
ROLES = ("random", "language", "image", "controls", "control_donors", "control_hosts")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """One folder for all notebooks, as the last one gathers what the others recorded."""
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="module", autouse=True)
def one_core():
    """Train in the notebook's own process: a worker takes longer to start than smoke to train."""
    with patch.dict(os.environ, LOKY_MAX_CPU_COUNT="1", OMP_NUM_THREADS="1"):
        yield


def code_cells(path):
    everything = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in everything if cell["cell_type"] == "code"]


def in_exercises(path):
    """Code of a notebook's exercises and answers, which runs after all cells."""
    everything = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in everything if cell["cell_type"] == "markdown"]
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", "\n".join(texts), re.M | re.S)
    return [textwrap.dedent(block) for block in blocks]


@contextlib.contextmanager
def in_this_process(folder):
    """What a kernel sets up for a notebook; afterwards all is as before.

    Figures are not painted: only their numbers are compared.
    """
    with (
        patch.dict(os.environ, DTLIB_FIGURES=str(folder)),
        patch.dict(dtlib_figures.STYLES),
        patch.object(dtlib_figures, "framed"),
        patch.object(Figure, "savefig", lambda figure, path, **_: path.touch()),
        plt.rc_context(),
        torch.enable_grad(),
    ):
        try:
            yield {"__name__": "__main__", "display": display}
        finally:
            plt.close("all")
            torch.set_num_threads(1)


def run_here(name, settings, folder):
    """Execute a notebook's cells in this process, which has imported everything."""
    (job,) = batch.plan(repository() / "notebooks", "smoke", [name], settings)
    pretrain_all(profiles.to_be_pretrained("smoke", job.values))
    about = {"DTLIB_NOTEBOOK": job.path.stem, "DTLIB_HASH": storage.notebook_hash(job.path)}
    as_batch = patch.dict(os.environ, about)
    with as_batch, in_this_process(folder) as scope:
        for cell in code_cells(job.path):
            exec(compile("".join(cell["source"]), job.path.name, "exec"), scope)
            if "parameters" in cell["metadata"].get("tags", []):
                scope |= job.values
        for number, source in enumerate(in_exercises(job.path)):
            exec(compile(source, f"{job.path.name}, exercise's code {number}", "exec"), scope)
    return folder / "smoke" / job.path.stem


@each
def test_runs_and_repeats_itself(path, figures, capfd):
    """Run in a kernel, then here: every run is found, and the numbers are the same to the byte.

    The two processes hash text differently, and nothing that was measured is remembered here.
    """
    trained, numbers = [], []
    batch.run("smoke", [path.stem], figures=str(figures / "first"))
    for attempt in ("first", "second"):
        folder = figures / attempt / "smoke" / path.stem
        if attempt == "second":
            run_here(path.stem, {}, figures / attempt)
        files = [file for file in runs_root().rglob("*") if file.is_file()]
        trained.append({file: file.stat().st_mtime_ns for file in files})
        named = [file for file in folder.glob("*") if file.suffix in (".csv", ".json")]
        numbers.append({f.name: f.read_bytes() for f in named if f.name != "figures.json"})
    assert numbers[0] == numbers[1] and len(numbers[0]) > 1
    assert trained[0] == trained[1]
    capfd.readouterr()  # progress bars


def kill_a_worker_at_work(logs, done, killed):
    """Kill the first worker that has saved an epoch of a run and has not finished it."""
    while not done.wait(0.01):
        for state in (logs.parent / "runs/.partial").glob("*/resume.safetensors"):
            with contextlib.suppress(OSError, IndexError, ProcessLookupError):
                log = (logs / f"{state.parent.name}.log").read_text(encoding="utf-8")
                if "is done" not in log:
                    os.kill(int(re.findall("process ([0-9]+)", log)[-1]), signal.SIGKILL)
                    killed.append(state.parent.name)
                    return


@pytest.fixture
def local_tables(figures):
    """Where two notebooks wrote their tables here, by name; they run unless a test ran them."""
    names = "03_parameter_change", "12_output_head"  # quick ones
    folders = {name: figures / "first/smoke" / name for name in names}
    for name, folder in folders.items():
        if not (folder / "results.json").exists():
            batch.run("smoke", [name], figures=str(figures / "first"))
    return folders


@pytest.fixture
def three_workers(tmp_path, monkeypatch):
    """The address of a real scheduler with three worker processes and a new cache."""
    pytest.importorskip("distributed")
    shutil.copytree(cache_root() / "data", tmp_path / "cache/data")
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    about, quiet = tmp_path / "scheduler.json", {"stdout": -3, "stderr": -3}
    dask = [sys.executable, "-m", "dask"]
    worker = [*dask, "worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    commands = [[*dask, "scheduler", "--port", "0", "--no-dashboard"], worker, worker, worker]
    commands = [[*command, "--scheduler-file", str(about)] for command in commands]
    started = [subprocess.Popen(command, cwd=tmp_path, **quiet) for command in commands]
    while not about.exists():
        time.sleep(0.1)
    yield json.loads(about.read_text())["address"]
    for process in started:
        process.kill()
        process.wait()


def test_workers_of_a_cluster_give_the_same_bytes_though_one_is_killed(
    local_tables, three_workers, tmp_path, capfd
):
    names, done, killed = [*local_tables], threading.Event(), []
    logs = tmp_path / "cache/logs"
    thread = threading.Thread(target=kill_a_worker_at_work, args=(logs, done, killed))
    thread.start()
    try:
        with patch.dict(os.environ, LOKY_MAX_CPU_COUNT="2"):  # notebooks side by side
            batch.run("smoke", names, figures=str(tmp_path), scheduler=three_workers)
    finally:
        done.set()
        thread.join()
    assert len(killed) == 1
    assert (logs / f"{killed[0]}.log").read_text().count("begins") == 2
    for name in names:
        tables = sorted(local_tables[name].glob("*.csv"))
        assert tables
        for local in tables:
            assert (tmp_path / "smoke" / name / local.name).read_bytes() == local.read_bytes()
    capfd.readouterr()


def test_notebooks_share_their_settings():
    """So that they share stored runs: what every question needs has one default."""
    shared = {}
    for path in NOTEBOOKS:
        values = batch.defaults(path)
        assert values["profile"] == "laptop" and values.get("overrides", {}) == {}, path.stem
        for name in values.keys() & {"tasks", "seeds", "random", "language", "image", "level"}:
            assert shared.setdefault(name, values[name]) == values[name], f"{path.stem}: {name}"


@each
def test_starting_points_are_named_by_role(path):
    """Each is known, and none is found by its position in a list."""
    values = batch.defaults(path)
    named = [values[role] for role in ROLES if role in values]
    for value in named:
        for name in [value] if isinstance(value, str) else value:
            assert name in STARTING_POINTS, name
    assert not any("initialisations[" in "".join(cell["source"]) for cell in code_cells(path))


@each
def test_is_committed_clean_and_short(path):
    for cell in code_cells(path):
        lines = "".join(cell["source"]).splitlines()
        assert not cell["outputs"] and cell["execution_count"] is None
        limit = 40 if "parameters" in cell["metadata"].get("tags", []) else 25
        if any(tag.startswith("figure-") for tag in cell["metadata"].get("tags", [])):
            limit = 8  # how a figure is drawn stands in a function
        assert len(lines) <= limit, "\n".join(lines)
        assert all(len(line) <= 100 for line in lines), "\n".join(lines)


@each
def test_each_promised_figure_has_its_cell(path):
    promised = json.loads(path.read_text(encoding="utf-8"))["metadata"]["dtlib"]["figures"]
    tags = [tag for cell in code_cells(path) for tag in cell["metadata"].get("tags", [])]
    drawing = [tag for tag in tags if tag.startswith("figure-")]
    assert len(set(drawing)) == len(drawing)
    assert {f"figure-{name}" for name in promised} <= set(drawing)


GUIDE = repository() / "notebooks" / "README.md"


def test_the_guide_lists_all_notebooks_and_they_follow_its_order():
    """Each notebook links to the one before and to the next one, at its top and at its end."""
    order = re.findall(r"^\| \d+ \| \[[^]]*\]\((\w+\.ipynb)\)", GUIDE.read_text("utf-8"), re.M)
    assert sorted(order) == [path.name for path in NOTEBOOKS]
    for before, name, after in zip([None, *order], order, [*order[1:], None], strict=False):
        cells = json.loads((GUIDE.parent / name).read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        for text in (texts[0], texts[-1]):
            assert before is None or re.search(rf"Before: \[[^]]*\]\({before}\)", text), name
            assert after is None or re.search(rf"Next: \[[^]]*\]\({after}\)", text), name


def test_a_notebook_asks_the_guides_question():
    """Word for word, before its results."""
    rows = re.findall(
        r"^\| \d+ \| \[[^]]*\]\((\w+)\.ipynb\).*\| ([^|]+) \|$", GUIDE.read_text("utf-8"), re.M
    )
    assert len(rows) == len(NOTEBOOKS)
    for name, question in rows:
        first = json.loads((GUIDE.parent / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]
        assert f"**Before you look:** {question}" in "".join(first["source"]), name


def found_cells(path, tag):
    """What stands in a notebook's cells of text with that tag."""
    everything = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in everything if tag in cell["metadata"].get("tags", [])]
    return "".join("".join(cell["source"]) for cell in tagged)


# "found" is about laptop, "found-gpu" about the profile gpu.
TAGS = {"found": "laptop"} | {f"found-{name}": name for name in profiles.PROFILES}
FOUND = [(path, tag) for path in NOTEBOOKS for tag in TAGS if found_cells(path, tag)]


@pytest.mark.parametrize("path, tag", FOUND, ids=lambda one: getattr(one, "stem", one))
def test_what_was_found_is_what_was_recorded(path, tag):
    """The bold numbers of the text are the values under "found" in the results, in order."""
    results = repository() / "figures" / TAGS[tag] / path.stem / "results.json"
    recorded = json.loads(results.read_text(encoding="utf-8"))["found"]
    written = re.findall(r"\*\*([−\d][\d.,]*)\*\*", found_cells(path, tag))
    assert len(written) == len(recorded) > 0
    for text, (name, value) in zip(written, recorded, strict=True):
        text = text.replace(",", "").replace("−", "-")
        digits = len(text.partition(".")[2])
        assert f"{value:.{digits}f}" == text, f"{name}: written {text}, recorded {value}"


def test_results_of_another_profile_or_of_other_values_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_FIGURES", str(tmp_path))
    own = dtlib_figures.Output("smoke", "00_sanity_check")
    own.values = "of another yml"
    own.record({"verdicts": []})
    with pytest.raises(UserError, match="00_sanity_check .run before the profile changed"):
        run_here("10", {}, tmp_path)
    own.profile = "laptop"
    own.record({"verdicts": []})
    with pytest.raises(UserError, match="00_sanity_check .run with profile laptop"):
        run_here("10", {}, tmp_path)


MEASURING = [path for path in NOTEBOOKS if '"measure"' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", MEASURING, ids=lambda path: path.stem)
def test_measures_stand_alone(path):
    """Cells tagged "measure" import what they need: they can be copied into other work."""
    assert any(callable(value) for value in vars(cells(path.stem, "measure")).values())


def test_another_starting_point_can_play_a_role(tmp_path, capfd):
    """A notebook compares what it is given: here a Markov chain for language, and no control."""
    folder = run_here("03", {"language": "markov", "controls": []}, tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert "markov" in json.dumps(results) and "language" not in set(
        pd.read_csv(folder / "by_depth.csv").initialisation
    )
    capfd.readouterr()


def test_sizes_and_amounts_add_up(tmp_path, capfd):
    """Two batches, the second told of the first one's table, give what one batch of all gives."""

    def table(folder, amounts, **further):
        wishes = {
            "pretrained": ["markov"],
            "amounts": amounts,
            "rate_factors": {"tiny": [1.0, 0.1]},
        }
        return run_here("11", wishes | further, tmp_path / folder) / "size_and_amount.csv"

    first = table("first", {"tiny": ["4k"]})
    at_once = table("at once", {"tiny": ["2k", "4k"]})
    both = table("both", {"tiny": ["2k"]}, earlier=str(first))
    assert both.read_bytes() == at_once.read_bytes() != first.read_bytes()
    one = table("one K", {"tiny": ["2k"]}, pretrained=["iid"], context=1)
    joined = pd.read_csv(table("joined", {"tiny": ["2k"]}, earlier=str(one)))
    assert {*zip(joined.kind, joined.K, strict=True)} == {
        ("random-matched", 20),
        ("random-matched", 1),
        ("markov", 20),
        ("markov", 1),
        ("iid", 1),
    }
    with pytest.raises(UserError, match="Of the 8 runs that .* shares with those made now, 0 are"):
        table("other", {"tiny": []}, earlier=str(first), warmup_steps=3)
    capfd.readouterr()
