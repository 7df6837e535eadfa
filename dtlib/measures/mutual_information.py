"""Mutual information I(X;Y) in nats of continuous vectors (paper A, 5.2): by critics that are trained, and two without one.

All is done for M problems of one shape at once: x (M, N, P) and y (M, N, Q), row n of both being one pair. All problems start
from the same weights and draw the same rows, so that an estimate does not depend on which others stand beside it.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Layers = list[Pair]


def _networks(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Layers:
    """M copies of one network: weights (M, in, out) and biases (M, 1, out), drawn as torch.nn.Linear draws them."""
    def draw(rows: int, outputs: int, inputs: int) -> Tensor:
        uniform = 2 * torch.rand(rows, outputs, generator=generator) - 1
        return (uniform / inputs ** 0.5).to(like).repeat(len(like), 1, 1).requires_grad_()
    return [(draw(inputs, outputs, inputs), draw(1, outputs, inputs)) for inputs, outputs in pairwise(sizes)]


def _forward(layers: Layers, rows: Tensor) -> Tensor:
    """(M, B, in) → (M, B, out), with ReLU between the layers."""
    for i, (weight, bias) in enumerate(layers):
        rows = torch.baddbmm(bias, rows.relu() if i else rows, weight)
    return rows


def _adam(layers: Layers, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    # Adam works entry by entry, and the gradient of a sum over problems separates: one optimiser does for all M networks.
    tensors = [tensor for layer in layers for tensor in layer]
    return torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=weight_decay, fused=True)


def mine(x: Tensor, y: Tensor, hidden: tuple[int, ...] = (400, 400, 400), passes: int = 1000, batch_size: int = 50,
         learning_rate: float = 1e-4, average: float = 0.01, seed: int = 0) -> Tensor:
    """MINE (Belghazi et al. 2018), (M,): what critics f reach on the very pairs that they were trained on.

    They climb E_joint[f] − log E_marginal[eᶠ]; the marginal is the same x with the y shuffled once, and the denominator of the
    second term's gradient a moving average. Defaults: as released [code]; as written: hidden=(400, 400) and batch_size=N.
    Where eᶠ overflows, the value is not finite.
    """
    generator, count = torch.Generator().manual_seed(seed), x.shape[1]
    layers = _networks((x.shape[2] + y.shape[2], *hidden, 1), x, generator)

    def critic(rows: Tensor) -> Pair:
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        pairs = torch.cat([x[:, rows].repeat(1, 2, 1), y[:, torch.cat([rows, shuffled])]], dim=2)
        return _forward(layers, pairs)[..., 0].chunk(2, dim=1)  # of the joint and of the marginal, each (M, B)

    optimiser, running = _adam(layers, learning_rate), None
    for _ in range(passes):
        for rows in torch.randperm(count, generator=generator).split(batch_size):
            joint, marginal = critic(rows)
            odds = marginal.detach().exp()
            mean = odds.mean(1, keepdim=True)
            running = mean if running is None else average * mean + (1 - average) * running
            optimiser.zero_grad()
            (odds / running * marginal - joint).mean(1).sum().backward()
            optimiser.step()
    with torch.no_grad():
        joint, marginal = critic(torch.arange(count))
        return joint.mean(1) - marginal.exp().mean(1).log()


def canonical_variates(x: Tensor, y: Tensor, *others: Pair, ridge: float = 1e-2) -> list[Pair]:
    """``others``, pairs (M, N', P) and (M, N', Q), along the directions that correlate most in (x, y), best first.

    Each becomes a pair of (M, N', k), k = min(P, Q). A function of x alone and one of y alone share at most I(X;Y), so that
    what is found on other pairs does not exceed it, but for an estimator's own error. ``ridge`` is added to the variances, 1.
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


def info_nce(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, width: int = 32, embedding: int = 16, steps: int = 100,
             batch_size: int = 64, group: int = 250, shuffles: int = 4, seed: int = 0) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) on held-out pairs, (M, shuffles): in expectation at most I, never above log(group).

    The critic g(x)·h(y) learns which y of a batch belongs to each x. The N' test pairs are cut into groups, anew for each of
    ``shuffles``; a group that is not whole is left out. Inputs should have unit scale.
    """
    generator, count = torch.Generator().manual_seed(seed), x_test.shape[1]
    g, h = (_networks((part.shape[2], width, embedding), part, generator) for part in (x, y))

    def bound(x: Tensor, y: Tensor) -> Tensor:
        scores = torch.bmm(_forward(g, x), _forward(h, y).mT)  # (M, B, B): on the diagonal, what belongs together
        return (scores.diagonal(dim1=1, dim2=2) - scores.logsumexp(2)).mean(1) + math.log(x.shape[1])

    optimiser = _adam(g + h, learning_rate=0.01, weight_decay=1.0)
    for _ in range(steps):
        rows = torch.randint(x.shape[1], (batch_size,), generator=generator)
        optimiser.zero_grad()
        bound(x[:, rows], y[:, rows]).sum().neg().backward()
        optimiser.step()
    group = min(group, count)
    with torch.no_grad():
        orders = [torch.randperm(count, generator=generator)[:count - count % group].split(group) for _ in range(shuffles)]
        return torch.stack([torch.stack([bound(x_test[:, rows], y_test[:, rows]) for rows in order]).mean(0)
                            for order in orders], dim=1)


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """½ log(det Σ_x det Σ_y / det Σ_xy), (M,): the information of Gaussian vectors with the pairs' covariances."""
    parts = [part.double() - part.double().mean(1, keepdim=True) for part in (x, y, torch.cat([x, y], dim=2))]
    one, other, both = (torch.linalg.slogdet(part.mT @ part / part.shape[1]).logabsdet for part in parts)
    return (one + other - both) / 2


def ksg(x: Tensor, y: Tensor, neighbours: int = 3) -> Tensor:
    """Kraskov, Stögbauer and Grassberger's (2004) first estimator, (M,), from distances to neighbours; for few dimensions."""
    found = []
    for pair in zip(x.double().cpu().numpy(), y.double().cpu().numpy(), strict=True):
        joint = cKDTree(np.hstack(pair))
        radius = np.nextafter(joint.query(joint.data, neighbours + 1, p=np.inf)[0][:, -1], 0)
        inside = [cKDTree(part).query_ball_point(part, radius, p=np.inf, return_length=True) for part in pair]  # with itself
        found.append(digamma(neighbours) + digamma(len(radius)) - np.mean(digamma(inside[0]) + digamma(inside[1])))
    return torch.tensor(found)
