"""Tokens without any modality: an order-1 Markov chain (Wang et al. 2024), or independent ones."""

import numpy as np

from dtlib.pretraining.corpus import HELD_OUT, Corpus, count_within
from dtlib.seeding import stream_seed

CHAIN_STATES = 100  # as in Wang et al. 2024
TEMPERATURE = 0.25  # theirs is 1, where guessing is within 1 % of the entropy rate


def transition_matrix(kind: str, seed: int, temperature: float = TEMPERATURE) -> np.ndarray:
    """Return chances (100, 100) of the next state: softmax(U[0, 1] / temperature), or uniform."""
    generator = np.random.default_rng(stream_seed(seed, "chain"))
    logits = generator.random((CHAIN_STATES, CHAIN_STATES)) * (kind == "markov") / temperature
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def stationary(matrix: np.ndarray) -> np.ndarray:
    """Return the distribution (states,) that a step of the chain does not change."""
    return np.linalg.matrix_power(matrix, 64)[0]


def entropy_rate(matrix: np.ndarray) -> float:
    """Return the chain's nats per token: the lowest loss that any model can reach."""
    return float(-stationary(matrix) @ (matrix * np.log(matrix)).sum(1))


def synthetic(kind: str, seed: int, sequence: int) -> Corpus:
    """Return sequences of the chain of ``kind`` ("markov" or "iid") and ``seed``."""
    matrix = transition_matrix(kind, seed)
    cumulative, first = matrix.cumsum(1), stationary(matrix).cumsum()
    cumulative[:, -1] = first[-1] = 1  # rounding may leave it below

    def sample(generator: np.random.Generator, count: int) -> np.ndarray:
        uniform = generator.random((sequence + 1, count, 1))
        tokens = np.empty((sequence + 1, count), np.int64)
        tokens[0] = (first < uniform[0]).sum(-1)
        for t in range(1, sequence + 1):
            tokens[t] = (cumulative[tokens[t - 1]] < uniform[t]).sum(-1)
        return np.ascontiguousarray(tokens.T)

    generator = np.random.default_rng(stream_seed(seed, "held-out tokens"))
    held_out = sample(generator, count_within(sequence, *HELD_OUT))
    known = -np.log(matrix[held_out[:, :-1], held_out[:, 1:]])
    facts = {
        "states": CHAIN_STATES,
        "temperature": TEMPERATURE if kind == "markov" else None,
        "entropy_rate": entropy_rate(matrix),
        "loss_of_the_chain_itself": float(known.mean()),
    }
    return Corpus(CHAIN_STATES, sample, held_out, facts, {})
