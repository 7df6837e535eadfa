"""Offline data: episodes and windows against loops, every source against its own reader, every bad input refused."""

import http.server
import importlib
import os
import pickle
import re
import resource
import shutil
import sys
import threading
import types
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector.episode_buffer import EpisodeBuffer

from dtlib import data
from dtlib.collect import collect
from dtlib.data import Trajectories, WindowSampler, load
from dtlib.errors import UserError
from dtlib.tasks import get_task

HOPPER = get_task("hopper")


def arrays(lengths=(7, 3, 12), partial=0, timeouts=(1,), seed=0):
    """D4RL's arrays for episodes of these lengths; those numbered in ``timeouts`` time out, the others terminate."""
    generator, steps = np.random.default_rng(seed), sum(lengths) + partial
    ends = np.cumsum(lengths) - 1
    flags = np.zeros((2, steps), bool)
    for number, end in enumerate(ends):
        flags[int(number in timeouts), end] = True
    return {"observations": generator.normal(3, 2, (steps, 11)).astype(np.float32),
            "actions": generator.uniform(-1, 1, (steps, 3)).astype(np.float32),
            "rewards": generator.normal(1, 1, steps).astype(np.float32), "terminals": flags[0], "timeouts": flags[1]}


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


def listing(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


# What a Trajectories computes


def test_returns_lengths_returns_to_go_and_time_steps_against_a_loop():
    columns = arrays((7, 3, 12, 1), partial=4)
    trajectories = load(Source(columns), HOPPER)
    row = 0
    for episode, length in enumerate((7, 3, 12, 1)):
        rewards = [float(reward) for reward in columns["rewards"][row:row + length]]
        assert trajectories.lengths[episode] == length
        assert trajectories.returns[episode] == pytest.approx(sum(rewards), abs=1e-6)
        for step in range(length):
            assert trajectories.returns_to_go[row + step] == pytest.approx(sum(rewards[step:]), abs=1e-5)
            assert trajectories.time_steps[row + step] == step
        row += length
    assert trajectories.starts.tolist() == [0, 7, 10, 22, 23] and len(trajectories.rewards) == 23
    kinds = [getattr(trajectories, name).dtype for name in ("observations", "actions", "rewards", "returns_to_go",
                                                            "returns", "starts", "time_steps", "lengths")]
    assert kinds == [np.float32] * 4 + [np.float64] + [np.int64] * 3


def test_returns_to_go_keep_their_precision_late_in_a_long_data_set():
    columns = arrays((1000,) * 200)
    columns["rewards"][:] = 5.0
    assert np.array_equal(load(Source(columns), HOPPER).returns_to_go[-1000:], np.arange(5000, 0, -5, np.float32))


def test_statistics_are_the_population_ones_of_the_kept_steps():
    columns = arrays(partial=5)
    columns["observations"][-5:] = 1e6  # dropped with the partial episode
    trajectories = load(Source(columns), HOPPER)
    kept = columns["observations"][:22].astype(np.float64)
    np.testing.assert_allclose(trajectories.state_mean, kept.mean(0), rtol=1e-6)
    np.testing.assert_allclose(trajectories.state_std, np.sqrt(((kept - kept.mean(0)) ** 2).mean(0)) + 1e-6, rtol=1e-6)
    assert trajectories.state_mean.dtype == trajectories.state_std.dtype == np.float32


def test_fingerprint_changes_with_any_number_and_with_nothing_else(tmp_path):
    columns = arrays()
    prints = {load(Source(columns), HOPPER).fingerprint, load(write(tmp_path / "a.hdf5", columns), HOPPER).fingerprint}
    assert len(prints) == 1 and re.fullmatch("[0-9a-f]{64}", *prints)
    for key in ("observations", "actions", "rewards", "terminals"):
        changed = {name: values.copy() for name, values in columns.items()}
        changed[key].flat[0] = not changed[key].flat[0]
        prints.add(load(Source(changed), HOPPER).fingerprint)
    assert len(prints) == 5


def test_summary_says_what_there_is():
    trajectories = Trajectories("mine", np.zeros((3, 1), np.float32), np.zeros((3, 1), np.float32),
                                np.float32([1, 2, 7]), np.array([0, 2, 3]), ("a note",))
    assert trajectories.summary() == "mine: 2 episodes, 3 steps; return 5.0 ± 2.0 (min 3.0, max 7.0)\n  - a note"


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
    assert "horizon, 1000 steps" in trajectories.summary() and f"episode, {length} steps" in trajectories.summary()


def test_steps_keeps_the_whole_episodes_inside_the_first_rows(tmp_path):
    path = write(tmp_path / "a.hdf5", arrays((7, 3, 12)))
    trajectories = load(str(path), HOPPER, steps=15)
    assert trajectories.lengths.tolist() == [7, 3]
    assert trajectories.notes == ("read the first 15 of 22 steps", "dropped the trailing partial episode, 5 steps")
    assert load(path, HOPPER, steps=10).lengths.tolist() == [7, 3]
    assert load(path, HOPPER, steps=1000).fingerprint == load(path, HOPPER).fingerprint


def test_other_number_types_and_columns_of_one_are_read_as_d4rl_does(tmp_path):
    plain, odd = arrays(), {key: values.astype(np.float64) for key, values in arrays().items()}
    odd["rewards"], odd["terminals"] = odd["rewards"][:, None], plain["terminals"][:, None].astype(np.uint8)
    assert load(write(tmp_path / "a.h5", odd), HOPPER).fingerprint == load(Source(plain), HOPPER).fingerprint


# Windows


@pytest.mark.parametrize("context", [1, 5, 20])
def test_windows_against_a_loop(context):
    trajectories = load(Source(arrays((7, 3, 12, 1, 30))), HOPPER)
    sampler = WindowSampler(trajectories, context, return_scale=1000.0)
    windows = sampler.windows(torch.arange(sampler.number_of_steps))
    assert windows.states.dtype == windows.actions.dtype == windows.returns_to_go.dtype == torch.float32
    assert windows.time_steps.dtype == torch.int64 and windows.mask.dtype == torch.bool
    for start in range(sampler.number_of_steps):
        end = min(end for end in trajectories.starts if end > start)
        for step in range(context):
            row, real = start + step, start + step < end
            assert windows.mask[start, step] == real
            if real:
                state = (trajectories.observations[row] - trajectories.state_mean) / trajectories.state_std
                assert np.array_equal(windows.states[start, step], state)
                assert np.array_equal(windows.actions[start, step], trajectories.actions[row])
                expected = trajectories.rewards[row:end].astype(np.float64).sum() / 1000
                assert float(windows.returns_to_go[start, step]) == pytest.approx(expected, abs=1e-7)
                assert windows.time_steps[start, step] == trajectories.time_steps[row]
            else:  # padding: on the right, all zeros
                for values in windows:
                    assert not values[start, step].any()


def test_real_steps_come_first():
    sampler = WindowSampler(load(Source(arrays((7, 3))), HOPPER), 5, 1.0)
    assert sampler.windows(torch.tensor([5, 9, 0])).mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1] * 5]
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
    draws = torch.randint(sampler.number_of_steps, (44_000,), generator=torch.Generator().manual_seed(0))
    episode = np.searchsorted(trajectories.starts, draws.numpy(), side="right") - 1
    np.testing.assert_allclose(np.bincount(episode) / 44_000, np.array([7, 3, 12]) / 22, atol=0.01)


def test_windows_copy_nothing_to_the_host():
    """On the meta device, which holds no numbers, whatever has to look at one fails."""
    sampler = WindowSampler(load(Source(arrays()), HOPPER), 5, 1000.0, "meta")
    windows = sampler.windows(torch.zeros(4, dtype=torch.int64, device="meta"))
    assert [tuple(values.shape) for values in windows] == [(4, 5, 11), (4, 5, 3), (4, 5), (4, 5), (4, 5)]


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


# Sources


def test_collected_data_are_read_like_any_file(hopper_file):
    trajectories = load("collected:random", HOPPER, steps=3000, progress=False)
    assert trajectories.name == "collected:random"
    assert trajectories.fingerprint == load(hopper_file, HOPPER).fingerprint
    assert 2900 < len(trajectories.rewards) <= 3000
    other = load("collected:random", HOPPER, steps=500, seed=1, progress=False)
    assert not np.array_equal(other.observations[:100], trajectories.observations[:100])


@pytest.fixture
def d4rl(tmp_path, monkeypatch):
    """The real d4rl package, with gymnasium under the name of gym and empty modules for suites of other robots."""
    for name in ("", ".envs", ".envs.registration", ".spaces", ".utils"):
        monkeypatch.setitem(sys.modules, f"gym{name}", importlib.import_module(f"gymnasium{name}"))
    mujoco = types.ModuleType("gym.envs.mujoco")
    for file, name in (("ant", "AntEnv"), ("half_cheetah", "HalfCheetahEnv"), ("hopper", "HopperEnv"),
                       ("walker2d", "Walker2dEnv")):
        setattr(mujoco, name, getattr(importlib.import_module(f"gymnasium.envs.mujoco.{file}_v4"), name))
    monkeypatch.setitem(sys.modules, "gym.envs.mujoco", mujoco)
    for name in ("locomotion", "hand_manipulation_suite", "pointmaze", "gym_minigrid"):
        monkeypatch.setitem(sys.modules, f"d4rl.{name}", types.ModuleType(f"d4rl.{name}"))
    monkeypatch.setenv("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    registered = dict(gymnasium.registry)
    yield importlib.import_module("d4rl")
    for name in [name for name in sys.modules if name.split(".")[0] == "d4rl"]:
        del sys.modules[name]
    gymnasium.registry.clear()
    gymnasium.registry.update(registered)


@pytest.mark.filterwarnings("ignore")
def test_the_d4rl_package_reads_a_collected_file_and_gives_the_same_arrays(d4rl, hopper_file):
    path = data.d4rl_path(HOPPER, "medium-replay")
    assert path == Path(d4rl.offline_env.filepath_from_url(d4rl.infos.DATASET_URLS["hopper-medium-replay-v2"]))
    shutil.copy(hopper_file, path)
    environment = gymnasium.make("hopper-medium-replay-v2", disable_env_checker=True).unwrapped
    theirs = environment.get_dataset()
    with h5py.File(hopper_file) as file:
        assert set(theirs) == set(file)
        for key, values in theirs.items():
            assert values.dtype == file[key].dtype and np.array_equal(values, file[key][:])
    ours = load("d4rl:medium-replay", HOPPER)
    assert load(environment, HOPPER).fingerprint == ours.fingerprint  # an object with get_dataset()
    episodes = list(d4rl.sequence_dataset(environment))
    assert [len(episode["rewards"]) for episode in episodes] == ours.lengths.tolist()
    for key in ("observations", "actions", "rewards"):
        assert np.array_equal(np.concatenate([episode[key] for episode in episodes]), getattr(ours, key))
    name = "hopper-medium-replay-v2"
    assert HOPPER.d4rl_reference == (d4rl.infos.REF_MIN_SCORE[name], d4rl.infos.REF_MAX_SCORE[name])
    assert HOPPER.scores(1234.5)["D4RL"] == pytest.approx(100 * d4rl.get_normalized_score(name, 1234.5))


def test_every_d4rl_file_has_the_packages_name_and_address(d4rl, monkeypatch):
    for name in ("hopper", "halfcheetah", "walker2d"):
        task = get_task(name)
        for quality in ("random", "medium", "medium-replay", "medium-expert", "expert"):
            path = data.d4rl_path(task, quality)
            assert data.D4RL_ADDRESS + path.name == d4rl.infos.DATASET_URLS[f"{name}-{quality}-v2"]
        assert task.d4rl_reference == tuple(scores[f"{name}-medium-v2"] for scores in (
            d4rl.infos.REF_MIN_SCORE, d4rl.infos.REF_MAX_SCORE))
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert data.d4rl_path(HOPPER, "random") == Path("~/.d4rl/datasets/hopper_random-v2.hdf5").expanduser()


@pytest.fixture
def minari_hopper(tmp_path, monkeypatch):
    """A Minari data set of real episodes, and the buffers it was made of."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    environment = gymnasium.make("Hopper-v5", max_episode_steps=50)
    environment.action_space.seed(0)
    buffers = []
    for seed in range(6):
        buffer = EpisodeBuffer(id=seed, observations=[environment.reset(seed=seed)[0]], actions=[])
        while not any(buffer.terminations + buffer.truncations):
            buffer.actions.append(environment.action_space.sample() * (seed / 5))  # at rest it lasts longest
            state, reward, terminal, timeout, _ = environment.step(buffer.actions[-1])
            buffer.observations.append(state)
            buffer.rewards.append(reward)
            buffer.terminations.append(terminal)
            buffer.truncations.append(timeout)
        buffers.append(buffer)
    minari.create_dataset_from_buffers("mujoco/hopper/handmade-v0", buffers, env=environment, algorithm_name="random",
                                       author="test", author_email="test@example.org", description="test",
                                       code_permalink="https://example.org")
    return buffers


@pytest.mark.filterwarnings("ignore")
def test_a_minari_data_set_round_trips(minari_hopper, tmp_path):
    trajectories = load("minari:mujoco/hopper/handmade-v0", HOPPER, progress=False)
    lengths = trajectories.lengths
    assert lengths.tolist() == [len(buffer.actions) for buffer in minari_hopper]
    assert 50 in lengths and lengths.min() < 50  # a timeout and a terminal
    for name in ("observations", "actions", "rewards"):
        expected = np.concatenate([getattr(buffer, name)[:len(buffer.actions)] for buffer in minari_hopper])
        assert np.array_equal(getattr(trajectories, name), expected.astype(np.float32))
    some = load("minari:mujoco/hopper/handmade-v0", HOPPER, steps=int(lengths[:2].sum()) + 1, progress=False)
    assert some.lengths.tolist() == trajectories.lengths[:2].tolist()
    with pytest.raises(UserError, match=r"handmade-v0: observations .*, 11\), walker2d needs .*\('N', 17\)"):
        load("minari:mujoco/hopper/handmade-v0", get_task("walker2d"))
    (stored,) = tmp_path.rglob("*.hdf5")
    stored.write_bytes(stored.read_bytes()[:-10])
    with pytest.raises(UserError, match="handmade-v0.*truncated file.*remove a damaged copy"):
        load("minari:mujoco/hopper/handmade-v0", HOPPER, progress=False)


def test_minari_without_a_network_is_a_user_error(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(minari.storage.hosting, "download_dataset", unreachable)
    for identifier in ("mujoco/hopper/medium-v0", "nonsense"):
        with pytest.raises(UserError, match=f"{identifier}.*mujoco/hopper/medium-v0"):
            load(f"minari:{identifier}", HOPPER)
    assert listing(tmp_path) == []


# Downloads, from a server on this machine


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``content``; can hang up after ``limit`` bytes, ignore ranges, or fail."""

    content, limit, ranges, status = b"", None, True, None

    def do_GET(self):
        type(self).requests.append((self.path, self.headers["Range"]))
        if self.status:
            return self.send_error(self.status)
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.ranges else 0
        if first >= len(self.content):
            return self.send_error(416)
        body = self.content[first:]
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        if self.ranges:
            self.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(body[:self.limit])

    def log_message(self, *arguments):
        """Silence."""


@pytest.fixture
def server(monkeypatch, tmp_path, hopper_file):
    handler = type("Handler", (Server,), {"content": Path(hopper_file).read_bytes(), "requests": []})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(data, "D4RL_ADDRESS", f"http://127.0.0.1:{running.server_port}/v2/")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler.close = lambda: (running.shutdown(), thread.join(), running.server_close())
    yield handler
    handler.close()


FILE = "hopper_medium-v2.hdf5"


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_resumes_to_the_same_bytes(server, tmp_path, hopper_file, ranges):
    folder = tmp_path / "datasets"
    server.limit, server.ranges = len(server.content) // 2, ranges
    with pytest.raises(UserError, match=f"{FILE}.*ended after.*{folder}.*D4RL_DATASET_DIR.*a second try goes on"):
        load("d4rl:medium", HOPPER, progress=False)
    assert listing(folder) == [Path(FILE + ".part")]
    server.limit = None
    trajectories = load("d4rl:medium", HOPPER, progress=False)
    assert listing(folder) == [Path(FILE)] and (folder / FILE).read_bytes() == server.content
    assert trajectories.fingerprint == load(hopper_file, HOPPER).fingerprint and trajectories.name == "d4rl:medium"
    assert server.requests == [(f"/v2/{FILE}", "bytes=0-"), (f"/v2/{FILE}", f"bytes={len(server.content) // 2 - 1}-")]
    load("d4rl:medium", HOPPER)
    assert len(server.requests) == 2  # the file is there now


def test_a_download_that_was_complete_but_not_renamed_is_finished(server, tmp_path):
    folder = tmp_path / "datasets"
    folder.mkdir()
    (folder / (FILE + ".part")).write_bytes(server.content)
    load("d4rl:medium", HOPPER, progress=False)
    assert listing(folder) == [Path(FILE)] and (folder / FILE).read_bytes() == server.content


def test_a_rest_that_cannot_be_of_this_file_is_removed(server, tmp_path):
    folder = tmp_path / "datasets"
    folder.mkdir()
    (folder / (FILE + ".part")).write_bytes(server.content + b"more")
    with pytest.raises(UserError, match=FILE):
        load("d4rl:medium", HOPPER, progress=False)
    assert listing(folder) == []


def test_a_full_disk_while_downloading_is_a_user_error(server, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(server.content) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="No room to write"):
            load("d4rl:medium", HOPPER, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "datasets" / FILE).exists()
    load("d4rl:medium", HOPPER, progress=False)


def test_two_at_once_download_once(server, tmp_path):
    threads = [threading.Thread(target=load, args=("d4rl:medium", HOPPER)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1 and listing(tmp_path / "datasets") == [Path(FILE)]


def test_an_unreachable_server_is_a_user_error_that_says_which_file_to_put_where(server, tmp_path):
    server.close()
    folder = tmp_path / "datasets"
    with pytest.raises(UserError, match=f"Cannot download {FILE} .*put {FILE} into {folder}, or set D4RL_DATASET_DIR"):
        load("d4rl:medium", HOPPER, progress=False)
    assert listing(folder) == []


@pytest.mark.parametrize("change, message", [({"status": 404}, "404"), ({"content": b"<html>log in"}, "not HDF5")])
def test_what_is_not_the_file_is_not_kept(server, tmp_path, change, message):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=message):
        load("d4rl:medium", HOPPER, progress=False)
    assert listing(tmp_path / "datasets") == []


# Bad input


@pytest.mark.parametrize("dataset, options, message", [
    ("hopper-medium-v2", {}, "Unknown data set 'hopper-medium-v2'.*collected:QUALITY.*medium-replay.*hdf5"),
    ("", {}, "Unknown data set"),
    ("collected:mediocre", {}, "mediocre.*random, medium"),
    ("d4rl:mediocre", {}, "mediocre.*random, medium"),
    ("d4rl:", {}, "qualities"),
    ("missing.hdf5", {}, "There is no file missing.hdf5"),
    (".", {}, "Unknown data set"),
    (None, {}, "'None'.*get_dataset"),
    ({"observations": []}, {}, "observations.*get_dataset"),
    ("collected:random", {"steps": 0}, "steps=0"),
    ("collected:random", {"seed": -1}, "seed -1"),
])
def test_what_names_no_data_set_is_refused(dataset, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    with pytest.raises(UserError, match=message):
        load(dataset, HOPPER, **options)
    assert listing(tmp_path) == []


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
    "a missing key": (lambda columns: columns.pop("rewards"), "has no rewards: expected observations, actions"),
    "missing keys": (lambda columns: [columns.pop("actions"), columns.pop("terminals")], "no actions and no terminals"),
    "different lengths": (replaced("actions", lambda a: a[:-1]), r"different lengths.*'actions': \(21,\)"),
    "timeouts too short": (replaced("timeouts", lambda a: a[:5]), "different lengths"),
    "a NaN": (poisoned("observations", (13, 2), np.nan), "observations is not finite at step 13"),
    "an infinity": (poisoned("rewards", 4, np.inf), "rewards is not finite at step 4"),
    "no episode end": (no_end, "no episode ends within 22 steps"),
    "no steps": (lambda columns: columns.update({key: a[:0] for key, a in columns.items()}), "ends within 0 "),
    "another task's states": (replaced("observations", lambda a: np.zeros((22, 17))), r"\(22, 17\), hopper needs.*11"),
    "another task's actions": (replaced("actions", lambda a: np.zeros((22, 6))), r"actions.*\(22, 6\).*'N', 3"),
    "rewards of two columns": (replaced("rewards", lambda a: np.zeros((22, 2))), r"rewards.*\(22, 2\)"),
    "a scalar": (replaced("rewards", lambda a: np.float32(3)), r"different lengths.*'rewards': \(\)"),
    "text": (replaced("rewards", lambda a: np.array([b"one"] * 22)), "rewards is .*S3"),
    "an episode beyond the horizon": (endless, "an episode has 1,001 steps, more than the task's horizon, 1000"),
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
    assert listing(tmp_path) == [Path("a.hdf5")]


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["a.hdf5", "a.pkl", "a.pickle", "a.pt"])
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_never_opened(name, protocol, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol))
    with pytest.raises(UserError, match="pickle" if protocol or name != "a.hdf5" else "not HDF5"):
        load(tmp_path / name, HOPPER)
    assert listing(tmp_path) == [Path(name)]


def test_files_that_are_not_whole_hdf5_are_refused(tmp_path):
    whole = write(tmp_path / "whole.hdf5", arrays((100,) * 20)).read_bytes()
    for number, content in enumerate((b"", b"text", b"\x80", whole[:100], whole[:3000], whole[:-1])):
        path = tmp_path / f"{number}.hdf5"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{number}.hdf5 is"):
            load(path, HOPPER)
    with h5py.File(tmp_path / "groups.hdf5", "w") as file:
        for key in arrays():
            file.create_group(key)
    with pytest.raises(UserError, match="groups.hdf5"):
        load(tmp_path / "groups.hdf5", HOPPER)


def test_flipped_bytes_end_in_data_or_in_a_user_error(tmp_path):
    whole = write(tmp_path / "a.hdf5", arrays((10,) * 3)).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for place in generator.integers(len(whole), size=3):
            content[place] = generator.integers(256)
        (tmp_path / "a.hdf5").write_bytes(content)
        try:
            assert len(load(tmp_path / "a.hdf5", HOPPER).starts) > 1
        except UserError as error:
            assert "a.hdf5" in str(error)


def test_a_damaged_file_in_the_cache_is_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    path = collect(HOPPER, "random", 200, progress=False)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=f"{path} is not HDF5, or not all of it"):
        load("collected:random", HOPPER, steps=200)
