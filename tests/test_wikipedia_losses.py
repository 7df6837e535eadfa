"""Paper B's additions: each against a slow version in float64, and in whole runs."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import GPT2LMHeadModel

from dtlib import build, data, runs
from dtlib.config import RunConfig
from dtlib.errors import UserError
from dtlib.starts import build_model, pretrained_folder
from dtlib.tasks import get_task
from dtlib.wikipedia import losses

HOPPER = get_task("hopper")
LANGUAGE = pretrained_folder("language", "mini", 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=5)) for _ in range(99)]
    (folder / "a.txt").write_text(
        "\n\n\n".join(" ".join(generator.choices(words, k=40)) for _ in range(200))
    )
    return folder


@pytest.fixture
def config(hopper_file):
    return RunConfig(
        dataset=str(hopper_file),
        initialisation="language",
        size="mini",
        context=3,
        epochs=2,
        steps_per_epoch=3,
        batch_size=4,
        warmup_steps=2,
        evaluation_episodes=2,
        time_embedding_std=0.02,
    )


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    return tmp_path


def changed(config, **values):
    return dataclasses.replace(config, **values)


def bytes_of(run):
    return {file.name: file.read_bytes() for file in sorted(run.path.glob("epoch_*.safetensors"))}


@pytest.mark.parametrize("reduction", ["max", "mean", "as released"])
def test_alignment_equals_loops_in_float64(reduction):
    generator = torch.Generator().manual_seed(0)
    embedded, centres = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 4, 3, 5), (7, 5))
    )
    centres, mask = (
        normalize(centres, dim=1),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool),
    )
    values = []
    for b in range(2):
        for k in range(4):
            for token in embedded[b, k].tolist():
                length = math.sqrt(sum(x * x for x in token))
                products = [
                    [x / length * c for x, c in zip(token, centre, strict=True)]
                    for centre in centres.tolist()
                ]
                if reduction == "as released":  # a maximum for every coordinate, padding included
                    values += [max(row[d] for row in products) for d in range(5)]
                elif mask[b, k]:
                    cosines = [sum(row) for row in products]
                    values.append(
                        max(cosines) if reduction == "max" else sum(cosines) / len(cosines)
                    )
    found = losses.alignment_loss(embedded, centres, mask, reduction)
    assert float(found) == pytest.approx(-sum(values) / len(values), abs=1e-14)


def test_annealing_has_the_papers_values():
    assert [round(losses.annealing(step), 4) for step in (0, 2500, 5000)] == [0.9933, 0.5, 0.0067]
    assert [round(losses.annealing(step, 15_000), 4) for step in (0, 7500, 15_000)] == [
        0.9933,
        0.5,
        0.0067,
    ]
    assert 0 <= losses.annealing(100_000, 300) < 1e-300  # long after it has faded


def test_centres_are_means_of_the_words_nearest_to_them():
    words = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    centres, unit = losses.cosine_centres(words, 10), normalize(words, dim=1)
    assert torch.allclose(centres.norm(dim=1), torch.ones(10), atol=1e-6)
    nearest = (unit @ centres.T).argmax(1)
    means = torch.stack([normalize(unit[nearest == j].mean(0), dim=0) for j in range(10)])
    # k-means measures distances before centres have length 1: a few words lie with a neighbour.
    assert (means * centres).sum(1).min() > 0.98
    assert torch.equal(centres, losses.cosine_centres(words, 10))


def test_reading_is_the_language_models_own():
    model = build_model("language", "mini", HOPPER, 0).double().eval()
    words = losses.Words(LANGUAGE).double()
    theirs = GPT2LMHeadModel.from_pretrained(LANGUAGE).double().eval()
    sequences = torch.randint(2048, (3, 33), generator=torch.Generator().manual_seed(0))
    expected = theirs(input_ids=sequences[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(expected.flatten(0, 1), sequences[:, 1:].flatten())
    found = losses.reading_loss(model, words, sequences)
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)


def test_positions_are_repeated_but_for_the_first_two():
    model, positions = build_model("random", "chibit", HOPPER, 0), torch.randn(7, 128)
    losses.extend_positions(model, positions)
    expected, row = [0, 1], 2
    while len(expected) < HOPPER.horizon:
        expected.append(row)
        row = row + 1 if row < 6 else 2
    assert torch.equal(model.embed_time.weight, positions[expected])


def test_without_weight_nothing_changes(config, text, own_cache):
    assert bytes_of(runs.fine_tune(config)) == bytes_of(
        runs.fine_tune(
            changed(
                config,
                alignment=0.0,
                alignment_steps=7.0,
                cotraining=0.0,
                cotraining_corpus=str(text),
                words="language",
            )
        )
    )


def test_both_losses_train_the_model_and_resume(config, text, own_cache, monkeypatch):
    config = changed(
        config,
        alignment=0.1,
        alignment_steps=6.0,
        cotraining=1.0,
        cotraining_corpus=str(text),
        extended_positions=True,
    )
    whole = runs.fine_tune(config)
    plain = runs.fine_tune(changed(config, alignment=0.0, cotraining=0.0))
    assert bytes_of(whole)["epoch_000.safetensors"] == bytes_of(plain)["epoch_000.safetensors"]
    assert bytes_of(whole)["epoch_002.safetensors"] != bytes_of(plain)["epoch_002.safetensors"]
    whole.load_model()  # neither words nor head are in it
    monkeypatch.setenv("DTLIB_CACHE", str(own_cache / "second"))

    def stop(steps):
        seen.append(steps)
        if sum(seen) == 5:  # in the second epoch
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        runs.fine_tune(config, on_steps=stop)
    assert bytes_of(runs.fine_tune(config)) == bytes_of(whole)


def test_reading_beside_acting_keeps_the_language(config, text, own_cache):
    def reads(cotraining):
        run = runs.fine_tune(
            changed(
                config,
                initialisation="random-matched",
                words="language",
                epochs=1,
                steps_per_epoch=30,
                learning_rate=3e-3,
                cotraining=cotraining,
                cotraining_corpus=str(text),
                dropout=(0.0, 0.0, 0.0),
            )
        )
        sequences = torch.as_tensor(losses.text_for(LANGUAGE, str(text)).held_out)[:4]
        return losses.reading_loss(run.load_model(), losses.Words(LANGUAGE), sequences).item()

    assert reads(1.0) < reads(0.0) - 0.2


def test_frozen_blocks_do_not_change_by_a_bit(config, own_cache):
    run = runs.fine_tune(changed(config, frozen_blocks=True))
    before, after = run.load_model(0).state_dict(), run.load_model().state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("h."), name


def test_adapters_change_the_attention_alone(config, own_cache):
    run = runs.fine_tune(changed(config, adapter_rank=2))
    before, after = run.load_model(0).state_dict(), run.load_model().state_dict()
    moved = {
        name
        for name, tensor in before.items()
        if name.startswith("h.") and not torch.equal(tensor, after[name])
    }
    assert moved == {f"h.{i}.attn.c_{part}.weight" for i in range(4) for part in ("attn", "proj")}
    difference = after["h.0.attn.c_attn.weight"] - before["h.0.attn.c_attn.weight"]
    assert torch.linalg.matrix_rank(difference.double(), rtol=1e-4) <= 2


def test_adapters_are_a_function_of_the_seed():
    blocks = [build_model("random", "tiny", HOPPER, 0).h for _ in range(3)]
    for one, seed in zip(blocks, (0, 0, 1), strict=True):
        losses.add_adapters(one, 2, seed)
    first, again, other = (one[0].attn.c_attn.lora_A.default.weight for one in blocks)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_is_kept_acts_as_what_was_trained():
    model = build_model("language", "mini", HOPPER, 0).eval()
    losses.add_adapters(model.h, 3, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    plain = build_model("random-matched", "mini", HOPPER, 1).eval()
    plain.load_state_dict(losses.plain_state(model))
    windows = (
        torch.randn(2, 3, 11, generator=generator),
        torch.randn(2, 3, 3, generator=generator),
        torch.randn(2, 3, generator=generator),
        torch.arange(3).expand(2, -1),
    )
    assert torch.allclose(plain(*windows), model(*windows), atol=1e-5)
    untouched = build_model("language", "mini", HOPPER, 0).eval()
    assert not torch.allclose(untouched(*windows), model(*windows), atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(alignment=0.1, initialisation="random"), "'random' has no word table"),
        (
            dict(alignment=0.1, initialisation="random", size="gpt2", words=str(LANGUAGE)),
            "has width 128, the model has 768",
        ),
        (dict(cotraining=1.0, initialisation="markov"), "no language model with a tokenizer"),
        (dict(cotraining=1.0, cotraining_corpus="nowhere"), "Unknown corpus 'nowhere'"),
    ],
)
def test_wrong_wishes_are_named(config, own_cache, wrong, says):
    with pytest.raises(UserError, match=says):
        runs.fine_tune(changed(config, **wrong))


def test_a_fraction_of_the_episodes_and_delayed_rewards(hopper_file):
    trajectories = data.load(str(hopper_file), HOPPER)
    rows, episodes = trajectories.rows_of(0.3, seed=1), len(trajectories.lengths)
    whole = [
        np.arange(a, b) for a, b in zip(trajectories.starts, trajectories.starts[1:], strict=False)
    ]
    chosen = [part for part in whole if np.isin(part, rows).any()]
    assert np.array_equal(np.concatenate(chosen), rows) and len(chosen) == max(
        1, round(0.3 * episodes)
    )
    assert not np.array_equal(rows, trajectories.rows_of(0.3, seed=2)) and len(
        trajectories.rows_of(1e-9, 0)
    )
    late = trajectories.delayed()
    assert np.allclose(late.returns, trajectories.returns, rtol=1e-6)
    assert np.allclose(
        late.returns_to_go, np.repeat(trajectories.returns, trajectories.lengths), rtol=1e-5
    )


def test_runs_on_a_fraction_see_no_other_window(config, own_cache, monkeypatch):
    seen, windows = [], data.WindowSampler.windows

    def note(sampler, starts):
        seen.append(starts)
        return windows(sampler, starts)

    monkeypatch.setattr(data.WindowSampler, "windows", note)
    config = changed(config, data_fraction=0.3, delayed_rewards=True, seed=1)
    runs.fine_tune(config)
    trained = torch.cat([starts for starts in seen if len(starts) == config.batch_size])
    assert set(trained.tolist()) <= set(build.load_data(config).rows_of(0.3, 1).tolist())
