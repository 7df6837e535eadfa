"""Starting points made here: the same bytes however often interrupted, and the shipped ones."""

import dataclasses
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import types
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.spatial import cKDTree
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
)
from typer.testing import CliRunner

import dtlib.__main__ as command_line
from dtlib.errors import UserError
from dtlib.pretraining import images, training
from dtlib.pretraining.synthetic import synthetic
from dtlib.pretraining.training import PretrainConfig, load_starting_point
from dtlib.starts import SHIPPED

# Children are forked from a server that has imported everything once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dtlib.pretraining.training"])
TINY = {"sequence": 8, "steps": 20, "batch_size": 4}
MARKOV = PretrainConfig("markov", "chibit", **TINY)
SEPARATOR = "\n\n\n"


def pretrain(config, folder, on_steps=lambda steps: None):
    """Without a progress bar."""
    return training.pretrain(config, folder, "cpu", on_steps)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_time(folder):
    """A starting point's record and its other files, without the seconds that training took."""
    found = files(folder)
    record = json.loads(found.pop("training.json"))
    assert record.pop("seconds") > 0 and found.pop("sha256.json")
    return record, found | {"README.md": re.sub(rb"\d+ minutes", b"", found["README.md"])}


def prose(number, words=99):
    words = ["".join(random.Random(i).choices("etaoinshrdlu", k=5)) for i in range(words)]
    return [" ".join(random.Random(i).choices(words, k=20)) for i in range(number)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, config) of a language and an image starting point, from little text and pictures."""
    root = tmp_path_factory.mktemp("trained")
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text(SEPARATOR.join(prose(200)))
    text = {"corpus": str(root / "texts"), "vocabulary": 300, "learning_rate": 0.01}
    configs = {
        "language": PretrainConfig("language", **text, **TINY),
        "image": PretrainConfig("image", "chibit", **TINY | {"sequence": 16}),
    }
    pictures = np.random.default_rng(0).integers(256, size=(2, 20, 40, 3)).astype(np.uint8)
    photographs = types.SimpleNamespace(images=list(pictures))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.datasets.load_sample_images", lambda: photographs)
        patch.setattr(images, "COLOURS", 8)
        return {kind: (pretrain(config, root / kind), config) for kind, config in configs.items()}


def test_a_config_takes_its_sizes_own_values_and_refuses_others():
    assert vars(PretrainConfig("image")) == {
        "kind": "image",
        "size": "mini",
        "seed": 0,
        "corpus": "photographs",
        "vocabulary": 2048,
        "sequence": 256,
        "tokens": "",
        "steps": 2500,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "weight_decay": 0.01,
        "precision": "float32",
    }
    large = PretrainConfig("language", "gpt2", steps=7)
    assert (large.corpus, large.vocabulary, large.sequence) == ("installed", 16_384, 1024)
    assert (large.steps, large.batch_size, large.learning_rate) == (7, 64, 3e-4)
    assert MARKOV.name == "markov-chibit-seed0"
    for wrong, says in (
        ({"step": 3}, "Parameter step=3.*Known are kind, size, seed"),
        ({"steps": "3"}, "steps='3'"),
        ({"size": "huge"}, "size='huge'.*mini"),
        ({"vocabulary": 256}, "vocabulary=256"),
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"kind": "music"}, "kind='music'"),
        ({"corpus": "words"}, "drawn, not read: leave out the corpus 'words'"),
    ):
        with pytest.raises(UserError, match=says):
            PretrainConfig(**{"kind": "iid"} | wrong)


def test_an_amount_of_tokens_sets_the_steps():
    config = PretrainConfig("language", tokens="1M", seed=2)
    assert config.steps == round(10**6 / 16 / 128) and config.name == "language-mini-1M-seed2"
    assert PretrainConfig(**dataclasses.asdict(config)) == config
    # Of a million tokens, a large model's batches of 65,536 would be 15 steps.
    few, many = (PretrainConfig("markov", "gpt2", tokens=amount) for amount in ("1M", "100M"))
    assert (few.batch_size, few.steps) == (2, 488) and (many.batch_size, many.steps) == (64, 1526)
    assert PretrainConfig("markov", "gpt2", tokens="1M", batch_size=64).steps == 15
    with pytest.raises(UserError, match="tokens=1M are 488 steps here, not 7"):
        PretrainConfig("language", tokens="1M", steps=7)
    with pytest.raises(UserError, match="Parameter tokens='many'"):
        PretrainConfig("language", tokens="many")


LANGUAGE = {"corpus": "wikitext-2", "learning_rate": 3e-5, "weight_decay": 0.0, "vocabulary": 500}


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig("iid"),
        PretrainConfig("markov", tokens="2M"),
        PretrainConfig("markov", "gpt2", tokens="10M"),
        PretrainConfig("language", tokens="1M", batch_size=4),
        PretrainConfig("image", "imagegpt", 3, corpus="it's a folder", precision="bfloat16"),
        PretrainConfig("language", seed=2, **LANGUAGE),
    ],
)
def test_the_recorded_command_makes_the_same_config(config, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(training, "pretrain", lambda *given: asked.append(given) or tmp_path)
    found = (None, {"held_out": {}}, None)
    monkeypatch.setattr(training, "load_starting_point", lambda folder: found)
    words = shlex.split(config.command)
    assert words[:4] == ["python", "-m", "dtlib", "pretrain"]
    result = CliRunner().invoke(command_line.app, words[3:])
    assert result.exit_code == 0 and asked == [(config, None, "auto")]


def test_the_learning_rate_is_as_it_was():
    """To the last digit: a linear warm-up over a twentieth of the steps, then linearly to 0."""
    for steps in (3, 24, 58, 3500):
        config = PretrainConfig("markov", steps=steps, learning_rate=2e-3)
        for step in range(steps):
            warm, left = (step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps)
            assert training.learning_rate_at(step, config) == 2e-3 * min(warm, left)


def test_a_large_batch_in_parts_is_the_whole_batch(tmp_path, monkeypatch):
    config, curves = PretrainConfig("markov", "tiny", sequence=8, steps=3, batch_size=21), []
    for parts in (16, 21):
        monkeypatch.setattr(training, "AT_ONCE", parts * 8)
        record = load_starting_point(pretrain(config, tmp_path / str(parts)))[1]
        rows = record["curve"]
        curves.append([(r["step"], r["held_out_loss"], r["training_loss"] or 0) for r in rows])
    # A training of few steps is measured after each, once.
    assert [row[0] for row in curves[0]] == [0, 1, 2, 3]
    assert curves[0][0][1] - curves[0][-1][1] > 1e-3
    np.testing.assert_allclose(*curves, atol=2e-6)


def test_side_by_side_is_one_by_one(tmp_path, monkeypatch, capsys):
    configs = [dataclasses.replace(MARKOV, seed=seed) for seed in (0, 1, 2)]
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(joblib, "effective_n_jobs", lambda jobs: 2)
    folders = training.pretrain_all(configs, "cpu")
    output = capsys.readouterr().err
    assert "pre-training 3 starting points" in output and "60/60" in output
    assert folders == [tmp_path / "starting_points" / config.name for config in configs]
    for config, folder in zip(configs, folders, strict=True):
        alone = pretrain(config, tmp_path / config.name)
        weights = [place / "model.safetensors" for place in (alone, folder)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_a_training_leaves(trained):
    own = {
        "language": {"tokenizer.json", "tokenizer_config.json"},
        "image": {"preprocessor_config.json"},
    }
    common = {"README.md", "config.json", "training.json"}
    common |= {"held_out.safetensors", "model.safetensors", "sha256.json"}
    for kind, (folder, config) in trained.items():
        network, record, held_out = load_starting_point(folder)
        assert set(files(folder)) - {"generation_config.json"} == own[kind] | common
        assert PretrainConfig(**record["config"]) == config and record["command"] == config.command
        assert [row["step"] for row in record["curve"]] == list(range(21))
        assert record["tokens_seen"] == 20 * 4 * config.sequence
        assert held_out.shape[1] == config.sequence + 1
        losses = record["held_out"]
        # Of the weights as they are stored.
        assert losses["model"] == training.held_out_loss(network, held_out)
        assert record["curve"][0]["held_out_loss"] == pytest.approx(losses["uniform"], abs=0.05)
        card = (folder / "README.md").read_text()
        assert all(f"{loss:.4f}" in card for loss in losses.values()) and config.command in card
        assert not network.training and {p.dtype for p in network.parameters()} == {torch.float32}
    losses = load_starting_point(trained["language"][0])[1]["held_out"]
    assert losses["model"] < losses["uniform"] - 1  # it learns


def test_the_same_config_gives_the_same_bytes(trained, tmp_path):
    folder, config = trained["language"]
    assert without_time(pretrain(config, tmp_path / "again")) == without_time(folder)
    one, other = (PretrainConfig("markov", seed=seed) for seed in (0, 1))
    heads = [training.make_model(config, 100).lm_head.weight for config in (one, other)]
    assert not torch.equal(*heads)


def killed_at(folder, name, times):
    """Train; die by SIGKILL when something is renamed to ``name`` for the ``times``-th time."""
    seen = []

    def hook(event, arguments):
        if event == "os.rename" and Path(arguments[1]).name == name:
            seen.append(name)
            if len(seen) == times:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    pretrain(MARKOV, folder)


def interrupt_at(steps, monkeypatch):
    """Ctrl-C at that step."""
    clip, taken = torch.nn.utils.clip_grad_norm_, []  # called once a step

    def interrupted(*arguments):
        taken.append(0)
        return clip(*arguments) if len(taken) < steps else signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)


def test_killed_and_interrupted_trainings_go_on_to_the_same_bytes(tmp_path, monkeypatch):
    folder, partial = tmp_path / "killed", tmp_path / ".partial" / "killed"
    whole = without_time(pretrain(MARKOV, tmp_path / "whole"))
    for name, times in (
        ("training.json", 1),
        ("resume.safetensors", 4),
        ("README.md", 1),
        ("killed", 1),
    ):
        process = FORKS.Process(target=killed_at, args=(folder, name, times))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and partial.exists() and not folder.exists()
        if times == 4:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                interrupt_at(6, patch)
                pretrain(MARKOV, folder)
            with safe_open(partial / "resume.safetensors", "np") as state:
                curve = json.loads(state.metadata()["progress"])["curve"]
            assert len(curve) == 3 + 5  # three measurements, then one after each step
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: pytest.fail("all were done"))
    done = []
    assert without_time(pretrain(MARKOV, folder, done.append)) == whole and done == [20]
    assert not partial.exists()


def test_another_text_under_the_same_name_is_noticed(tmp_path, monkeypatch):
    text = tmp_path / "texts" / "a.txt"
    text.parent.mkdir()
    config = PretrainConfig("language", corpus=str(text.parent), vocabulary=300, **TINY)
    text.write_text(SEPARATOR.join(prose(200)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(6, patch)
        pretrain(config, tmp_path / "model")
    text.write_text(SEPARATOR.join(prose(150)))
    with pytest.raises(UserError, match="begun on another text"):
        pretrain(config, tmp_path / "model")
    text.write_text(SEPARATOR.join(prose(200)))
    assert (pretrain(config, tmp_path / "model") / "model.safetensors").exists()


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path):
    (tmp_path / "place" / "out").mkdir(parents=True)
    assert (pretrain(MARKOV, tmp_path / "place" / "out") / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]


def test_a_folder_of_something_else_is_left_alone(trained, tmp_path, monkeypatch):
    folder, config = trained["language"]
    monkeypatch.setattr(training, "_train", lambda *arguments: pytest.fail("trained"))
    assert pretrain(config, folder) == folder  # it is there
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    shutil.copytree(folder, tmp_path / ".partial" / "other")
    for place in (folder, tmp_path / "foreign", tmp_path / "file", tmp_path / "other"):
        with pytest.raises(UserError, match="holds something else"):
            pretrain(MARKOV, place)
    assert (tmp_path / "foreign" / "thesis.tex").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["gpt2", "imagegpt"])
def test_losses_are_transformers_own(kind):
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 9}
    shape |= {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    if kind == "gpt2":
        network = GPT2LMHeadModel(GPT2Config(vocab_size=20, **shape))
    else:
        network = ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=21, **shape))
    network = network.double().eval()
    torch.nn.init.normal_(network.lm_head.weight)
    sequences = torch.randint(20, (5, 9), generator=torch.Generator().manual_seed(0))
    theirs = network(input_ids=sequences, labels=sequences).loss.item()
    assert abs(theirs - np.log(20)) > 0.1
    assert training.token_loss(network, sequences).item() == pytest.approx(theirs, rel=1e-6)
    ours = training.held_out_loss(network, sequences, batch_size=2)
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("kind", ["language", "image"])
def test_transformers_loads_the_folder(trained, kind):
    network, _, held_out = load_starting_point(trained[kind][0])
    theirs = AutoModel.from_pretrained(trained[kind][0], dtype=torch.float32).eval()
    tokens = held_out[:4, :-1]
    with torch.no_grad():
        expected = network.transformer(input_ids=tokens).last_hidden_state
        assert torch.equal(theirs(input_ids=tokens).last_hidden_state, expected)


def rewrite(name, change):
    def spoil(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def tensors(change):
    def spoil(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return spoil


def cut(content):
    return content[:-9]


VOCABULARY = b'{"model": {"vocab": {"a": 0, "b": 1}}}'
SPOILT = [
    (rewrite("tokenizer.json", lambda text: VOCABULARY), "has 2 tokens but.*300"),
    (rewrite("model.safetensors", cut), "not a whole safetensors file"),
    (rewrite("held_out.safetensors", cut), "not a whole safetensors file"),
    (rewrite("training.json", lambda text: b"{}"), "no whole starting point"),
    (
        rewrite("training.json", lambda text: text.replace(b'"mini"', b'"chibit"')),
        "does not fit its config.json",
    ),
    (rewrite("config.json", lambda text: text.replace(b"gpt2", b"bert")), "'bert'"),
    (lambda folder: (folder / "training.json").unlink(), r"no whole.*training\.json"),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "no pickle is opened",
    ),
    (
        tensors(lambda held: held.pop("transformer.h.1.ln_2.bias")),
        r"does not fit.*h\.1\.ln_2\.bias",
    ),
    (tensors(lambda held: held.pop("transformer.wte.weight")), r"does not fit.*wte\.weight"),
    (tensors(lambda held: held.update(extra=torch.zeros(1))), "does not fit.*extra"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILT)
def test_damaged_starting_points(trained, tmp_path, spoil, says):
    folder = shutil.copytree(trained["language"][0], tmp_path / "damaged")
    load_starting_point(folder)
    (folder / "sha256.json").unlink()  # see test_robust.py
    spoil(folder)
    with pytest.raises(UserError, match=says):
        load_starting_point(folder)


FOLDERS = sorted(SHIPPED.glob("[!.]*-seed*"))


def test_what_is_shipped():
    kinds = {f"{kind}-mini-seed0" for kind in training.STEPS}
    assert len(kinds) == 4 and kinds <= {path.name for path in FOLDERS}
    everything = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in everything) <= 30e6
    others = (".bin", ".pt", ".pkl", ".lock")
    assert not [path for path in everything if path.name[0] == "." or path.suffix in others]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_starting_point_is_what_its_record_says(folder, monkeypatch):
    network, record, held_out = load_starting_point(folder)
    config, losses = PretrainConfig(**record["config"]), record["held_out"]
    assert folder.name == config.name
    assert config == PretrainConfig(config.kind, config.size, config.seed)
    assert held_out.shape == (512, config.sequence + 1)
    # The curve's subset, before the weights were rounded to float16: all 512 take too long here.
    measured = training.held_out_loss(network, held_out[:64])
    assert measured == pytest.approx(record["curve"][-1]["held_out_loss"], abs=5e-3)
    assert losses["uniform"] == pytest.approx(np.log(network.lm_head.out_features))
    if config.kind == "language":
        assert losses["model"] < losses["bigram"] - 0.3 and losses["bigram"] < losses["unigram"]
    elif config.kind == "image":
        palette = json.loads((folder / "preprocessor_config.json").read_text())["clusters"]
        nearest = types.SimpleNamespace(
            cluster_centers_=np.array(palette),
            predict=lambda pixels: cKDTree(palette).query(pixels)[1],
        )
        kmeans = types.SimpleNamespace(fit=lambda pixels: nearest)
        monkeypatch.setattr("sklearn.cluster.KMeans", lambda *a, **k: kmeans)
        corpus = images.image(config.corpus, config.sequence)
        assert np.array_equal(corpus.held_out, held_out) and corpus.facts == record["corpus"]
        counted = {name: loss for name, loss in losses.items() if name != "model"}
        assert corpus.baselines() == pytest.approx(counted, abs=1e-6)
        assert losses["model"] < min(losses["unigram"], losses["bigram"], losses["pixel above"])
    else:
        corpus = synthetic(config.kind, config.seed, config.sequence)
        assert np.array_equal(corpus.held_out, held_out)
        assert corpus.facts == pytest.approx(record["corpus"])  # processors differ in last digits
        assert abs(losses["model"] / corpus.facts["entropy_rate"] - 1) <= 0.02
        left = losses["model"] - corpus.facts["loss_of_the_chain_itself"]
        share = left / (losses["unigram"] - losses["model"])
        assert config.kind == "iid" or share < 0.05  # of what there is to learn
