"""The loop against an independent one, its loss against a hand count."""

import pytest
import torch

from dtlib import data, train
from dtlib.dropout import add_dropped
from dtlib.starts import build_model
from dtlib.tasks import get_task


@pytest.fixture(scope="module")
def sampler(hopper_file):
    return data.WindowSampler(data.load(str(hopper_file), get_task("hopper")), 5, 1000.0)


def build(**options):
    return build_model("random-matched", "chibit", get_task("hopper"), seed=0, **options)


def rate(step, total=None):
    shape = "decay" if total else "constant"
    return train.learning_rate_at(step, 1e-3, 10, total, shape)


OPTIONS = {"rate": rate, "gradient_clip": 0.25}
NO_DROPOUT = {"dropout": (0.0, 0.0, 0.0)}


def draw(sampler, steps, batch):
    return torch.randint(
        sampler.number_of_steps, (steps, batch), generator=torch.Generator().manual_seed(0)
    )


def test_loss_is_the_mean_over_real_steps_and_action_dimensions():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    windows = data.Windows(
        states=None, actions=torch.zeros(2, 3, 2), returns_to_go=None, time_steps=None, mask=mask
    )
    predicted = torch.tensor(
        [[[1.0, 3.0], [2.0, 0.0], [9.0, 9.0]], [[0.0, 1.0], [9.0, 9.0], [9.0, 9.0]]]
    )
    assert train.action_loss(predicted, windows).item() == pytest.approx(
        (1 + 9 + 4 + 0 + 0 + 1) / 6
    )


@pytest.mark.parametrize("total", [None, 20])
def test_epoch_equals_a_plain_loop(sampler, total):
    """Twenty steps of warm-up, decay, clipping and AdamW, with torch's unfused optimiser."""
    starts = draw(sampler, 20, 8)
    ours, plain = build(**NO_DROPOUT), build(**NO_DROPOUT)
    optimiser = train.make_optimiser(ours, 1e-3)
    loss = train.train_epoch(
        ours, optimiser, sampler, starts, rate=lambda step: rate(step, total), gradient_clip=0.25
    )
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=1e-4, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        reference, lambda step: min((step + 1) / 10, 1) * (1 - step / (total or 1e9))
    )
    losses = []
    for row in starts:
        windows = sampler.windows(row)
        predicted = plain(
            windows.states, windows.actions, windows.returns_to_go, windows.time_steps
        )
        error = torch.nn.functional.mse_loss(predicted[windows.mask], windows.actions[windows.mask])
        losses.append(error.item())
        reference.zero_grad()
        error.backward()
        norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
        for p in plain.parameters():
            p.grad *= min(1.0, 0.25 / (norm.item() + 1e-6))
        reference.step()
        schedule.step()
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert losses[-1] < losses[0]
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)


def test_clipping_binds_and_none_switches_it_off(sampler):
    starts = draw(sampler, 1, 8)
    norms = {}
    for clip in (0.01, None):
        model = build(**NO_DROPOUT)
        train.train_epoch(
            model,
            train.make_optimiser(model, 1e-3),
            sampler,
            starts,
            rate=lambda step: 1e-3,
            gradient_clip=clip,
        )
        norms[clip] = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3) and norms[None] > 0.05


def test_action_error_ignores_dropout_and_batching(sampler):
    model, starts = build(), draw(sampler, 1, 100)[0]
    errors = {train.action_error(model, sampler, starts, batch) for batch in (100, 7)}
    assert max(errors) - min(errors) < 1e-6
    windows = sampler.windows(starts)
    expected = train.action_loss(train.predict(model.eval(), windows), windows).item()
    assert errors.pop() == pytest.approx(expected, abs=1e-6)


def loss_curve(sampler, model, precision="float32", device="cpu"):
    """Mean losses of six times ten steps."""
    optimiser = train.make_optimiser(model, 1e-3)
    return torch.tensor(
        [
            train.train_epoch(
                model, optimiser, sampler, part, first_step=10 * i, precision=precision, **OPTIONS
            )
            for i, part in enumerate(draw(sampler, 60, 16).to(device).split(10))
        ]
    )


def test_bfloat16_follows_float32(sampler):
    """The same direction of descent from the same weights; training goes down in both."""
    model, windows, gradients = build(**NO_DROPOUT), sampler.windows(draw(sampler, 1, 64)[0]), []
    for precision in ("float32", "bfloat16"):
        model.zero_grad()
        train.action_loss(train.predict(model, windows, precision), windows).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert 0.98 < torch.cosine_similarity(*gradients, dim=0) < 1
    torch.testing.assert_close(gradients[1].norm(), gradients[0].norm(), rtol=0.05, atol=0)
    curve = loss_curve(sampler, build(**NO_DROPOUT), "bfloat16")
    assert curve[-1] < 0.95 * curve[0]


@pytest.mark.gpu
def test_cuda_follows_the_cpu(sampler, hopper_file):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    on_card = data.WindowSampler(data.load(str(hopper_file), get_task("hopper")), 5, 1000.0, "cuda")
    cuda = loss_curve(on_card, build(**NO_DROPOUT).to("cuda"), device="cuda")
    torch.testing.assert_close(cuda, loss_curve(sampler, build(**NO_DROPOUT)), rtol=0.01, atol=0)


def test_dropout_keeps_the_right_share_scales_it_and_adds_the_residual():
    branch, residual = torch.ones(400, 501, requires_grad=True), torch.full((400, 501), 2.0)
    for probability in (0.1, 0.2):
        torch.manual_seed(0)
        out = add_dropped(residual, branch, probability)
        kept = out.detach() != 2
        torch.testing.assert_close(
            out[kept], torch.full_like(out[kept], 2 + 1 / (1 - probability)), rtol=1e-4, atol=0
        )
        deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
        assert abs(kept.float().mean().item() - (1 - probability)) < 4 * deviation
        for shift in (1, 2, 3):  # four neighbours share a drawn number
            both = (kept.flatten()[shift:] & kept.flatten()[:-shift]).float().mean().item()
            assert abs(both - (1 - probability) ** 2) < 6 * deviation
        (gradient,) = torch.autograd.grad(out.sum(), branch)
        torch.testing.assert_close(gradient, kept / (1 - probability), rtol=1e-4, atol=0)
    assert torch.equal(add_dropped(residual, branch, 0.0), residual + branch)


def test_attention_with_dropout_is_the_fused_one_where_nothing_is_dropped():
    model = build(dropout=(0.0, 1e-9, 0.0)).double()
    tokens = torch.randn(2, 12, model.config.n_embd, dtype=torch.float64)
    torch.testing.assert_close(
        model.train().hidden(tokens), model.eval().hidden(tokens), rtol=0, atol=1e-12
    )


def test_learning_rates_of_all_shapes():
    def rates(shape, steps, warmup, total):
        return [train.learning_rate_at(step, 2.0, warmup, total, shape) for step in steps]

    assert rates("constant", (0, 4, 9, 10, 99), 10, 100) == [0.2, 1.0, 2.0, 2.0, 2.0]
    assert rates("decay", (4, 50), 10, 100) == pytest.approx([0.96, 1.0])
    assert rates("cosine", (0, 50, 100), 1, 100) == pytest.approx([2.0, 1.0, 0.2])
    assert rates("constant", (0,), 0, 100) == [2.0]
