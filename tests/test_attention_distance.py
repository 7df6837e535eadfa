"""Attention distance against examples worked by hand, loops, and a model's own attention."""

import math

import pytest
import torch
from conftest import cells

from dtlib import data, probe, starts
from dtlib.tasks import get_task

measure = cells("07_attention_distance", "measure")
HOPPER = get_task("hopper")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def three_tokens():
    """Queries and keys (1, 3, 4); scores over √4 are log [[2, 1, 1], [1, 2, 1], [1, 2, 5]]."""
    scores = torch.tensor([[2, 1, 1], [1, 2, 1], [1, 2, 5]], dtype=torch.float64).log()
    key = torch.eye(4, dtype=torch.float64)[:3]
    return 2 * scores @ key, key


def causal(query, key):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(
        torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf
    ).softmax(-1)


def test_as_released_by_hand(three_tokens):
    """Rows 1/2 1/4 1/4, 1/4 1/2 1/4, 1/8 2/8 5/8; then 0, 1/4 and 2/8 + 2/8 over 9 entries."""
    query, key = (x[None] for x in three_tokens)
    torch.testing.assert_close(
        measure.distances_as_released(query, key), torch.tensor([3 / 4 / 9], dtype=torch.float64)
    )


def test_as_written_and_per_head_by_hand(three_tokens):
    """Causal rows 1, 1/3 2/3, 1/8 2/8 5/8: (0 + 1/3 + 1/2) / 3 = 5/18.

    A second head looks at nothing but itself.
    """
    looks_back, looks_at_itself = causal(*three_tokens), torch.eye(3, dtype=torch.float64)
    attention = torch.stack([looks_back, looks_at_itself])[None]
    per_head = measure.distances(attention)
    torch.testing.assert_close(per_head, torch.tensor([[5 / 18, 0]], dtype=torch.float64))
    torch.testing.assert_close(
        per_head.mean(1), torch.tensor([5 / 36], dtype=torch.float64)
    )  # as written
    torch.testing.assert_close(
        measure.weight_on_itself(attention),
        torch.tensor([[(1 + 2 / 3 + 5 / 8) / 3, 1]], dtype=torch.float64),
    )
    # Let the heads exchange what they do: the mean over heads stays, each head changes by 5/18.
    exchanged = measure.distances(attention.flip(1))
    assert measure.change(per_head.mean(1), exchanged.mean(1)) == 0
    torch.testing.assert_close(
        measure.change(per_head, exchanged), torch.tensor([5 / 18, 5 / 18], dtype=torch.float64)
    )


def test_change_is_the_mean_of_each_windows_change():
    """Windows that change by +1 and −1 have changed by 1, though their mean has not."""
    before = torch.tensor([[2.0, 5.0], [4.0, 5.0]])
    torch.testing.assert_close(
        measure.change(before, before + torch.tensor([[1.0, 0.0], [-1.0, 3.0]])),
        torch.tensor([1.0, 1.5]),
    )


def test_against_loops():
    query, key = random(4, 7, 6), random(4, 7, 6, seed=1)
    attention = random(4, 3, 7, 7, seed=2).exp().tril()
    for window in range(4):
        total = 0.0
        for i in range(7):
            weights = [
                math.exp(
                    sum(query[window, i, d].item() * key[window, j, d].item() for d in range(6))
                    / math.sqrt(6)
                )
                for j in range(7)
            ]
            total += sum(weights[j] / sum(weights) * abs(i - j) for j in range(i + 1))
        assert measure.distances_as_released(query, key)[window].item() == pytest.approx(
            total / 49, rel=1e-12
        )
        for head in range(3):
            a = attention[window, head].tolist()
            expected = sum(a[i][j] * (i - j) for i in range(7) for j in range(i + 1)) / 7
            assert measure.distances(attention)[window, head].item() == pytest.approx(
                expected, rel=1e-12
            )
            expected = sum(a[i][i] for i in range(7)) / 7
            assert measure.weight_on_itself(attention)[window, head].item() == pytest.approx(
                expected, rel=1e-12
            )


@pytest.mark.parametrize("tokens", [1, 3, 60])
def test_uniform_attention(tokens):
    zeros = torch.zeros(1, tokens, 2, dtype=torch.float64)
    assert measure.distances(causal(zeros, zeros)[None]).item() == pytest.approx(
        measure.uniform_distance(tokens)
    )
    assert measure.distances_as_released(zeros, zeros).item() == pytest.approx(
        measure.uniform_distance_as_released(tokens)
    )
    assert measure.weight_on_itself(causal(zeros, zeros)[None]).item() == pytest.approx(
        measure.uniform_weight_on_itself(tokens)
    )


def test_of_a_model(hopper_file):
    """A model's own weights are the formula's.

    With one head, the released rows are those times their share of the past.
    """
    sampler = data.WindowSampler(data.load(str(hopper_file), HOPPER), 5, HOPPER.return_scale)
    windows = probe.draw_windows(sampler, 6)
    model = starts.build_model("random", "mini", HOPPER, seed=0)
    model.h[0].attn.c_attn.weight.data *= 5  # uneven attention
    query, key, _ = probe.activations(model, windows)["h.0.attn.c_attn"].split(128, dim=-1)
    (own, *_) = probe.attention(model, windows)
    torch.testing.assert_close(
        measure.distances(own), measure.distances(causal(query, key)[:, None])
    )
    past = (query @ key.transpose(1, 2) / 128**0.5).softmax(-1).tril().sum(-1)  # (B, T)
    rows = (own[:, 0] * torch.arange(15).sub(torch.arange(15)[:, None]).abs()).sum(-1)
    torch.testing.assert_close(
        measure.distances_as_released(query, key), (past * rows).mean(1) / 15
    )
    assert past.mean() < 0.9 and rows.std() > 0.1  # else nothing would be tested
