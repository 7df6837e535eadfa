"""Trajectories and windows against loops, and every bad input refused."""

import re

import h5py
import numpy as np
import pytest
import torch

from dtlib.data import Trajectories, WindowSampler, load
from dtlib.errors import UserError
from dtlib.tasks import get_task

HOPPER = get_task("hopper")


def arrays(lengths=(7, 3, 12), partial=0, timeouts=(1,), seed=0):
    """D4RL's arrays of episodes: those numbered in ``timeouts`` time out, the others terminate."""
    generator, steps = np.random.default_rng(seed), sum(lengths) + partial
    ends = np.cumsum(lengths) - 1
    flags = np.zeros((2, steps), bool)
    for number, end in enumerate(ends):
        flags[int(number in timeouts), end] = True
    return {
        "observations": generator.normal(3, 2, (steps, 11)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (steps, 3)).astype(np.float32),
        "rewards": generator.normal(1, 1, steps).astype(np.float32),
        "terminals": flags[0],
        "timeouts": flags[1],
    }


def write(path, columns):
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = values
    return path


class Source:
    """Whatever offers D4RL's ``get_dataset()``."""

    def __init__(self, columns):
        self.columns = columns

    def get_dataset(self):
        return self.columns


# What a Trajectories computes


def test_returns_lengths_returns_to_go_and_time_steps_against_a_loop():
    columns = arrays((7, 3, 12, 1), partial=4)
    trajectories = load(Source(columns), HOPPER)
    row = 0
    for episode, length in enumerate((7, 3, 12, 1)):
        rewards = [float(reward) for reward in columns["rewards"][row : row + length]]
        assert trajectories.lengths[episode] == length
        assert trajectories.returns[episode] == pytest.approx(sum(rewards), abs=1e-6)
        for step in range(length):
            assert trajectories.returns_to_go[row + step] == pytest.approx(
                sum(rewards[step:]), abs=1e-5
            )
            assert trajectories.time_steps[row + step] == step
        row += length
    assert trajectories.starts.tolist() == [0, 7, 10, 22, 23] and len(trajectories.rewards) == 23
    kinds = [
        getattr(trajectories, name).dtype
        for name in (
            "observations",
            "actions",
            "rewards",
            "returns_to_go",
            "returns",
            "starts",
            "time_steps",
            "lengths",
        )
    ]
    assert kinds == [np.float32] * 4 + [np.float64] + [np.int64] * 3


def test_returns_to_go_keep_their_precision_late_in_a_long_data_set():
    columns = arrays((1000,) * 200)
    columns["rewards"][:] = 5.0
    assert np.array_equal(
        load(Source(columns), HOPPER).returns_to_go[-1000:], np.arange(5000, 0, -5, np.float32)
    )


def test_statistics_are_the_population_ones_of_the_kept_steps():
    columns = arrays(partial=5)
    columns["observations"][-5:] = 1e6  # dropped with the partial episode
    trajectories = load(Source(columns), HOPPER)
    kept = columns["observations"][:22].astype(np.float64)
    np.testing.assert_allclose(trajectories.state_mean, kept.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        trajectories.state_std, np.sqrt(((kept - kept.mean(0)) ** 2).mean(0)) + 1e-6, rtol=1e-6
    )
    assert trajectories.state_mean.dtype == trajectories.state_std.dtype == np.float32


def test_fingerprint_changes_with_any_number_and_with_nothing_else(tmp_path):
    columns = arrays()
    prints = {
        load(Source(columns), HOPPER).fingerprint,
        load(write(tmp_path / "a.hdf5", columns), HOPPER).fingerprint,
    }
    assert len(prints) == 1 and re.fullmatch("[0-9a-f]{64}", *prints)
    for key in ("observations", "actions", "rewards", "terminals"):
        changed = {name: values.copy() for name, values in columns.items()}
        changed[key].flat[0] = not changed[key].flat[0]
        prints.add(load(Source(changed), HOPPER).fingerprint)
    assert len(prints) == 5


def test_summary_says_what_there_is():
    trajectories = Trajectories(
        "mine",
        np.zeros((3, 1), np.float32),
        np.zeros((3, 1), np.float32),
        np.float32([1, 2, 7]),
        np.array([0, 2, 3]),
        ("a note",),
    )
    assert (
        trajectories.summary()
        == "mine: 2 episodes, 3 steps; return 5.0 ± 2.0 (min 3.0, max 7.0)\n  - a note"
    )


# Where episodes end


def test_episodes_end_at_terminals_and_at_timeouts_and_a_partial_one_is_dropped_and_said():
    trajectories = load(Source(arrays((7, 3, 12), partial=4, timeouts=(1,))), HOPPER)
    assert trajectories.lengths.tolist() == [7, 3, 12]
    assert "dropped the trailing partial episode, 4 steps" in trajectories.summary()
    assert load(Source(arrays((7, 3, 12))), HOPPER).notes == ()


def test_without_timeouts_episodes_also_end_at_the_horizon_and_that_is_said():
    columns = arrays((1000, 5, 1000, 1000, 2, 999, 1), partial=1001, timeouts=())
    terminals = columns["terminals"]
    terminals[:] = False
    terminals[[1004, 3006, 4006]] = True
    del columns["timeouts"]
    trajectories = load(Source(columns), HOPPER)
    expected, length = [], 0
    for terminal in terminals:
        length += 1
        if terminal or length == 1000:
            expected.append(length)
            length = 0
    assert trajectories.lengths.tolist() == expected == [1000, 5, 1000, 1000, 2, 1000, 1000]
    assert (
        "horizon, 1000 steps" in trajectories.summary()
        and f"episode, {length} steps" in trajectories.summary()
    )


def test_steps_keeps_the_whole_episodes_inside_the_first_rows(tmp_path):
    path = write(tmp_path / "a.hdf5", arrays((7, 3, 12)))
    trajectories = load(str(path), HOPPER, steps=15)
    assert trajectories.lengths.tolist() == [7, 3]
    assert trajectories.notes == (
        "read the first 15 of 22 steps",
        "dropped the trailing partial episode, 5 steps",
    )
    assert load(path, HOPPER, steps=10).lengths.tolist() == [7, 3]
    assert load(path, HOPPER, steps=1000).fingerprint == load(path, HOPPER).fingerprint


def test_other_number_types_and_columns_of_one_are_read_as_d4rl_does(tmp_path):
    plain, odd = arrays(), {key: values.astype(np.float64) for key, values in arrays().items()}
    odd["rewards"], odd["terminals"] = (
        odd["rewards"][:, None],
        plain["terminals"][:, None].astype(np.uint8),
    )
    assert (
        load(write(tmp_path / "a.h5", odd), HOPPER).fingerprint
        == load(Source(plain), HOPPER).fingerprint
    )


# Windows


@pytest.mark.parametrize("context", [1, 5, 20])
def test_windows_against_a_loop(context):
    trajectories = load(Source(arrays((7, 3, 12, 1, 30))), HOPPER)
    sampler = WindowSampler(trajectories, context, return_scale=1000.0)
    windows = sampler.windows(torch.arange(sampler.number_of_steps))
    assert (
        windows.states.dtype
        == windows.actions.dtype
        == windows.returns_to_go.dtype
        == torch.float32
    )
    assert windows.time_steps.dtype == torch.int64 and windows.mask.dtype == torch.bool
    for start in range(sampler.number_of_steps):
        end = min(end for end in trajectories.starts if end > start)
        for step in range(context):
            row, real = start + step, start + step < end
            assert windows.mask[start, step] == real
            if real:
                state = (
                    trajectories.observations[row] - trajectories.state_mean
                ) / trajectories.state_std
                assert np.array_equal(windows.states[start, step], state)
                assert np.array_equal(windows.actions[start, step], trajectories.actions[row])
                expected = trajectories.rewards[row:end].astype(np.float64).sum() / 1000
                assert float(windows.returns_to_go[start, step]) == pytest.approx(
                    expected, abs=1e-7
                )
                assert windows.time_steps[start, step] == trajectories.time_steps[row]
            else:  # padding: on the right, all zeros
                for values in windows:
                    assert not values[start, step].any()


def test_real_steps_come_first():
    sampler = WindowSampler(load(Source(arrays((7, 3))), HOPPER), 5, 1.0)
    assert sampler.windows(torch.tensor([5, 9, 0])).mask.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [1] * 5,
    ]
    assert sampler.windows(torch.tensor([5])).time_steps.tolist() == [[5, 6, 0, 0, 0]]


def test_every_step_starts_exactly_one_window_also_in_the_episode_of_lowest_return():
    """So rows drawn uniformly are windows drawn uniformly over all steps."""
    columns = arrays((7, 3, 12))
    columns["rewards"][7:10] = -100
    trajectories = load(Source(columns), HOPPER)
    sampler = WindowSampler(trajectories, 4, 1000.0)
    assert sampler.number_of_steps == 22
    windows = sampler.windows(torch.arange(22))
    assert windows.mask[:, 0].all()
    assert torch.equal(windows.actions[:, 0], torch.from_numpy(trajectories.actions))
    draws = torch.randint(
        sampler.number_of_steps, (44_000,), generator=torch.Generator().manual_seed(0)
    )
    episode = np.searchsorted(trajectories.starts, draws.numpy(), side="right") - 1
    np.testing.assert_allclose(np.bincount(episode) / 44_000, np.array([7, 3, 12]) / 22, atol=0.01)


def test_windows_copy_nothing_to_the_host():
    """On the meta device, which holds no numbers, whatever has to look at one fails."""
    sampler = WindowSampler(load(Source(arrays()), HOPPER), 5, 1000.0, "meta")
    windows = sampler.windows(torch.zeros(4, dtype=torch.int64, device="meta"))
    assert [tuple(values.shape) for values in windows] == [
        (4, 5, 11),
        (4, 5, 3),
        (4, 5),
        (4, 5),
        (4, 5),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_windows_on_a_gpu_are_the_same_and_wait_for_nothing():
    trajectories = load(Source(arrays()), HOPPER)
    starts = torch.arange(22)
    here, there = (WindowSampler(trajectories, 5, 1000.0, device) for device in ("cpu", "cuda"))
    on_device = starts.cuda()
    torch.cuda.set_sync_debug_mode("error")
    windows = there.windows(on_device)
    torch.cuda.set_sync_debug_mode("default")
    for expected, values in zip(here.windows(starts), windows, strict=True):
        assert values.is_cuda and torch.equal(expected, values.cpu())


# Data sets by name


def test_collected_data_are_read_like_any_file(hopper_file):
    trajectories = load("collected:random", HOPPER, steps=3000, progress=False)
    assert trajectories.name == "collected:random"
    assert trajectories.fingerprint == load(hopper_file, HOPPER).fingerprint
    assert 2900 < len(trajectories.rewards) <= 3000
    other = load("collected:random", HOPPER, steps=500, seed=1, progress=False)
    assert not np.array_equal(other.observations[:100], trajectories.observations[:100])


# Bad input


@pytest.mark.parametrize(
    "dataset, options, message",
    [
        (
            "hopper-medium-v2",
            {},
            "Unknown data set 'hopper-medium-v2'.*collected:QUALITY.*medium-replay.*hdf5",
        ),
        ("", {}, "Unknown data set"),
        ("collected:mediocre", {}, "mediocre.*random, medium"),
        ("d4rl:mediocre", {}, "mediocre.*random, medium"),
        ("d4rl:", {}, "qualities"),
        ("missing.hdf5", {}, "There is no file .*missing.hdf5"),
        (".", {}, "Unknown data set"),
        (None, {}, "'None'.*get_dataset"),
        ({"observations": []}, {}, "observations.*get_dataset"),
        ("collected:random", {"steps": 0}, "steps=0"),
        ("collected:random", {"seed": -1}, "seed -1"),
    ],
)
def test_what_names_no_data_set_is_refused(dataset, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    with pytest.raises(UserError, match=message):
        load(dataset, HOPPER, **options)
    assert not list(tmp_path.iterdir())


def replaced(key, values):
    return lambda columns: columns.update({key: values(columns[key])})


def poisoned(key, row, value):
    def change(columns):
        columns[key][row] = value

    return change


def no_end(columns):
    columns["terminals"][:] = columns["timeouts"][:] = False


def endless(columns):
    columns.update(arrays((7, 1001, 3)))


DAMAGE = {
    "a missing key": (
        lambda columns: columns.pop("rewards"),
        "has no rewards: expected observations, actions",
    ),
    "missing keys": (
        lambda columns: [columns.pop("actions"), columns.pop("terminals")],
        "no actions and no terminals",
    ),
    "different lengths": (
        replaced("actions", lambda a: a[:-1]),
        r"different lengths.*'actions': \(21,\)",
    ),
    "timeouts too short": (replaced("timeouts", lambda a: a[:5]), "different lengths"),
    "a NaN": (poisoned("observations", (13, 2), np.nan), "observations is not finite at step 13"),
    "an infinity": (poisoned("rewards", 4, np.inf), "rewards is not finite at step 4"),
    "no episode end": (no_end, "no episode ends within 22 steps"),
    "no steps": (
        lambda columns: columns.update({key: a[:0] for key, a in columns.items()}),
        "ends within 0 ",
    ),
    "another task's states": (
        replaced("observations", lambda a: np.zeros((22, 17))),
        r"\(22, 17\), hopper needs.*11",
    ),
    "another task's actions": (
        replaced("actions", lambda a: np.zeros((22, 6))),
        r"actions.*\(22, 6\).*'N', 3",
    ),
    "rewards of two columns": (
        replaced("rewards", lambda a: np.zeros((22, 2))),
        r"rewards.*\(22, 2\)",
    ),
    "a scalar": (
        replaced("rewards", lambda a: np.float32(3)),
        r"different lengths.*'rewards': \(\)",
    ),
    "text": (replaced("rewards", lambda a: np.array([b"one"] * 22)), "rewards is .*S3"),
    "an episode beyond the horizon": (
        endless,
        "an episode has 1,001 steps, more than the task's horizon, 1000",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_refused_from_a_file_and_from_an_object(damage, tmp_path):
    change, message = DAMAGE[damage]
    columns = arrays()
    change(columns)
    path = write(tmp_path / "a.hdf5", columns)
    for dataset in (str(path), Source(columns)):
        with pytest.raises(UserError, match=message):
            load(dataset, HOPPER)
    assert list(tmp_path.iterdir()) == [path]
