"""Where data come from: real MuJoCo to the byte, D4RL's and Minari's readers, every bad input."""

import dataclasses
import http.server
import importlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import gymnasium
import h5py
import joblib
import minari
import numpy as np
import psutil
import pytest
from conftest import output_until_all_ended
from minari.data_collector.episode_buffer import EpisodeBuffer
from safetensors.numpy import load_file, save_file
from test_data import arrays, write

from dtlib import parallel, storage
from dtlib.data import load
from dtlib.errors import UserError
from dtlib.sources import collected, files
from dtlib.sources.collected import POLICIES, act, collect
from dtlib.tasks import TASKS, get_task

ROOT = Path(__file__).parents[1]
HOPPER = get_task("hopper")

# Collected data


def actor(seed, states=11, actions=3):
    """An untrained actor: what the tests prove must hold for any."""
    generator = np.random.default_rng(seed)
    sizes = {
        "hidden.0": (256, states),
        "hidden.1": (256, 256),
        "mean": (actions, 256),
        "log_std": (actions, 256),
    }
    tensors = {
        f"{name}.weight": generator.normal(0, 0.1, size).astype(np.float32)
        for name, size in sizes.items()
    }
    return tensors | {f"{name}.bias": np.zeros(size[0], np.float32) for name, size in sizes.items()}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def actors(tmp_path, monkeypatch):
    """Two actors in place of the shipped ones; there is no expert."""
    folder = tmp_path / "policies" / "hopper"
    folder.mkdir(parents=True)
    for step in (0, 10):
        save_file(actor(step), folder / f"{step}.safetensors")
    plan = {"medium": 10, "medium-replay": [0, 10], "expert": None}
    (folder / "policies.json").write_text(json.dumps(plan))
    monkeypatch.setattr(collected, "POLICIES", folder.parent)
    return folder


def read(path):
    with h5py.File(path) as file:
        return {key: file[key][:] for key in file}, dict(file.attrs)


def listing(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def episodes_of(data):
    """Split into whole episodes, by a loop."""
    episodes, start = [], 0
    for row, end in enumerate(data["terminals"] | data["timeouts"]):
        if end:
            episodes.append({key: values[start : row + 1] for key, values in data.items()})
            start = row + 1
    return episodes


def test_layout_is_d4rls(own_cache, actors):
    data, attributes = read(collect(HOPPER, "medium", 600, seed=3, progress=False))
    assert {key: (values.shape, values.dtype) for key, values in data.items()} == {
        "observations": ((600, 11), np.float32),
        "next_observations": ((600, 11), np.float32),
        "actions": ((600, 3), np.float32),
        "rewards": ((600,), np.float32),
        "terminals": ((600,), bool),
        "timeouts": ((600,), bool),
    }
    assert attributes["environment"] == "Hopper-v4" and list(attributes["policies"]) == ["10"]
    assert attributes["seed"] == 3 and {"mujoco", "gymnasium"} <= set(attributes)
    assert np.abs(data["actions"]).max() <= 1
    for episode in episodes_of(data):
        assert np.array_equal(episode["observations"][1:], episode["next_observations"][:-1])
        assert not (episode["terminals"] | episode["timeouts"])[:-1].any()


@pytest.mark.parametrize("quality", ["random", "medium"])
def test_stored_actions_replayed_one_environment_at_a_time_give_the_stored_data(
    own_cache, actors, quality
):
    """Also proves that episode i is a function of policy, seed and i."""
    data, _ = read(collect(HOPPER, quality, 700, seed=5, progress=False))
    weights = load_file(actors / "10.safetensors") if quality == "medium" else None
    environment = HOPPER.make_environment()
    episodes = episodes_of(data)
    assert len(episodes) > 15
    for number, episode in enumerate(episodes):
        generator = np.random.default_rng([5, number])
        state, _ = environment.reset(seed=int(generator.integers(2**31)))
        for row in range(len(episode["rewards"])):
            noise = generator.standard_normal(3) if weights else generator.uniform(-1, 1, 3)
            four = np.tile(noise.astype(np.float32), (4, 1))
            action = act(weights, np.tile(state.astype(np.float32), (4, 1)), four)[0]
            assert np.array_equal(episode["observations"][row], state.astype(np.float32))
            assert np.array_equal(episode["actions"][row], action)
            state, reward, terminal, timeout, _ = environment.step(action)
            assert episode["rewards"][row] == np.float32(reward)
            assert (episode["terminals"][row], episode["timeouts"][row]) == (terminal, timeout)


def test_act_is_the_squashed_gaussian_of_its_network():
    weights, generator = actor(1), np.random.default_rng(0)
    weights["log_std.bias"] += np.float32([-30, 5, 0])  # both ends of the clip
    states, noise = (
        generator.normal(size=(8, 11)).astype(np.float32),
        generator.normal(size=(8, 3)).astype(np.float32),
    )
    hidden = states.astype(np.float64)
    for name in ("hidden.0", "hidden.1"):
        hidden = np.maximum(hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0)
    mean, log_std = (
        hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        for name in ("mean", "log_std")
    )
    assert log_std.min() < -20 and log_std.max() > 2
    expected = np.tanh(mean + np.exp(np.clip(log_std, -20, 2)) * noise)
    np.testing.assert_allclose(act(weights, states, noise), expected, atol=1e-5)
    # A row's rounding depends on no other row and not on its place.
    for row in range(8):
        assert np.array_equal(
            act(weights, np.tile(states[row], (16, 1)), np.tile(noise[row], (16, 1)))[row],
            act(weights, states, noise)[row],
        )


def test_same_seed_same_bytes_other_seed_other_data(own_cache, actors):
    first = collect(HOPPER, "medium-replay", 300, seed=0, progress=False)
    content = first.read_bytes()
    modified = first.stat().st_mtime_ns
    assert collect(HOPPER, "medium-replay", 300, seed=0, progress=False) == first
    assert first.stat().st_mtime_ns == modified  # read from the cache, not made again
    first.unlink()
    assert collect(HOPPER, "medium-replay", 300, seed=0, progress=False).read_bytes() == content
    other = collect(HOPPER, "medium-replay", 300, seed=1, progress=False)
    assert not np.array_equal(read(other)[0]["observations"], read(first)[0]["observations"])
    assert listing(own_cache) == sorted([first, other])  # no lock or temporary file stays


def test_other_policy_other_file(own_cache, actors):
    before = collect(HOPPER, "medium", 50, progress=False)
    save_file(actor(99), actors / "10.safetensors")
    assert collect(HOPPER, "medium", 50, progress=False) != before


def test_more_steps_only_add_episodes(own_cache, actors):
    short, _ = read(collect(HOPPER, "medium", 250, progress=False))
    long, _ = read(collect(HOPPER, "medium", 1000, progress=False))
    for key in ("observations", "actions", "rewards", "next_observations", "terminals"):
        assert np.array_equal(short[key], long[key][:250])


def test_policies_share_the_steps_in_whole_episodes(own_cache, actors):
    mixed, attributes = read(collect(HOPPER, "medium-replay", 800, progress=False))
    assert list(attributes["policies"]) == ["0", "10"]
    medium, _ = read(collect(HOPPER, "medium", 800, progress=False))
    ends = np.flatnonzero(mixed["terminals"] | mixed["timeouts"]) + 1
    first_share = ends[ends >= 400][0]  # the first policy ends with the episode that fills its half
    rest = 800 - first_share
    assert np.array_equal(mixed["observations"][first_share:], medium["observations"][:rest])
    assert not np.array_equal(mixed["observations"][:rest], medium["observations"][:rest])


def test_episodes_time_out_at_the_horizon(own_cache, actors):
    data, _ = read(collect(dataclasses.replace(HOPPER, horizon=5), "medium", 100, progress=False))
    lengths = [len(episode["rewards"]) for episode in episodes_of(data)]
    assert max(lengths) == 5 and data["timeouts"].sum() > 10


@pytest.mark.parametrize(
    "quality, steps, seed, message",
    [
        (
            "expert",
            100,
            0,
            "needs hopper's expert policy; shipped are only: random, medium, medium-replay",
        ),
        ("medium-expert", 100, 0, "medium-expert needs hopper's expert policy"),
        ("mediocre", 100, 0, "mediocre.*random, medium"),
        ("random", 0, 0, "at least 1 step"),
        ("random", 100, -1, "seed"),
    ],
)
def test_what_cannot_be_collected_is_a_user_error(own_cache, actors, quality, steps, seed, message):
    with pytest.raises(UserError, match=message):
        collect(HOPPER, quality, steps, seed, progress=False)
    assert not own_cache.exists()


def test_an_interrupt_leaves_nothing(own_cache, actors, monkeypatch):
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return act(*arguments)

    monkeypatch.setattr(collected, "act", interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect(HOPPER, "medium", 500, progress=False)
    assert listing(own_cache) == []


@pytest.fixture
def two_processes(monkeypatch):
    """Two processes for however few steps, whatever the machine; lists the numbers of processes."""
    used = []

    def noted(job, items, processes, advice):
        used.append(processes)
        return parallel.in_processes(job, items, processes, advice)

    monkeypatch.setattr(collected, "STEPS_A_PROCESS", 1)
    monkeypatch.setattr(joblib, "effective_n_jobs", lambda number: 2)
    monkeypatch.setattr(collected, "in_processes", noted)
    return used


def test_side_by_side_gives_the_same_bytes(own_cache, actors, two_processes, monkeypatch):
    short = dataclasses.replace(HOPPER, horizon=1)
    beside = collect(short, "medium-replay", 900, progress=False)
    content = beside.read_bytes()
    later = collected._four_episodes(short, 0, (0, load_file(actors / "0.safetensors"), 110))[1][0]
    assert np.array_equal(read(beside)[0]["observations"][440], later["observations"][0])
    beside.unlink()
    monkeypatch.setattr(collected, "STEPS_A_PROCESS", 10_000)
    assert collect(short, "medium-replay", 900, progress=False).read_bytes() == content
    assert two_processes == [2, 0]


def test_a_killed_worker_is_a_user_error_and_leaves_nothing(
    own_cache, actors, two_processes, monkeypatch
):
    def kill_one(*arguments):
        results = parallel.in_processes(*arguments)
        yield next(results)
        for child in psutil.Process().children():
            if "popen_loky_posix" in " ".join(child.cmdline()):
                child.kill()
        yield from results

    monkeypatch.setattr(collected, "in_processes", kill_one)
    with pytest.raises(UserError, match="A worker process was killed.*free some"):
        collect(HOPPER, "medium", 50_000, progress=False)
    assert listing(own_cache) == []


# A script without the usual guard around its main part.
SIDE_BY_SIDE = """
from dtlib.sources import collected as module
from dtlib.tasks import get_task
class Say(module.tqdm):
    def update(self, steps):
        print("collecting", flush=True)
print("script", flush=True)
module.tqdm, module.joblib.effective_n_jobs = Say, lambda number: 2
module.collect(get_task("hopper"), "random", 1_000_000, progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(own_cache, tmp_path, number):
    (tmp_path / "script.py").write_text(SIDE_BY_SIDE)
    process = start(tmp_path / "script.py", PYTHONPATH=str(ROOT))
    deadline = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))
    deadline.start()
    assert [process.stdout.readline() for _ in range(2)] == ["script\n", "collecting\n"]
    output = output_until_all_ended(process, number, deadline)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in output and output.count("Traceback") == 1
        assert listing(own_cache) == []
    assert not list(own_cache.rglob("*.hdf5"))


FULL_DISK = """
import resource, signal
from dtlib.errors import UserError
from dtlib.sources.collected import collect
from dtlib.tasks import get_task
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    collect(get_task("hopper"), "random", 1000, progress=False)
except UserError as error:
    print(error)
"""

# Two of these run at once; each says when it really collects.
COLLECT = """
from dtlib.sources import collected as module
from dtlib.tasks import get_task
episodes = module._four_episodes
def say(*arguments):
    print("collecting", flush=True)
    return episodes(*arguments)
module._four_episodes = say
print(module.collect(get_task("hopper"), "medium", 400, progress=False))
"""


def start(script, **environment):
    """A process of its own, and a group of its own, that runs code or a file."""
    return subprocess.Popen(
        [sys.executable, *([script] if isinstance(script, Path) else ["-c", script])],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_full_disk_is_a_user_error_and_leaves_nothing(own_cache):
    process = start(FULL_DISK)
    output = process.communicate(timeout=120)[0]
    told = "Cannot write" in output and "DTLIB_CACHE" in output
    assert process.returncode == 0 and told, output
    assert listing(own_cache) == []


def test_two_processes_collect_once_whatever_their_number_of_threads(own_cache):
    processes = [start(COLLECT, OPENBLAS_NUM_THREADS=threads) for threads in ("1", "2")]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sum("collecting" in output for output in outputs) == 1, outputs
    assert outputs[0][-1] == outputs[1][-1] and listing(own_cache) == [Path(outputs[0][-1])]
    content = Path(outputs[0][-1]).read_bytes()
    Path(outputs[0][-1]).unlink()
    assert collect(HOPPER, "medium", 400, progress=False).read_bytes() == content


@pytest.mark.parametrize("folder", [POLICIES / name for name in TASKS], ids=lambda path: path.name)
def test_shipped_policies_are_whole(folder):
    task = TASKS[folder.name]
    plan = json.loads((folder / "policies.json").read_text())
    assert set(plan) == {"medium", "medium-replay", "expert"}
    steps = {
        plan["medium"],
        *plan["medium-replay"],
        *([plan["expert"]] if plan["expert"] is not None else []),
    }
    assert (
        plan["medium-replay"] == sorted(plan["medium-replay"])
        and plan["medium-replay"][-1] <= plan["medium"]
    )
    assert steps == {int(path.stem) for path in folder.glob("*.safetensors")}
    curve = np.genfromtxt(folder / "curve.csv", delimiter=",", names=True)
    assert steps <= set(curve["step"].astype(int))
    for step in steps:
        shapes = {
            name: tensor.shape for name, tensor in load_file(folder / f"{step}.safetensors").items()
        }
        assert shapes == {
            name: tensor.shape for name, tensor in actor(0, task.state_dim, task.action_dim).items()
        }


def test_shipped_medium_is_better_than_random(cache):
    medium, _ = read(collect(HOPPER, "medium", 1500, progress=False))
    random, _ = read(collect(HOPPER, "random", 1500, progress=False))
    returns = [
        [episode["rewards"].sum() for episode in episodes_of(data)] for data in (medium, random)
    ]
    assert np.mean(returns[0]) > 10 * np.mean(returns[1])


# D4RL and Minari


@pytest.fixture
def d4rl(tmp_path, monkeypatch):
    """The real d4rl package, with gymnasium called gym and empty modules for other robots."""
    for name in ("", ".envs", ".envs.registration", ".spaces", ".utils"):
        monkeypatch.setitem(sys.modules, f"gym{name}", importlib.import_module(f"gymnasium{name}"))
    mujoco = types.ModuleType("gym.envs.mujoco")
    for file, name in (
        ("ant", "AntEnv"),
        ("half_cheetah", "HalfCheetahEnv"),
        ("hopper", "HopperEnv"),
        ("walker2d", "Walker2dEnv"),
    ):
        setattr(
            mujoco, name, getattr(importlib.import_module(f"gymnasium.envs.mujoco.{file}_v4"), name)
        )
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
    path = files.d4rl_path(HOPPER, "medium-replay")
    assert path == Path(
        d4rl.offline_env.filepath_from_url(d4rl.infos.DATASET_URLS["hopper-medium-replay-v2"])
    )
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
        assert np.array_equal(
            np.concatenate([episode[key] for episode in episodes]), getattr(ours, key)
        )
    name = "hopper-medium-replay-v2"
    assert HOPPER.d4rl_reference == (d4rl.infos.REF_MIN_SCORE[name], d4rl.infos.REF_MAX_SCORE[name])
    assert HOPPER.scores(1234.5)["D4RL"] == pytest.approx(
        100 * d4rl.get_normalized_score(name, 1234.5)
    )


def test_every_d4rl_file_has_the_packages_name_and_address(d4rl, monkeypatch):
    for name in ("hopper", "halfcheetah", "walker2d"):
        task = get_task(name)
        for quality in ("random", "medium", "medium-replay", "medium-expert", "expert"):
            path = files.d4rl_path(task, quality)
            assert files.D4RL_ADDRESS + path.name == d4rl.infos.DATASET_URLS[f"{name}-{quality}-v2"]
        assert task.d4rl_reference == tuple(
            scores[f"{name}-medium-v2"]
            for scores in (d4rl.infos.REF_MIN_SCORE, d4rl.infos.REF_MAX_SCORE)
        )
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert (
        files.d4rl_path(HOPPER, "random")
        == Path("~/.d4rl/datasets/hopper_random-v2.hdf5").expanduser()
    )


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
            buffer.actions.append(
                environment.action_space.sample() * (seed / 5)
            )  # at rest it lasts longest
            state, reward, terminal, timeout, _ = environment.step(buffer.actions[-1])
            buffer.observations.append(state)
            buffer.rewards.append(reward)
            buffer.terminations.append(terminal)
            buffer.truncations.append(timeout)
        buffers.append(buffer)
    minari.create_dataset_from_buffers(
        "mujoco/hopper/handmade-v0",
        buffers,
        env=environment,
        algorithm_name="random",
        author="test",
        author_email="test@example.org",
        description="test",
        code_permalink="https://example.org",
    )
    return buffers


@pytest.mark.filterwarnings("ignore")
def test_a_minari_data_set_round_trips(minari_hopper, tmp_path):
    trajectories = load("minari:mujoco/hopper/handmade-v0", HOPPER, progress=False)
    lengths = trajectories.lengths
    assert lengths.tolist() == [len(buffer.actions) for buffer in minari_hopper]
    assert 50 in lengths and lengths.min() < 50  # a timeout and a terminal
    for name in ("observations", "actions", "rewards"):
        expected = np.concatenate(
            [getattr(buffer, name)[: len(buffer.actions)] for buffer in minari_hopper]
        )
        assert np.array_equal(getattr(trajectories, name), expected.astype(np.float32))
    some = load(
        "minari:mujoco/hopper/handmade-v0", HOPPER, steps=int(lengths[:2].sum()) + 1, progress=False
    )
    assert some.lengths.tolist() == trajectories.lengths[:2].tolist()
    with pytest.raises(
        UserError, match=r"handmade-v0: observations .*, 11\), walker2d needs .*\('N', 17\)"
    ):
        load("minari:mujoco/hopper/handmade-v0", get_task("walker2d"))
    (stored,) = tmp_path.rglob("*.hdf5")
    stored.write_bytes(stored.read_bytes()[:-10])
    with pytest.raises(UserError, match="handmade-v0.*truncated file.*move a damaged copy away"):
        load("minari:mujoco/hopper/handmade-v0", HOPPER, progress=False)


def test_minari_without_a_network_is_a_user_error(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(minari.storage.hosting, "download_dataset", unreachable)
    for identifier in ("mujoco/hopper/medium-v0", "nonsense"):
        with pytest.raises(UserError, match=f"{identifier}.*mujoco/hopper/medium-v0"):
            load(f"minari:{identifier}", HOPPER)
    assert not list(tmp_path.iterdir())


# Downloads, from a server on this machine


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``content``; can hang up after ``limit`` bytes, or fail."""

    content, limit, status = b"", None, None

    def do_GET(self):
        type(self).requests.append(self.path)
        type(self).seen = os.listdir(os.environ["D4RL_DATASET_DIR"])
        if self.status:
            return self.send_error(self.status)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: self.limit])

    def log_message(self, *arguments):
        """Silence."""


@pytest.fixture
def server(monkeypatch, tmp_path, hopper_file):
    handler = type("Handler", (Server,), {"content": hopper_file.read_bytes(), "requests": []})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(files, "D4RL_ADDRESS", f"http://127.0.0.1:{running.server_port}/v2/")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler.close = lambda: (running.shutdown(), thread.join(), running.server_close())
    yield handler
    handler.close()


FILE, HASH = "hopper_medium-v2.hdf5", "hopper_medium-v2.sha256"


def test_a_broken_download_leaves_nothing_and_can_be_repeated(server, tmp_path, hopper_file):
    folder, whole = tmp_path / "datasets", server.content
    server.content, server.limit = whole[:100] + bytes(len(whole)), len(whole) // 2
    with pytest.raises(UserError, match=f"Cannot download {FILE}.*{folder}.*D4RL_DATASET_DIR"):
        load("d4rl:medium", HOPPER, progress=False)
    assert listing(folder) == []
    swept = (storage.WRITING, f"{FILE}.lock")  # after kill -9, too
    assert server.seen and all(name.startswith(swept) for name in server.seen)
    server.content, server.limit = whole, None  # another version: the two are not joined
    trajectories = load("d4rl:medium", HOPPER, progress=False)
    assert listing(folder) == [folder / FILE, folder / HASH]
    assert (folder / FILE).read_bytes() == server.content
    assert trajectories.fingerprint == load(hopper_file, HOPPER).fingerprint
    assert trajectories.name == "d4rl:medium" and server.requests == [f"/v2/{FILE}"] * 2
    load("d4rl:medium", HOPPER)
    assert len(server.requests) == 2  # the file is there now


def test_a_file_that_changes_is_refused(server, tmp_path, hopper_file):
    folder = tmp_path / "datasets"
    shutil.copytree(hopper_file.parent, folder)  # found, not downloaded
    (folder / hopper_file.name).rename(folder / FILE)
    load("d4rl:medium", HOPPER, progress=False)
    digest, name = (folder / HASH).read_text().split()
    assert len(digest) == 64 and name == FILE and server.requests == []
    write(folder / FILE, arrays())
    with pytest.raises(UserError, match=f"{FILE} has changed since.*{HASH}"):
        load("d4rl:medium", HOPPER, progress=False)
    (folder / HASH).unlink()
    assert load("d4rl:medium", HOPPER, progress=False).lengths.tolist() == [7, 3, 12]


def test_a_full_disk_while_downloading_is_a_user_error(server, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(server.content) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="Cannot write"):
            load("d4rl:medium", HOPPER, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path / "datasets") == []
    load("d4rl:medium", HOPPER, progress=False)


def test_two_at_once_download_once(server, tmp_path):
    threads = [threading.Thread(target=load, args=("d4rl:medium", HOPPER)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1
    assert [path.name for path in listing(tmp_path / "datasets")] == [FILE, HASH]


def test_an_unreachable_server_is_a_user_error_that_says_which_file_to_put_where(server, tmp_path):
    server.close()
    folder = tmp_path / "datasets"
    advice = f"put {FILE} into {folder}, or set D4RL_DATASET_DIR"
    with pytest.raises(UserError, match=f"Cannot download {FILE} .*{advice}"):
        load("d4rl:medium", HOPPER, progress=False)
    assert listing(folder) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"status": 404}, "404"), ({"content": b"<html>log in"}, "not HDF5")],
)
def test_what_is_not_the_file_is_not_kept(server, tmp_path, change, message):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=message):
        load("d4rl:medium", HOPPER, progress=False)
    assert listing(tmp_path / "datasets") == []


# Files that are not what they should be


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
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_files_that_are_not_whole_hdf5_are_refused(tmp_path):
    whole = write(tmp_path / "whole.hdf5", arrays((100,) * 20)).read_bytes()
    for number, content in enumerate(
        (b"", b"text", b"\x80", whole[:100], whole[:3000], whole[:-1])
    ):
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


def test_arrays_in_other_files_are_not_read(tmp_path):
    columns, path = arrays(), tmp_path / "a.hdf5"
    rewards = columns.pop("rewards")
    (tmp_path / "secret").write_bytes(rewards.tobytes())
    write(tmp_path / "other.hdf5", {"rewards": rewards})
    layout = h5py.VirtualLayout(rewards.shape, rewards.dtype)
    layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "rewards", rewards.shape)
    outside = [(str(tmp_path / "secret"), 0, rewards.nbytes)]
    for add in (
        lambda file: file.create_dataset("rewards", rewards.shape, "f4", external=outside),
        lambda file: file.create_virtual_dataset("rewards", layout),
        lambda file: file.update(rewards=h5py.ExternalLink("other.hdf5", "rewards")),
    ):
        write(path, columns)
        with h5py.File(path, "a") as file:
            add(file)
        with pytest.raises(UserError, match="rewards lies in another file"):
            load(path, HOPPER)


def test_a_filter_that_is_not_installed_is_named(tmp_path):
    write(tmp_path / "a.hdf5", arrays())
    missing = (32001, 1, (2, 2, 4, 2400, 5, 1, 1))  # Blosc, optional here, so that h5py can write
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((22,))
    settings.set_filter(*missing)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["rewards"]
        space = h5py.h5s.create_simple((22,))
        h5py.h5d.create(file.id, b"rewards", h5py.h5t.IEEE_F32LE, space, settings)
    with pytest.raises(UserError, match="rewards is compressed by filter 32001.*h5repack"):
        load(tmp_path / "a.hdf5", HOPPER)
