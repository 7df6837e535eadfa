"""The batch runner, on throw-away notebooks: wrong names run nothing, a failing cell stops, figures are new."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

from dtlib import batch, profiles
from dtlib.errors import UserError

PARAMETERS = """profile = "laptop"
tasks = ["hopper"]  # x = y: papermill's own reader would stumble over this
seeds = [0, 1,
         2]
epochs = 3
learning_rate = 1e-3
fast = False
size = "mini"
limit = None
more = {"a": 0}"""


def write_notebook(path, *cells, parameters=PARAMETERS, figures=()):
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["dtlib"] = {"figures": list(figures)}
    nbformat.write(notebook, path)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small repository with two notebooks; the current folder is inside it."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    write_notebook(tmp_path / "notebooks" / "00_first.ipynb")
    write_notebook(tmp_path / "notebooks" / "01_second.ipynb", parameters='profile = "laptop"\nwidth = 2')
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def plan(repository, profile="laptop", wanted=None, **overrides):
    return batch.plan(repository / "notebooks", profile, wanted, overrides)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(profile="desktop"), "Unknown profile 'desktop': the profiles are smoke, laptop, full, gpu, paper"),
    (dict(wanted=["first"]), "Unknown notebook 'first': the notebooks are 00_first, 01_second"),
    (dict(wanted=["00", "7"]), "Unknown notebook '7'"),
    (dict(epoch=2), "'epoch': the parameters are epochs, fast, learning_rate, limit, more, seeds, size, tasks, width"),
    (dict(wanted=["00"], width=2), "Unknown parameter 'width'"),
    (dict(profile="laptop", epochs="many"), "epochs got 'many': expected int, such as 3"),
    (dict(epochs=2.5), "epochs got 2.5: expected int"),
    (dict(epochs=True), "epochs got True: expected int"),
    (dict(epochs=None), "epochs got None: expected int"),
    (dict(learning_rate="fast"), "learning_rate got 'fast': expected float, such as 0.001"),
    (dict(fast="perhaps"), "fast got 'perhaps': expected bool"),
    (dict(fast=1), "fast got 1: expected bool"),
    (dict(tasks=""), "tasks got '': expected list"),
    (dict(seeds=3), "seeds got 3: expected list"),
    (dict(seeds="0,one"), "seeds got 'one': expected int"),
    (dict(size=3), "size got 3: expected str"),
    (dict(more="{a"), "more got '{a': expected dict"),
])
def test_wrong_names_and_values_are_one_clear_line_and_leave_nothing(repository, arguments, message):
    before = sorted(repository.rglob("*"))
    with pytest.raises(UserError) as caught:
        batch.run(arguments.pop("profile", "laptop"), arguments.pop("wanted", None), arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(repository.rglob("*")) == before


def test_the_profile_is_no_parameter(repository):
    with pytest.raises(UserError, match="Unknown parameter 'profile'"):
        batch.run("laptop", None, {"profile": "paper"})


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("learning_rate", "1e-4", 1e-4), ("learning_rate", 1, 1.0), ("learning_rate", "2", 2.0), ("epochs", "7", 7),
    ("seeds", "3,4", [3, 4]), ("seeds", "[3, 4]", [3, 4]), ("seeds", "3", [3]), ("seeds", (3, 4), [3, 4]),
    ("seeds", "[]", []),
    ("tasks", "hopper", ["hopper"]), ("tasks", "[hopper, walker2d]", ["hopper", "walker2d"]),
    ("tasks", "['hopper', 'walker2d']", ["hopper", "walker2d"]), ("fast", "true", True), ("fast", "False", False),
    ("size", "12", "12"), ("limit", "5", 5), ("limit", "some", "some"), ("limit", None, None),
    ("more", "{'a': 1}", {"a": 1}),
])
def test_text_takes_the_type_of_the_default(repository, name, value, expected):
    values = plan(repository, wanted=["00"], **{name: value})[0][2]
    assert values[name] == expected
    assert type(values[name]) is type(expected)


def test_notebooks_are_found_by_number_and_name_in_order(repository):
    for wanted in (None, [], ["1", "00"], ["01_second", "00_first.ipynb", "0"]):
        assert [path.stem for path, _, _ in plan(repository, wanted=wanted)] == ["00_first", "01_second"]
    assert [path.stem for path, _, _ in plan(repository, wanted=["01"])] == ["01_second"]


def test_profiles_set_what_a_notebook_has_and_overrides_come_last(repository):
    (_, _, first), (_, _, second) = plan(repository, "smoke", epochs=9)
    assert first["seeds"] == profiles.PROFILES["smoke"]["seeds"]
    assert first["epochs"] == 9
    assert first["profile"] == second["profile"] == "smoke"
    assert set(second) == {"profile", "width"}


@pytest.mark.parametrize("cell", ["seeds = list(range(3))", "import os", "a, b = 1, 2", "seeds = [0"])
def test_parameter_cells_hold_plain_values_only(repository, cell):
    write_notebook(repository / "notebooks" / "00_first.ipynb", parameters=cell)
    with pytest.raises(UserError, match="00_first needs one cell tagged 'parameters'"):
        plan(repository)


def test_a_repository_without_notebooks_says_so(repository):
    for path in repository.glob("notebooks/*"):
        path.unlink()
    with pytest.raises(UserError, match="no notebook in"):
        batch.run("laptop")


def test_paper_without_a_network_names_each_file_and_folder(repository, monkeypatch):
    monkeypatch.setattr(profiles, "unreachable", lambda address: "no network")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(repository / "d4rl"))
    (repository / "d4rl").mkdir()
    (repository / "d4rl" / "walker2d_medium-v2.hdf5").touch()
    write_notebook(repository / "notebooks" / "00_first.ipynb",
                   parameters='profile = "laptop"\ndataset = ""\ntasks = [""]\ninitialisations = [""]\nwidth = 1')
    before = sorted(repository.rglob("*"))
    with pytest.raises(UserError) as caught:
        batch.run("paper", ["00"])
    for task in ("hopper", "halfcheetah"):
        assert str(repository / "d4rl" / f"{task}_medium-v2.hdf5") in str(caught.value)
    assert "walker2d" not in str(caught.value)
    assert "openai/imagegpt-small" in str(caught.value)
    assert sorted(repository.rglob("*")) == before
    # Only the profile's own wishes that the notebook has count; with its data collected here nothing is missing.
    assert len(plan(repository, "paper", ["00"], dataset="collected:medium", initialisations="random")) == 1


def test_a_device_that_is_absent_is_missing(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert any("CUDA" in lack for lack in profiles.missing("gpu"))
    assert profiles.missing("laptop") == profiles.missing("smoke") == profiles.missing("full") == []


def test_packages_that_are_absent_are_missing(monkeypatch):
    monkeypatch.setattr(profiles, "unreachable", lambda address: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lacks = {name: [lack for lack in profiles.missing(name) if "package" in lack] for name in profiles.PROFILES}
    games, adapters, wikitext = (f"the package {name} (pip install 'dtlib[{extra}]')" for name, extra in (
        ("ale-py", "games"), ("peft", "adapters"), ("datasets", "wikitext")))
    assert lacks == {"smoke": [games], "laptop": [], "full": [games, adapters], "gpu": [games],
                     "paper": [games, adapters, wikitext]}
    assert profiles.missing("laptop", {"variants": ["co-training"], "cotraining_corpus": "wikitext-2"}) == [wikitext]
    assert profiles.missing("laptop", {"variants": ["alignment"], "cotraining_corpus": "wikitext-2"}) == []


def test_amounts_are_lists():
    with pytest.raises(UserError, match="amounts of mini are 5: expected a list"):
        profiles.to_be_made({"pretrained": ["language"], "amounts": {"mini": 5}})


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux")
def test_what_kernels_share_needs_no_extra():
    """Not even one that is installed here."""
    script = ("import importlib, sys\nfrom dtlib import kernels\n"
              "sys.modules.update(dict.fromkeys(['ale_py', 'peft', 'datasets']))\n"
              "for name in kernels.PRELOADED: importlib.import_module(name)")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


REPORT = """import json, os, sys
from pathlib import Path
folder = Path(os.environ["DTLIB_FIGURES"], profile, "00_first")
for end in ("png", "pdf", "csv"):
    (folder / f"curve.{end}").touch()
(folder / "results.json").write_text(json.dumps([sys.executable, os.getcwd(), learning_rate, seeds, fast,
                                                 os.environ["DTLIB_OVERRIDES"]]))"""


def test_a_run_uses_this_interpreter_from_the_root_with_typed_parameters(repository, monkeypatch, capsys, caplog):
    hostile = repository / "jupyter" / "kernels" / "python3"
    hostile.mkdir(parents=True)
    specification = {"argv": ["/bin/false"], "display_name": "no", "language": "python"}
    (hostile / "kernel.json").write_text(json.dumps(specification))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(repository / "jupyter"))
    monkeypatch.setenv("JUPYTER_PATH", str(repository / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    import sklearn  # noqa: F401, these two set variables as they are imported

    import dtlib.model  # noqa: F401
    before = dict(os.environ)
    write_notebook(repository / "notebooks" / "00_first.ipynb", REPORT, figures=["curve"])
    seconds = batch.run("smoke", ["00"], {"learning_rate": "1e-4", "fast": "true"}, figures="figures {of today}")
    folder = repository / "figures {of today}" / "smoke" / "00_first"
    assert json.loads((folder / "results.json").read_text()) == [
        sys.executable, str(repository), 1e-4, [0, 1], True, '{"learning_rate": 0.0001, "fast": true}']
    assert (folder / "executed.ipynb").exists()
    assert list(seconds) == ["00_first"]
    printed = capsys.readouterr()
    assert "00_first" in printed.out and "total" in printed.out
    assert "100%" in printed.err
    assert "Unable to parse" not in printed.err + caplog.text
    assert dict(os.environ) == before


def test_a_failing_cell_stops_the_batch_and_is_named(repository):
    write_notebook(repository / "notebooks" / "00_first.ipynb", "before = 1", "\nresult = before / 0\nafter = 2")
    with pytest.raises(UserError) as caught:
        batch.run("laptop")
    executed = repository / "figures" / "laptop" / "00_first" / "executed.ipynb"
    for part in ("00_first", "cell [4]", "(result = before / 0)", "ZeroDivisionError: division by zero", str(executed)):
        assert part in str(caught.value)
    assert executed.exists()
    assert not (repository / "figures" / "laptop" / "01_second").exists()


def test_a_promised_figure_that_is_absent_or_old_is_an_error(repository):
    folder = repository / "figures" / "laptop" / "00_first"
    folder.mkdir(parents=True)
    for name in ("curve.png", "curve.pdf", "curve.csv"):
        (folder / name).touch()
    os.utime(folder / "curve.pdf", (0, 0))
    cell = f"from pathlib import Path\nfor end in ('png', 'csv'): Path(r'{folder}', f'curve.{{end}}').touch()"
    write_notebook(repository / "notebooks" / "00_first.ipynb", cell, figures=["curve"])
    with pytest.raises(UserError, match="without writing .*curve.pdf, which it promises"):
        batch.run("laptop", ["00"])


def test_a_kernel_that_dies_is_an_error_that_names_the_notebook(repository):
    write_notebook(repository / "notebooks" / "00_first.ipynb", "import os\nos._exit(1)")
    with pytest.raises(UserError, match="Notebook 00_first stopped: .*died"):
        batch.run("laptop", ["00"])


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux")
def test_kernels_start_with_their_imports_and_nothing_of_the_one_before(repository):
    leave = """import os, sys, torch, dtlib
assert {"dtlib.runs", "matplotlib.pyplot", "torch._dynamo"} <= set(sys.modules)
assert not hasattr(dtlib, "left") and "LEFT" not in os.environ and os.getpgid(0) == os.getpid()
assert torch.initial_seed() != 1
dtlib.left = os.environ["LEFT"] = "something"
torch.manual_seed(1)
import matplotlib.pyplot as plt
plt.plot([1, 2])"""
    for name in ("00_first", "01_second"):
        results = f"from pathlib import Path\nPath(os.environ['DTLIB_FIGURES'], profile, {name!r}, 'results.json').touch()"
        write_notebook(repository / "notebooks" / f"{name}.ipynb", leave, results)
    assert list(batch.run("laptop")) == ["00_first", "01_second"]
    shown = nbformat.read(repository / "figures" / "laptop" / "01_second" / "executed.ipynb", as_version=4)
    assert any("image/png" in output.get("data", {}) for cell in shown.cells for output in cell.get("outputs", []))


def test_a_killed_batch_leaves_no_kernel(repository):
    note, kernel = repository / "kernel", None
    write_notebook(repository / "notebooks" / "00_first.ipynb", f"""import os, time
from pathlib import Path
Path({str(note)!r}).write_text(str(os.getpid()))
time.sleep(600)""")
    running = subprocess.Popen([sys.executable, "-m", "dtlib", "figures", "00"], cwd=repository, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if note.exists() and (kernel := note.read_text()):
                break
            time.sleep(0.1)
    finally:
        running.kill()
        running.wait()
    state = Path("/proc", kernel, "stat")
    for _ in range(300):
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":  # it has ended, but nobody has asked for its exit code
                break
        except OSError:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"The kernel, process {kernel}, is still there.")


ASKING = """from dtlib import runs
finished = runs.fine_tuned([runs.RunConfig(size=size, epochs=epochs, initialisation=name, seed=seed)
                            for name in initialisations for seed in seeds], device=device)"""
POINTS = """profile = "laptop"
size = "tiny"
epochs = 3
seeds = [0, 1]
initialisations = ["random", "markov-1k"]
device = "cuda"
"""


def test_a_plan_counts_the_runs_and_runs_nothing(repository, capsys):
    for name in ("00_first", "01_second"):  # both ask for the same
        write_notebook(repository / "notebooks" / f"{name}.ipynb", "raise SystemExit", ASKING, parameters=POINTS)
    before = sorted(repository.rglob("*"))
    assert batch.run("laptop", None, {"seeds": "0,1,2"}, only_plan=True) == {}
    assert "asks for 6 runs, 6 of them new, after 1 new starting points" in capsys.readouterr().out
    assert sorted(repository.rglob("*")) == before


@pytest.mark.parametrize("fast", [False, True])
def test_starting_points_that_are_absent_are_made_first(fast, repository, monkeypatch):
    from dtlib import pretrain
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True} if fast else {})
    monkeypatch.setattr(pretrain, "pretrain_all", made.extend)
    write_notebook(repository / "notebooks" / "00_first.ipynb", "raise KeyError", parameters=POINTS.replace("cuda", "auto"))
    with pytest.raises(UserError, match="KeyError"):
        batch.run("laptop", ["00"])
    precision = "bfloat16" if fast else "float32"
    assert made == [pretrain.PretrainConfig("markov", size="tiny", tokens="1k", precision=precision)]


@pytest.fixture
def real_notebooks():
    try:
        return batch.repository() / "notebooks"
    except UserError:
        pytest.skip("the tests run outside the repository")


def test_no_two_notebooks_ask_for_one_starting_point_in_two_ways(real_notebooks, monkeypatch, tmp_path):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    for profile in ("full", "gpu"):
        jobs = batch.plan(real_notebooks, profile, None, {}, True)
        points = {config for *_, values in jobs for config in profiles.to_be_made(values)}
        assert len({config.name for config in points}) == len(points) > 5


def test_each_profile_fits_the_real_notebooks(real_notebooks):
    """Every name that a profile sets is a parameter of some notebook, of the right type."""
    notebooks = batch.find(real_notebooks, None)
    known = {}
    for path in notebooks:
        known |= batch.defaults(nbformat.read(path, as_version=4), path.stem)
    for name, values in profiles.PROFILES.items():
        for parameter, value in values.items():
            assert parameter in known, f"{name}: {parameter}"
            batch.convert(parameter, value, known[parameter])
