"""The run store: interruptions at any moment, several processes, damage by hand, a full disk."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dtlib import build, runs
from dtlib.errors import UserError
from dtlib.records import digests, run_folder, runs_root
from dtlib.starts import build_model
from dtlib.tasks import get_task

# Children are forked from a clean server that has imported everything, so that each starts fast.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dtlib.runs"])


@pytest.fixture
def config(hopper_file):
    return runs.RunConfig(
        dataset=str(hopper_file),
        size="chibit",
        context=3,
        epochs=3,
        steps_per_epoch=4,
        batch_size=4,
        warmup_steps=2,
        evaluation_episodes=2,
        checkpoints=(1,),
    )


def in_cache(cache, action, arguments):
    os.environ["DTLIB_CACHE"] = cache  # the server that forks was started with another one
    action(*arguments)


def child(action, *arguments):
    process = FORKS.Process(target=in_cache, args=(os.environ["DTLIB_CACHE"], action, arguments))
    process.start()
    return process


def checkpoints(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("epoch_*.safetensors"))}


def finished():
    return sorted(runs_root().glob("[!.]*"))


def without_times(record):
    return {k: v for k, v in record.items() if k not in ("provenance", "checksum")}


@pytest.fixture(scope="module")
def uninterrupted(hopper_file, tmp_path_factory):
    """The same run as ``config``'s, trained in one go in a cache of its own."""
    return run_in(tmp_path_factory.mktemp("uninterrupted"), config.__wrapped__(hopper_file))


def run_in(folder, config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DTLIB_CACHE", str(folder))
        return runs.fine_tune(config)


def test_a_run_is_what_its_config_says(uninterrupted, config):
    assert [row["epoch"] for row in uninterrupted.metrics] == [0, 1, 2, 3]
    assert [row["step"] for row in uninterrupted.metrics] == [0, 4, 8, 12]
    assert (
        uninterrupted.metrics[0]["training_loss"] is None
        and uninterrupted.metrics[3]["training_loss"] > 0
    )
    assert all(len(row["returns"]) == len(row["lengths"]) == 2 for row in uninterrupted.metrics)
    assert list(uninterrupted.record["checkpoints"]) == [
        f"epoch_00{epoch}.safetensors" for epoch in (0, 1, 3)
    ]
    start = build_model("random", "chibit", get_task("hopper"), seed=0)
    loaded, last = uninterrupted.load_model(0), uninterrupted.load_model()
    assert all(
        torch.equal(a, b) for a, b in zip(start.parameters(), loaded.parameters(), strict=True)
    )
    assert not torch.equal(last.embed_state.weight, loaded.embed_state.weight) and not last.training
    mean, std = uninterrupted.statistics()
    trajectories = runs.load_data(config)
    assert np.array_equal(mean, trajectories.state_mean) and np.array_equal(
        std, trajectories.state_std
    )


def killed_at_rename(config, moment):
    """Train, and die by SIGKILL when the ``moment``-th file is about to get its final name."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event == "os.rename" and "runs" in str(arguments[1]):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    runs.fine_tune(config)


def killed_at_step(config, moment):
    steps = 0

    def die(done):
        nonlocal steps
        steps += done
        if steps >= moment:
            os.kill(os.getpid(), signal.SIGKILL)

    runs.fine_tune(config, "cpu", die)


def test_killed_again_and_again(config, uninterrupted, tmp_path, monkeypatch):
    """Within epochs and between files: each attempt resumes the last; the outcome is equal."""
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    kills = 0
    for action, moment in (
        (killed_at_step, 3),
        (killed_at_rename, 2),
        (killed_at_step, 6),
        (killed_at_step, 8),
        (killed_at_rename, 1),
        (killed_at_rename, 3),
        (killed_at_step, 11),
    ):
        process = child(action, config, moment)
        process.join(120)
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 5
    resumed = runs.fine_tune(config)
    assert checkpoints(resumed.path) == checkpoints(uninterrupted.path)
    assert without_times(resumed.record) == without_times(uninterrupted.record)


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_killed_once_before_a_rename(config, uninterrupted, tmp_path, monkeypatch, moment):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    process = child(killed_at_rename, config, moment)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert finished() == []
    resumed = runs.fine_tune(config)
    assert checkpoints(resumed.path) == checkpoints(uninterrupted.path)
    assert without_times(resumed.record) == without_times(uninterrupted.record)
    assert not list(tmp_path.rglob(".writing-*"))


def train_and_count(config, counter, said):
    def count(steps):
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.02)

    with contextlib.redirect_stdout(io.StringIO()) as out:
        runs.fine_tune(config, "cpu", count)
    said.put(out.getvalue())


def test_two_processes_train_one_run_once(config, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    counters, said = [FORKS.Value("i", 0), FORKS.Value("i", 0)], FORKS.Queue()
    processes = [child(train_and_count, config, counter, said) for counter in counters]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert sorted(counter.value for counter in counters) == [1, 12], (
        "one trains twelve steps, the other is told once"
    )
    assert any("waiting for it" in text for text in (said.get(timeout=5), said.get(timeout=5)))
    assert checkpoints(run_folder(config)) == checkpoints(uninterrupted.path)


def test_side_by_side_equals_one_by_one(config, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    other = runs.RunConfig(**{**vars_of(config), "seed": 1})
    together = runs.fine_tuned([config, other, config], processes=2)
    assert together[0].path == together[2].path != together[1].path
    assert checkpoints(together[0].path) == checkpoints(uninterrupted.path)
    assert checkpoints(together[1].path) == checkpoints(run_in(tmp_path / "alone", other).path)
    assert finished() == sorted(run.path for run in together[:2])


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def train_many(configs):
    os.setpgrp()  # as a shell's foreground job: Ctrl-C reaches the parent and its workers
    with contextlib.suppress(KeyboardInterrupt):
        runs.fine_tuned(configs, processes=2)
        os._exit(1)


def test_interrupt_leaves_runs_that_resume(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    configs = [
        runs.RunConfig(**{**vars_of(config), "seed": seed, "steps_per_epoch": 60})
        for seed in (0, 1)
    ]
    process = child(train_many, configs)
    saved = tmp_path / "runs" / ".partial"
    deadline = time.time() + 90
    while not any(saved.rglob("resume.safetensors")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0
    assert finished() == [] and any(saved.rglob("resume.safetensors"))
    resumed = runs.fine_tune(configs[0])
    assert checkpoints(resumed.path) == checkpoints(run_in(tmp_path / "whole", configs[0]).path)


def test_global_generator_and_threads_are_left_as_they_were(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    torch.manual_seed(1)
    expected, threads = torch.rand(2)[1], torch.get_num_threads()
    torch.manual_seed(1)
    torch.rand(1)
    runs.fine_tune(config)
    assert torch.rand(1) == expected and torch.get_num_threads() == threads


def test_a_swapped_block_survives_the_disk(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    swapped = dataclasses.replace(config, size="mini", donor="language", swapped_block=2)
    assert digests(swapped)["starting_weights"] and run_folder(swapped) != run_folder(config)
    start = build_model(
        "random", "mini", get_task("hopper"), 0, donor="language", swapped_block=2
    ).eval()
    loaded = runs.fine_tune(swapped).load_model(0)
    assert all(
        torch.equal(tensor, loaded.state_dict()[name])
        for name, tensor in start.state_dict().items()
    )
    tokens = torch.randn(2, 6, 128)
    assert torch.equal(
        loaded.hidden(tokens), start.hidden(tokens)
    )  # and so do its heads and its activation


# --- what users get wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lr": 1e-4}, "lr"),
        ({"epochs": "3"}, "epochs"),
        ({"epochs": 0}, "greater than 0"),
        ({"epochs": True}, "epochs"),
        ({"learning_rate": "1e-4"}, "learning_rate"),
        ({"size": "huge"}, "'mini'"),
        ({"precision": "float16"}, "bfloat16"),
        ({"task": "ant"}, "halfcheetah"),
        ({"action_head": "both"}, "'separate'"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"dropout": (0.1, 0.1, 1.0)}, "less than 1"),
        ({"checkpoints": (1.5,)}, "checkpoints"),
        ({"compile": True}, "compile"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"reset_heads": (-1,)}, "reset_heads"),
    ],
)
def test_wrong_parameters_are_named(values, says):
    with pytest.raises(UserError, match=says):
        runs.RunConfig(**values)


def test_every_parameter_changes_the_name():
    changed = {
        "task": "walker2d",
        "dataset": "x.hdf5",
        "initialisation": "random-matched",
        "size": "mini",
        "dataset_steps": 7,
        "precision": "bfloat16",
        "action_head": "separate",
        "gradient_clip": None,
        "checkpoints": (2,),
        "target_return": 1.0,
        "donor": "random-matched",
        "reset_heads": (1,),
        "alignment": 0.1,
        "alignment_reduction": "mean",
        "cotraining": 0.1,
        "cotraining_corpus": "x",
        "words": "random-matched",
        "extended_positions": True,
        "frozen_blocks": True,
        "delayed_rewards": True,
        "dropout": (0.5, 0.1, 0.1),
        "learning_rate_decay": True,
    }
    default = vars_of(runs.RunConfig())
    others = {
        key: changed.get(key, value * 2 + 1 if isinstance(value, int) else value)
        for key, value in default.items()
    }
    others |= {
        key: value / 2
        for key, value in default.items()
        if isinstance(value, float) and key not in changed
    }
    same = {"starting_weights": ""}
    names = {runs.RunConfig(**{**default, key: value}).name(same) for key, value in others.items()}
    assert len(names | {runs.RunConfig().name(same)}) == len(default) + 1
    assert runs.RunConfig().name({"starting_weights": "other"}) not in names


@pytest.mark.parametrize("name", ["initialisation", "donor", "words"])
def test_unknown_starting_points_are_named(name):
    with pytest.raises(UserError, match="Unknown initialisation 'bert': expected one of random"):
        run_folder(runs.RunConfig(**{name: "bert"}))


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_absent_devices(config, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"'{device}' is not available: torch sees cpu here"):
        runs.fine_tuned([config], device=device)


def edit_metrics(path):
    record = json.loads((path / "run.json").read_text())
    record["metrics"][-1]["returns"] = [9999.0]
    (path / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage",
    [
        edit_metrics,
        lambda path: (path / "run.json").write_text("{"),
        lambda path: (path / "run.json").write_text('{"config": {"epochs": "many"}}'),
        lambda path: (path / "run.json").unlink(),
        lambda path: (path / "epoch_003.safetensors").unlink(),
        lambda path: (path / "epoch_003.safetensors").write_bytes(b"\x80\x04pickled"),
        lambda path: (path / "epoch_003.safetensors").write_bytes(
            (path / "epoch_000.safetensors").read_bytes()
        ),
    ],
)
def test_damaged_runs_are_refused(uninterrupted, tmp_path, damage):
    import shutil

    path = Path(shutil.copytree(uninterrupted.path, tmp_path / uninterrupted.path.name))
    damage(path)
    with pytest.raises(UserError, match=r"move (that|its) folder away"):
        runs.Run.open(path).load_model()


def test_epoch_that_was_not_kept(uninterrupted):
    with pytest.raises(UserError, match="epoch_001"):
        uninterrupted.load_model(2)


def test_a_file_that_changes_makes_another_run(hopper_file, tmp_path):
    path, names = tmp_path / "mine.hdf5", []
    for end in (b"", b"", b"one more byte"):
        path.write_bytes(hopper_file.read_bytes() + end)
        names.append(run_folder(runs.RunConfig(dataset=str(path))))
    assert names[0] == names[1] != names[2]


def test_changed_data_are_noticed_on_resume(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    process = child(killed_at_step, config, 6)
    process.join(60)
    original = build.load_data(config)
    monkeypatch.setattr(
        build,
        "load_data",
        lambda *a, **k: type(original)(
            original.name,
            original.observations + 1,
            original.actions,
            original.rewards,
            original.starts,
        ),
    )
    with pytest.raises(UserError, match="other data than"):
        runs.fine_tune(config)


def train_with_little_room(config, room, answers):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        runs.fine_tune(config)
    except UserError as error:
        answers.put(str(error))


def test_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    config, uninterrupted, tmp_path, monkeypatch
):
    """A limit on file sizes stands for the disk: writing fails in the same place."""
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    answers = FORKS.Queue()
    child(train_with_little_room, config, 100_000, answers).join(60)
    assert "Cannot write" in answers.get(timeout=5)
    assert not list(tmp_path.rglob(".writing-*")) and not list(tmp_path.rglob("*.safetensors"))
    assert checkpoints(runs.fine_tune(config).path) == checkpoints(uninterrupted.path)
