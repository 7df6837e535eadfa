"""Gradients of single windows and what clipping does to them (paper A, 5.4), from their inner products.

A Gram matrix (B, B) holds in (i, j) the inner product of the gradients of windows i and j over some parameters; those over
several parameters are sums of those over each, so nothing here needs the gradients themselves.
"""

import numpy as np


def norms(gram: np.ndarray) -> np.ndarray:
    """Norm of each window's gradient before any clipping, (B,)."""
    return np.sqrt(np.diagonal(gram))


def clipped_norms(part: np.ndarray, whole: np.ndarray, threshold: float = 0.25) -> np.ndarray:
    """Norm of a part of each window's gradient after clipping by the norm of the whole, (B,), as released and as written.

    ``part``, ``whole``: Gram matrices over some (in the paper the blocks') and all parameters. The factor is torch's
    clip_grad_norm_: min(1, threshold / (norm + 1e-6)).
    """
    return norms(part) * np.minimum(1, threshold / (norms(whole) + 1e-6))


def cosines(gram: np.ndarray) -> np.ndarray:
    """Cosine between the gradients of every two different windows, (B(B − 1)/2,); NaN where a gradient is zero.

    Clipping leaves them as they are. Their minimum is the paper's gradient confusion, as released and as written: an extreme
    value, which falls as windows are added. Corrected: their mean, or all of them.
    """
    lengths = norms(gram)
    with np.errstate(invalid="ignore"):
        return (gram / np.outer(lengths, lengths))[np.triu_indices(len(gram), 1)]


def batch_norms(gram: np.ndarray, batch_size: int, batches: int, seed: int = 0) -> np.ndarray:
    """Norm of the mean gradient of batches of windows that are drawn with replacement from these, (batches,).

    It is a batch's gradient that training clips, not a single window's.
    """
    size = len(gram)
    counts = np.random.default_rng(seed).multinomial(batch_size, np.full(size, 1 / size), size=batches)
    return np.sqrt(np.einsum("ni,ij,nj->n", counts, gram, counts, optimize=True).clip(0)) / batch_size


def shares_of_batch(grams: dict[str, np.ndarray]) -> dict[str, float]:
    """Each tensor's share of the squared norm of the windows' mean gradient, which is one batch's, as released."""
    sums = {name: gram.sum() for name, gram in grams.items()}
    return {name: float(value / sum(sums.values())) for name, value in sums.items()}


def shares_of_windows(grams: dict[str, np.ndarray]) -> dict[str, float]:
    """Each tensor's share of the squared norm of a single window's gradient, mean over the windows with any: corrected."""
    squares = {name: np.diagonal(gram) for name, gram in grams.items()}
    whole = sum(squares.values())
    return {name: float(np.mean(square[whole > 0] / whole[whole > 0])) for name, square in squares.items()}
