"""Make what the book's page on attention shows: `python scripts/make_windows.py`.

Takes runs of notebook 07 with context, the first seed, at the profile `laptop`, and trains those
that are absent. Of one recorded episode it takes the first, the middle and the last K steps. Writes
docs/windows/WINDOW.webp, the frames side by side, and weights.json: each head's weights before and
after fine-tuning, as 16-bit numbers, row by row without the future.
"""

from base64 import b64encode
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dtlib import batch, data, figures, probe, profiles, runs
from dtlib.config import RunConfig
from dtlib.storage import write_text
from dtlib.tasks import get_task

ROOT = Path(__file__).parents[1]
FOLDER, EPISODE = ROOT / "docs/windows", 0


def packed(weights: torch.Tensor) -> str:
    """Return the lower triangle of weights (H, T, T), in 65535ths, as base64 of little endians."""
    rows, columns = np.tril_indices(weights.shape[-1])
    numbers = np.round(65535 * weights.numpy()[:, rows, columns]).astype("<u2")
    return b64encode(numbers.tobytes()).decode()


def main() -> None:
    """Train, measure and draw."""
    known = batch.defaults(ROOT / "notebooks/07_attention_distance.ipynb")
    settings, task = profiles.training("laptop", {}), get_task(known["tasks"][0])
    context, names = known["context"], [known[name] for name in ("random", "language", "image")]
    same = {"task": task.name, "context": context, "seed": known["seeds"][0]}
    configs = [RunConfig(initialisation=name, **same, **settings) for name in names]
    found = dict(zip(names, runs.fine_tuned(configs), strict=True))
    trajectories = data.load(settings["dataset"], task, steps=settings["dataset_steps"])
    sampler = data.WindowSampler(trajectories, context, task.return_scale)
    start, end = trajectories.starts[EPISODE : EPISODE + 2]
    places = {"first": start, "middle": (start + end - context) // 2, "last": end - context}
    windows = sampler.windows(torch.tensor(list(places.values())))
    FOLDER.mkdir(exist_ok=True)
    for name, row in places.items():
        states = trajectories.observations[row : row + context]
        pictures = figures.render(task, states, camera_name="track")
        drawn = Image.fromarray(np.concatenate(pictures, axis=1))
        drawn.save(FOLDER / f"{name}.webp", quality=60, method=6)
    models = {
        name: {
            when: [
                {window: packed(block[i]) for i, window in enumerate(places)}
                for block in probe.attention(run.load_model(epoch), windows)
            ]
            for when, epoch in (("before", 0), ("after", settings["epochs"]))
        }
        for name, run in found.items()
    }
    heads = max(run.load_model(0).h[0].attn.num_heads for run in found.values())
    blocks = len(next(iter(models.values()))["before"])
    menus = {"model": names, "block": [*range(blocks)], "head": [*range(heads)]}
    menus["window"] = [*places]
    write_text(FOLDER / "weights.json", {"context": context, "menus": menus, "models": models})


if __name__ == "__main__":
    main()
