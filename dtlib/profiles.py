"""Profiles: one notebook, several sizes. A profile replaces values of the notebooks' parameters, by name."""

import functools
import http.client
import urllib.request
from pathlib import Path

ALL_TASKS = ["hopper", "halfcheetah", "walker2d"]
# Paper A's architecture, training and evaluation.
AS_PAPER = dict(size="gpt2", context=20, epochs=40, steps_per_epoch=2500, batch_size=64, learning_rate=1e-4,
                warmup_steps=5000, evaluation_episodes=100, device="cuda", tasks=ALL_TASKS, dataset_steps=1_000_000)

PROFILES: dict[str, dict[str, object]] = {
    "smoke": dict(dataset_steps=5_000, seeds=[0, 1], epochs=1, steps_per_epoch=3, batch_size=8, warmup_steps=2,
                  evaluation_episodes=2),
    "laptop": {},  # the notebooks' own defaults
    "full": dict(tasks=ALL_TASKS, seeds=[0, 1, 2, 3, 4]),
    "gpu": dict(AS_PAPER, dataset="collected:medium", initialisations=["random", "random-matched"], seeds=[0, 1, 2],
                precision="bfloat16"),
    "paper": dict(AS_PAPER, dataset="d4rl:medium", initialisations=["random", "gpt2", "igpt"], seeds=[666, 42],
                  precision="float32"),
}
HOSTS = ["https://huggingface.co", "http://rail.eecs.berkeley.edu"]


@functools.cache
def unreachable(address: str) -> str:
    """Why ``address`` does not answer within five seconds; empty if it does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            return ""
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"


def missing(profile: str, parameters: dict[str, object] | None = None) -> list[str]:
    """What ``profile`` (or ``parameters``, if given) needs that this machine neither has nor can get; what to do."""
    parameters, lacks = PROFILES[profile] if parameters is None else parameters, []
    if parameters.get("device") == "cuda":
        import torch
        if not torch.cuda.is_available():
            lacks.append("a CUDA device that torch can use")
    kind, _, quality = parameters.get("dataset", "").partition(":")
    if kind == "d4rl":
        from dtlib.data import D4RL_ADDRESS, d4rl_path
        from dtlib.tasks import get_task
        for task in parameters.get("tasks", ALL_TASKS):
            path = d4rl_path(get_task(task), quality)
            if not path.exists() and unreachable(D4RL_ADDRESS + path.name):
                lacks.append(f"the file {path} (put it there, from {D4RL_ADDRESS}{path.name})")
    if parameters.get("initialisations"):
        from huggingface_hub import constants, try_to_load_from_cache

        from dtlib.model import get_initialisation
        for weights in dict.fromkeys(get_initialisation(name).weights for name in parameters["initialisations"]):
            here = weights is None or Path(weights).is_dir() or try_to_load_from_cache(weights, "config.json")
            if not here and unreachable(f"{constants.ENDPOINT}/{weights}/resolve/main/config.json"):
                lacks.append(f"the weights {weights} (connect to the network once, or give a folder with config.json "
                             "and model.safetensors as the initialisation)")
    return lacks
