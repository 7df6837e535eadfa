"""Starting points made here: the same bytes however often interrupted, transformers' own losses, and the shipped ones."""

import dataclasses
import json
import multiprocessing
import os
import random
import re
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
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, ImageGPTConfig, ImageGPTForCausalImageModeling
from typer.testing import CliRunner

import dtlib.__main__ as command_line
from dtlib import corpora, model, pretrain
from dtlib.errors import UserError
from dtlib.pretrain import PretrainConfig, load_starting_point

FORKS = multiprocessing.get_context("forkserver")  # children are forked from a server that has imported everything once
FORKS.set_forkserver_preload(["dtlib.runs", "dtlib.pretrain"])
TINY = dict(sequence=8, steps=20, batch_size=4)
MARKOV = PretrainConfig("markov", "chibit", **TINY)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of a language and an image starting point, from a little text and two small photographs, and their configs."""
    root, generator = tmp_path_factory.mktemp("trained"), random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=5)) for _ in range(99)]
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("\n\n\n".join(" ".join(generator.choices(words, k=20)) for _ in range(200)))
    configs = {"language": PretrainConfig("language", corpus=str(root / "texts"), vocabulary=300, learning_rate=0.01, **TINY),
               "image": PretrainConfig("image", "chibit", **TINY | {"sequence": 16})}
    pictures = np.random.default_rng(0).integers(256, size=(2, 20, 40, 3)).astype(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.datasets.load_sample_images", lambda: types.SimpleNamespace(images=list(pictures)))
        patch.setattr(corpora, "COLOURS", 8)
        return {kind: (pretrain.pretrain(config, root / kind, "cpu", False), config) for kind, config in configs.items()}


def test_a_config_takes_its_sizes_own_values_and_refuses_others():
    assert vars(PretrainConfig("image")) == dict(
        kind="image", size="mini", seed=0, corpus="photographs", vocabulary=2048, sequence=256, tokens="", steps=2500,
        batch_size=8, learning_rate=2e-3, weight_decay=0.01, precision="float32")
    large = PretrainConfig("language", "gpt2", steps=7)
    assert (large.corpus, large.vocabulary, large.sequence, large.steps) == ("installed", 16_384, 1024, 7)
    assert (large.batch_size, large.learning_rate) == (64, 3e-4) and MARKOV.name == "markov-chibit-seed0"
    for wrong, says in ((dict(step=3), "Parameter step=3.*Known are kind, size, seed"), (dict(steps="3"), "steps='3'"),
                        (dict(size="huge"), "size='huge'.*mini"), (dict(vocabulary=256), "vocabulary=256"),
                        (dict(steps=0), "steps=0"), (dict(seed=-1), "seed=-1"), (dict(kind="music"), "kind='music'")):
        with pytest.raises(UserError, match=says):
            PretrainConfig(**{"kind": "iid"} | wrong)


def test_an_amount_of_tokens_sets_the_steps():
    config = PretrainConfig("language", tokens="1M", seed=2)
    assert config.steps == round(10**6 / 16 / 128) and config.name == "language-mini-1M-seed2"
    assert PretrainConfig(**dataclasses.asdict(config)) == config
    # A large model's batch of 65,536 tokens would leave it 15 steps; of 100 million tokens it has enough.
    few, many = (PretrainConfig("markov", "gpt2", tokens=amount) for amount in ("1M", "100M"))
    assert (few.batch_size, few.steps) == (2, 488) and (many.batch_size, many.steps) == (64, 1526)
    assert PretrainConfig("markov", "gpt2", tokens="1M", batch_size=64).steps == 15
    with pytest.raises(UserError, match="tokens=1M are 488 steps here, not 7"):
        PretrainConfig("language", tokens="1M", steps=7)
    with pytest.raises(UserError, match="Parameter tokens='many'"):
        PretrainConfig("language", tokens="many")


@pytest.mark.parametrize("config", [
    PretrainConfig("iid"), PretrainConfig("markov", tokens="2M"), PretrainConfig("markov", "gpt2", tokens="10M"),
    PretrainConfig("language", tokens="1M", batch_size=4),
    PretrainConfig("image", "imagegpt", 3, corpus="it's a folder", precision="bfloat16"),
    PretrainConfig("language", seed=2, corpus="wikitext-2", learning_rate=3e-5, weight_decay=0.0, vocabulary=500)])
def test_the_recorded_command_makes_the_same_config(config, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(pretrain, "pretrain", lambda *arguments: asked.append(arguments) or tmp_path)
    monkeypatch.setattr(pretrain, "load_starting_point", lambda folder: (None, {"held_out": {}}, None))
    words = pretrain.shlex.split(config.command)
    assert words[:4] == ["python", "-m", "dtlib", "pretrain"]
    result = CliRunner().invoke(command_line.app, words[3:])
    assert result.exit_code == 0 and asked == [(config, None, "auto")]


def test_a_large_batch_in_parts_is_the_whole_batch(tmp_path, monkeypatch):
    config, curves = PretrainConfig("markov", "tiny", sequence=8, steps=3, batch_size=21), []
    for parts in (16, 21):
        monkeypatch.setattr(pretrain, "AT_ONCE", parts * 8)
        record = load_starting_point(pretrain.pretrain(config, tmp_path / str(parts), "cpu", False))[1]
        curves.append([[row["step"], row["held_out_loss"], row["training_loss"] or 0] for row in record["curve"]])
    assert [row[0] for row in curves[0]] == [0, 1, 2, 3]  # a training of few steps is measured after each, once
    assert curves[0][0][1] - curves[0][-1][1] > 1e-3
    np.testing.assert_allclose(*curves, atol=2e-6)


def test_side_by_side_is_one_by_one(tmp_path, monkeypatch, capsys):
    configs = [dataclasses.replace(MARKOV, seed=seed) for seed in (0, 1, 2)]
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    pretrain.pretrain_all(configs, "cpu")
    assert "pre-training 3 starting points" in (said := capsys.readouterr().err) and "60/60" in said
    for config in configs:
        alone = pretrain.pretrain(config, tmp_path / config.name, "cpu", False)
        assert (alone / "model.safetensors").read_bytes() == (
            tmp_path / "starting_points" / config.name / "model.safetensors").read_bytes()


def test_what_a_training_leaves(trained):
    for kind, (folder, config) in trained.items():
        network, record, held_out = load_starting_point(folder)
        own = {"language": {"tokenizer.json", "tokenizer_config.json"}, "image": {"preprocessor_config.json"}}[kind]
        assert set(files(folder)) - {"generation_config.json"} == own | {
            "README.md", "config.json", "held_out.safetensors", "model.safetensors", "training.json"}
        assert PretrainConfig(**record["config"]) == config and record["command"] == config.command
        assert [row["step"] for row in record["curve"]] == list(range(21))
        assert record["tokens_seen"] == 20 * 4 * config.sequence and held_out.shape[1] == config.sequence + 1
        losses = record["held_out"]
        assert losses["model"] == pretrain.held_out_loss(network, held_out)  # of the weights as they are stored
        assert record["curve"][0]["held_out_loss"] == pytest.approx(losses["uniform"], abs=0.05)
        assert all(f"{loss:.4f}" in (folder / "README.md").read_text() for loss in losses.values())
        assert not network.training and {p.dtype for p in network.parameters()} == {torch.float32}
    losses = load_starting_point(trained["language"][0])[1]["held_out"]
    assert losses["model"] < losses["uniform"] - 1  # it learns


def test_the_same_config_gives_the_same_bytes(trained, tmp_path):
    folder, config = trained["language"]
    again = pretrain.pretrain(config, tmp_path / "again", "cpu", False)
    first, second = files(folder), files(again)
    records = [json.loads(content.pop("training.json")) for content in (first, second)]
    assert all(record.pop("seconds") > 0 for record in records) and records[0] == records[1]
    for content in (first, second):
        content["README.md"] = re.sub(rb"\(\d+ minutes", b"", content["README.md"])
    assert first == second
    other = pretrain.make_model(PretrainConfig("markov", seed=1), 100)
    assert not torch.equal(other.lm_head.weight, pretrain.make_model(PretrainConfig("markov"), 100).lm_head.weight)


def killed_at(folder, name, times):
    """Train, and die by SIGKILL when a file or folder is to be renamed to ``name`` for the ``times``-th time."""
    seen = []

    def hook(event, arguments):
        if event == "os.rename" and Path(arguments[1]).name == name:
            seen.append(name)
            if len(seen) == times:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    pretrain.pretrain(MARKOV, folder, "cpu", False)


def test_killed_and_interrupted_trainings_go_on_to_the_same_bytes(tmp_path, monkeypatch):
    folder, growing, steps = tmp_path / "killed", tmp_path / ".partial-killed", []
    clip = torch.nn.utils.clip_grad_norm_  # called once a step

    def interrupted(*arguments):
        steps.append(0)
        return clip(*arguments) if len(steps) < 6 else signal.raise_signal(signal.SIGINT)
    whole = files(pretrain.pretrain(MARKOV, tmp_path / "whole", "cpu", False))
    for name, times in (("training.json", 1), ("resume.safetensors", 4), ("README.md", 1), ("killed", 1)):
        process = FORKS.Process(target=killed_at, args=(folder, name, times))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and growing.exists() and not folder.exists()
        if times == 4:
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pretrain.pretrain(MARKOV, folder, "cpu", False)
            monkeypatch.undo()
            with safe_open(growing / "resume.safetensors", "np") as state:  # three measurements, then one after each step
                assert len(json.loads(state.metadata()["progress"])["curve"]) == 3 + 5
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: pytest.fail("all steps were done"))
    finished = files(pretrain.pretrain(MARKOV, folder, "cpu", False))
    records = [json.loads(content.pop("training.json")) for content in (whole, finished)]
    assert all(record.pop("seconds") > 0 for record in records) and records[0] == records[1] and whole == finished
    assert not growing.exists()


def test_another_text_under_the_same_name_is_noticed(tmp_path, monkeypatch):
    text, clip, steps = tmp_path / "texts" / "a.txt", torch.nn.utils.clip_grad_norm_, []
    text.parent.mkdir()
    words = ["".join(random.Random(i).choices("etaoinshrdlu", k=5)) for i in range(99)]
    prose = [" ".join(random.Random(i).choices(words, k=20)) for i in range(200)]
    config = PretrainConfig("language", corpus=str(text.parent), vocabulary=300, **TINY)
    text.write_text("\n\n\n".join(prose))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: clip(*given) if len(steps) < 6 and not steps.append(0)
                      else signal.raise_signal(signal.SIGINT))
        pretrain.pretrain(config, tmp_path / "model", "cpu", False)
    text.write_text("\n\n\n".join(prose[:150]))
    with pytest.raises(UserError, match="begun on another text"):
        pretrain.pretrain(config, tmp_path / "model", "cpu", False)
    text.write_text("\n\n\n".join(prose))
    assert (pretrain.pretrain(config, tmp_path / "model", "cpu", False) / "model.safetensors").exists()


def test_a_folder_of_something_else_is_left_alone(trained, tmp_path, monkeypatch):
    folder, config = trained["language"]
    monkeypatch.setattr(pretrain, "_train", lambda *arguments: pytest.fail("trained"))
    assert pretrain.pretrain(config, folder, "cpu", False) == folder  # it is there
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    shutil.copytree(folder, tmp_path / ".partial-other")
    for place in (folder, tmp_path / "foreign", tmp_path / "file", tmp_path / "other"):
        with pytest.raises(UserError, match="holds something else"):
            pretrain.pretrain(MARKOV, place, "cpu", False)
    assert (tmp_path / "foreign" / "thesis.tex").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="drawn, not read: leave out the corpus 'words'"):
        pretrain.pretrain(PretrainConfig("markov", corpus="words"), tmp_path / "new", "cpu", False)
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize("kind", ["gpt2", "imagegpt"])
def test_losses_are_transformers_own(kind):
    shape = dict(n_layer=2, n_embd=32, n_head=2, n_positions=9, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    network = (GPT2LMHeadModel(GPT2Config(vocab_size=20, **shape)) if kind == "gpt2"
               else ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=21, **shape))).double().eval()
    torch.nn.init.normal_(network.lm_head.weight)
    sequences = torch.randint(20, (5, 9), generator=torch.Generator().manual_seed(0))
    theirs = network(input_ids=sequences, labels=sequences).loss.item()
    assert pretrain.token_loss(network, sequences).item() == pytest.approx(theirs, rel=1e-6) and abs(theirs - np.log(20)) > 0.1
    assert pretrain.held_out_loss(network, sequences, batch_size=2) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("kind", ["language", "image"])
def test_transformers_loads_the_folder(trained, kind):
    network, _, held_out = load_starting_point(trained[kind][0])
    theirs = AutoModel.from_pretrained(trained[kind][0], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = network.transformer(input_ids=held_out[:4, :-1]).last_hidden_state
        assert torch.equal(theirs(input_ids=held_out[:4, :-1]).last_hidden_state, expected)


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


@pytest.mark.parametrize(("spoil", "says"), [
    (rewrite("tokenizer.json", lambda text: b'{"model": {"vocab": {"a": 0, "b": 1}}}'), "has 2 tokens but.*300"),
    (rewrite("model.safetensors", lambda content: content[:-9]), "not a whole safetensors file"),
    (rewrite("held_out.safetensors", lambda content: content[:-9]), "not a whole safetensors file"),
    (rewrite("training.json", lambda text: b"{}"), "no whole starting point"),
    (rewrite("training.json", lambda text: text.replace(b'"mini"', b'"chibit"')), "does not fit its config.json"),
    (rewrite("config.json", lambda text: text.replace(b"gpt2", b"bert")), "'bert'"),
    (lambda folder: (folder / "training.json").unlink(), r"no whole.*training\.json"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickles are not opened"),
    (tensors(lambda held: held.pop("transformer.h.1.ln_2.bias")), r"does not fit.*h\.1\.ln_2\.bias"),
    (tensors(lambda held: held.pop("transformer.wte.weight")), r"does not fit.*wte\.weight"),
    (tensors(lambda held: held.update(extra=torch.zeros(1))), "does not fit.*extra"),
])
def test_damaged_starting_points(trained, tmp_path, spoil, says):
    folder = shutil.copytree(trained["language"][0], tmp_path / "damaged")
    load_starting_point(folder)
    spoil(folder)
    with pytest.raises(UserError, match=says):
        load_starting_point(folder)


SHIPPED = sorted(model.SHIPPED.glob("[!.]*-seed*"))


def test_what_is_shipped():
    assert {f"{kind}-mini-seed0" for kind in pretrain.KINDS} <= {path.name for path in SHIPPED}
    everything = [path for path in model.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in everything) <= 30e6
    assert not [path for path in everything if path.name.startswith(".") or path.suffix in (".bin", ".pt", ".pkl", ".lock")]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_starting_point_is_what_its_record_says(folder, monkeypatch):
    network, record, held_out = load_starting_point(folder)
    config, losses = PretrainConfig(**record["config"]), record["held_out"]
    assert folder.name == config.name and config == PretrainConfig(config.kind, config.size, config.seed)
    assert held_out.shape == (512, config.sequence + 1)
    # The curve's subset, before the weights were rounded to float16: all 512 sequences take too long here.
    assert pretrain.held_out_loss(network, held_out[:64]) == pytest.approx(record["curve"][-1]["held_out_loss"], abs=5e-3)
    assert losses["uniform"] == pytest.approx(np.log(network.lm_head.out_features))
    if config.kind == "language":
        assert losses["model"] < losses["bigram"] - 0.3 and losses["bigram"] < losses["unigram"]
    elif config.kind == "image":
        palette = np.array(json.loads((folder / "preprocessor_config.json").read_text())["clusters"])
        nearest = types.SimpleNamespace(cluster_centers_=palette, predict=lambda pixels: cKDTree(palette).query(pixels)[1])
        monkeypatch.setattr("sklearn.cluster.KMeans", lambda *a, **k: types.SimpleNamespace(fit=lambda pixels: nearest))
        corpus = corpora.image(config.corpus, config.sequence)
        assert np.array_equal(corpus.held_out, held_out) and corpus.facts == record["corpus"]
        assert corpus.baselines() == pytest.approx({name: loss for name, loss in losses.items() if name != "model"}, abs=1e-6)
        assert losses["model"] < min(losses["unigram"], losses["bigram"], losses["pixel above"])
    else:
        corpus = corpora.synthetic(config.kind, config.seed, config.sequence)
        assert np.array_equal(corpus.held_out, held_out)
        assert corpus.facts == pytest.approx(record["corpus"])  # processors differ in the last digits
        assert abs(losses["model"] / corpus.facts["entropy_rate"] - 1) <= 0.02
        left = (losses["model"] - corpus.facts["loss_of_the_chain_itself"]) / (losses["unigram"] - losses["model"])
        assert config.kind == "iid" or left < 0.05  # of what there is to learn
