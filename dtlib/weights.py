"""Weights files in transformers' layout: which are read, what must fit, and what is left out."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dtlib.causal import SHAPES, shape_of
from dtlib.config import SIZES
from dtlib.errors import UserError, explained, problem, reading
from dtlib.model import ARCHITECTURES, DecisionTransformer
from dtlib.storage import damaged, memory, read_tensors

# What a weights file may hold beyond the blocks: tables and heads, and causal masks in old files.
LEFT_OUT = r"(?!(h|ln_f)\.).*|h\.\d+\.attn\.(masked_)?bias"
USUAL = r"(wte|wpe|lm_head)\.weight|h\..*"  # of these, what is left out without a word
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
# ImageGPT's norms have no bias: in GPT-2 blocks these stay at GPT-2's own zeros.
NEW_BIASES = r"(h\.\d+\.ln_[12]|ln_f)\.bias"


# What a folder's config.json decides; everything else in it is about vocabulary and dropout.
FROM_CONFIG = ("n_layer", "n_embd", "n_head", "n_inner")
FROM_CONFIG += ("activation_function", "layer_norm_epsilon", "initializer_range")


class Backbone(BaseModel):
    """What config.json of a GPT-2 or ImageGPT folder must hold; at most 10 times GPT-3's."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    n_layer: Annotated[int, Field(ge=1, le=1000)]
    n_embd: Annotated[int, Field(ge=1, le=100_000)]
    n_head: Annotated[int, Field(ge=1, le=1000)]
    n_inner: Annotated[int, Field(ge=1, le=1_000_000)] | None
    n_positions: Annotated[int, Field(ge=1, le=10_000_000)]
    vocab_size: Annotated[int, Field(ge=1, le=10_000_000)]
    activation_function: Literal[tuple(ACT2FN)]
    layer_norm_epsilon: Annotated[float, Field(gt=0, le=1)]
    initializer_range: Annotated[float, Field(ge=0, le=10)]
    scale_attn_weights: Literal[True]
    scale_attn_by_inverse_layer_idx: Literal[False]


def read_any_config(folder: Path) -> dict:
    """Return a model folder's config.json. Raises UserError if it is missing or not an object."""
    path, kinds = folder / "config.json", (OSError, ValueError, KeyError, TypeError, RecursionError)
    advice = "give a folder in transformers' layout"
    with explained(f"{path} is missing or describes no model", advice, *kinds), reading():
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["model_type"], str):
            raise ValueError("model_type is no text")
        return config


def read_training(folder: Path) -> dict:
    """Return a pre-trained model's training.json, {} where there is none. UserError if damaged."""
    path, kinds = folder / "training.json", (OSError, ValueError, KeyError, TypeError)
    advice = "bring it back, or rename it if another program wrote it"
    with explained(f"{path} is no whole record of pre-training", advice, *kinds), reading():
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if found:
            found["config"] = {"tokens": "", "corpus": "", **found["config"]}
        return found


def read_config(folder: Path) -> dict:
    """Return config.json of a GPT-2 or ImageGPT folder. Raises UserError if it is not one."""
    config, path = read_any_config(folder), folder / "config.json"
    if (kind := config["model_type"]) not in ARCHITECTURES:
        raise UserError(f"{path}: a {kind!r} model; expected one of {', '.join(ARCHITECTURES)}.")
    try:
        found = Backbone(**ARCHITECTURES[kind][0]().to_dict() | config)
    except ValidationError as error:
        raise UserError(f"{path}: {problem(error)}; give a whole model's folder.") from error
    inner = found.n_inner or 4 * found.n_embd
    size = 4 * found.n_layer * found.n_embd * (4 * found.n_embd + 2 * inner)
    if found.n_embd % found.n_head or size > memory():
        heads = f"n_embd={found.n_embd} must be divisible by n_head={found.n_head}"
        room = f"the blocks, {size / 1e9:.0f} GB, must fit in {memory() / 1e9:.0f} GB of memory"
        raise UserError(f"{path}: {heads}, and {room}.")
    return config | {name: value for name, value in found if name in config}


def backbone(point: object, size: str, folder: Path | None, dropout: tuple) -> dict:
    """Return the configuration of a starting point's blocks, with the smallest word tables."""
    if folder is None and size in SHAPES:
        if point.heads is not None:
            raise UserError(f"Size {size!r} has its own heads: take 'random-matched'.")
        return SHAPES[size]
    if point.architecture == "causal":
        return shape_of(read_any_config(folder), point.tower)
    values = dict(zip(("resid_pdrop", "attn_pdrop", "embd_pdrop"), dropout, strict=True))
    values |= {"model_type": point.architecture, "use_cache": False}
    # ImageGPT's causal mask takes its size from n_positions.
    values |= {"vocab_size": 1, "n_positions": 1 if point.architecture == "gpt2" else 1024}
    values |= {"bos_token_id": None, "eos_token_id": None}
    if folder is None:
        blocks, width, heads = SIZES[size]
        values |= {"n_layer": blocks, "n_embd": width, "n_head": point.heads or heads}
        return values | {"activation_function": point.activation}
    given = read_config(folder)
    if point.architecture == "imagegpt" != given["model_type"]:
        raise UserError(f"{folder}: a {given['model_type']!r} model does not fit ImageGPT blocks.")
    return values | {key: given[key] for key in FROM_CONFIG if key in given}


def is_usual(folder: Path, size: str) -> bool:
    """Return whether a folder's architecture is what models of ``size`` pre-trained here have."""
    given = read_config(folder)
    shape = dict(zip(("n_layer", "n_embd", "n_head"), SIZES[size], strict=True))
    usual = ARCHITECTURES[given["model_type"]][0](**shape).to_dict()
    return all(given.get(name, usual[name]) == usual[name] for name in FROM_CONFIG)


def weights_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors: one, or those that its index lists. UserError if damaged."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.is_file():
        return [whole]
    kinds = OSError, ValueError, KeyError, TypeError, AttributeError
    with explained(f"{index} lists no weights", "get the folder anew", *kinds), reading():
        names = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it must name files beside it")
        return [folder / name for name in sorted(names)]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return a folder's tensors, without the hub's prefix, on the CPU. UserError if damaged."""
    if changed := damaged(folder):
        advice = "bring that file back, or make the folder anew elsewhere"
        raise UserError(f"{changed} is not what was written when it was made: {advice}.")
    parts = map(read_tensors, weights_files(folder))
    return {name.removeprefix("transformer."): t for part in parts for name, t in part.items()}


def load_blocks(model: DecisionTransformer, folder: Path) -> dict[str, list[str]]:
    """Copy a folder's weights into the blocks and the final norm, in place.

    Returns the tensors' names, without the hub's prefix, as "kept", "left_out" (see LEFT_OUT) and
    "new" (see NEW_BIASES), and prints which other heads are left out. Raises UserError if any other
    is missing, unexpected, misshapen or not finite.
    """
    found = read_weights(folder)
    inside = {n: p.shape for n, p in model.named_parameters() if n.startswith(("h.", "ln_f."))}
    left_out = [name for name in found if name not in inside and re.fullmatch(LEFT_OUT, name)]
    kinds = read_config(folder)["model_type"], model.config.model_type
    absent = [name for name in inside if name not in found and re.fullmatch(NEW_BIASES, name)]
    new = absent if kinds == ("imagegpt", "gpt2") else []
    kept = [name for name in inside if name in found]
    wrong = [f"{name} is missing" for name in inside if name not in kept + new]
    wrong += [f"{name} is unexpected" for name in found if name not in kept + left_out]
    for name in kept:
        if found[name].shape != inside[name]:
            shapes = f"{tuple(found[name].shape)}, expected {tuple(inside[name])}"
            wrong.append(f"{name} has shape {shapes}")
        elif found[name].dtype not in FLOATS:
            wrong.append(f"{name} is {found[name].dtype}, quantised, not floating point")
        elif not found[name].isfinite().all():
            wrong.append(f"{name} holds NaN or infinity")
    if wrong:
        what = f"{folder}: {len(wrong)} tensors do not fit its config.json, first: {wrong[0]}"
        raise UserError(f"{what}. Use weights that belong to it.")
    if heads := [name for name in left_out if not re.fullmatch(USUAL, name)]:
        print(f"{folder}: {', '.join(heads)} left out: only the blocks are used.", flush=True)
    model.load_state_dict({name: found[name] for name in kept}, strict=False)
    return {"kept": kept, "left_out": left_out, "new": new}


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a checkpoint in place. Raises UserError if it is damaged or of another architecture."""
    tensors = read_tensors(path)
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path}: {wrong[0]} holds NaN or infinity; train that run anew.")
    advice = "load it with its run's config"
    with explained(f"{path} belongs to another architecture", advice, RuntimeError):
        model.load_state_dict(tensors)
