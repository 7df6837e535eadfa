"""What paper B adds to the action loss: alignment with a language model's word table, and language modelling beside it."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from dtlib import corpora
from dtlib.data import Windows
from dtlib.errors import UserError
from dtlib.model import DecisionTransformer, read_tensors
from dtlib.seeding import stream_seed


def annealing(step: int, steps: float = 5000) -> float:
    """The alignment's weight after ``step`` steps: 0.993 at first, one half at ``steps``/2, 0.0067 at ``steps`` [code]."""
    return 1 / (1 + math.exp(min(5 - (steps - step) / (steps / 10), 700.0)))  # of more, exp is too large for a float


def cosine_centres(words: Tensor, number: int = 1000) -> Tensor:
    """Centres (C, D), of length 1, of k-means by cosine on a word table (V, D); the same on every machine's cores."""
    unit = normalize(words.float(), dim=1).numpy()
    with threadpool_limits(1):
        from sklearn.cluster import KMeans  # slow to import, and only needed here
        found = KMeans(min(number, len(unit)), n_init=1, max_iter=50, random_state=0).fit(unit).cluster_centers_
    return normalize(torch.from_numpy(found), dim=1).to(words.dtype)


def nearest(embedded: Tensor, centres: Tensor) -> Tensor:
    """Cosine of tokens (…, D) with the nearest of the centres (C, D), which have length 1: (…)."""
    return (normalize(embedded, dim=-1) @ centres.T).max(-1).values


def alignment_loss(embedded: Tensor, centres: Tensor, mask: Tensor,
                   reduction: Literal["max", "mean", "as released"] = "max") -> Tensor:
    """−mean over real tokens of the cosine between a token and its nearest centre (B, 3.2); the mean over centres: "mean".

    embedded (B, K, 3, D): tokens after the input norm; centres (C, D) of length 1; mask (B, K), true at real steps. "as
    released" is what B's script computes: its product is never summed over the width, so that each coordinate takes the centre
    that suits it best, and the mean runs over coordinates and padding too.
    """
    unit = normalize(embedded, dim=-1)
    if reduction == "as released":
        highest, lowest = centres.max(0).values, centres.min(0).values
        return -torch.where(unit > 0, unit * highest, unit * lowest).mean()
    cosines = nearest(embedded, centres) if reduction == "max" else (unit @ centres.T).mean(-1)  # (B, K, 3)
    return -(cosines.mean(-1) * mask).sum() / mask.sum()


class Words(nn.Module):
    """A language model's tables of words (V, D) and positions (P, D): what it needs beside its blocks to read on."""

    def __init__(self, folder: Path):
        super().__init__()
        tensors = read_tensors(folder / "model.safetensors")
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        if not {"wte.weight", "wpe.weight"} <= set(tensors):
            raise UserError(f"{folder} has no tables of words and positions: name a language model.")
        self.wte, self.wpe = (nn.Parameter(tensors[name].float()) for name in ("wte.weight", "wpe.weight"))


def reading_loss(model: DecisionTransformer, words: Words, sequences: Tensor) -> Tensor:
    """Nats per token of predicting each of ``sequences`` (B, T + 1) by ``model``'s blocks; the head is the word table."""
    hidden = model.hidden(words.wte[sequences[:, :-1]] + words.wpe[:sequences.shape[1] - 1])
    return cross_entropy((hidden @ words.wte.T).flatten(0, 1), sequences[:, 1:].flatten())


def text_for(folder: Path, corpus: str) -> corpora.Corpus:
    """``corpus`` as tokens of the language model in ``folder``, in sequences of all its positions; empty: what it learnt from.

    Raises UserError if the folder has no tokenizer, or as ``corpora.language`` does.
    """
    try:
        tokenizer = (folder / "tokenizer.json").read_text()
        positions = json.loads((folder / "config.json").read_text())["n_positions"]
        record = folder / "training.json"
        corpus = corpus or (json.loads(record.read_text())["config"]["corpus"] if record.exists() else "wikitext-103")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no language model with a tokenizer ({error}): name one for co-training.") from error
    return corpora.language(corpus, positions, progress=False, tokenizer=tokenizer)


def extend_positions(model: DecisionTransformer, positions: Tensor) -> None:
    """Start the time-step table (horizon, D) from a language model's positions (P, D), again and again but for the first two.

    As B's ``extend_positions`` [code], where the two tables are also one; here they part after the start.
    """
    rows = torch.arange(len(model.embed_time.weight))
    with torch.no_grad():
        model.embed_time.weight.copy_(positions[torch.where(rows < 2, rows, (rows - 2) % (len(positions) - 2) + 2)])


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a Decision Transformer as without adapters, which are added to theirs, and words, which are left out."""
    merged = copy.deepcopy(model)
    for module in merged.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    return {name.replace(".base_layer", ""): tensor.cpu() for name, tensor in merged.state_dict().items()
            if "lora_" not in name and not name.startswith("words.")}


def freeze_blocks(model: DecisionTransformer) -> None:
    """Leave the blocks as they are; embeddings and norms go on learning (B's ablation) [code]."""
    model.h.requires_grad_(False)


def add_adapters(model: DecisionTransformer, rank: int) -> None:
    """Freeze the blocks and add low-rank adapters to their attention's projections (Hu et al. 2022; LaMo, Shi et al. 2024).

    Raises UserError where the package ``peft`` is missing.
    """
    try:
        import peft  # an extra: slow to import, and only needed here
    except ModuleNotFoundError as error:
        raise UserError("Adapters need the package peft: install it with `pip install 'dtlib[adapters]'`.") from error
    learning = {name for name, _ in model.named_parameters() if not name.startswith("h.")}
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, fan_in_fan_out=True,
                                                 target_modules=r"h\.\d+\.attn\.c_(attn|proj)"), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning or "lora_" in name)


class LanguageLosses:
    """λ₁·a(t)·L_cos + λ₂·L_LM of paper B: called with a step's windows and number, it gives what the action loss lacks.

    ``words``: tables that stay (for alignment) or learn with the model (for co-training, as ``model.words``). Text for a step
    is drawn from ``seed`` and the step's number alone, so that an interrupted run goes on with the same.
    """

    def __init__(self, model: DecisionTransformer, words: Words, folder: Path, *, alignment: float, alignment_steps: float,
                 alignment_reduction: str, cotraining: float, cotraining_corpus: str, seed: int):
        self.model, self.words, self.alignment, self.cotraining, self.seed = model, words, alignment, cotraining, seed
        self.alignment_steps, self.alignment_reduction = alignment_steps, alignment_reduction
        self.centres = cosine_centres(words.wte.detach().cpu()).to(words.wte.device) if alignment else None
        self.draw: Callable | None = text_for(folder, cotraining_corpus).sample if cotraining else None

    def __call__(self, windows: Windows, step: int) -> Tensor:
        total = torch.zeros((), device=windows.mask.device)
        if self.alignment:
            embedded = self.model.embed_kinds(windows.states, windows.actions, windows.returns_to_go)
            found = alignment_loss(embedded, self.centres, windows.mask, self.alignment_reduction)
            total = total + self.alignment * annealing(step, self.alignment_steps) * found
        if self.cotraining:  # two sequences a step, as B
            drawn = self.draw(np.random.default_rng(stream_seed(self.seed, "text", step)), 2)
            sequences = torch.as_tensor(drawn).to(windows.mask.device, non_blocking=True)
            total = total + self.cotraining * reading_loss(self.model, self.words, sequences)
        return total
