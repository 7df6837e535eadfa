"""Weights files in transformers' layout: which are read, what must fit, and what is left out."""

import json
import re
from pathlib import Path

from torch import nn

from dtlib.causal import SMOLLM2
from dtlib.config import SIZES
from dtlib.errors import UserError
from dtlib.model import ARCHITECTURES, DecisionTransformer
from dtlib.storage import read_tensors

# What a weights file may hold beyond the blocks: vocabulary tables, and causal masks in old files.
LEFT_OUT = r"(wte|wpe|lm_head)\.weight|h\.\d+\.attn\.(masked_)?bias"
# ImageGPT's norms have no bias: in GPT-2 blocks these stay at GPT-2's own zeros.
NEW_BIASES = r"(h\.\d+\.ln_[12]|ln_f)\.bias"


# What a folder's config.json decides; everything else in it is about vocabulary and dropout.
FROM_CONFIG = (
    *("n_layer", "n_embd", "n_head", "n_inner"),
    *("activation_function", "layer_norm_epsilon", "initializer_range"),
)


def read_any_config(folder: Path) -> dict:
    """Return a model folder's config.json. Raises UserError if it is missing or not JSON."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is missing or not JSON ({error}): download the folder again."
        ) from error


def read_config(folder: Path) -> dict:
    """Return config.json of a GPT-2 or ImageGPT folder. Raises UserError if it is not one."""
    config = read_any_config(folder)
    if config.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"{folder} holds a {config.get('model_type')!r} model; expected one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise UserError(
            f"{folder} scales its attention unlike GPT-2 and ImageGPT: give another model."
        )
    return config


def backbone(point: object, size: str, folder: Path | None, dropout: tuple) -> dict:
    """Return the configuration of a starting point's blocks, with the smallest word tables."""
    if folder is None and size == "smollm2":
        if point.heads is not None:
            raise UserError("Size 'smollm2' has its own heads: take 'random-matched'.")
        return SMOLLM2
    if point.architecture == "causal":
        return read_any_config(folder)
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
        raise UserError(
            f"{folder} holds a {given['model_type']!r} model: it does not fit ImageGPT blocks."
        )
    return values | {key: given[key] for key in FROM_CONFIG if key in given}


def load_blocks(model: DecisionTransformer, folder: Path) -> dict[str, list[str]]:
    """Copy a folder's weights into the blocks and the final norm, in place.

    Returns the tensors' names, without the hub's prefix, as "kept", "left_out" (see LEFT_OUT) and
    "new" (see NEW_BIASES). Raises UserError if any other is missing, unexpected or misshapen.
    """
    path = folder / "model.safetensors"
    found = {name.removeprefix("transformer."): t for name, t in read_tensors(path).items()}
    inside = {n: p.shape for n, p in model.named_parameters() if n.startswith(("h.", "ln_f."))}
    left_out = [name for name in found if name not in inside and re.fullmatch(LEFT_OUT, name)]
    other_norm = (read_config(folder)["model_type"], model.config.model_type) == (
        "imagegpt",
        "gpt2",
    )
    new = [n for n in inside if other_norm and n not in found and re.fullmatch(NEW_BIASES, n)]
    kept = [name for name in inside if name in found]
    wrong = [f"{name} is missing" for name in inside if name not in kept + new]
    wrong += [f"{name} is unexpected" for name in found if name not in kept + left_out]
    for name in kept:
        if found[name].shape != inside[name]:
            shapes = f"{tuple(found[name].shape)}, expected {tuple(inside[name])}"
            wrong.append(f"{name} has shape {shapes}")
    if wrong:
        raise UserError(
            f"{path} does not fit its architecture in {len(wrong)} tensors, first {wrong[0]}: "
            "use a file that belongs to its config.json."
        )
    model.load_state_dict({name: found[name] for name in kept}, strict=False)
    return {"kept": kept, "left_out": left_out, "new": new}


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a checkpoint in place. Raises UserError if it is damaged or of another architecture."""
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(
            f"{path} belongs to another architecture ({first}): load it with its run's config."
        ) from error
