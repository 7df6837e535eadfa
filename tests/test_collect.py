"""Collected data: real MuJoCo, reproducible to the byte, written once or not at all."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import joblib
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dtlib import collect as module
from dtlib.collect import POLICIES, act, collect
from dtlib.errors import UserError
from dtlib.tasks import TASKS, get_task
from dtlib.workers import Workers

HOPPER = get_task("hopper")


def actor(seed, states=11, actions=3):
    """An untrained actor: what the tests prove must hold for any."""
    generator = np.random.default_rng(seed)
    sizes = {"hidden.0": (256, states), "hidden.1": (256, 256), "mean": (actions, 256), "log_std": (actions, 256)}
    tensors = {f"{name}.weight": generator.normal(0, 0.1, size).astype(np.float32) for name, size in sizes.items()}
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
    monkeypatch.setattr(module, "POLICIES", folder.parent)
    return folder


def read(path):
    with h5py.File(path) as file:
        return {key: file[key][:] for key in file}, dict(file.attrs)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def episodes_of(data):
    """Split into whole episodes, by a loop."""
    episodes, start = [], 0
    for row, end in enumerate(data["terminals"] | data["timeouts"]):
        if end:
            episodes.append({key: values[start:row + 1] for key, values in data.items()})
            start = row + 1
    return episodes


def test_layout_is_d4rls(own_cache, actors):
    data, attributes = read(collect(HOPPER, "medium", 600, seed=3, progress=False))
    assert {key: (values.shape, values.dtype) for key, values in data.items()} == {
        "observations": ((600, 11), np.float32), "next_observations": ((600, 11), np.float32),
        "actions": ((600, 3), np.float32), "rewards": ((600,), np.float32),
        "terminals": ((600,), bool), "timeouts": ((600,), bool)}
    assert attributes["environment"] == "Hopper-v4" and list(attributes["policies"]) == ["10"]
    assert attributes["seed"] == 3 and {"mujoco", "gymnasium"} <= set(attributes)
    assert np.abs(data["actions"]).max() <= 1
    for episode in episodes_of(data):
        assert np.array_equal(episode["observations"][1:], episode["next_observations"][:-1])
        assert not (episode["terminals"] | episode["timeouts"])[:-1].any()


@pytest.mark.parametrize("quality", ["random", "medium"])
def test_stored_actions_replayed_one_environment_at_a_time_give_the_stored_data(own_cache, actors, quality):
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
    states, noise = generator.normal(size=(8, 11)).astype(np.float32), generator.normal(size=(8, 3)).astype(np.float32)
    hidden = states.astype(np.float64)
    for name in ("hidden.0", "hidden.1"):
        hidden = np.maximum(hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0)
    mean, log_std = (hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"] for name in ("mean", "log_std"))
    assert log_std.min() < -20 and log_std.max() > 2
    expected = np.tanh(mean + np.exp(np.clip(log_std, -20, 2)) * noise)
    np.testing.assert_allclose(act(weights, states, noise), expected, atol=1e-5)
    # A row's rounding depends on no other row and not on its place.
    for row in range(8):
        assert np.array_equal(act(weights, np.tile(states[row], (16, 1)), np.tile(noise[row], (16, 1)))[row],
                              act(weights, states, noise)[row])


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
    assert files(own_cache) == sorted([first, other])  # no lock or temporary file stays


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


@pytest.mark.parametrize("quality, steps, seed, message", [
    ("expert", 100, 0, "needs hopper's expert policy; shipped are only: random, medium, medium-replay"),
    ("medium-expert", 100, 0, "medium-expert needs hopper's expert policy"),
    ("mediocre", 100, 0, "mediocre.*random, medium"),
    ("random", 0, 0, "at least 1 step"),
    ("random", 100, -1, "seed"),
])
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

    monkeypatch.setattr(module, "act", interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect(HOPPER, "medium", 500, progress=False)
    assert files(own_cache) == []


@pytest.fixture
def pools(monkeypatch):
    """Two processes for however few steps, whatever the machine; the list fills with the pools that are made."""
    made = []
    monkeypatch.setattr(module, "STEPS_A_PROCESS", 1)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(module, "Workers", lambda *arguments: made.append(Workers(*arguments)) or made[-1])
    return made


def test_side_by_side_gives_the_same_bytes(own_cache, actors, pools, monkeypatch):
    short = dataclasses.replace(HOPPER, horizon=1)  # each policy needs more than the 1024 episodes asked for at a time
    beside = collect(short, "medium-replay", 2400, progress=False)
    content = beside.read_bytes()
    assert len(pools) == 1 and pools[0].steps.value >= 2400  # one for all policies, and it did the work
    later = module._four_episodes(short, load_file(actors / "0.safetensors"), 0, 275)[0]  # number 1100
    assert np.array_equal(read(beside)[0]["observations"][1100], later["observations"][0])
    beside.unlink()
    monkeypatch.setattr(module, "STEPS_A_PROCESS", 10_000)
    assert collect(short, "medium-replay", 2400, progress=False).read_bytes() == content
    assert len(pools) == 1


def test_a_killed_worker_is_a_user_error_and_leaves_nothing(own_cache, actors, pools, monkeypatch):
    """In a thread, too: only the main one may say what Ctrl-C does."""
    made, errors = module.Workers, []

    def kill_one(*arguments):
        pool = made(*arguments)
        os.kill(list(pool._processes)[1], signal.SIGKILL)
        return pool

    def attempt():
        try:
            collect(HOPPER, "medium", 50_000, progress=False)
        except UserError as error:
            errors.append(str(error))

    monkeypatch.setattr(module, "Workers", kill_one)
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(60)
    assert "A worker process was killed" in errors[0]
    assert files(own_cache) == []


def test_workers_that_cannot_start_leave_the_process_as_it_was(monkeypatch):
    def fail(*arguments):
        raise OSError("no more processes")
    main, handler = sys.modules["__main__"], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Workers, "submit", fail)
    with pytest.raises(OSError, match="no more processes"):
        Workers(2, "")
    assert sys.modules["__main__"] is main and signal.getsignal(signal.SIGINT) is handler


# A script without the usual guard around its main part.
SIDE_BY_SIDE = """
from dtlib import collect as module
from dtlib.tasks import get_task
class Say(module.tqdm):
    def __init__(self, **options):  # when the workers have been started, half a second before they can work
        print("begun", flush=True)
        super().__init__(**options)
    def update(self, steps):
        print("collecting", flush=True)
print("script", flush=True)
module.tqdm, module.joblib.cpu_count = Say, lambda: 2
module.collect(get_task("hopper"), "random", 1_000_000, progress=False)
"""


@pytest.mark.parametrize("number, lines", [(signal.SIGINT, ["script", "begun"]), (signal.SIGKILL, ["script", "begun"]),
                                           (signal.SIGINT, ["script", "begun", "collecting"]),
                                           (signal.SIGKILL, ["script", "begun", "collecting"])])
def test_workers_end_with_their_parent(own_cache, tmp_path, number, lines):
    (tmp_path / "script.py").write_text(SIDE_BY_SIDE)
    process = start(tmp_path / "script.py", PYTHONPATH=str(Path(module.__file__).parents[1]))
    deadline = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
    deadline.start()
    assert [process.stdout.readline().strip() for _ in lines] == lines
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal: to the workers, too
    else:
        process.kill()
    output = process.communicate()[0]  # comes when the last process that could write has ended
    assert deadline.is_alive()
    deadline.cancel()
    assert "script\n" not in output and process.returncode in (-number, 1)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in output and output.count("Traceback") == 1  # the parent's and no worker's
        assert files(own_cache) == []
    assert not list(own_cache.rglob("*.hdf5"))


FULL_DISK = """
import resource, signal
from dtlib.collect import collect
from dtlib.errors import UserError
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
from dtlib import collect as module
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
    return subprocess.Popen([sys.executable, *([script] if isinstance(script, Path) else ["-c", script])], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            cwd=Path(module.__file__).parents[1], env={**os.environ, **environment})


def test_full_disk_is_a_user_error_and_leaves_nothing(own_cache):
    process = start(FULL_DISK)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "No room to write" in output and "DTLIB_CACHE" in output, output
    assert files(own_cache) == []


def test_two_processes_collect_once_whatever_their_number_of_threads(own_cache):
    processes = [start(COLLECT, OPENBLAS_NUM_THREADS=threads) for threads in ("1", "2")]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sum("collecting" in output for output in outputs) == 1, outputs
    assert outputs[0][-1] == outputs[1][-1] and files(own_cache) == [Path(outputs[0][-1])]
    content = Path(outputs[0][-1]).read_bytes()
    Path(outputs[0][-1]).unlink()
    assert collect(HOPPER, "medium", 400, progress=False).read_bytes() == content


@pytest.mark.parametrize("folder", [POLICIES / name for name in TASKS], ids=lambda path: path.name)
def test_shipped_policies_are_whole(folder):
    task = TASKS[folder.name]
    plan = json.loads((folder / "policies.json").read_text())
    assert set(plan) == {"medium", "medium-replay", "expert"}
    steps = {plan["medium"], *plan["medium-replay"], *([plan["expert"]] if plan["expert"] is not None else [])}
    assert plan["medium-replay"] == sorted(plan["medium-replay"]) and plan["medium-replay"][-1] <= plan["medium"]
    assert steps == {int(path.stem) for path in folder.glob("*.safetensors")}
    curve = np.genfromtxt(folder / "curve.csv", delimiter=",", names=True)
    assert steps <= set(curve["step"].astype(int))
    for step in steps:
        shapes = {name: tensor.shape for name, tensor in load_file(folder / f"{step}.safetensors").items()}
        assert shapes == {name: tensor.shape for name, tensor in actor(0, task.state_dim, task.action_dim).items()}


def test_shipped_medium_is_better_than_random(cache):
    medium, _ = read(collect(HOPPER, "medium", 1500, progress=False))
    random, _ = read(collect(HOPPER, "random", 1500, progress=False))
    returns = [[episode["rewards"].sum() for episode in episodes_of(data)] for data in (medium, random)]
    assert np.mean(returns[0]) > 10 * np.mean(returns[1])
