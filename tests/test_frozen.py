"""What no rebuild may change: run names, random streams, parameters, old runs, losses.

The values in tests/frozen/ were computed with the code of revision 8ba6e18, before the rebuild. The
runs that notebooks have asked for since were added to their names.
"""

import ast
import contextlib
import json
import re
import sys
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pytest
import torch

from dtlib import batch, data, evaluate, profiles, runs
from dtlib.config import RunConfig
from dtlib.errors import UserError
from dtlib.records import digests
from dtlib.seeding import stream_seed
from dtlib.starts import build_model
from dtlib.tasks import get_task

ROOT = Path(__file__).parents[1]
FROZEN = Path(__file__).parent / "frozen"
HOPPER = get_task("hopper")
RUN_NAME = re.compile(r"[\w-]+-K\d+-seed\d+-[0-9a-f]{12}")


def frozen(name):
    return json.loads((FROZEN / name).read_text())


def readable(name):
    """A run's name without its hash."""
    return name.rpartition("-")[0]


# Names of runs


@pytest.fixture(scope="module")
def asked_for():
    """Names of the runs that a notebook first asks for, and those of them that nobody can know.

    Of starting points that are not shipped there are no digests: "to be made" stands for them.
    """
    found = {}

    def ask(profile, notebook):
        if (profile, notebook) not in found:
            found[profile, notebook] = set(), set()
            (job,) = batch.plan(ROOT / "notebooks", profile, [notebook], {})
            with contextlib.chdir(ROOT):
                configs = batch.asked_for(job)
            for config in configs:
                try:
                    kind, name = 0, config.name(digests(config))
                except UserError:
                    kind, name = 1, config.name({"starting_weights": "to be made"})
                found[profile, notebook][kind].add(name)
        return found[profile, notebook]

    return ask


NAMES = [(profile, notebook) for profile, of in frozen("runs.json").items() for notebook in of]


@pytest.mark.parametrize(("profile", "notebook"), NAMES)
def test_notebooks_ask_for_the_runs_that_they_always_asked_for(profile, notebook, asked_for):
    known, unknown = asked_for(profile, notebook)
    assert sorted(known | unknown) == frozen("runs.json")[profile][notebook]


@pytest.mark.parametrize(("profile", "notebook"), NAMES)
def test_runs_behind_committed_results_are_asked_for(profile, notebook, asked_for):
    folder = ROOT / "figures" / profile / notebook
    files = [file for file in folder.iterdir() if file.suffix in (".csv", ".json")]
    committed = {name for file in files for name in RUN_NAME.findall(file.read_text())}
    committed -= {name for *_, name in frozen("reset_heads.json")}
    known, unknown = asked_for(profile, notebook)
    rest = committed - known
    assert len(committed) > 10 and len(rest) <= len(unknown)
    assert {readable(name) for name in rest} <= {readable(name) for name in unknown}


@pytest.mark.parametrize(("seed", "heads", "name"), frozen("reset_heads.json"))
def test_runs_with_reset_heads_keep_their_names(seed, heads, name):
    settings = profiles.training("full") | {"reset_heads": tuple(heads)}
    config = RunConfig(initialisation="language", seed=seed, **settings)
    assert config.name(digests(config)) == name


# Random streams


def test_streams_have_the_same_seeds():
    for purpose, values in frozen("streams.json").items():
        for seed, index, expected in values:
            assert stream_seed(seed, purpose, index) == expected, (purpose, seed, index)


def purposes(source):
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("stream_seed"):
            yield ast.literal_eval(call.args[1])


def test_every_purpose_is_still_in_use():
    sources = [path.read_text() for path in (ROOT / "dtlib").rglob("*.py")]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        sources += [cell.source for cell in cells if cell.cell_type == "code"]
    used = {purpose for source in sources for purpose in purposes(source)}
    assert set(frozen("streams.json")) <= used


# Parameters


@pytest.mark.parametrize("name", frozen("state_dict.json"))
def test_parameters_have_the_same_names_shapes_and_order(name):
    model = build_model(name, "mini", HOPPER, seed=0)
    found = [[key, list(tensor.shape)] for key, tensor in model.state_dict().items()]
    assert found == [[key, shape] for key, shape in frozen("state_dict.json")[name].items()]


# Runs of earlier versions


@pytest.mark.parametrize("name", frozen("old_runs/predictions.json"))
def test_an_old_run_opens_and_predicts_as_it_did(name):
    """Two runs from a toy GPT-2 of width 8; one has a block of another."""
    run = runs.Run.open(FROZEN / "old_runs" / name)
    assert [row["epoch"] for row in run.metrics] == [0, 1, 2]
    inputs = (
        torch.linspace(-1, 1, 66).view(2, 3, 11),
        torch.linspace(-1, 1, 18).view(2, 3, 3),
        torch.linspace(0, 3, 6).view(2, 3),
        torch.arange(3).expand(2, 3),
    )
    for epoch, expected in frozen("old_runs/predictions.json")[name].items():
        predicted = run.load_model(int(epoch))(*inputs)
        torch.testing.assert_close(predicted, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert run.load_model().training is False and run.statistics()[0].shape == (11,)


# Losses


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Random numbers in D4RL's layout, from one to sixty steps an episode."""
    path = tmp_path_factory.mktemp("frozen") / "synthetic.hdf5"
    generator, lengths = np.random.default_rng(0), (40, 7, 25, 1, 60) * 4
    steps, ends = sum(lengths), np.cumsum(lengths) - 1
    with h5py.File(path, "w") as file:
        file["observations"] = generator.normal(1, 2, (steps, 11)).astype(np.float32)
        file["actions"] = generator.uniform(-1, 1, (steps, 3)).astype(np.float32)
        file["rewards"] = generator.normal(1, 1, steps).astype(np.float32)
        file["terminals"] = np.isin(np.arange(steps), ends)
        file["timeouts"] = np.zeros(steps, bool)
    return path


def test_data_have_the_same_fingerprint(synthetic):
    assert data.load(synthetic, HOPPER).fingerprint == frozen("losses.json")["fingerprint"]


@pytest.mark.parametrize("name", frozen("losses.json")["variants"])
def test_three_steps_have_the_same_losses_and_returns(name, synthetic):
    """Every part of the training step: each of the three epochs is one step."""
    stored = frozen("losses.json")
    expected = stored["variants"][name]
    if "cotraining" in expected["config"] and sys.version.split()[0] != stored["python"]:
        pytest.skip(f"the text is the documentation of Python {stored['python']}")
    values = stored["common"] | expected["config"] | {"dataset": str(synthetic)}
    run = runs.fine_tune(RunConfig(**values))
    for ours, theirs in zip(run.metrics, expected["metrics"], strict=True):
        # 1e-6 on the kind of processor that wrote these numbers, 4e-6 on another kind.
        assert ours["action_error"] == pytest.approx(theirs["action_error"], rel=1e-5)
        if theirs["epoch"] > 0:
            assert ours["training_loss"] == pytest.approx(theirs["training_loss"], rel=1e-5)
        # Contacts magnify the last digit that another processor may round otherwise; a robot then
        # falls a step earlier or later. The short rollout below has no such contact.
        assert ours["lengths"] == pytest.approx(theirs["lengths"], abs=2)
        same = ours["lengths"] == theirs["lengths"]
        assert ours["returns"] == pytest.approx(theirs["returns"], rel=1e-3 if same else 0.02)
    episodes = evaluate.rollout(
        run.load_model(),
        HOPPER,
        *run.statistics(),
        target_return=3600.0,
        episodes=2,
        context=run.config.context,
        seed=5,
        horizon=12,
    )
    assert episodes.returns == pytest.approx(expected["short_rollout"], rel=1e-4)
