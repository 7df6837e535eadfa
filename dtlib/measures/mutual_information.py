"""Mutual information I(X;Y), in nats, of continuous vectors, by critics that are trained (A 5.2).

M problems of one shape are estimated at once: x (M, N, P) and y (M, N, Q), row n of both being a
pair. All start from the same weights and draw the same rows: none depends on those beside it.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def _networks(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> list[Pair]:
    """Weights (M, in, out) and biases (M, 1, out), drawn once as nn.Linear draws them."""

    def draw(rows: int, outputs: int, inputs: int) -> Tensor:
        uniform = 2 * torch.rand(rows, outputs, generator=generator) - 1
        return (uniform / inputs**0.5).to(like).repeat(len(like), 1, 1).requires_grad_()

    return [(draw(old, new, old), draw(1, new, old)) for old, new in pairwise(sizes)]


def _forward(layers: list[Pair], rows: Tensor) -> Tensor:
    """(M, B, in) → (M, B, out), with ReLU between the layers."""
    for i, (weight, bias) in enumerate(layers):
        rows = torch.baddbmm(bias, rows.relu() if i else rows, weight)
    return rows


def _adam(layers: list[Pair], rate: float, decay: float = 0.0) -> torch.optim.AdamW:
    """One optimiser for all M networks: Adam works entry by entry, and the losses are summed."""
    return torch.optim.AdamW(sum(layers, ()), lr=rate, weight_decay=decay, fused=True)


def mine(
    x: Tensor, y: Tensor, hidden=(400,) * 3, passes=1000, batch_size=50, learning_rate=1e-4, seed=0
) -> Tensor:
    """Return MINE (Belghazi et al. 2018), (M,): what critics f reach on the pairs they learnt from.

    They climb E_joint[f] − log E_marginal[eᶠ]. The marginal is the same x with shuffled y; a moving
    average is the denominator of the second term's gradient. The defaults are as released [code];
    as written: hidden=(400, 400), batch_size=N. Not finite where eᶠ overflows.
    """
    generator, count = torch.Generator().manual_seed(seed), x.shape[1]
    layers = _networks((x.shape[2] + y.shape[2], *hidden, 1), x, generator)

    def critic(rows: Tensor) -> Pair:  # of the joint and of the marginal, each (M, B)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        pairs = torch.cat([x[:, rows].repeat(1, 2, 1), y[:, torch.cat([rows, shuffled])]], dim=2)
        return _forward(layers, pairs)[..., 0].chunk(2, dim=1)

    optimiser, running = _adam(layers, learning_rate), None
    for _ in range(passes):
        for rows in torch.randperm(count, generator=generator).split(batch_size):
            joint, marginal = critic(rows)
            odds = marginal.detach().exp()
            mean = odds.mean(1, keepdim=True)
            running = mean if running is None else 0.01 * mean + 0.99 * running
            optimiser.zero_grad()
            (odds / running * marginal - joint).mean(1).sum().backward()
            optimiser.step()
    with torch.no_grad():
        joint, marginal = critic(torch.arange(count))
        return joint.mean(1) - marginal.exp().mean(1).log()


def canonical_variates(x: Tensor, y: Tensor, *others: Pair, ridge: float = 1e-2) -> list[Pair]:
    """Return ``others`` along the directions that correlate most in (x, y): (M, N', min(P, Q)).

    They share at most I(X;Y). ``ridge`` is added to the variances, which are 1.
    """
    scales = [(part.mean(1, keepdim=True), part.std(1, keepdim=True) + 1e-6) for part in (x, y)]

    def standardised(pair: Pair) -> list[Tensor]:
        return [(part - mean) / sd for part, (mean, sd) in zip(pair, scales, strict=True)]

    def whitener(part: Tensor) -> Tensor:
        covariance = part.mT @ part / part.shape[1] + ridge * torch.eye(part.shape[2]).to(part)
        return torch.linalg.inv(torch.linalg.cholesky(covariance)).mT

    x, y = standardised((x, y))
    left, right = whitener(x), whitener(y)
    u, _, vh = torch.linalg.svd(left.mT @ x.mT @ y @ right, full_matrices=False)
    left, right = left @ u, right @ vh.mT
    return [(x @ left, y @ right) for x, y in map(standardised, others)]


def info_nce(x, y, x_test, y_test, steps: int = 100, group: int = 250, seed: int = 0) -> Tensor:
    """Return InfoNCE (van den Oord et al. 2018) on test pairs in four orders, (M, 4).

    In expectation it is at most I; it never exceeds log(group). The critic g(x)·h(y) learns which y
    of a batch belongs to each x, of unit scale. Only whole groups of pairs count.
    """
    generator, count = torch.Generator().manual_seed(seed), x_test.shape[1]
    g, h = (_networks((part.shape[2], 32, 16), part, generator) for part in (x, y))

    def bound(x: Tensor, y: Tensor) -> Tensor:
        scores = torch.bmm(_forward(g, x), _forward(h, y).mT)  # (M, B, B); pairs on the diagonal
        return (scores.diagonal(0, 1, 2) - scores.logsumexp(2)).mean(1) + math.log(x.shape[1])

    optimiser = _adam(g + h, rate=0.01, decay=1.0)
    for _ in range(steps):
        rows = torch.randint(x.shape[1], (64,), generator=generator)
        optimiser.zero_grad()
        bound(x[:, rows], y[:, rows]).sum().neg().backward()
        optimiser.step()
    group, found = min(group, count), []
    with torch.no_grad():
        for _ in range(4):
            order = torch.randperm(count, generator=generator)[: count - count % group]
            bounds = [bound(x_test[:, rows], y_test[:, rows]) for rows in order.split(group)]
            found.append(torch.stack(bounds).mean(0))
    return torch.stack(found, dim=1)
