"""What is lost, mixed or stale in silence: nothing. One section for each kind of accident."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dtlib import batch, config, data, profiles, records, runs, settings, starts, storage, weights
from dtlib.errors import Unreadable, UserError, reading
from dtlib.model import DecisionTransformer
from dtlib.pretraining import language, training
from dtlib.sources import collected, files
from dtlib.tasks import get_task
from dtlib.train import make_optimiser
from dtlib.wikipedia import losses

HOPPER = get_task("hopper")
SHIPPED = starts.SHIPPED / "language-tiny-seed0"
SMALL = {"size": "tiny", "context": 2, "epochs": 1, "steps_per_epoch": 2, "batch_size": 2}
SMALL |= {"warmup_steps": 0, "evaluation_episodes": 1}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """A copy of a shipped language model, as a folder that a user brings."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "model"))


def columns(steps=200, states=11, actions=3):
    generator = np.random.default_rng(0)
    return {
        "observations": generator.standard_normal((steps, states)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (steps, actions)).astype(np.float32),
        "rewards": generator.random(steps).astype(np.float32),
        "terminals": np.arange(steps) % 20 == 19,
        "timeouts": np.zeros(steps, bool),
    }


def write(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


# A run's name covers all that decides it


def name_of(**values):
    return records.run_folder(runs.RunConfig(**SMALL | values)).name


def changed_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit(folder / "config.json", n_head=1),
        lambda folder: edit(folder / "config.json", layer_norm_epsilon=1e-3),
        lambda folder: edit(folder / "tokenizer.json", version="2.0"),
        changed_weights,
    ],
)
@pytest.mark.parametrize("role", ["initialisation", "donor", "words"])
def test_each_file_of_a_model_folder_is_in_the_name(folder, change, role):
    before = name_of(**{role: str(folder)})
    assert name_of(**{role: str(folder)}) == before
    change(folder)
    assert name_of(**{role: str(folder)}) != before


def test_a_shipped_start_is_named_by_its_weights_alone(own_cache):
    code = storage.digest(SHIPPED / "model.safetensors")[:16]
    assert records.weights_digest("language", "tiny", 0) == code
    for kind in ("language", "image", "markov"):
        path = starts.pretrained_folder(kind, "mini", 0)
        assert weights.is_usual(path, "mini")
    made = Path(shutil.copytree(SHIPPED, own_cache / "starting_points" / "markov-tiny-seed0"))
    assert records.weights_digest("markov", "tiny", 0) == code
    edit(made / "config.json", n_head=1)
    assert records.weights_digest("markov", "tiny", 0) != code


def test_each_file_of_a_data_set_and_of_a_text_is_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "texts").mkdir()
    cotraining = {"initialisation": "language", "cotraining": 0.1}
    for file, values in (
        (tmp_path / "mine.HDF5", {"dataset": str(tmp_path / "mine.HDF5")}),
        (tmp_path / "hopper_medium-v2.hdf5", {"dataset": "d4rl:medium"}),
        (tmp_path / "a/b-v0/data/main_data.hdf5", {"dataset": "minari:a/b-v0"}),
        (tmp_path / "texts/a.txt", cotraining | {"cotraining_corpus": str(tmp_path / "texts")}),
    ):
        names = [name_of(**values)]
        file.parent.mkdir(parents=True, exist_ok=True)
        for content in (b"one", b"two"):
            file.write_bytes(content)
            names.append(name_of(**values))
        assert len(set(names)) == 3, file


def test_files_that_change_while_a_run_learns_make_no_other_run_of_it(
    own_cache, folder, tmp_path, monkeypatch
):
    measure = runs._measure

    def and_change(*arguments):
        edit(folder / "config.json", n_head=1)
        return measure(*arguments)

    monkeypatch.setattr(runs, "_measure", and_change)
    wish = SMALL | {"dataset": str(write(tmp_path / "d.hdf5", columns()))}
    wish = runs.RunConfig(**wish, initialisation=str(folder))
    before = records.run_folder(wish)
    run = runs.fine_tune(wish)  # after hours: it is kept, under the name of what it began with
    assert run.path == before != records.run_folder(wish)
    assert run.load_model(0).config.n_head == 2


def test_digests_cannot_be_given():
    with pytest.raises(UserError, match="starting_weights"):
        runs.RunConfig(starting_weights="0" * 16)


def test_runs_of_other_code_are_said_when_they_are_found(own_cache, capsys, monkeypatch):
    wish = runs.RunConfig(dataset="collected:random", dataset_steps=200, **SMALL)
    runs.fine_tuned([wish], "cpu", 1)
    runs.fine_tuned([wish], "cpu", 1)
    assert "other code" not in capsys.readouterr().out
    monkeypatch.setattr(records, "CODE", "another")
    runs.fine_tuned([wish], "cpu", 1)
    said = capsys.readouterr().out
    assert "1 of 1 runs were trained by other code or libraries, first hopper-" in said
    assert f"(dtlib {storage.code_digest()}, now another)" in said


def test_a_record_says_which_text_co_training_read(monkeypatch):
    record = {"data": {"fingerprint": "f", "text": language.text_identity("python")}}
    wish = runs.RunConfig(initialisation="language", cotraining=1.0, cotraining_corpus="python")
    records.check_source(wish, record, "f", Path("run"))
    monkeypatch.setattr(language.platform, "python_version", lambda: "3.11.99")
    with pytest.raises(UserError, match="run learnt from other text than 'python' has now"):
        records.check_source(wish, record, "f", Path("run"))
    records.check_source(wish, {"data": {"fingerprint": "f"}}, "f", Path("run"))  # an older one


def test_what_does_not_fit_in_memory_is_one_sentence(tmp_path):
    shape = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "llama"}))
    with pytest.raises(UserError, match="The blocks of this model, .* GB, do not fit in .* GB"):
        starts.build_model(str(tmp_path), "tiny", HOPPER, 0, (0.0, 0.0, 0.0))
    with pytest.raises(UserError, match="99999999999999 steps take .* GB of memory, this machine"):
        collected.collect(HOPPER, "medium", 99999999999999, progress=False)


def test_a_finished_run_is_refused_when_the_collected_data_changed(own_cache):
    wish = runs.RunConfig(dataset="collected:random", dataset_steps=200, **SMALL)
    (run,) = runs.fine_tuned([wish], "cpu", 1)
    path = collected.collect(HOPPER, "random", 200, progress=False)
    with h5py.File(path, "a") as file:
        file["rewards"][3] += 1
        del file.attrs["sha256"]
    with pytest.raises(UserError, match="learnt from other data than 'collected:random' has now"):
        runs.fine_tuned([wish], "cpu", 1)
    assert runs.Run.open(run.path).metrics == run.metrics  # and nothing was removed


def test_a_trial_is_no_starting_point(own_cache):
    trial = training.PretrainConfig("markov", "tiny", steps=3, tokens="")
    made = own_cache / "starting_points" / trial.name
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "training.json").write_text(json.dumps({"config": dataclasses.asdict(trial)}))
    values = {"overrides": {"size": "tiny"}, "controls": ["markov"]}
    (wanted,) = profiles.to_be_pretrained("laptop", values)
    assert wanted.name == trial.name and wanted.steps > 3
    with pytest.raises(UserError, match="something else: move it away"):
        training.pretrain(wanted)


def test_a_model_that_runs_would_not_use_is_refused(own_cache, tmp_path):
    for wish in ({"steps": 20}, {"steps": 20, "seed": 1}):  # shipped; other than the shipped
        with pytest.raises(UserError, match="Runs would not use this .*language-tiny-seed0.*--out"):
            training.pretrain(training.PretrainConfig("language", "tiny", **wish))
    made = own_cache / "starting_points" / "language-tiny-seed1"
    shutil.copytree(SHIPPED, made)
    assert starts.pretrained_folder("language", "tiny", 1) == made
    record = json.loads((made / "training.json").read_text())
    edit(made / "training.json", config=record["config"] | {"steps": 20})
    assert starts.pretrained_folder("language", "tiny", 1) == SHIPPED


def test_the_corpus_that_a_models_record_names_is_in_the_name(folder):
    names, record = set(), json.loads((folder / "training.json").read_text())
    for corpus in ("python", "installed", "wikitext-2"):
        edit(folder / "training.json", config=record["config"] | {"corpus": corpus})
        names.add(name_of(initialisation=str(folder), cotraining=1.0))
    (folder / "training.json").unlink()
    assert len(names | {name_of(initialisation=str(folder), cotraining=1.0)}) == 4


@pytest.mark.parametrize("text", ["", '{"config"', '{"epoch": 3}', "[]3", '{"config": 7}'])
def test_a_record_of_pretraining_that_is_none_is_one_sentence(folder, text):
    (folder / "training.json").write_text(text)
    with pytest.raises(UserError, match=r"training\.json is no whole record of pre-training"):
        name_of(initialisation=str(folder), cotraining=1.0)


def test_runs_of_other_versions_and_copies_are_not_called_damaged(own_cache, tmp_path):
    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    run = runs.fine_tune(wish)
    copy = Path(shutil.copytree(run.path, run.path.with_name("copy")))
    with pytest.raises(UserError, match=f"copy is a renamed or copied {run.path.name}: name it so"):
        runs.Run.open(copy)
    record = json.loads((run.path / "run.json").read_text())
    record["config"]["new_field"] = record.pop("checksum") == ""
    text = json.dumps({"checksum": storage.digest(json.dumps(record)), **record})
    (run.path / "run.json").write_text(text)
    with pytest.raises(UserError, match="is of another version of dtlib .*new_field"):
        runs.Run.open(run.path)


# Divergence is a result, not a run


def test_what_is_not_finite_is_no_run(own_cache, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="target_return"):
        runs.RunConfig(target_return=1e42)
    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    monkeypatch.setattr(runs, "action_error", lambda *arguments: float("nan"))
    with pytest.raises(UserError, match="After epoch 0 actions or returns are not finite"):
        runs.fine_tune(wish)
    assert not list(records.runs_root().glob("[!.]*"))


def test_quantised_weights_are_refused(folder):
    tensors, name = load_file(folder / "model.safetensors"), "transformer.h.1.attn.c_attn.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="attn.c_attn.weight is torch.int8, quantised"):
        starts.build_model(str(folder), "tiny", HOPPER, 0)


def test_a_training_that_diverges_says_so_and_leaves_no_run(own_cache, tmp_path):
    wish = SMALL | {"dataset": str(write(tmp_path / "d.hdf5", columns())), "steps_per_epoch": 20}
    wish |= {"learning_rate": 1e30, "gradient_clip": 1e30}
    message = r"diverged at step \d+: the loss was .*norm .*learning rate 1e\+30"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            runs.fine_tune(runs.RunConfig(**wish))
    assert not list(records.runs_root().glob("[!.]*"))


def test_a_pretraining_that_diverges_never_joins_the_starting_points(own_cache, monkeypatch):
    calls, loss = [], training.token_loss

    def infinite(model, sequences):
        calls.append(0)
        return loss(model, sequences) * (float("inf") if len(calls) > 6 else 1)

    monkeypatch.setattr(training, "token_loss", infinite)
    wish = training.PretrainConfig("markov", "tiny", sequence=8, steps=20, batch_size=4)
    with pytest.raises(UserError, match="diverged at step"):
        training.pretrain(wish, on_steps=lambda steps: None)
    assert [path.name for path in (own_cache / "starting_points").iterdir()] == [".partial"]
    with pytest.raises(UserError, match="There is no 'markov' starting point of size 'tiny'"):
        starts.pretrained_folder("markov", "tiny", 0)


def test_an_epoch_that_changes_no_prediction_is_said(own_cache, tmp_path, monkeypatch, capsys):
    measure = runs._measure
    monkeypatch.setattr(runs, "_measure", lambda *a: measure(*a) | {"action_error": 0.9})
    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    assert runs.fine_tuned([wish], "cpu", 1)[0].stands_still
    assert (
        "1 of 1 runs stand still: the last epoch changed no prediction" in capsys.readouterr().out
    )
    monkeypatch.undo()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_setting_is_infinite(value):
    floats = [f.name for f in dataclasses.fields(runs.RunConfig) if isinstance(f.default, float)]
    assert {"learning_rate", "gradient_clip", "alignment"} <= set(floats)
    for name in (*floats, "target_return"):
        with pytest.raises(UserError, match=name):
            runs.RunConfig(**{name: value})
    with pytest.raises(UserError, match="expected float"):
        settings.fit("rate", value, 0.5)


def test_weights_that_are_not_finite_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.attn.c_attn.weight"][5, 7] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"h\.1\.attn\.c_attn\.weight holds NaN"):
        starts.build_model(str(folder), "tiny", HOPPER, 0)


def test_sums_that_overflow_are_refused(tmp_path):
    for key in ("rewards", "observations"):
        arrays = columns()
        arrays[key][:] = -3.3e38
        arrays[key][::20] = 3.3e38
        with pytest.raises(UserError, match="overflow"):
            data.load(write(tmp_path / "d.hdf5", arrays), HOPPER)


# Data are what the file holds


def outside(tmp_path):
    write(tmp_path / "other.hdf5", columns())
    os.mkfifo(tmp_path / "pipe")
    return {
        "soft": h5py.SoftLink("/elsewhere"),
        "external": h5py.ExternalLink("other.hdf5", "rewards"),
        "pipe": h5py.ExternalLink(str(tmp_path / "pipe"), "rewards"),
        "missing": h5py.ExternalLink("absent.hdf5", "rewards"),
        "indirect": h5py.SoftLink("/group/rewards"),
    }


def test_links_are_refused_without_following_them(tmp_path):
    for link in outside(tmp_path).values():
        arrays = columns()
        del arrays["rewards"]
        write(tmp_path / "a.hdf5", arrays)
        with h5py.File(tmp_path / "a.hdf5", "a") as file:
            file["group"] = h5py.ExternalLink("other.hdf5", "/")
            file["rewards"] = link
        with pytest.raises(UserError, match="rewards lies in another file"):
            data.load(tmp_path / "a.hdf5", HOPPER)


def test_an_array_larger_than_the_memory_is_refused_before_it_is_read(tmp_path):
    arrays = columns()
    del arrays["rewards"]
    write(tmp_path / "a.hdf5", arrays)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file.create_dataset("rewards", (10**14,), "f4", chunks=(10**6,))
    with pytest.raises(UserError, match="more than this machine's memory"):
        data.load(tmp_path / "a.hdf5", HOPPER)


def test_groups_masks_and_what_is_no_data_are_sentences(tmp_path):
    arrays = columns()
    del arrays["rewards"]
    with h5py.File(write(tmp_path / "a.hdf5", arrays), "a") as file:
        file.create_group("rewards")
    masked = columns()
    masked["rewards"] = np.ma.masked_less(masked["rewards"], 0.5)

    class Source:
        def __init__(self, columns):
            self.get_dataset = lambda: columns

    for given, says in (
        (tmp_path / "a.hdf5", "rewards is no array"),
        (Source(masked), "rewards has masked entries"),
        (Source(None), r"get_dataset\(\) gave None"),
        ("x" * 5000 + ".hdf5", "There is no file"),
    ):
        with pytest.raises(UserError, match=says):
            data.load(given, HOPPER)


def test_what_is_odd_in_the_data_is_said(tmp_path):
    arrays = columns()
    arrays["actions"][:50] *= 3
    arrays["rewards"] = np.ones(200, np.int64)
    said = data.load(write(tmp_path / "a.hdf5", arrays), HOPPER).summary()
    assert "actions outside [−1, 1]" in said and "rewards are int64, not float32" in said
    standing = columns(states=17, actions=6)
    standing["observations"][:, 0] = 1.2
    path = write(tmp_path / "walker.hdf5", standing)
    assert "another robot's" in data.load(path, get_task("halfcheetah")).summary()
    assert "another robot's" not in data.load(path, get_task("walker2d")).summary()


def test_collected_data_that_were_damaged_are_refused(own_cache):
    path = collected.collect(HOPPER, "random", 200, progress=False)
    before = data.load("collected:random", HOPPER, steps=200).fingerprint
    with h5py.File(path) as file:
        place = file["rewards"].id.get_offset() + 41
    flip(path, place)
    with pytest.raises(UserError, match="not those that were written"):
        data.load("collected:random", HOPPER, steps=200)
    flip(path, place)
    assert data.load("collected:random", HOPPER, steps=200).fingerprint == before


# Saved state is sealed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = starts.build_model("random", "tiny", HOPPER, 0)
    optimiser = make_optimiser(model, 1e-3)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimiser.step()
    path = tmp_path_factory.mktemp("saved") / "resume.safetensors"
    storage.save_state(path, model, optimiser, {"metrics": [{"step": 1}]})
    return path


def load(path):
    model = starts.build_model("random", "tiny", HOPPER, 1)
    return storage.load_state(path, model, make_optimiser(model, 1e-3)), model


def test_any_flipped_bit_of_a_saved_state_is_noticed(saved, tmp_path, capsys):
    assert load(saved)[0] == {"metrics": [{"step": 1}]}
    path, start = tmp_path / saved.name, load(tmp_path / "absent")[1]
    size = saved.stat().st_size
    header = int.from_bytes(saved.read_bytes()[:8], "little")
    places = np.random.default_rng(0).integers(8 + header, size, 8).tolist()
    for place in (0, 9, 8 + header // 2, *places, size - 1):
        shutil.copy(saved, path)
        flip(path, place)
        progress, model = load(path)
        assert progress is None and f"{path} is damaged" in capsys.readouterr().out, place
        for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def interrupted(wish, monkeypatch):
    """Leave a run after its first epoch."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*arguments):
            raise KeyboardInterrupt

        patch.setattr(runs, "_train_one_epoch", stop)
        runs.fine_tune(wish)
    (folder,) = (records.runs_root() / ".partial").glob("hopper*-K2-*[0-9a-f]")
    return folder


@pytest.mark.parametrize("file", ["resume.safetensors", "epoch_000.safetensors"])
def test_an_interrupted_run_with_a_damaged_file_begins_anew(
    file, own_cache, tmp_path, monkeypatch, capsys
):
    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    folder = interrupted(wish, monkeypatch)
    flip(folder / file, -1000)
    run = runs.fine_tune(wish)
    assert "this training begins anew" in capsys.readouterr().out
    shutil.move(run.path, tmp_path / "first")
    again = runs.fine_tune(wish)
    assert again.record["checkpoints"] == run.record["checkpoints"]


def test_other_libraries_on_resume_are_said_and_kept(own_cache, tmp_path, monkeypatch, capsys):
    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    interrupted(wish, monkeypatch)
    older = storage.versions()
    monkeypatch.setattr(storage, "versions", lambda: older | {"torch": "9.9"})
    run = runs.fine_tune(wish)
    assert f"torch {older['torch']} then, 9.9 now" in capsys.readouterr().out
    assert older.items() <= run.record["provenance"]["begun_with"].items()


def test_another_dtlib_on_resume_is_said_and_kept(own_cache, tmp_path, monkeypatch, capsys):
    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    interrupted(wish, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "CODE", "another")
        run = runs.fine_tune(wish)
    assert "goes on with other code: dtlib" in capsys.readouterr().out
    versions = run.record["provenance"]["versions"]
    assert run.record["provenance"]["begun_with"]["dtlib"] != versions["dtlib"]


def test_a_state_under_another_runs_name_begins_anew(own_cache, tmp_path, monkeypatch, capsys):
    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    other = dataclasses.replace(wish, learning_rate=1e-2)
    folder = interrupted(wish, monkeypatch)
    folder.rename(folder.with_name(records.run_folder(other).name))
    mixed = runs.fine_tune(other)
    assert f"it belongs to {folder.name}" in capsys.readouterr().out
    shutil.rmtree(mixed.path)
    assert runs.fine_tune(other).metrics == mixed.metrics


def test_another_text_on_resume_is_noticed(own_cache, tmp_path, monkeypatch):
    def documents(word):
        texts = (
            f"the {word} {'abcdefghij'[i % 10] * 3} walks by {'qrstuv'[i % 6] * 2} birds and "
            f"sees a {'mnop'[i % 4] * 4} lake {'wxyz'[i // 60 % 4] * (i // 240 + 1)}"
            for i in range(2000)
        )
        return lambda packages, progress: (("x", text) for text in texts)

    wish = {"dataset": str(write(tmp_path / "d.hdf5", columns())), "initialisation": "language"}
    wish = runs.RunConfig(**SMALL | wish, cotraining=1.0, cotraining_corpus="python")
    monkeypatch.setattr(language, "_python_documents", documents("robot"))
    interrupted(wish, monkeypatch)
    monkeypatch.setattr(language, "_python_documents", documents("banana"))
    shutil.rmtree(own_cache / "corpora")
    with pytest.raises(UserError, match="There are other data than when"):
        runs.fine_tune(wish)


# What cannot be read just now is neither damaged nor removed


@pytest.fixture
def refused(monkeypatch):
    """Names of files that the system does not open, as those of another user."""
    names, real = set(), open

    def opens(path, *arguments, **options):
        if os.path.basename(str(path)) in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", opens)
    monkeypatch.setattr("io.open", opens)
    return names


def test_what_cannot_be_read_now_is_kept(own_cache, folder, tmp_path, monkeypatch, refused):
    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    state = interrupted(wish, monkeypatch) / "resume.safetensors"
    before = state.read_bytes()

    def is_said(action, name):
        storage._file_digest.cache_clear()
        refused.add(name)
        with pytest.raises(UserError, match=f"^This cannot be read now .*{name}.*who may read it"):
            action()
        refused.clear()

    is_said(lambda: runs.fine_tune(wish), state.name)
    assert state.read_bytes() == before and state.stat().st_mode & 0o777 == 0o666 & ~umask()
    run = runs.fine_tune(wish)
    is_said(lambda: runs.Run.open(run.path), "run.json")
    is_said(run.load_model, "epoch_001.safetensors")
    is_said(lambda: starts.build_model(str(folder), "tiny", HOPPER, 0), "config.json")
    storage.seal(folder)
    is_said(lambda: weights.read_weights(folder), "sha256.json")
    is_said(lambda: weights.read_weights(folder), "model.safetensors")
    with storage.growing(folder, remake=True) as growing:
        assert growing is None
    is_said(lambda: storage.growing(folder, remake=True).__enter__(), "model.safetensors")
    assert (folder / "model.safetensors").exists()


def test_a_link_that_leads_nowhere_is_no_place_for_a_folder(tmp_path):
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="astray is a link that leads nowhere"):
        storage.growing(tmp_path / "astray").__enter__()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_data_that_another_process_writes_are_not_called_damaged(tmp_path, monkeypatch):
    def refuse(path):
        raise BlockingIOError(errno.EAGAIN, f"{path}: {os.strerror(errno.EAGAIN)}")

    path = write(tmp_path / "d.hdf5", columns())
    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(UserError, match=r"^This cannot be read now .*d\.hdf5"):
        data.load(path, HOPPER)


def test_a_damaged_corpus_is_made_anew(own_cache, tmp_path, capsys):
    words = [" ".join(f"{'abcdefgh'[i % 8]}{'xyz'[j % 3]}o" for j in range(9)) for i in range(120)]
    (tmp_path / "texts").mkdir()
    texts = [f"{text} {'qrstuv'[n % 6]}{'lmn'[n % 5 % 3]}e" * 3 for n, text in enumerate(words)]
    (tmp_path / "texts" / "a.txt").write_text("\n\n\n".join(texts))
    first = language.language(str(tmp_path / "texts"), 8, 260, False)
    (tokens,) = own_cache.rglob("tokens.safetensors")
    flip(tokens, -3)
    again = language.language(str(tmp_path / "texts"), 8, 260, False)
    assert "tokens.safetensors is damaged" in capsys.readouterr().out
    assert np.array_equal(first.held_out, again.held_out) and first.files == again.files


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", '{"model": {"vocab": {}}}'])
def test_a_tokenizer_that_is_none_is_refused(text, own_cache, folder):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        losses.text_for(folder, "python")


def test_a_tokenizer_of_another_model_is_refused(own_cache, folder, tmp_path):
    (tmp_path / "texts").mkdir()
    text = "\n\n\n".join(f"the quick brown fox number {n} jumps over a dog" for n in range(200))
    (tmp_path / "texts" / "a.txt").write_text(text.replace("0", "zero").replace("1", "one"))
    edit(folder / "config.json", vocab_size=2000, n_positions=8)
    with pytest.raises(UserError, match="has 2048 tokens, but the word table has 2000"):
        losses.text_for(folder, str(tmp_path / "texts"))


def test_a_starting_point_made_here_is_sealed(own_cache):
    wish = training.PretrainConfig("markov", "tiny", sequence=8, steps=20, batch_size=4)
    made = training.pretrain(wish, on_steps=lambda steps: None)
    training.load_starting_point(made)
    for file, place in (("model.safetensors", -50), ("config.json", -3)):
        flip(made / file, place)
        with pytest.raises(UserError, match=f"{file} (is not what was written|is missing)"):
            training.load_starting_point(made)
        flip(made / file, place)


# Wrong values are sentences

ODD = (None, True, -1, 0, 3, 7.5, 10**12, float("nan"), "many", [], {}, [1, 2], "x" * 5000)


def test_each_odd_value_in_a_models_config_is_one_sentence(folder):
    good, refused = json.loads((folder / "config.json").read_text()), 0
    for key in (*weights.Backbone.model_fields, "model_type"):
        for value in ODD:
            (folder / "config.json").write_text(json.dumps(good | {key: value}))
            try:
                starts.build_model(str(folder), "tiny", HOPPER, 0)
            except UserError as error:
                refused += 1
                assert "config.json" in str(error) or str(folder) in str(error)
                assert len(str(error)) < 700 and "\n" not in str(error)
    assert refused > 80
    for text in ("", "[]", "3", "null", "[" * 5000, '{"model_type": ["gpt2"]}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is missing or describes no model"):
            starts.build_model(str(folder), "tiny", HOPPER, 0)


def test_each_odd_setting_of_a_run_is_one_sentence():
    texts = ["", "nan", "inf", "-1", "1e999", "9" * 400, "[", "{", "()", "a,b", "0x", "true", "\0"]
    known, refused = vars(config.RunConfig()), 0
    for name in known:
        for text in texts:
            try:
                config.RunConfig(**settings.parse_settings([f"{name}={text}"], known))
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 2000
    assert refused > 200


def test_one_reader_for_all_commands():
    known = vars(config.RunConfig())
    texts = ["checkpoints=1", "learning_rate_decay=TRUE", "reset_heads=0", "gradient_clip=none"]
    values = settings.parse_settings(texts, known)
    assert values == {
        "checkpoints": [1],
        "learning_rate_decay": True,
        "reset_heads": [0],
        "gradient_clip": None,
    }
    assert config.RunConfig(**values).reset_heads == (0,)


def test_no_checkpoint_lies_beyond_the_last_epoch():
    with pytest.raises(UserError, match="checkpoints has 4, but the last epoch is 3"):
        config.RunConfig(epochs=3, checkpoints=(1, 4))


def test_a_name_fits_a_file_system(tmp_path):
    for long in ("long" * 60, "模型" * 60, "🤖" * 60):
        name = runs.RunConfig(initialisation=str(tmp_path / long)).name({})
        assert len(name.encode()) < 200


def test_a_plan_with_a_wrong_value_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[1])
    for wrong in ("tasks=mars", "learning_rate=nan", "epochs=-1", "seeds=-1"):
        with pytest.raises(UserError):
            batch.run("laptop", ["00"], [wrong], only_plan=True)


# The machine's state is a sentence


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_the_disk_refuses_is_a_sentence(code, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    for call in ("mkdir", "open", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(UserError, match=f"{tmp_path}.*DTLIB_CACHE"):
                storage.write_text(tmp_path / "new" / call / "a.json", "{}")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO])
def test_a_lock_that_cannot_be_had_is_a_sentence(code, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(UserError, match="Cannot lock .*DTLIB_CACHE"),
        storage.locked(tmp_path / "a"),
    ):
        pytest.fail("not locked")


def test_a_renderer_that_is_missing_does_no_harm_and_ctrl_c_at_the_start_is_one_line():
    code = "import dtlib.tasks as t; e = t.get_task('hopper').make_environment(); e.reset()"
    environment = os.environ | {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    process = subprocess.Popen([sys.executable, "-m", "dtlib", "--help"], stderr=subprocess.PIPE)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].count(b"\n") < 12 and process.returncode


def test_a_cache_that_cannot_be_written_serves(own_cache, monkeypatch):
    collected.collect(HOPPER, "random", 200, progress=False)
    wish = runs.RunConfig(dataset="collected:random", dataset_steps=200, **SMALL)
    runs.fine_tune(wish)

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for call in ("mkdir", "replace", "rename", "unlink"):
        monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert runs.fine_tuned([wish], "cpu", 1)[0].config == wish


def test_a_machine_without_network_or_with_an_odd_endpoint(monkeypatch):
    assert "ValueError" in profiles.unreachable("no-scheme.example")


# Paths are resolved once, where they are typed


def test_typed_paths_are_absolute(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "texts").mkdir()
    (tmp_path / "data.hdf5").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    values = settings.parse_settings(["a=../data.hdf5", "b=~/texts", "c=texts", "d=a/b", "e=~/no"])
    assert values["a"] == str(tmp_path / "home" / "../data.hdf5")
    assert values["b"] == str(tmp_path / "home" / "texts")
    assert (values["c"], values["d"], values["e"]) == ("texts", "a/b", "~/no")
    monkeypatch.setenv("DTLIB_CACHE", "~/cache")
    assert storage.cache_root() == tmp_path / "home" / "cache"
    monkeypatch.setenv("DTLIB_CACHE", "cache")
    assert storage.cache_root() == tmp_path / "home" / "cache"


def test_a_model_folder_in_the_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    expected = starts.build_model(str(folder), "tiny", HOPPER, 0)
    found = starts.build_model("~/model", "tiny", HOPPER, 0)
    assert torch.equal(found.h[0].attn.c_attn.weight, expected.h[0].attn.c_attn.weight)


# Broader starts


def test_parts_and_other_heads_load(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    whole = starts.build_model(str(folder), "tiny", HOPPER, 0)
    tensors |= {"score.weight": torch.ones(2, 64), "v_head.summary.weight": torch.ones(1, 64)}
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert isinstance(whole, DecisionTransformer)
    parts = starts.build_model(str(folder), "tiny", HOPPER, 0)
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "score.weight, v_head.summary.weight left out" in capsys.readouterr().out
    index["weight_map"]["score.weight"] = "../one.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="must name files beside it"):
        starts.build_model(str(folder), "tiny", HOPPER, 0)


# Nothing is left behind


def test_what_dead_processes_left_is_swept_and_what_lives_stays(own_cache):
    dead = subprocess.Popen(["true"])
    dead.wait()
    places = [own_cache / part for part in ("data", "runs/.partial/a", "corpora")]
    for place in places:
        place.mkdir(parents=True)
        (place / f"{storage.WRITING}{dead.pid}-aa").touch()
        (place / f"{storage.WRITING}{os.getpid()}-bb").touch()
        (place / f".writing-elsewhere-{dead.pid}-cc").touch()  # another machine's
        (place / f".writing-{os.uname().nodename}-0123abcd-{dead.pid}-cc").touch()  # container's
        (place / "x.lock").touch()
    (own_cache / f"{storage.WRITING}{dead.pid}-dd" / "kernels").mkdir(parents=True)
    (own_cache / "runs").rename(own_cache.with_name("large disk"))
    (own_cache / "runs").symlink_to(own_cache.with_name("large disk"))
    storage.sweep_cache()
    left = [path.name for place in places for path in place.iterdir() if path.is_file()]
    container = f".writing-{os.uname().nodename}-0123abcd-{dead.pid}-cc"
    stays = [f"{storage.WRITING}{os.getpid()}-bb", f".writing-elsewhere-{dead.pid}-cc", container]
    assert sorted(left) == sorted(stays * 3)
    assert not list(own_cache.glob(".writing-*"))


def test_a_run_lacks_no_checkpoint(own_cache, tmp_path, monkeypatch):
    """What happens when its folder is moved away while it grows."""
    measure = runs._measure

    def and_lose(*arguments):
        for file in own_cache.rglob("epoch_000.safetensors"):
            file.unlink()
        return measure(*arguments)

    wish = runs.RunConfig(dataset=str(write(tmp_path / "d.hdf5", columns())), **SMALL)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"epoch_000\.safetensors"):
        patch.setattr(runs, "_measure", and_lose)
        runs.fine_tune(wish)
    assert not list(records.runs_root().glob("[!.]*"))
    assert len(runs.fine_tune(wish).record["checkpoints"]) == 2


def test_one_module_makes_temporary_files():
    """Else what ``kill -9`` leaves is swept by nobody."""
    code = Path(storage.__file__).parent.rglob("*.py")
    assert [p.name for p in code if "tempfile" in p.read_text(encoding="utf-8")] == ["storage.py"]


def test_temporary_files_follow_no_link_and_have_no_name_to_guess(tmp_path, monkeypatch):
    names = {storage.temporary_name(tmp_path) for _ in range(50)}
    assert len(names) == 50
    victim = tmp_path / "victim"
    victim.write_text("mine")
    trap = tmp_path / "trap"
    trap.symlink_to(victim)
    monkeypatch.setattr(storage, "temporary_name", lambda folder: trap)
    with pytest.raises(OSError):
        storage.write_text(tmp_path / "a.json", "{}")
    assert victim.read_text() == "mine"


def test_a_download_that_was_killed_is_swept(tmp_path, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f"{storage.WRITING}{dead.pid}-aa").touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(files, "D4RL_ADDRESS", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="Cannot download"):
        files.d4rl_file(HOPPER, "medium", False)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_now_is_said_once():
    """Though one reading stands inside another: a checkpoint's, and its digest's."""
    with pytest.raises(Unreadable) as caught, reading(), reading():
        raise PermissionError(13, "Permission denied")
    assert str(caught.value).count("cannot be read now") == 1
