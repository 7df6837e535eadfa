"""What paper B changes in fine-tuning: alignment, co-training, time steps; and LaMo's adapters."""

import copy
import math
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from dtlib.config import RunConfig
from dtlib.data import Windows
from dtlib.errors import UserError, explained
from dtlib.model import DecisionTransformer
from dtlib.pretraining.corpus import Corpus
from dtlib.pretraining.language import language
from dtlib.seeding import stream_seed
from dtlib.starts import get_starting_point, weights_folder
from dtlib.storage import typed
from dtlib.weights import FLOATS, read_config, read_training, read_weights


def annealing(step: int, steps: float = 5000) -> float:
    """Return the alignment's weight a(t): 0.993 at 0, 0.5 at ``steps``/2, 0.0067 at ``steps``."""
    return 1 / (1 + math.exp(min(5 - (steps - step) / (steps / 10), 700.0)))  # exp(710) overflows


def cosine_centres(words: Tensor, number: int = 1000) -> Tensor:
    """Return centres (C, D), of length 1, of k-means by cosine on a word table (V, D)."""
    from sklearn.cluster import KMeans  # slow to import

    unit = normalize(words.float(), dim=1).numpy()
    with threadpool_limits(1):  # the same rounding on any number of cores
        means = KMeans(min(number, len(unit)), n_init=1, max_iter=50, random_state=0).fit(unit)
    return normalize(torch.from_numpy(means.cluster_centers_), dim=1).to(words.dtype)


def nearest(embedded: Tensor, centres: Tensor) -> Tensor:
    """Return the cosine (…) of tokens (…, D) with their nearest centre, of centres (C, D)."""
    return (normalize(embedded, dim=-1) @ centres.T).max(-1).values


def alignment_loss(tokens: Tensor, centres: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Return L_cos of paper B: minus the mean, over real tokens, of the cosine with a centre.

    tokens (B, K, 3, D) after the input norm; centres (C, D) of length 1; mask (B, K), true at real
    steps. ``reduction``: "max" takes the nearest centre, "mean" the mean over centres. "as
    released" [code] does not sum over the width: each coordinate takes its own best centre, and
    the mean runs over coordinates and padding.
    """
    unit = normalize(tokens, dim=-1)
    if reduction == "as released":
        highest, lowest = centres.max(0).values, centres.min(0).values
        return -torch.where(unit > 0, unit * highest, unit * lowest).mean()
    cosines = nearest(tokens, centres) if reduction == "max" else (unit @ centres.T).mean(-1)
    return -(cosines.mean(-1) * mask).sum() / mask.sum()  # cosines (B, K, 3)


class Words(nn.Module):
    """A language model's tables of words ``wte`` (V, D) and positions ``wpe`` (P, D)."""

    def __init__(self, folder: Path):
        super().__init__()
        found = read_weights(folder)
        tables = [found.get(name) for name in ("wte.weight", "wpe.weight")]
        whole = [t for t in tables if t is not None and t.dim() == 2 and t.dtype in FLOATS]
        if len(whole) < 2 or not all(table.isfinite().all() for table in whole):
            raise UserError(f"{folder} has no finite word and position tables: name a GPT-2.")
        self.wte, self.wpe = (nn.Parameter(table.float()) for table in tables)


def reading_loss(model: DecisionTransformer, words: Words, sequences: Tensor) -> Tensor:
    """Return L_LM of paper B, in nats per token: the blocks predict ``sequences`` (B, T + 1)."""
    hidden = model.hidden(words.wte[sequences[:, :-1]] + words.wpe[: sequences.shape[1] - 1])
    return cross_entropy((hidden @ words.wte.T).flatten(0, 1), sequences[:, 1:].flatten())


def corpus_of(config: RunConfig) -> str:
    """Return the corpus that co-training reads; by default what the language model learnt from."""
    point = get_starting_point(config.words or config.initialisation)
    if config.cotraining_corpus or (point.hub and not typed(point.hub).is_dir()):
        return config.cotraining_corpus or "wikitext-103"
    folder = weights_folder(point, config.size, config.seed)
    record = read_training(folder) if folder else {}  # of models pre-trained here
    return record["config"]["corpus"] if record else "wikitext-103"


def text_for(folder: Path, corpus: str) -> Corpus:
    """Return ``corpus`` in a model's tokens and full sequences. UserError without its tokenizer."""
    tokenizer, shape = folder / "tokenizer.json", read_config(folder)
    if not tokenizer.is_file():
        raise UserError(f"{folder} is no language model with a tokenizer: co-training needs one.")
    text = tokenizer.read_text(encoding="utf-8", errors="replace")
    found = language(corpus, shape["n_positions"], 0, False, text)
    if found.vocabulary > (words := shape["vocab_size"]):
        what = f"{tokenizer} has {found.vocabulary} tokens, but the word table has {words}"
        raise UserError(f"{what}: bring the model's own tokenizer.")
    return found


class LanguageLosses:
    """λ₁·a(t)·L_cos + λ₂·L_LM of paper B, for a step's windows and its number t.

    The text of a step depends on seed and t alone, so that a resumed run reads the same text.
    """

    def __init__(self, config: RunConfig, model: DecisionTransformer, words: Words, folder: Path):
        self.config, self.model, self.words = config, model, words
        table = words.wte.detach()
        self.centres = cosine_centres(table.cpu()).to(table.device) if config.alignment else None
        self.text = text_for(folder, corpus_of(config)) if config.cotraining else None

    def __call__(self, windows: Windows, step: int) -> Tensor:
        config, device = self.config, windows.mask.device
        total = torch.zeros((), device=device)
        if config.alignment:
            tokens = self.model.embed_kinds(windows.states, windows.actions, windows.returns_to_go)
            loss = alignment_loss(tokens, self.centres, windows.mask, config.alignment_reduction)
            total = total + config.alignment * annealing(step, config.alignment_steps) * loss
        if config.cotraining:
            generator = np.random.default_rng(stream_seed(config.seed, "text", step))
            sequences = torch.as_tensor(self.text.sample(generator, 2)).to(device)  # two [code]
            total = total + config.cotraining * reading_loss(self.model, self.words, sequences)
        return total


def extend_positions(model: DecisionTransformer, positions: Tensor) -> None:
    """Start the time-step table from positions (P, D); all but the first two repeat [code].

    In B's code time steps and words share one table; here they part after the start.
    """
    rows = torch.arange(len(model.embed_time.weight))
    rows = torch.where(rows < 2, rows, (rows - 2) % (len(positions) - 2) + 2)
    model.embed_time.weight = nn.Parameter(positions[rows])


def add_adapters(blocks: nn.ModuleList, rank: int, seed: int) -> None:
    """Freeze the blocks, add low-rank adapters to their attention (LaMo). UserError: no peft."""
    with explained("Adapters need peft", "`pip install 'dtlib[adapters]'`", ModuleNotFoundError):
        import peft  # an extra
    if not hasattr(blocks[0], "attn"):
        raise UserError("Adapters fit GPT-2's and ImageGPT's blocks only: set adapter_rank=0.")
    where = {"target_modules": r"\d+\.attn\.c_(attn|proj)", "fan_in_fan_out": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "adapters"))
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, **where), blocks)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights with adapters merged into the blocks, and without word tables."""
    merged = copy.deepcopy(model)
    for module in merged.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    found = {name.replace(".base_layer", ""): t.cpu() for name, t in merged.state_dict().items()}
    return {n: t for n, t in found.items() if "lora_" not in n and not n.startswith("words.")}


def add_language(
    config: RunConfig, model: DecisionTransformer, device: str
) -> LanguageLosses | None:
    """Change ``model`` as paper B's fields of ``config`` say, and move it to ``device``.

    Returns what is added to the action loss. Raises UserError for an unfit word table.
    """
    words = None
    if config.alignment or config.cotraining or config.extended_positions:
        name, width = config.words or config.initialisation, model.config.hidden_size
        folder = weights_folder(get_starting_point(name), config.size, config.seed)
        if folder is None:
            raise UserError(f"{name!r} has no word table: name one that has, as words='language'.")
        words = Words(folder)
        if (found := words.wte.shape[1]) != width:
            problem = f"The word table of {name!r} has width {found}, the model has {width}"
            raise UserError(f"{problem}: take two of one size.")
    if config.extended_positions:
        extend_positions(model, words.wpe.detach())
    if config.adapter_rank:
        add_adapters(model.h, config.adapter_rank, config.seed)
    elif config.frozen_blocks:
        model.h.requires_grad_(False)  # embeddings and the final norm still learn [code]
    if config.cotraining:
        model.words = words  # learns with the model
    model.to(device)
    if config.alignment or config.cotraining:
        return LanguageLosses(config, model, words.to(device), folder)
    return None
