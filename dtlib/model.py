"""The Decision Transformer over transformers' own blocks, and the starting points it can be built from."""

import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers import GPT2Config, GPT2Model, ImageGPTConfig, ImageGPTModel
from transformers.activations import NewGELUActivation

from dtlib.errors import UserError, cache_root, sha256
from dtlib.seeding import stream_seed
from dtlib.tasks import Task

# Blocks, width, heads.
SIZES = {"tiny": (2, 64, 2), "mini": (4, 128, 4), "chibit": (3, 128, 1), "atari": (6, 128, 8), "small": (6, 384, 6),
         "gpt2": (12, 768, 12), "imagegpt": (24, 512, 8)}


@dataclass(frozen=True)
class Initialisation:
    """A starting point: where the blocks' weights come from and which architecture carries them."""

    weights: str | None = None  # hub id, or folder in transformers' layout
    made: str | None = None  # kind of starting point made by `python -m dtlib pretrain`; with no weights either: random
    tokens: str = ""  # how many that has learnt from, such as "10M"; empty: its size's own number
    carrier: str = "gpt2"  # or "imagegpt", whose norm does not centre and has no bias
    heads: int | None = None  # of random weights; None: as the size has it. Pre-trained ones bring this and the next
    activation: str = "gelu_new"
    scramble: Literal["shuffled", "rotated"] | None = None  # what is done to the weights: see scrambled


INITIALISATIONS = {
    # [code] The released Random Init differs from GPT-2 in more than its weights: one head, and ReLU.
    "random": Initialisation(heads=1, activation="relu"),
    # The control for that: the heads and the activation of the pre-trained model it stands beside.
    "random-matched": Initialisation(),
    "gpt2": Initialisation(weights="openai-community/gpt2"),
    # [code] The released iGPT is ImageGPT's weights poured into GPT-2 blocks, whose norm is another function.
    "igpt": Initialisation(weights="openai/imagegpt-small"),
    "igpt-native": Initialisation(weights="openai/imagegpt-small", carrier="imagegpt"),
    # Made here and shipped at mini size: English, photographs (in both carriers), and two controls without any modality.
    "language": Initialisation(made="language"),
    "image": Initialisation(made="image"),
    "image-native": Initialisation(made="image", carrier="imagegpt"),
    "markov": Initialisation(made="markov"),
    "iid": Initialisation(made="iid"),
    # Controls that keep the scale of the language model's tensors, or their singular values, and nothing that was learnt.
    "language-shuffled": Initialisation(made="language", scramble="shuffled"),
    "language-rotated": Initialisation(made="language", scramble="rotated"),
}
SHIPPED = Path(__file__).parent / "starting_points"

STATES, LAST = slice(1, None, 3), slice(-1, None)  # of the tokens R̂_1, s_1, a_1, R̂_2, …
CARRIERS = {"gpt2": (GPT2Config, GPT2Model), "imagegpt": (ImageGPTConfig, ImageGPTModel)}

# The one place that lists what a weights file may hold beyond the blocks (left out here), and what it may lack.
# "attn.bias" and "attn.masked_bias" are the causal mask that older files carry; the rest are vocabulary tables.
LEFT_OUT = r"(wte|wpe|lm_head)\.weight|h\.\d+\.attn\.(masked_)?bias"
# ImageGPT's norms have no bias: in GPT-2 blocks these (two a block and the final one) start at GPT-2's own zeros.
NEW_WHEN_POURED = r"(h\.\d+\.ln_[12]|ln_f)\.bias"


def get_initialisation(name: str) -> Initialisation:
    """The row called ``name``; one made from so many tokens, such as "language-10M"; or one for a folder of GPT-2 or ImageGPT
    weights. Raises UserError for anything else."""
    if name in INITIALISATIONS:
        return INITIALISATIONS[name]
    kind, _, tokens = name.rpartition("-")
    if re.fullmatch(r"[1-9]\d*[kMB]", tokens) and kind in INITIALISATIONS and (row := INITIALISATIONS[kind]).made:
        return replace(row, tokens=tokens)
    if (Path(name) / "config.json").is_file():
        return Initialisation(weights=name, carrier=read_config(Path(name))["model_type"])
    raise UserError(f"Unknown initialisation {name!r}: expected one of {', '.join(INITIALISATIONS)}, or a folder with the "
                    "config.json and model.safetensors of a GPT-2 or ImageGPT model.")


def made_from(kind: str, tokens: str) -> str:
    """Name of the initialisation ``kind`` after so many ``tokens`` ("language-10M"); of the kind's own number if empty."""
    return f"{kind}-{tokens}" if tokens else kind


def starting_point(kind: str, size: str, seed: int, tokens: str = "") -> Path:
    """Folder of a starting point made here: the shipped ones first, then this machine's own.

    Where there are n of that kind, size and amount of ``tokens``, ``seed`` takes number seed mod n, so that seeds vary the
    starting point too. Raises UserError if there is none.
    """
    roots, amount = (cache_root() / "starting_points", SHIPPED), f"-{tokens}" * bool(tokens)
    found = {int(number): folder for root in roots for folder in root.glob(f"{kind}-{size}{amount}-seed*")
             if (number := folder.name.rpartition("seed")[2]).isdecimal()}
    if not found:
        raise UserError(f"There is no {kind!r} starting point of size {size!r} here: make one with "
                        f"`python -m dtlib pretrain {kind} --size {size}{f' --set tokens={tokens}' * bool(tokens)}`, or "
                        "take size='mini', which is shipped.")
    return found[sorted(found)[seed % len(found)]]


def made_size(kind: str | None, size: str) -> str:
    """The size of the starting point beside models of ``size``: beside GPT-2 the papers put ImageGPT at its own size."""
    return "imagegpt" if kind == "image" and size == "gpt2" else size


def weights_folder(row: Initialisation, size: str, seed: int) -> Path | None:
    """Folder of a starting point's files, from the hub (downloaded if need be) if its row says so; None: random weights."""
    if row.made:
        return starting_point(row.made, made_size(row.made, size), seed, row.tokens)
    if (weights := row.weights) is None or Path(weights).is_dir():
        return weights and Path(weights)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(weights, allow_patterns=["config.json", "*.safetensors", "tokenizer.json"]))
    except Exception as error:  # the hub's client raises many unrelated kinds; each means that there are no files
        raise UserError(f"Could not get the weights {weights!r} from the Hugging Face hub ({type(error).__name__}): run again "
                        "with a network, or give a folder with their config.json and model.safetensors instead.") from error


def weights_digest(initialisation: str, size: str, seed: int) -> str:
    """First 16 digits of the SHA-256 of the weights file that a start takes from this machine; "" for random and the hub's."""
    row = get_initialisation(initialisation)
    if row.made is None and (row.weights is None or not Path(row.weights).is_dir()):
        return ""
    path = weights_folder(row, size, seed) / "model.safetensors"
    return digest(path) if path.is_file() else ""


def digest(path: Path) -> str:
    """First 16 digits of a file's SHA-256, computed once for as long as the file stays the same."""
    return _digest(path, path.stat().st_mtime_ns)


@functools.cache
def _digest(path: Path, modified: int) -> str:
    return sha256(path)[:16]


def number_of_blocks(initialisation: str, size: str, seed: int) -> int:
    """How many blocks a starting point has: ``size``'s, or those that its weights bring."""
    row = get_initialisation(initialisation)
    if row.weights is None:
        return SIZES[made_size(row.made, size)][0]
    return read_config(weights_folder(row, size, seed))["n_layer"]


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
        raise UserError(f"{path} is not a whole safetensors file ({error}): get it anew; pickles are not opened, but "
                        "transformers' save_pretrained turns them into this format.") from error


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
        transformer = CARRIERS[backbone.model_type][1](backbone)
        self.h, self.ln_f = transformer.h, transformer.ln_f
        for block in self.h:
            if isinstance(block.mlp.act, NewGELUActivation):
                block.mlp.act = nn.GELU(approximate="tanh")  # the same function, fused

    def embed_kinds(self, states: Tensor, actions: Tensor, returns_to_go: Tensor) -> Tensor:
        """Tokens after the input norm, without their time: (B, K, 3, D), as R̂, s and a; arguments as in ``forward``."""
        kinds = (self.embed_return(returns_to_go.unsqueeze(-1)), self.embed_state(states), self.embed_action(actions))
        return self.embed_ln(torch.stack(kinds, dim=2))

    def embed(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Tokens (B, T, D) in the order R̂_1, s_1, a_1, R̂_2, …; shapes of the arguments as in ``forward``."""
        return (self.embed_kinds(states, actions, returns_to_go) + self.embed_time(time_steps).unsqueeze(2)).flatten(1, 2)

    def hidden(self, tokens: Tensor, wanted: slice = slice(None)) -> Tensor:
        """The blocks and the final norm: (B, T, D) → (B, W, D), W of the tokens being ``wanted``.

        Causal: padding that comes last needs no mask. The blocks' layers are transformers'; they are put together here, the
        same for GPT-2 and ImageGPT, with cheaper dropout, and in the last block nothing for unwanted tokens.
        """
        hidden = self._dropped(tokens, self.config.embd_pdrop)
        for block in self.h:
            only = wanted if block is self.h[-1] else slice(None)
            hidden = self._dropped(self._attention(block, hidden, only), self.config.resid_pdrop, hidden[:, only])
            inner = block.mlp.act(block.mlp.c_fc(block.ln_2(hidden)))
            hidden = self._dropped(block.mlp.c_proj(inner), self.config.resid_pdrop, hidden)
        return self.ln_f(hidden)

    def _attention(self, block: nn.Module, hidden: Tensor, only: slice) -> Tensor:
        """The attention branch of a block for W tokens, ``only``: (B, T, D) → (B, W, D)."""
        batch, tokens, width = hidden.shape
        split = block.attn.c_attn(block.ln_1(hidden)).view(batch, tokens, 3, block.attn.num_heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        drop = self.config.attn_pdrop if self.training else 0.0
        if drop and not hidden.is_cuda:  # where torch has no fused kernel with dropout
            scores = query[:, :, only] @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            future = torch.full((tokens, tokens), -torch.inf, dtype=scores.dtype).triu(1)[only]
            mixed = self._dropped((scores + future).softmax(-1), drop) @ value
        elif only == LAST:  # it sees all
            mixed = scaled_dot_product_attention(query[:, :, only], key, value, dropout_p=drop)
        else:
            mixed = scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)[:, :, only]
        return block.attn.c_proj(mixed.transpose(1, 2).reshape(batch, -1, width).contiguous())

    def _dropped(self, branch: Tensor, probability: float, residual: Tensor | None = None) -> Tensor:
        """``residual`` (or 0) + dropout of ``branch``, in training.

        On a CPU torch draws one random number an element, in a quarter of the whole step's time: here 64 drawn bits serve four
        elements, with a probability that is exact to 2⁻¹⁶.
        """
        if not self.training or not probability:
            return branch if residual is None else residual + branch
        if branch.is_cuda:
            branch = dropout(branch, probability)
            return branch if residual is None else residual + branch
        bits = torch.empty(-(-branch.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        threshold = round(probability * 2**16)
        kept = (bits[:branch.numel()] >= threshold - 2**15).view(branch.shape).to(branch.dtype)
        kept *= 2**16 / (2**16 - threshold)
        return branch * kept if residual is None else torch.addcmul(residual, branch, kept)

    def act(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """The last step's predicted action (B, A), as in ``forward`` but for all that it does not need."""
        tokens = self.embed(states, actions, returns_to_go, time_steps)[:, :-1]  # the last action is what is asked for
        return torch.tanh(self.hidden(tokens, LAST)[:, 0] @ self.embed_action.weight)

    def forward(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Predicted actions (B, K, A).

        states (B, K, S) standardised; actions (B, K, A), a_t itself is not seen by its prediction; returns_to_go (B, K)
        scaled; time_steps (B, K) int64 below ``horizon``. Windows are padded on the right.
        """
        tokens = self.embed(states, actions, returns_to_go, time_steps)[:, :-1]  # no prediction sees the last action
        return torch.tanh(self.hidden(tokens, STATES) @ self.embed_action.weight)  # from the state tokens: â = tanh(W_aᵀ h)


def swap_block(model: DecisionTransformer, donor: DecisionTransformer, block: int) -> None:
    """Put ``donor``'s block of number ``block`` into ``model``, with its own heads and activation (paper A, 5.6.1 [code]).

    Raises UserError if there is no such block, or it belongs to another width or architecture.
    """
    if block not in range(min(len(model.h), len(donor.h))):
        raise UserError(f"There is no block {block} to swap: choose one from 0 to {min(len(model.h), len(donor.h)) - 1}.")
    ours, theirs = ((m.config.model_type, m.config.hidden_size) for m in (model, donor))
    if ours != theirs:
        raise UserError(f"A block of {theirs[0]}, width {theirs[1]}, does not fit into {ours[0]}, width {ours[1]}: choose a "
                        "donor of the same size and architecture.")
    model.h[block] = donor.h[block]


def reset_heads(model: DecisionTransformer, heads: tuple[int, ...]) -> None:
    """Draw the weights of some of block 0's heads anew, as GPT-2 starts them (Zhao et al. 2025), from torch's generator."""
    attention, std = model.h[0].attn, model.config.initializer_range
    if wrong := [head for head in heads if head not in range(attention.num_heads)]:
        raise UserError(f"There is no head {wrong[0]} to reset: block 0 has heads 0 to {attention.num_heads - 1}.")
    of_head = (3, attention.num_heads, -1)
    with torch.no_grad():
        for head in heads:
            attention.c_attn.weight.unflatten(1, of_head)[:, :, head].normal_(std=std)
            attention.c_attn.bias.unflatten(0, of_head)[:, head].zero_()
            attention.c_proj.weight.unflatten(0, of_head[1:])[head].normal_(std=std / (2 * len(model.h)) ** 0.5)


def scrambled(tensor: Tensor, how: str) -> Tensor:
    """A tensor like ``tensor`` but for what was learnt, drawn from torch's generator.

    "shuffled": the same entries in random order. "rotated": a matrix's singular values between random orthogonal maps; of a
    vector the same entries in random order.
    """
    if how == "shuffled" or tensor.dim() == 1:
        return tensor.flatten()[torch.randperm(tensor.numel())].view_as(tensor)
    rows, columns = (nn.init.orthogonal_(torch.empty(n, n)) for n in tensor.shape)
    return (rows @ tensor.float() @ columns).to(tensor.dtype)


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
                time_embedding_std: float = 1.0, donor: str | None = None, swapped_block: int = 0,
                reset: tuple[int, ...] = ()) -> DecisionTransformer:
    """A Decision Transformer at its starting point, float32, on the CPU, in training mode; the same for the same seed.

    Layers other than the blocks start as torch's defaults, the time-step table as a standard normal [code]: added after the
    input norm it is as large as all else, which long training overcomes; ``time_embedding_std`` shrinks it for short runs.
    ``size``: of random weights and those made here. ``dropout``: residual, attention, embedding. ``donor``: an initialisation
    whose block ``swapped_block`` takes the place of this one's; ``reset``: see reset_heads. UserError: bad names, files.
    """
    row = get_initialisation(initialisation)
    if size not in SIZES:
        raise UserError(f"Unknown size {size!r}: expected one of {', '.join(SIZES)}.")
    folder = weights_folder(row, size, seed)
    # The word and position tables are dropped: one row each will do. ImageGPT's causal mask takes its size from n_positions.
    plain = {"vocab_size": 1, "n_positions": 1 if row.carrier == "gpt2" else 1024, "use_cache": False,
             "bos_token_id": None, "eos_token_id": None,
             **dict(zip(("resid_pdrop", "attn_pdrop", "embd_pdrop"), dropout, strict=True))}
    if folder is None:
        blocks, width, heads = SIZES[size]
        plain |= {"n_layer": blocks, "n_embd": width, "n_head": row.heads or heads, "activation_function": row.activation}
    else:
        given = read_config(folder)
        if row.carrier == "imagegpt" and given["model_type"] != "imagegpt":
            raise UserError(f"{folder} holds a {given['model_type']!r} model, which ImageGPT blocks cannot carry.")
        if given.get("scale_attn_by_inverse_layer_idx") or not given.get("scale_attn_weights", True):
            raise UserError(f"{folder} scales its attention in another way than GPT-2 and ImageGPT: give another model.")
        kept = ("n_layer", "n_embd", "n_head", "n_inner", "activation_function", "layer_norm_epsilon", "initializer_range")
        plain |= {key: given[key] for key in kept if key in given}
    backbone = CARRIERS[row.carrier][0](**plain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "weights"))
        model = DecisionTransformer(task, backbone)
        nn.init.normal_(model.embed_time.weight, std=time_embedding_std)
        if folder is not None:
            load_blocks(model, folder)
        torch.manual_seed(stream_seed(seed, "controls"))
        if row.scramble:
            model.load_state_dict({name: scrambled(tensor, row.scramble) for name, tensor in model.state_dict().items()
                                   if name.startswith("h.")}, strict=False)
        reset_heads(model, reset)
    if donor is not None:
        swap_block(model, build_model(donor, size, task, seed, dropout), swapped_block)
    return model


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a checkpoint in place. Raises UserError if the file is damaged or belongs to another architecture."""
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"{path} belongs to another architecture ({first}): load it with its run's config.") from error
