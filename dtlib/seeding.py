"""Every random number comes from one seed, through named streams."""

import zlib

import numpy as np


def stream_seed(seed: int, purpose: str, index: int = 0) -> int:
    """Return the 63-bit seed of the stream named by ``seed``, ``purpose`` and ``index``."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
