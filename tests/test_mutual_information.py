"""Estimates of mutual information against closed forms, loops, and one plain torch network."""

import math

import numpy as np
import pytest
import torch
from conftest import cells
from torch import nn

from dtlib.measures import mutual_information as mi

without_critics = cells("02_mutual_information", "measure")


def gaussian_pairs(correlation, count, dimensions=2, noise=0, problems=1, seed=0):
    """x (M, N, d) and y (M, N, d + noise), and I in nats.

    They are d pairs of correlated Gaussians, those of y turned among noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, problems, count, dimensions, generator=generator, dtype=torch.float64)
    y = correlation * x + math.sqrt(1 - correlation**2) * y
    y = torch.cat(
        [y, torch.randn(problems, count, noise, generator=generator, dtype=torch.float64)], dim=2
    )
    turn = torch.linalg.qr(
        torch.randn(2 * [dimensions + noise], generator=generator, dtype=torch.float64)
    ).Q
    return x, y @ turn, -dimensions * math.log(1 - correlation**2) / 2


def variates_of(x, y):
    """x, y, x_test, y_test: the next 1000 pairs and the rest, along the first 1000's directions."""
    thirds = [
        (x[:, rows], y[:, rows]) for rows in (slice(1000), slice(1000, 2000), slice(2000, None))
    ]
    return [part for pair in mi.canonical_variates(*thirds[0], *thirds[1:]) for part in pair]


class MovingAverageLog(torch.autograd.Function):
    """log mean eᶠ whose gradient divides by a given running mean."""

    @staticmethod
    def forward(context, values, running):
        context.save_for_backward(values, running)
        return values.exp().mean().log()

    @staticmethod
    def backward(context, gradient):
        values, running = context.saved_tensors
        return gradient * values.exp() / running / len(values), None


def plain_mine(x, y, hidden, passes, batch_size, learning_rate):
    """One network of torch's modules with torch's Adam, given only the draws of ``mine``."""
    generator = torch.Generator().manual_seed(0)
    sizes, layers = (x.shape[1] + y.shape[1], *hidden, 1), []
    for weight, bias in mi._networks(sizes, x[None], generator):
        layers += [nn.Linear(*weight.shape[1:]).double(), nn.ReLU()]
        layers[-2].weight.data, layers[-2].bias.data = (
            weight[0].T.detach().clone(),
            bias[0, 0].detach().clone(),
        )
    network = nn.Sequential(*layers[:-1])
    optimiser, running = torch.optim.Adam(network.parameters(), lr=learning_rate), None

    def critics(rows):
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        return [
            network(torch.cat([x[rows], y[other]], dim=1)).flatten() for other in (rows, shuffled)
        ]

    for _ in range(passes):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            joint, marginal = critics(rows)
            mean = marginal.exp().mean().detach()
            running = mean if running is None else 0.01 * mean + 0.99 * running
            optimiser.zero_grad()
            (MovingAverageLog.apply(marginal, running) - joint.mean()).backward()
            optimiser.step()
    joint, marginal = critics(torch.arange(len(x)))
    return (joint.mean() - marginal.exp().mean().log()).item()


@pytest.mark.parametrize(
    ("hidden", "batch_size"),
    [((16, 16, 16), 30), ((16, 16), 60)],
    ids=["as released", "as written"],
)
def test_stacked_networks_train_as_each_would_alone(hidden, batch_size):
    x, y, _ = gaussian_pairs(0.9, 60, noise=3, problems=3)
    settings = {"hidden": hidden, "passes": 30, "batch_size": batch_size, "learning_rate": 3e-3}
    together = mi.mine(x, y, **settings)
    for i in range(3):
        torch.testing.assert_close(
            mi.mine(x[i : i + 1], y[i : i + 1], **settings)[0], together[i], rtol=0, atol=1e-10
        )
        assert together[i].item() == pytest.approx(plain_mine(x[i], y[i], **settings), abs=1e-8)
    assert together.std() > 0.01  # three problems, not one three times
    variates = variates_of(*gaussian_pairs(0.9, 2300, noise=3, problems=3)[:2])
    stacked = mi.info_nce(*variates, steps=10)
    for i in range(3):
        torch.testing.assert_close(
            mi.info_nce(*(part[i : i + 1] for part in variates), steps=10)[0],
            stacked[i],
            rtol=0,
            atol=1e-10,
        )


def test_networks_start_as_torch_starts_them():
    layers = mi._networks((300, 200, 1), torch.zeros(2, 1, 1), torch.Generator().manual_seed(0))
    for (weight, bias), plain in zip(layers, (nn.Linear(300, 200), nn.Linear(200, 1)), strict=True):
        assert weight.shape == (2, *plain.weight.T.shape) and bias.shape == (
            2,
            1,
            *plain.bias.shape,
        )
        assert torch.equal(weight[0], weight[1])
        bound = plain.in_features**-0.5
        assert weight.abs().max() <= bound and bias.abs().max() <= bound
        assert weight.std().item() == pytest.approx(plain.weight.std().item(), rel=0.1)
        assert abs(weight.mean().item()) < 4 * bound / math.sqrt(3 * weight[0].numel())


def test_an_overflow_is_not_finite_and_stays_with_its_problem():
    x, y, _ = gaussian_pairs(0.9, 50, problems=2)
    settings = {"hidden": (8, 8), "passes": 5, "batch_size": 50}
    alone = mi.mine(x[:1], y[:1], **settings)
    y[1] *= 1e6
    both = mi.mine(x, y, **settings)
    assert both[0].item() == pytest.approx(alone[0].item(), rel=1e-9) and not both[1].isfinite()


def test_as_released_finds_information_where_there_is_none():
    """Critics are judged on what they learnt by heart: pairs of noise seem to share nats."""
    x, y, truth = gaussian_pairs(0.0, 100, noise=60, problems=3)
    found = mi.mine(x.float(), y.float(), hidden=(64, 64, 64), passes=50, learning_rate=2e-3)
    assert truth == 0 and found.min() > 0.5
    variates = variates_of(*gaussian_pairs(0.0, 3000, noise=60, problems=3)[:2])
    assert mi.info_nce(*variates).max() < 0.05
    assert without_critics.gaussian(*variates[2:]).abs().max() < 0.03


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_estimates_reach_the_closed_form(correlation):
    x, y, truth = gaussian_pairs(correlation, 3000, problems=3)
    variates = variates_of(x, y)
    assert without_critics.gaussian(*variates[2:]).mean().item() == pytest.approx(truth, abs=0.05)
    assert truth - 0.2 < mi.info_nce(*variates).mean().item() < truth + 0.05
    big = mi.mine(
        x[:, :1000].float(),
        y[:, :1000].float(),
        (32, 32),
        passes=15,
        batch_size=50,
        learning_rate=5e-3,
    )
    assert big.mean().item() == pytest.approx(
        truth, abs=0.25
    )  # with many pairs and few passes MINE is right, too


def test_noise_in_other_dimensions_lowers_a_held_out_estimate_only():
    x, y, truth = gaussian_pairs(0.9, 2000, noise=60, problems=3)
    own = x[:, :1000], y[:, :1000]
    fitted, held_out = mi.canonical_variates(*own, own, (x[:, 1000:], y[:, 1000:]))
    assert (
        without_critics.gaussian(*fitted).mean() > truth
    )  # in the pairs that chose the directions
    assert truth - 0.25 < without_critics.gaussian(*held_out).mean() < truth


def test_info_nce_counts_the_right_answers():
    """Against loops: orders of whole groups; log(group) is the ceiling even where I is infinite."""
    x, y, _ = gaussian_pairs(0.9, 2700, problems=1)
    variates = variates_of(x, y)
    found = mi.info_nce(*variates, steps=0, group=300)
    generator = torch.Generator().manual_seed(0)
    g, h = (mi._networks((2, 32, 16), x, generator) for _ in range(2))
    expected = []
    for _ in range(4):
        order, total = torch.randperm(700, generator=generator), []
        for rows in (order[:300], order[300:600]):
            left, right = (
                mi._forward(net, part[:, rows])[0].detach().numpy()
                for net, part in zip((g, h), variates[2:], strict=True)
            )
            for i in range(300):
                scores = [left[i] @ right[j] for j in range(300)]
                total.append(scores[i] - np.log(np.mean(np.exp(scores))))
        expected.append(np.mean(total))
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=1e-10)
    same = mi.info_nce(x[:, :1000], x[:, :1000], x[:, 2000:], x[:, 2000:], steps=300, group=20)
    assert same.min() > 2.0 and same.max() <= math.log(20)


def test_canonical_variates_are_those_of_linear_algebra():
    x, y, _ = gaussian_pairs(0.8, 1500, dimensions=3, noise=4)
    own = 10 * x[:, :1000] - 3, y[:, :1000]
    (u, v), (held_out, _) = mi.canonical_variates(*own, own, (x[:, 1000:], y[:, 1000:]), ridge=0.0)
    bases = [
        np.linalg.qr(part[0, :1000].numpy() - part[0, :1000].numpy().mean(0))[0] for part in (x, y)
    ]
    expected = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    np.testing.assert_allclose((u * v).mean(1)[0].numpy(), expected, atol=2e-3)
    np.testing.assert_allclose((u.mT @ v / 1000)[0].numpy(), np.diag(expected), atol=2e-3)
    assert held_out.shape == (1, 500, 3)


def test_bounds_of_given_scores():
    """By the formulas, written out term by term."""
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    odds = scores.exp()
    info_nce = sum(torch.log(odds[i, i] / odds[i].mean()) for i in range(5)) / 5
    assert without_critics.info_nce_bound(scores).item() == pytest.approx(info_nce.item())
    assert without_critics.info_nce_bound(1e3 * torch.eye(5)).item() == pytest.approx(math.log(5))
    mine = scores[0].mean() - torch.log(odds[1].mean())
    assert without_critics.mine_bound(scores[0], scores[1]).item() == pytest.approx(mine.item())
