"""Profiles: one notebook, several sizes. A profile replaces values of the notebooks' parameters, by name."""

import functools
import http.client
import importlib.util
import urllib.request
from pathlib import Path

from dtlib.errors import UserError

ALL_TASKS = ["hopper", "halfcheetah", "walker2d"]
EVERY_VARIANT = ["alignment", "co-training", "both losses", "frozen blocks", "adapters", "extended positions",
                 "random, both losses"]
AS_PAPER = dict(  # paper A's architecture, training and evaluation
    device="cuda", tasks=ALL_TASKS, size="gpt2", epochs=40, steps_per_epoch=2500, batch_size=64, learning_rate=1e-4,
    learning_rate_decay=False, dropout=[0.2, 0.1, 0.1], context=20, warmup_steps=5000, time_embedding_std=1.0,
    evaluation_episodes=100, precision="float32", dataset_steps=10**6, checkpoints=[1, 4],
    no_context_batch_size=64, no_context_learning_rate=1e-4, after_epoch=4, reset_which=["most", "least"],
    # of mutual information: all steps, and the released estimator's own size
    steps_back=list(range(20)), mine_width=400, mine_passes=1000, mine_learning_rate=1e-4, corrected_windows=6000,
    critic_steps=1000, full_size_correlations=[],
    # of paper B
    variants=EVERY_VARIANT, alignment_steps=15_000, cotraining_corpus="", game_settings={},
    # of size and amount
    amounts={size: ["1M", "10M", "100M", ""] for size in ("chibit", "mini", "small", "gpt2")})
PROFILES: dict[str, dict[str, object]] = {
    "smoke": dict(dataset_steps=5_000, seeds=[0, 1], epochs=1, steps_per_epoch=3, batch_size=8, warmup_steps=2,
                  time_embedding_std=0.02, evaluation_episodes=2, after_epoch=1, windows=30, gradient_windows=20,
                  corrected_windows=150, critic_steps=10, mine_passes=5, full_size_correlations=[], delayed=True,
                  reset_which=["most"], variants=["alignment", "frozen blocks"], alignment_steps=2,
                  games=["pong"], game_settings=dict(size="mini", data_steps=300, context=4, batch_size=4, epochs=1,
                                                     steps_per_epoch=2, evaluation_episodes=1, horizon=30)),
    "laptop": {},  # the notebooks' own defaults
    "full": dict(tasks=ALL_TASKS, unclipped=["image", "image-native"], reset_which=["most", "least"],
                 initialisations=["random", "language", "image", "random-matched", "image-native", "markov", "iid"],
                 control_hosts=["random-matched"],
                 control_donors=["language-shuffled", "language-rotated", "random-matched", "markov"],
                 variants=EVERY_VARIANT, sizes=["tiny", "chibit"], contexts=[5, 10], fractions=[0.01, 0.1], delayed=True,
                 further_data=["collected:medium-replay", "collected:medium-expert"], games=["pong"],
                 amounts={"tiny": ["1M", ""], "chibit": ["1M", ""], "mini": ["1M", ""], "small": [""]},
                 rate_factors={"small": [0.1, 0.03]}),
    "gpu": dict(AS_PAPER, dataset="collected:medium", tasks=["hopper"], seeds=[0, 1], precision="bfloat16",
                variants=["both losses", "frozen blocks"], games=["pong"],
                game_settings=dict(size="mini", data_steps=100_000, batch_size=128),
                amounts={"mini": ["10M", ""], "gpt2": ["10M", ""]}),
    "paper": dict(AS_PAPER, dataset="d4rl:medium", seeds=[666, 42], control_hosts=["random-matched"], control_donors=[],
                  initialisations=["random", "gpt2", "igpt", "random-matched", "igpt-native"], unclipped=["igpt"],
                  games=["breakout", "qbert", "pong", "seaquest"], game_data="dqn-replay",
                  game_initialisations=["random-matched", "gpt2"]),
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
    import torch  # these are slow to import, and only needed here
    from huggingface_hub import constants, try_to_load_from_cache

    from dtlib import data, model, tasks
    parameters, lacks = PROFILES[profile] if parameters is None else parameters, []
    if parameters.get("device") == "cuda" and not torch.cuda.is_available():
        lacks.append("a CUDA device that torch can use")
    kind, _, quality = parameters.get("dataset", "").partition(":")
    for name in parameters.get("tasks", ALL_TASKS) if kind == "d4rl" else []:
        path = data.d4rl_path(tasks.get_task(name), quality)
        if not path.exists() and unreachable(data.D4RL_ADDRESS + path.name):
            lacks.append(f"the file {path} (put it there, from {data.D4RL_ADDRESS}{path.name})")
    folder = Path(parameters.get("game_data", "collected"))
    lacks += [f"the folder {folder / game} (put there what the bucket gs://atari-replay-datasets/dqn has of that game, in "
              "1/replay_logs)" for game in parameters.get("games", [])
              if str(folder) != "collected" and not (folder / game).is_dir()]
    starts = [model.get_initialisation(name) for name in parameters.get("initialisations", [])]
    variants, corpus = parameters.get("variants", []), parameters.get("cotraining_corpus", "python")
    of_the_hub = not corpus and len(starts) > 1 and starts[1].made is None  # it learns on from wikitext-103
    reads = ("wikitext" in corpus or of_the_hub) and {"co-training", "both losses", "random, both losses"} & set(variants)
    lacks += [f"the package {package.replace('_', '-')} (pip install 'dtlib[{extra}]')" for package, extra, needed in (
        ("ale_py", "games", parameters.get("games")), ("peft", "adapters", "adapters" in variants),
        ("datasets", "wikitext", reads)) if needed and importlib.util.find_spec(package) is None]
    for weights in dict.fromkeys(row.weights for row in starts):
        here = weights is None or Path(weights).is_dir() or try_to_load_from_cache(weights, "config.json")
        if not here and unreachable(f"{constants.ENDPOINT}/{weights}/resolve/main/config.json"):
            lacks.append(f"the weights {weights} (connect to the network once, or give their folder as the initialisation)")
    return lacks


def to_be_made(parameters: dict[str, object]) -> list:
    """PretrainConfigs of the starting points that a notebook with these ``parameters`` needs and this machine has not.

    They are learnt in bfloat16 where the card or the processor multiplies it: on a processor, 6 × 384 then takes a third.
    """
    from dtlib import model, pretrain, train

    def pairs(names: str, sizes: list[str]) -> list[tuple[str, str]]:
        return [(name, size) for name in parameters.get(names, []) for size in sizes]

    own, found = [parameters.get("size", "mini")], []
    for size, amounts in parameters.get("amounts", {}).items():
        if not isinstance(amounts, (list, tuple)):
            raise UserError(f"amounts of {size} are {amounts!r}: expected a list, such as ['1M', ''].")
    precision = train.fast_precision(train.choose_device("auto"))
    wanted = [pair for names in ("initialisations", "control_donors", "control_hosts") for pair in pairs(names, own)]
    wanted += pairs("scaled", parameters.get("sizes", []))
    wanted += [(model.made_from(kind, amount), size) for size, amounts in parameters.get("amounts", {}).items()
               for kind, amount in pairs("pretrained", amounts)]
    if parameters.get("games"):
        wanted += pairs("game_initialisations", [parameters["game_settings"].get("size", "atari")])
    for name, size in wanted:
        row = model.get_initialisation(name)
        if row.made is None:
            continue
        try:
            model.weights_folder(row, size, 0)
        except UserError:
            found.append(pretrain.PretrainConfig(row.made, model.made_size(row.made, size), tokens=row.tokens,
                                                 precision=precision))
    return found
