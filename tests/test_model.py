"""The model against transformers' own modules; starting points against the hub's file shapes."""

import dataclasses
import pickle
import resource
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DecisionTransformerConfig,
    DecisionTransformerModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTModel,
)

from dtlib import model as dt
from dtlib import records, runs, starts
from dtlib.errors import UserError
from dtlib.pretraining.training import PretrainConfig, make_model
from dtlib.records import weights_digest
from dtlib.storage import read_tensors
from dtlib.tasks import get_task
from dtlib.weights import load_blocks, load_checkpoint

TASK = dataclasses.replace(get_task("hopper"), horizon=50)


def build(initialisation="random-matched", size="mini", seed=0, **options):
    return starts.build_model(initialisation, size, TASK, seed=seed, **options)


def window(batch=3, context=7, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randn(batch, context, 11, generator=g, dtype=dtype),
        "actions": torch.rand(batch, context, 3, generator=g, dtype=dtype) * 2 - 1,
        "returns_to_go": torch.randn(batch, context, generator=g, dtype=dtype),
        "time_steps": torch.arange(context).expand(batch, -1),
    }


def copy_into_reference(ours: dt.DecisionTransformer) -> DecisionTransformerModel:
    """transformers' Decision Transformer with our weights.

    It adds time before the input norm, so both norms are removed. Its action head is untied, so it
    gets the transposed embedding and no bias. It adds position row 0, so that is zeroed.
    """
    config = ours.config
    reference = DecisionTransformerModel(
        DecisionTransformerConfig(
            state_dim=11,
            act_dim=3,
            hidden_size=config.n_embd,
            max_ep_len=TASK.horizon,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function=config.activation_function,
            n_positions=64,
            vocab_size=1,
        )
    ).eval()
    with torch.no_grad():
        for name in ("embed_return", "embed_state", "embed_action"):
            getattr(reference, name).load_state_dict(getattr(ours, name).state_dict())
        reference.embed_timestep.weight.copy_(ours.embed_time.weight)
        reference.predict_action[0].weight.copy_(ours.embed_action.weight.T)
        reference.predict_action[0].bias.zero_()
        reference.encoder.h.load_state_dict(ours.h.state_dict())
        reference.encoder.ln_f.load_state_dict(ours.ln_f.state_dict())
        reference.encoder.wpe.weight.zero_()
    reference.embed_ln = ours.embed_ln = nn.Identity()
    return reference


@pytest.mark.parametrize("initialisation", ["random", "random-matched"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_transformers_decision_transformer(initialisation, dtype, tolerance):
    ours = build(initialisation).eval()
    reference = copy_into_reference(ours)
    ours, reference = ours.to(dtype), reference.to(dtype)
    given = window(dtype=dtype)
    theirs = reference(
        states=given["states"],
        actions=given["actions"],
        returns_to_go=given["returns_to_go"].unsqueeze(-1),
        timesteps=given["time_steps"],
    ).action_preds
    torch.testing.assert_close(ours(**given), theirs, rtol=0, atol=tolerance)


def test_time_embedding_comes_after_the_input_norm():
    ours, given = build(), window()
    tokens = ours.embed(**given)
    one = ours.embed_ln(ours.embed_state(given["states"][1, 4])) + ours.embed_time(
        given["time_steps"][1, 4]
    )
    torch.testing.assert_close(tokens[1, 3 * 4 + 1], one)


@pytest.mark.parametrize("initialisation", ["random", "random-matched"])
def test_right_padding_equals_left_padding_with_a_mask(initialisation):
    ours = build(initialisation).eval()
    real, context = 4, 7
    given = window(context=context)
    right = ours(**given)[:, :real]
    # Left-padded and masked, as in the released code. Padding is arbitrary numbers.
    noise = window(context=context, seed=1)
    left = {k: torch.cat([noise[k][:, : context - real], given[k][:, :real]], dim=1) for k in given}
    mask = (torch.arange(context) >= context - real).repeat_interleave(3).expand(3, -1)
    reference = GPT2Model(
        ours.config.__class__.from_dict(ours.config.to_dict() | {"n_positions": 64})
    ).eval()
    reference.h.load_state_dict(ours.h.state_dict())
    reference.ln_f.load_state_dict(ours.ln_f.state_dict())
    nn.init.zeros_(reference.wpe.weight)
    hidden = reference(inputs_embeds=ours.embed(**left), attention_mask=mask).last_hidden_state
    expected = torch.tanh(hidden[:, 1::3] @ ours.embed_action.weight)[:, context - real :]
    torch.testing.assert_close(right, expected, rtol=0, atol=1e-5)


def test_there_are_no_position_embeddings():
    ours = build().eval()
    assert not any("wpe" in name or "wte" in name for name in ours.state_dict())
    given = window()
    given["time_steps"] = torch.zeros_like(given["time_steps"])
    # With equal time steps, exchanging two earlier steps changes nothing.
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6])
    moved = {name: value[:, order] for name, value in given.items()}
    one_block = build(size="mini").eval()
    one_block.h = one_block.h[:1]
    torch.testing.assert_close(
        one_block(**given)[:, 2:], one_block(**moved)[:, 2:], rtol=0, atol=1e-5
    )


def test_actions_depend_on_the_past_only():
    ours, given = build().eval(), window()
    changed = {k: v.clone() for k, v in given.items()}
    changed["actions"][:, 3] += 1  # a_3 itself and all that follows
    changed["states"][:, 4:] += 1
    before, after = ours(**given), ours(**changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_gradients_flow_where_they_should_and_nowhere_else():
    ours, given = build(dropout=(0.0, 0.1, 0.1)), window(context=5)
    given = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in given.items()}
    ours(**given)[:, 3].sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    rows = ours.embed_time.weight.grad.abs().sum(1) > 0
    assert rows[:4].all() and not rows[4:].any()
    assert given["states"].grad[:, :4].abs().sum(-1).all() and not given["states"].grad[:, 4:].any()
    assert (
        given["actions"].grad[:, :3].abs().sum(-1).all() and not given["actions"].grad[:, 3:].any()
    )
    assert given["returns_to_go"].grad[:, :4].all() and not given["returns_to_go"].grad[:, 4:].any()


def test_released_random_and_its_matched_control():
    released, matched = build("random"), build("random-matched")
    assert (released.config.n_head, released.config.activation_function) == (1, "relu")
    assert (matched.config.n_head, matched.config.activation_function) == (4, "gelu_new")
    assert (
        released.config.resid_pdrop,
        released.config.attn_pdrop,
        released.config.embd_pdrop,
    ) == (0.2, 0.1, 0.1)


def test_block_parameters_at_the_papers_size():
    with torch.device("meta"):
        model = dt.DecisionTransformer(
            TASK, GPT2Config(n_layer=12, n_embd=768, n_head=1, vocab_size=1, n_positions=1)
        )
    assert round(sum(p.numel() for p in model.h.parameters()) / 1e6, 1) == 85.1


def test_same_seed_same_weights_and_global_generator_untouched():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(torch.rand(1), expected)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not torch.equal(first.h[0].attn.c_attn.weight, other.h[0].attn.c_attn.weight)


# --- files of the hub's shape ---------------------------------------------------------------------

GPT2_TRUE = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
IMAGEGPT_TRUE = {"n_layer": 24, "n_embd": 512, "n_head": 8, "vocab_size": 513, "n_positions": 1024}


def hub_folder(path, kind):
    """A folder with exactly the tensors of ``gpt2`` or ``openai/imagegpt-small``, random values.

    The hub's gpt2 has bare names and stores each block's causal mask. Its imagegpt-small has the
    language-model class's prefix, its masks, and the scalar that fills them.
    """
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2Model(GPT2Config(**GPT2_TRUE))
        tensors = dict(model.state_dict())
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for i in range(12)}
    else:
        model = ImageGPTForCausalImageModeling(ImageGPTConfig(**IMAGEGPT_TRUE))
        nn.init.normal_(model.transformer.ln_f.weight)
        tensors = dict(model.state_dict())
        for i in range(24):
            tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(
                1, 1, 1024, 1024, dtype=torch.uint8
            ).tril()
            tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    path.mkdir()
    (path / "config.json").write_text(model.config.to_json_string())
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        path / "model.safetensors",
    )
    return path


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def imagegpt_folder(tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub") / "imagegpt", "imagegpt")


def hub_model(folder):
    """Load what ``build_model`` would, and say which tensors went where."""
    model = build(str(folder), "gpt2" if folder.name == "gpt2" else "imagegpt")
    return model, load_blocks(model, folder)


def test_true_gpt2_folder_loads(gpt2_folder):
    model, fate = hub_model(gpt2_folder)
    assert len(fate["kept"]) == 12 * 12 + 2 and fate["new"] == []
    assert sorted(fate["left_out"]) == sorted(
        ["wte.weight", "wpe.weight", *(f"h.{i}.attn.bias" for i in range(12))]
    )
    reference = GPT2Model.from_pretrained(gpt2_folder).eval()
    nn.init.zeros_(reference.wpe.weight)
    tokens = torch.randn(2, 9, 768)
    expected = reference(inputs_embeds=tokens).last_hidden_state
    torch.testing.assert_close(model.eval().hidden(tokens), expected, rtol=0, atol=1e-5)
    assert (model.config.n_head, model.config.activation_function) == (12, "gelu_new")


def test_true_imagegpt_folder_in_its_own_architecture(imagegpt_folder):
    model, fate = hub_model(imagegpt_folder)
    assert len(fate["kept"]) == 24 * 10 + 1 and fate["new"] == []
    assert len(fate["left_out"]) == 3 + 2 * 24
    reference = ImageGPTModel.from_pretrained(imagegpt_folder).eval()
    nn.init.zeros_(reference.wpe.weight)
    tokens = torch.randn(2, 9, 512)
    expected = reference(inputs_embeds=tokens).last_hidden_state
    torch.testing.assert_close(model.eval().hidden(tokens), expected, rtol=0, atol=1e-5)


def test_true_imagegpt_folder_poured_into_gpt2_blocks(imagegpt_folder, monkeypatch):
    monkeypatch.setitem(
        starts.STARTING_POINTS, "igpt", starts.StartingPoint(hub=str(imagegpt_folder))
    )
    poured = build("igpt", "imagegpt").eval()
    fate = load_blocks(poured, imagegpt_folder)
    assert sorted(fate["new"]) == sorted(
        ["ln_f.bias", *(f"h.{i}.ln_{j}.bias" for i in range(24) for j in (1, 2))]
    )
    assert len(fate["new"]) == 49 and len(fate["kept"]) == 24 * 10 + 1
    assert all((poured.get_parameter(name) == 0).all() for name in fate["new"])
    assert (poured.config.n_head, poured.config.activation_function) == (8, "quick_gelu")
    native = build(str(imagegpt_folder), "imagegpt").eval()
    for name in fate["kept"]:
        assert torch.equal(poured.get_parameter(name), native.get_parameter(name)), name
    # The same numbers in another norm are another function.
    tokens = torch.randn(2, 9, 512) + 0.5
    assert (poured.hidden(tokens) - native.hidden(tokens)).abs().max() > 0.01


def small_folder(path, change=lambda tensors: None, **config):
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=10, n_positions=8, **config)
    )
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(tensors)
    path.mkdir()
    (path / "config.json").write_text(model.config.to_json_string())
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "h.1.ln_2.bias is missing"),
        (lambda t: t.update({"h.0.extra": torch.zeros(1)}), "h.0.extra is unexpected"),
        (
            lambda t: t.update({"transformer.ln_f.weight": torch.zeros(3)}),
            "ln_f.weight has shape (3,)",
        ),
    ],
)
def test_weights_that_do_not_fit_their_config(tmp_path, change, says):
    folder = small_folder(tmp_path / "m", change)
    with pytest.raises(UserError) as error:
        build(str(folder))
    assert says in str(error.value)


def test_any_gpt2_folder_with_the_language_model_prefix(tmp_path):
    model = build(str(small_folder(tmp_path / "m", activation_function="relu")))
    assert model.config.activation_function == "relu"


def test_pickled_truncated_and_absent_weights(tmp_path):
    folder = small_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (pickle.dumps({"wte.weight": [1.0]}), whole[: len(whole) // 2], b""):
        weights.write_bytes(content)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            build(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        build(str(folder))


def test_unknown_names_sizes_and_foreign_architectures(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="random-matched"):
        build("gpt3")
    with pytest.raises(UserError, match="mini"):
        build(size="huge")
    folder = small_folder(tmp_path / "m")
    assert build(str(folder), "gpt2").config.n_layer == 4  # the size is that of random weights only
    monkeypatch.setitem(
        starts.STARTING_POINTS,
        "wrong",
        starts.StartingPoint(hub=str(folder), architecture="imagegpt"),
    )
    with pytest.raises(UserError, match="does not fit ImageGPT"):
        build("wrong")
    for other in ({"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}):
        with pytest.raises(UserError, match="scale_attn_.*Input should be"):
            build(str(small_folder(tmp_path / str(other), **other)))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="'bert'"):
        build(str(folder))


def test_hub_without_a_network(monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *a, **k: (_ for _ in ()).throw(OSError("unreachable")),
    )
    with pytest.raises(UserError, match="openai-community/gpt2.*folder"):
        build("gpt2", "gpt2")


def test_checkpoint_of_another_architecture(tmp_path):
    save_file(build("random", "chibit").state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="another architecture"):
        load_checkpoint(build(), tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["gpt2", "igpt-native"])
def test_hub_weights_from_data_to_a_finished_run(
    name, gpt2_folder, imagegpt_folder, tmp_path, monkeypatch
):
    folder, error = str(gpt2_folder if name == "gpt2" else imagegpt_folder), runs.action_error
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr("os.fsync", lambda file: None)  # gigabytes that are deleted below
    monkeypatch.setattr(
        runs, "action_error", lambda model, sampler, starts: error(model, sampler, starts[:8])
    )  # not 512
    monkeypatch.setitem(
        starts.STARTING_POINTS, name, dataclasses.replace(starts.STARTING_POINTS[name], hub=folder)
    )
    (run,) = runs.fine_tuned(
        [
            runs.RunConfig(
                dataset="collected:random",
                dataset_steps=300,
                initialisation=name,
                context=2,
                epochs=1,
                steps_per_epoch=2,
                batch_size=2,
                warmup_steps=0,
                evaluation_episodes=1,
            )
        ],
        "cpu",
        processes=1,
    )
    first, last, start = (
        run.load_model(0),
        run.load_model(),
        starts.build_model(name, "gpt2", get_task("hopper"), seed=0),
    )
    for was, now, given in zip(
        first.parameters(), last.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(was, given) and not torch.equal(was, now)
    peak = resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss  # of all tests so far, in kilobytes but for macOS
    assert peak * (1 if sys.platform == "darwin" else 1024) < 24e9
    shutil.rmtree(tmp_path)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Untrained starting points: shipped, this machine's, and a copy that was put aside."""
    monkeypatch.setattr(starts, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    for place, kind, seed in (
        ("shipped", "language", 0),
        ("shipped", "image", 0),
        ("starting_points", "language", 3),
    ):
        network = make_model(PretrainConfig(kind, seed=seed, sequence=16), 40)
        for norm in (module for name, module in network.named_modules() if "ln_" in name):
            nn.init.normal_(norm.weight)  # a fresh one would fit any other
        network.half().save_pretrained(tmp_path / place / f"{kind}-mini-seed{seed}")
    for copy in ("language-mini-seed0", "language-mini-seed3-old"):
        shutil.copytree(
            tmp_path / "starting_points" / "language-mini-seed3",
            tmp_path / "starting_points" / copy,
        )
    return tmp_path


def test_seeds_vary_the_starting_point_and_runs_know_its_file(made):
    first, second = (
        made / "shipped" / "language-mini-seed0",
        made / "starting_points" / "language-mini-seed3",
    )
    assert [starts.pretrained_folder("language", "mini", seed) for seed in range(4)] == [
        first,
        second,
    ] * 2
    with pytest.raises(
        UserError, match="`python -m dtlib pretrain markov --size gpt2`, or take size='mini'"
    ):
        build("markov", "gpt2")
    digests = [weights_digest("language", "mini", seed) for seed in range(3)]
    assert digests[0] == digests[2] != digests[1] and weights_digest("random", "mini", 0) == ""
    shutil.copy(second / "model.safetensors", first / "model.safetensors")
    config = runs.RunConfig(initialisation="language", size="mini")
    assert records.digests(config) == {"starting_weights": digests[1]}


def test_starting_points_of_so_many_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    row = starts.get_starting_point("image-native-10M")
    assert (row.pretrained, row.architecture, row.tokens) == ("image", "imagegpt", "10M")
    with pytest.raises(UserError, match="pretrain image --size mini --set tokens=10M"):
        starts.weights_folder(row, "mini", 0)
    (folder := tmp_path / "starting_points" / "image-mini-10M-seed0").mkdir(parents=True)
    assert (
        starts.weights_folder(row, "mini", 5)
        == folder
        != starts.pretrained_folder("image", "mini", 0)
    )
    for name in ("language-0M", "language-10", "random-10M", "gpt2-10M"):
        with pytest.raises(UserError, match="Unknown initialisation"):
            starts.get_starting_point(name)


def test_starting_points_made_here_fill_the_blocks(made):
    tokens = torch.randn(2, 9, 128)
    for name, kept in (
        ("language", 4 * 12 + 2),
        ("image", 4 * 10 + 1),
        ("image-native", 4 * 10 + 1),
    ):
        folder, model = (
            made / "shipped" / f"{name.removesuffix('-native')}-mini-seed0",
            build(name).eval(),
        )
        fate, stored = load_blocks(build(name), folder), read_tensors(folder / "model.safetensors")
        tables = {"wte.weight", "wpe.weight"} | (
            set() if name == "language" else {"lm_head.weight"}
        )
        assert set(fate["left_out"]) == tables and len(fate["kept"]) == kept == len(stored) - len(
            tables
        )
        assert all(
            torch.equal(model.get_parameter(name), stored[f"transformer.{name}"].float())
            for name in fate["kept"]
        )
        norms = (
            {"ln_f.bias", *(f"h.{i}.ln_{j}.bias" for i in range(4) for j in (1, 2))}
            if name == "image"
            else set()
        )
        assert set(fate["new"]) == norms and not any(
            model.get_parameter(name).any() for name in norms
        )
        theirs = (
            (GPT2Model if name == "language" else ImageGPTModel)
            .from_pretrained(folder, dtype=torch.float32)
            .eval()
        )
        nn.init.zeros_(theirs.wpe.weight)
        difference = (
            (model.hidden(tokens) - theirs(inputs_embeds=tokens).last_hidden_state).abs().max()
        )
        assert (
            difference > 0.1 if name == "image" else difference < 1e-5
        )  # another norm is another function


def test_a_swapped_block_keeps_its_heads_and_activation():
    host, donor = (
        starts.build_model(name, "mini", get_task("hopper"), seed=0).eval()
        for name in ("random", "language")
    )
    swapped = starts.build_model(
        "random", "mini", get_task("hopper"), seed=0, donor="language", swapped_block=0
    ).eval()
    for name, tensor in swapped.state_dict().items():
        source = donor if name.startswith("h.0.") else host
        assert torch.equal(tensor, source.state_dict()[name]), name
    assert [block.attn.num_heads for block in swapped.h] == [4, 1, 1, 1]
    tokens = torch.randn(2, 9, 128)

    def run(*blocks):  # transformers' own forward passes
        hidden = tokens
        for block in blocks:
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return host.ln_f(hidden)

    torch.testing.assert_close(
        swapped.hidden(tokens), run(donor.h[0], *host.h[1:]), rtol=0, atol=1e-5
    )
    assert (swapped.hidden(tokens) - run(*host.h)).abs().max() > 0.01


@pytest.mark.parametrize(
    "donor, block, sentence",
    [("language", 4, "no block 4"), ("image-native", 1, "A block of imagegpt")],
)
def test_blocks_that_do_not_fit_are_refused(donor, block, sentence):
    with pytest.raises(UserError, match=sentence):
        starts.build_model(
            "random", "mini", get_task("hopper"), seed=0, donor=donor, swapped_block=block
        )


def test_reset_heads_changes_only_those_heads():
    plain, reset = (
        starts.build_model("language", "mini", get_task("hopper"), seed=0, reset_heads=heads)
        for heads in ((), (1, 3))
    )
    changed = {
        name
        for name, tensor in reset.state_dict().items()
        if not torch.equal(tensor, plain.state_dict()[name])
    }
    assert changed == {"h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias", "h.0.attn.c_proj.weight"}
    weight, before = (m.h[0].attn.c_attn.weight.unflatten(1, (3, 4, 32)) for m in (reset, plain))
    same = (weight == before).all(0).all(-1)
    assert same.tolist() == [[True, False, True, False]] * 3
    assert weight[:, :, 1].std().item() == pytest.approx(0.02, rel=0.05)
    assert (reset.h[0].attn.c_attn.bias.unflatten(0, (3, 4, 32))[:, [1, 3]] == 0).all()
    rows, before = (m.h[0].attn.c_proj.weight.unflatten(0, (4, 32)) for m in (reset, plain))
    assert torch.equal(rows[[0, 2]], before[[0, 2]]) and rows[1].std().item() == pytest.approx(
        0.02 / 8**0.5, rel=0.05
    )
    with pytest.raises(UserError, match="no head 4"):
        starts.build_model("language", "mini", get_task("hopper"), seed=0, reset_heads=(4,))


@pytest.mark.parametrize("how", ["shuffled", "rotated"])
def test_scrambled_starts_keep_what_they_promise(how):
    plain, scrambled = (
        starts.build_model(name, "mini", get_task("hopper"), seed=0)
        for name in ("language", f"language-{how}")
    )
    again = starts.build_model(f"language-{how}", "mini", get_task("hopper"), seed=0)
    for name, tensor in scrambled.state_dict().items():
        before = plain.state_dict()[name]
        assert torch.equal(tensor, again.state_dict()[name])
        if not name.startswith("h."):
            assert torch.equal(tensor, before)
        elif how == "shuffled" or tensor.dim() == 1:
            assert torch.equal(tensor.flatten().sort().values, before.flatten().sort().values)
        else:
            torch.testing.assert_close(
                torch.linalg.svdvals(tensor), torch.linalg.svdvals(before), rtol=1e-3, atol=1e-3
            )
        if name.startswith("h.") and tensor.std() > 0:
            assert not torch.equal(tensor, before), name
