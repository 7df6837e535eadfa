"""What every corpus offers: sequences to learn, a held-out sample, and losses of counting."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dtlib.seeding import stream_seed

HELD_OUT = 512, 131_072  # largest held-out sample: sequences, tokens
DISCOUNT = 0.75  # of each count of a pair


def count_within(sequence: int, sequences: int, tokens: int) -> int:
    """Return how many sequences of length ``sequence`` are within both limits; at least one."""
    return max(1, min(sequences, tokens // sequence))


@dataclass(frozen=True)
class Corpus:
    """Tokens as sequences (T + 1,) int64: the first is context, the T others are predicted."""

    vocabulary: int  # number of tokens that can be predicted
    sample: Callable[[np.random.Generator, int], np.ndarray]  # (generator, B) → (B, T + 1) to learn
    held_out: np.ndarray  # (N, T + 1), of documents, places or draws that sample never gives
    facts: dict  # for the record
    files: dict[str, str]  # contents by name, to be put beside the model: tokenizer or palette

    def baselines(self, sequences: int = 20_000) -> dict[str, float]:
        """Return held-out nats per token of counting: uniform, unigram, bigram, pixel above."""
        drawn = self.sample(np.random.default_rng(stream_seed(0, "baselines")), sequences)
        counts = np.bincount(drawn[:, 1:].ravel(), minlength=self.vocabulary) + 1.0
        unigram = counts / counts.sum()
        losses = {
            "uniform": float(np.log(self.vocabulary)),
            "unigram": float(-np.log(unigram[self.held_out[:, 1:]]).mean()),
            "bigram": _pair_loss(drawn, self.held_out, 1, unigram),
        }
        if side := self.facts.get("side"):
            losses["pixel above"] = _pair_loss(drawn, self.held_out, side, unigram)
        return losses


def _pair_loss(drawn: np.ndarray, held_out: np.ndarray, back: int, unigram: np.ndarray) -> float:
    """Loss of p(token | token ``back`` places before), smoothed by absolute discounting."""
    from scipy.sparse import coo_array  # slow to import

    before, after = _pairs(drawn, back)
    shape = (max(drawn.max(), held_out.max()) + 1, len(unigram))
    counts = coo_array((np.ones(len(after)), (before, after)), shape).tocsr()
    total, kinds = np.maximum(counts.sum(1), 1e-9), np.diff(counts.indptr)
    before, after = _pairs(held_out, back)
    seen = np.maximum(np.asarray(counts[before, after]).ravel() - DISCOUNT, 0) / total[before]
    left = np.where(kinds[before] > 0, DISCOUNT * kinds[before] / total[before], 1.0)
    return float(-np.log(seen + left * unigram[after]).mean())


def _pairs(sequences: np.ndarray, back: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens to predict, after those ``back`` places before them (missing ones: the first)."""
    padded = np.hstack([np.repeat(sequences[:, :1], back - 1, axis=1), sequences])
    return padded[:, :-back].ravel(), sequences[:, 1:].ravel()
