"""The probes against transformers' own modules, hooks and eager attention."""

import copy

import pytest
import torch
from torch import nn

from dtlib import data, probe, starts
from dtlib.errors import UserError
from dtlib.model import ARCHITECTURES
from dtlib.tasks import get_task
from dtlib.train import action_loss

HOPPER = get_task("hopper")
THEIRS = {
    "ln_1": "ln_1",
    "attn.c_attn": "attn.c_attn",
    "attn.c_proj": "attn.resid_dropout",
    "ln_2": "ln_2",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.act": "mlp.act",
    "mlp.c_proj": "mlp.dropout",
}


@pytest.fixture(scope="module")
def sampler(hopper_file):
    return data.WindowSampler(data.load(str(hopper_file), HOPPER), 5, HOPPER.return_scale)


@pytest.fixture(params=["random", "language", "image", "image-native", "separate head"])
def model(request):
    """In training mode, with dropout, as ``build_model`` leaves it."""
    separate = request.param == "separate head"
    head, name = ("separate", "random") if separate else ("tied", request.param)
    return starts.build_model(name, "mini", HOPPER, seed=0, action_head=head).double()


def transformers_twin(model):
    """transformers' own model with the same weights, without dropout and positions."""
    config = copy.deepcopy(model.config)
    config.n_positions, config._attn_implementation = 1024, "eager"
    twin = ARCHITECTURES[config.model_type][1](config).double().eval()
    twin.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k.startswith(("h.", "ln_f."))}, strict=False
    )
    nn.init.zeros_(twin.wpe.weight)
    return twin


def doubled(windows):
    return windows._replace(
        **{name: getattr(windows, name).double() for name in ("states", "actions", "returns_to_go")}
    )


def test_activations_equal_those_of_transformers(model, sampler):
    windows = doubled(probe.draw_windows(sampler, 7))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = probe.activations(model, windows)
    assert model.training and all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    twin, theirs = transformers_twin(model), {}
    for i, block in enumerate(twin.h):
        for mine, name in THEIRS.items():
            block.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, key=f"h.{i}.{mine}": theirs.__setitem__(key, output)
            )
        block.register_forward_hook(
            lambda module, inputs, output, key=f"h.{i}.stream": theirs.__setitem__(
                key, output[0] if isinstance(output, tuple) else output
            )
        )
    twin(inputs_embeds=ours["tokens"])
    assert set(theirs) == set(ours) - {"tokens"} and len(theirs) == 4 * len(probe.LAYERS)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-9, msg=name)
    chosen = probe.activations(model, windows, lambda a: a[:, probe.STATE])
    for name in ours:
        torch.testing.assert_close(chosen[name], ours[name][:, 3 * 5 - 2])


def test_attention_equals_transformers_eager_attention(model, sampler):
    windows = doubled(probe.draw_windows(sampler, 7))
    ours = probe.attention(model, windows)
    twin = transformers_twin(model)
    theirs = twin(
        inputs_embeds=probe.activations(model, windows)["tokens"], output_attentions=True
    ).attentions
    assert len(ours) == len(theirs) == 4
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.shape == (7, model.config.n_head, 15, 15)
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(mine.sum(-1), torch.ones_like(mine[..., 0]))
        assert (mine.triu(1) == 0).all()


def gram_matrices(model, gradients):
    """From one list of gradients a window, in the order of the model's parameters."""
    rows = {
        name: torch.stack(of_windows).flatten(1)
        for (name, _), of_windows in zip(
            model.named_parameters(), zip(*gradients, strict=True), strict=True
        )
    }
    return {name: own @ own.T for name, own in rows.items()}


def test_window_gradients_equal_a_loop_of_backward_passes(model, sampler):
    padded = torch.tensor([sampler.number_of_steps - 1])  # an episode's last step
    windows = doubled(sampler.windows(torch.cat([sampler.whole_windows()[[0, 7, 8, 150]], padded])))
    assert not windows.mask.all() and model.training
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    ours = probe.window_gradients(model, windows)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(
        p.grad is None and torch.equal(before[name], p) for name, p in model.named_parameters()
    )
    model.eval()
    gradients = []
    for i in range(5):
        alone = windows._replace(
            **{name: column[i : i + 1] for name, column in windows._asdict().items()}
        )
        gradients.append(
            torch.autograd.grad(action_loss(model(*alone[:4]), alone), list(model.parameters()))
        )
    theirs = gram_matrices(model, gradients)
    assert set(ours) == set(theirs)
    assert (model.head is not None) == ("head.weight" in ours)
    for name, expected in theirs.items():
        largest = expected.abs().max()
        assert largest > 0, name
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-8, atol=1e-8 * float(largest), msg=name
        )


def test_window_gradients_with_dropout(model, sampler):
    windows = doubled(
        sampler.windows(sampler.whole_windows()[[0, 7, 7, 150]])
    )  # the second and third are the same
    model.eval()
    ours, again, other, without = (
        probe.window_gradients(model, windows, seed) for seed in (3, 3, 4, None)
    )
    assert not model.training
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        errors = (model.train()(*windows[:4]) - windows.actions).square().mean((1, 2))
    parameters = list(model.parameters())
    theirs = gram_matrices(
        model, [torch.autograd.grad(error, parameters, retain_graph=True) for error in errors]
    )
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()), msg=name
        )
        assert torch.equal(ours[name], again[name]) and not torch.equal(ours[name], other[name])
    name = "h.0.mlp.c_fc.weight"
    assert without[name][1, 1] == pytest.approx(float(without[name][2, 2]), rel=1e-9)
    assert abs(ours[name][1, 1] / ours[name][2, 2] - 1) > 0.01  # the same window under two masks


def test_an_error_leaves_the_model_as_it_was(sampler):
    model = starts.build_model("random", "mini", HOPPER, seed=0)
    with pytest.raises(ZeroDivisionError):
        probe.activations(model, probe.draw_windows(sampler, 3), lambda a: 1 / 0)
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_windows_are_whole_and_the_same_for_every_model(sampler, hopper_file):
    windows = probe.draw_windows(sampler, 200, seed=3)
    assert windows.mask.all() and (windows.time_steps.diff(dim=1) == 1).all()
    again = probe.draw_windows(sampler, 200, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(windows, again, strict=True))
    assert not torch.equal(windows.states, probe.draw_windows(sampler, 200, seed=4).states)
    starts = set(sampler.whole_windows().tolist())
    for start in range(sampler.number_of_steps):
        assert (start in starts) == bool(sampler.windows(torch.tensor([start])).mask.all())
    with pytest.raises(UserError, match="No episode is as long"):
        probe.draw_windows(
            data.WindowSampler(data.load(str(hopper_file), HOPPER), 900, HOPPER.return_scale), 3
        )
