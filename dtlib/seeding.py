"""Every random number comes from one seed: a purpose and an index name an independent stream of it."""

import zlib

import numpy as np


def stream_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for the stream ``(seed, purpose, index)``."""
    return int(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index]).generate_state(1, np.uint64)[0] >> 1)
