"""A CUDA card against the CPU: losses, rollouts, measures, resuming. These need a card."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import cells

from dtlib import data, probe, runs
from dtlib.evaluate import rollout
from dtlib.measures import mutual_information
from dtlib.records import run_folder
from dtlib.starts import build_model
from dtlib.tasks import get_task
from dtlib.train import action_error, make_optimiser, train_epoch

DEVICE = os.environ.get(
    "DTLIB_TEST_DEVICE", "cuda"
)  # "cpu": to try these tests themselves where there is no card
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="no CUDA device that torch can use: nothing to compare with the CPU",
    ),
]
HOPPER = get_task("hopper")
NO_DROPOUT = (0.0, 0.0, 0.0)
feature_reuse = cells("01_feature_reuse", "measure")
gradients = cells("04_gradient_clipping", "measure")
attention_distance = cells("07_attention_distance", "measure")
information = cells("02_mutual_information", "measure")


def warmed_up(step):
    return 1e-3 * min((step + 1) / 10, 1)


def sampler(hopper_file, device, context=20):
    return data.WindowSampler(
        data.load(str(hopper_file), HOPPER), context, HOPPER.return_scale, device
    )


def losses(hopper_file, device, context=20, precision="float32", steps=50):
    """The loss of each of the first ``steps`` steps."""
    model = build_model("language", "mini", HOPPER, 0, NO_DROPOUT, 0.02).to(device)
    windows = sampler(hopper_file, device, context)
    optimiser = make_optimiser(model, 1e-3)
    starts = torch.randint(
        windows.number_of_steps, (steps, 1, 16), generator=torch.Generator().manual_seed(0)
    ).to(device)
    return np.array(
        [
            train_epoch(
                model,
                optimiser,
                windows,
                row,
                first_step=step,
                rate=warmed_up,
                gradient_clip=0.25,
                precision=precision,
            )
            for step, row in enumerate(starts)
        ]
    )


@pytest.mark.parametrize("context", [1, 20])
def test_ten_losses_are_the_cpus(hopper_file, context):
    """Seen on an H200: 3e-4 after 10 steps, 1e-2 after 15. At this rate rounding grows fast."""
    card, cpu = (losses(hopper_file, device, context, steps=10) for device in (DEVICE, "cpu"))
    np.testing.assert_allclose(card, cpu, rtol=1e-3)


def test_bfloat16_follows_float32(hopper_file):
    exact, rounded = (
        losses(hopper_file, DEVICE, precision=precision) for precision in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(rounded[-10:].mean(), exact[-10:].mean(), rtol=0.1)
    assert not np.array_equal(exact, rounded)


@pytest.mark.parametrize("context", [1, 20])
def test_rollouts_are_the_cpus(hopper_file, context):
    """In float64, as contacts multiply what rounding leaves."""
    trajectories, found = data.load(str(hopper_file), HOPPER), []
    for device in ("cpu", DEVICE):
        model = build_model("random-matched", "mini", HOPPER, 0, NO_DROPOUT).double().to(device)
        found.append(
            rollout(
                model,
                HOPPER,
                trajectories.state_mean,
                trajectories.state_std,
                target_return=3600.0,
                episodes=4,
                context=context,
                seed=0,
                horizon=40,
            )
        )
    assert found[0].lengths.tolist() == found[1].lengths.tolist()
    np.testing.assert_allclose(found[1].returns, found[0].returns, rtol=1e-6)


def test_probes_and_their_measures_are_the_cpus(hopper_file):
    """Activations and CKA, attention and its distance, gradients of windows and their norms."""
    found = []
    for device in ("cpu", DEVICE):
        windows = probe.draw_windows(sampler(hopper_file, device, 5), 24)
        models = [
            build_model(name, "mini", HOPPER, 0, NO_DROPOUT).double().to(device)
            for name in ("language", "random-matched")
        ]
        windows = data.Windows(
            *(column.double() if column.is_floating_point() else column for column in windows)
        )
        states = [
            probe.activations(model, windows, lambda a: a[:, probe.STATE])["h.3.stream"]
            for model in models
        ]
        grams = [feature_reuse.gram(state) for state in states]
        weights = probe.attention(models[0], windows)
        whole = sum(
            gram.double().cpu() for gram in probe.window_gradients(models[0], windows).values()
        )
        found.append(
            [
                feature_reuse.cka(*grams),
                attention_distance.distances(weights[2]),
                attention_distance.weight_on_itself(weights[0]),
                torch.from_numpy(gradients.norms(whole.numpy())),
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours.cpu(), rtol=1e-6, atol=1e-9)


def test_information_is_the_cpus():
    """The Gaussian estimate agrees to rounding; those that learn, to a tenth of a nat."""
    generator, found = torch.Generator().manual_seed(0), []
    x, noise = torch.randn(2, 2, 600, 3, generator=generator)
    y = 0.8 * x + 0.6 * noise
    for device in ("cpu", DEVICE):
        first, second = x.to(device), y.to(device)
        halves = [
            part[:, half] for half in (slice(0, 300), slice(300, None)) for part in (first, second)
        ]
        found.append(
            [
                information.gaussian(first, second),
                mutual_information.info_nce(*halves, seed=0),
                mutual_information.mine(
                    first[:, :100],
                    second[:, :100],
                    hidden=(64, 64, 64),
                    passes=30,
                    learning_rate=2e-3,
                    seed=0,
                ),
            ]
        )
    for (ours, theirs), tolerance in zip(zip(*found, strict=True), (1e-4, 0.1, 0.1), strict=True):
        torch.testing.assert_close(theirs.cpu(), ours.cpu(), rtol=0, atol=tolerance)


def test_action_errors_are_the_cpus(hopper_file):
    found = []
    for device in ("cpu", DEVICE):
        windows = sampler(hopper_file, device)
        starts = torch.randint(
            windows.number_of_steps, (200,), generator=torch.Generator().manual_seed(0)
        ).to(device)
        found.append(
            action_error(
                build_model("image-native", "mini", HOPPER, 0, NO_DROPOUT).to(device),
                windows,
                starts,
            )
        )
    assert found[1] == pytest.approx(found[0], rel=1e-4)


KILLED = """
import os, sys
from dtlib import runs
seen = []
def stop(steps):
    seen.append(steps)
    if sum(seen) > 7:
        os.kill(os.getpid(), 9)
config = runs.RunConfig(dataset=sys.argv[1], size="mini", context=5, epochs=3, steps_per_epoch=5,
                        batch_size=8, warmup_steps=2, evaluation_episodes=2, precision="bfloat16")
runs.fine_tune(config, sys.argv[2], stop)
"""


def test_a_killed_run_resumes_on_the_card(hopper_file, tmp_path, monkeypatch):
    config = runs.RunConfig(
        dataset=str(hopper_file),
        size="mini",
        context=5,
        epochs=3,
        steps_per_epoch=5,
        batch_size=8,
        warmup_steps=2,
        evaluation_episodes=2,
        precision="bfloat16",
    )
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "whole"))
    whole = runs.fine_tune(config, DEVICE)
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "killed"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(hopper_file), DEVICE])
    assert killed.returncode == -9 and not run_folder(config).exists()
    resumed = runs.fine_tune(config, DEVICE)
    for ours, theirs in zip(resumed.metrics, whole.metrics, strict=True):
        assert ours["action_error"] == pytest.approx(theirs["action_error"], rel=1e-3)
