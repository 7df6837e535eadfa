"""The Decision Transformer over transformers' own blocks, and the starting points it can be built from."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, ImageGPTConfig, ImageGPTModel

from dtlib.errors import UserError
from dtlib.seeding import stream_seed
from dtlib.tasks import Task

# Blocks, width, heads.
SIZES = {"mini": (4, 128, 4), "chibit": (3, 128, 1), "gpt2": (12, 768, 12), "imagegpt-small": (24, 512, 8)}


@dataclass(frozen=True)
class Initialisation:
    """A starting point: where the blocks' weights come from and which architecture carries them."""

    weights: str | None = None  # hub id, or folder in transformers' layout; None: random, at the size asked for
    carrier: str = "gpt2"  # or "imagegpt", whose norm does not centre and has no bias
    heads: int | None = None  # of random weights; None: as the size has it. Pre-trained weights bring both of these
    activation: str = "gelu_new"


INITIALISATIONS = {
    # [code] The released Random Init differs from GPT-2 in more than its weights: one head, and ReLU.
    "random": Initialisation(heads=1, activation="relu"),
    # The control for that: the heads and the activation of the pre-trained model it stands beside.
    "random-matched": Initialisation(),
    "gpt2": Initialisation(weights="openai-community/gpt2"),
    # [code] The released iGPT is ImageGPT's weights poured into GPT-2 blocks, whose norm is another function.
    "igpt": Initialisation(weights="openai/imagegpt-small"),
    "igpt-native": Initialisation(weights="openai/imagegpt-small", carrier="imagegpt"),
}

CARRIERS = {"gpt2": (GPT2Config, GPT2Model), "imagegpt": (ImageGPTConfig, ImageGPTModel)}

# The one place that lists what a weights file may hold beyond the blocks (left out here), and what it may lack.
# "attn.bias" and "attn.masked_bias" are the causal mask that older files carry; the rest are vocabulary tables.
LEFT_OUT = r"(wte|wpe|lm_head)\.weight|h\.\d+\.attn\.(masked_)?bias"
# ImageGPT's norms have no bias: in GPT-2 blocks these (two a block and the final one) start at GPT-2's own zeros.
NEW_WHEN_POURED = r"(h\.\d+\.ln_[12]|ln_f)\.bias"


def get_initialisation(name: str) -> Initialisation:
    """The row called ``name``, or one for a folder of GPT-2 or ImageGPT weights. Raises UserError for anything else."""
    if name in INITIALISATIONS:
        return INITIALISATIONS[name]
    if (Path(name) / "config.json").is_file():
        return Initialisation(weights=name, carrier=read_config(Path(name))["model_type"])
    raise UserError(f"Unknown initialisation {name!r}: expected one of {', '.join(INITIALISATIONS)}, or a folder with the "
                    "config.json and model.safetensors of a GPT-2 or ImageGPT model.")


def weights_folder(weights: str) -> Path:
    """Folder of a starting point's files: ``weights`` itself if it is one, else the hub's copy, downloaded if need be."""
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(weights, allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:  # the hub's client raises many unrelated kinds; each means that there are no files
        raise UserError(f"Could not get the weights {weights!r} from the Hugging Face hub ({type(error).__name__}): run again "
                        "with a network, or give a folder with their config.json and model.safetensors instead.") from error


def read_config(folder: Path) -> dict:
    """config.json of a GPT-2 or ImageGPT folder. Raises UserError if it is unreadable or of another architecture."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or not JSON ({error}): download the folder again.") from error
    if config.get("model_type") not in CARRIERS:
        raise UserError(f"{path} describes a {config.get('model_type')!r} model; expected one of {', '.join(CARRIERS)}.")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises UserError if it is missing, truncated or a pickle."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): get it anew; pickles are not opened.") from error


class DecisionTransformer(nn.Module):
    """Predict a_t from (R̂_1, s_1, a_1, …, R̂_t, s_t) (papers A and B; Chen et al. 2021).

    The time-step embedding is added after the input LayerNorm, as in A and B (Chen et al. add it before), and the action
    head is the transposed action embedding without bias. There is no word or position table. ``backbone``: the blocks' config.
    """

    def __init__(self, task: Task, backbone: GPT2Config | ImageGPTConfig):
        super().__init__()
        self.config, width = backbone, backbone.hidden_size
        self.embed_return = nn.Linear(1, width)
        self.embed_state = nn.Linear(task.state_dim, width)
        self.embed_action = nn.Linear(task.action_dim, width)
        self.embed_time = nn.Embedding(task.horizon, width)
        self.embed_ln = nn.LayerNorm(width)
        self.drop = nn.Dropout(backbone.embd_pdrop)
        transformer = CARRIERS[backbone.model_type][1](backbone)
        self.h, self.ln_f = transformer.h, transformer.ln_f

    def embed(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Tokens (B, T, D) in the order R̂_1, s_1, a_1, R̂_2, …; shapes of the arguments as in ``forward``."""
        kinds = (self.embed_return(returns_to_go.unsqueeze(-1)), self.embed_state(states), self.embed_action(actions))
        return (self.embed_ln(torch.stack(kinds, dim=2)) + self.embed_time(time_steps).unsqueeze(2)).flatten(1, 2)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The blocks and the final norm: (B, T, D) → (B, T, D). Causal: padding that comes last needs no mask."""
        hidden = self.drop(tokens)
        for block in self.h:
            output = block(hidden)
            hidden = output[0] if isinstance(output, tuple) else output  # ImageGPT's blocks return a tuple
        return self.ln_f(hidden)

    def forward(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Predicted actions (B, K, A).

        states (B, K, S) standardised; actions (B, K, A), a_t itself is not seen by its prediction; returns_to_go (B, K)
        scaled; time_steps (B, K) int64 below ``horizon``. Windows are padded on the right.
        """
        hidden = self.hidden(self.embed(states, actions, returns_to_go, time_steps))
        return torch.tanh(hidden[:, 1::3] @ self.embed_action.weight)  # from the state tokens: â = tanh(W_aᵀ h)


def load_blocks(model: DecisionTransformer, folder: Path) -> dict[str, list[str]]:
    """Pour a folder's weights into ``model``'s blocks and final norm, in place.

    Returns the tensors' names (hub prefixes removed) under "kept", "left_out" (see LEFT_OUT) and "new" (see
    NEW_WHEN_POURED). Raises UserError if anything else is missing, unexpected or of another shape.
    """
    tensors = read_tensors(folder / "model.safetensors")
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    wanted = {name: p.shape for name, p in model.named_parameters() if name.startswith(("h.", "ln_f."))}

    left_out = [name for name in found if name not in wanted and re.fullmatch(LEFT_OUT, name)]
    poured = read_config(folder)["model_type"] == "imagegpt" and model.config.model_type == "gpt2"
    new = [name for name in wanted if poured and name not in found and re.fullmatch(NEW_WHEN_POURED, name)]
    kept = [name for name in wanted if name in found]
    wrong = [f"{name} is missing" for name in wanted if name not in kept + new]
    wrong += [f"{name} is unexpected" for name in found if name not in kept + left_out]
    wrong += [f"{name} has shape {tuple(found[name].shape)}, expected {tuple(wanted[name])}"
              for name in kept if found[name].shape != wanted[name]]
    if wrong:
        raise UserError(f"{folder / 'model.safetensors'} does not fit its architecture in {len(wrong)} tensors, first of all "
                        f"{wrong[0]}: use a file that belongs to its config.json.")
    model.load_state_dict({name: found[name] for name in kept}, strict=False)
    return {"kept": kept, "left_out": left_out, "new": new}


def build_model(initialisation: str, size: str, task: Task, seed: int, dropout: tuple[float, float, float] = (0.2, 0.1, 0.1),
                time_embedding_std: float = 1.0) -> DecisionTransformer:
    """A Decision Transformer at its starting point, float32, on the CPU, in training mode; the same for the same seed.

    Layers other than the blocks start as torch's defaults, the time-step table as a standard normal [code]: added after the
    input norm it is as large as all else, which long training overcomes; ``time_embedding_std`` shrinks it for short runs.
    ``size``: of random weights. ``dropout``: residual, attention, embedding. Raises UserError: unknown names, unfit files.
    """
    row = get_initialisation(initialisation)
    if size not in SIZES:
        raise UserError(f"Unknown size {size!r}: expected one of {', '.join(SIZES)}.")
    # The word and position tables are dropped: one row each will do. ImageGPT's causal mask takes its size from n_positions.
    plain = {"vocab_size": 1, "n_positions": 1 if row.carrier == "gpt2" else 1024, "use_cache": False,
             "bos_token_id": None, "eos_token_id": None,
             **dict(zip(("resid_pdrop", "attn_pdrop", "embd_pdrop"), dropout, strict=True))}
    if row.weights is None:
        blocks, width, heads = SIZES[size]
        plain |= {"n_layer": blocks, "n_embd": width, "n_head": row.heads or heads, "activation_function": row.activation}
    else:
        folder = weights_folder(row.weights)
        given = read_config(folder)
        if row.carrier == "imagegpt" and given["model_type"] != "imagegpt":
            raise UserError(f"{folder} holds a {given['model_type']!r} model, which ImageGPT blocks cannot carry.")
        kept = ("n_layer", "n_embd", "n_head", "n_inner", "activation_function", "layer_norm_epsilon", "initializer_range",
                "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
        plain |= {key: given[key] for key in kept if key in given}
    backbone = CARRIERS[row.carrier][0](**plain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights"))
        model = DecisionTransformer(task, backbone)
        nn.init.normal_(model.embed_time.weight, std=time_embedding_std)
    if row.weights is not None:
        load_blocks(model, folder)
    return model


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a checkpoint in place. Raises UserError if the file is damaged or belongs to another architecture."""
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"{path} belongs to another architecture ({first}): load it with its run's config.") from error
