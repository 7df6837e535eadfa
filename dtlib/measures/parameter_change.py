"""How far fine-tuning moves each parameter tensor (paper A, 5.3)."""

import re

import numpy as np
import torch
from torch import Tensor


def of_block(name: str) -> tuple[int, str]:
    """Block and kind of tensor that a name stands for: "h.3.mlp.c_fc.weight" gives (3, "mlp.c_fc.weight").

    Raises ValueError for a tensor outside the blocks.
    """
    found = re.fullmatch(r"h\.(\d+)\.(.+)", name)
    if found is None:
        raise ValueError(f"{name!r} belongs to no block")
    return int(found[1]), found[2]


def change(before: Tensor, after: Tensor) -> dict[str, float]:
    """How a tensor moved from θ_0 (``before``) to θ_T (``after``), both of one shape, in float64.

    distance: ‖θ_T − θ_0‖₂, and cosine: of the angle between θ_0 and θ_T, both as released and as written; corrected for the
    tensor's size and scale, relative: distance / ‖θ_0‖₂, and per_entry: distance / √entries, the entries' root mean square
    change. Where θ_0 is zero (a bias at its start), relative is NaN; where θ_0 or θ_T is, cosine is.
    """
    before, after = before.double().flatten(), after.double().flatten()
    start, end, distance = (float(torch.linalg.vector_norm(v)) for v in (before, after, after - before))
    return {"distance": distance, "cosine": float(before @ after) / (start * end) if start * end else np.nan,
            "relative": distance / start if start else np.nan, "per_entry": distance / before.numel() ** 0.5}


def depth_contrast(depth: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Mean of ``values`` (n,) in the first third of the blocks minus that in the last; and that divided by the mean of all.

    ``depth`` (n,): where each value's block stands, (block + ½) / L, so that 4 blocks and 24 can be compared. NaN values (see
    change) are left out.
    """
    depth, values = np.asarray(depth)[~np.isnan(values)], np.asarray(values)[~np.isnan(values)]
    difference = values[depth < 1 / 3].mean() - values[depth > 2 / 3].mean()
    return float(difference), float(difference / values.mean())
