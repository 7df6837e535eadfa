"""Train a starting point: a small GPT-2 or ImageGPT learns a corpus, and its folder is written."""

import functools
import json
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
import transformers
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtlib import storage
from dtlib.config import SIZES, VALUES, Count, NotNegative, Positive, Whole
from dtlib.devices import choose_device
from dtlib.errors import Checked, UserError, explained, reading
from dtlib.parallel import one_thread, run_all
from dtlib.pretraining.corpus import Corpus, count_within
from dtlib.pretraining.images import image
from dtlib.pretraining.language import language
from dtlib.pretraining.synthetic import synthetic
from dtlib.progress import tqdm
from dtlib.seeding import stream_seed
from dtlib.starts import pretrained_folder, recipe
from dtlib.train import refuse_divergence
from dtlib.weights import read_config, read_training, read_weights

# What None stands for in a config, by size: width at most 384, larger.
OWN = {"vocabulary": (2048, 16_384), "sequence": (128, 1024), "batch_size": (16, 64)}
OWN |= {"learning_rate": (2e-3, 3e-4)}
STEPS = {"language": (3500, 15_000), "image": (2500, 15_000), "markov": (1500, 15_000)}
STEPS |= {"iid": (300, 1500)}
FEWEST_STEPS = 480  # for an amount of tokens, by smaller batches: 15 of 65,536 would teach nothing
CHECKPOINTS = 20  # a training is measured, and can be resumed, at this many places
MEASURED = 64, 16_384  # largest part of the held-out sample used there: sequences, tokens
AT_ONCE = 8192  # tokens that go through the model together, so that GPT-2's size fits 24 GB


@dataclass(frozen=True, config=VALUES)
class PretrainConfig(Checked):
    """All that decides a starting point."""

    kind: Literal["language", "image", "markov", "iid"]
    size: Literal[tuple(name for name in SIZES if name != "smollm2")] = "mini"
    seed: Whole = 0
    corpus: str = ""  # see language.py and images.py; empty: what comes with every install
    vocabulary: Annotated[int, Field(ge=257, le=65535)] | None = None  # of the byte-level BPE
    sequence: Count | None = None  # tokens
    tokens: Annotated[str, Field(pattern=r"^([1-9]\d*[kMB])?$")] = ""  # "10M": sets the steps
    steps: Count | None = None
    batch_size: Count | None = None  # sequences
    learning_rate: Positive | None = None  # the highest: see learning_rate_at
    weight_decay: NotNegative = 0.01
    precision: Literal["float32", "bfloat16"] = "float32"

    def own_values(self) -> dict[str, object]:
        """What None stands for: values of the size and kind, or of an amount of tokens."""
        if self.corpus and self.kind in ("markov", "iid"):
            raise UserError(f"Chains are drawn, not read: leave out the corpus {self.corpus!r}.")
        large = SIZES[self.size][1] > 384
        own = {name: pair[large] for name, pair in {**OWN, "steps": STEPS[self.kind]}.items()}
        own["corpus"] = {"language": "installed", "image": "photographs"}.get(self.kind, "")
        if self.kind == "image" and not large:
            own |= {"sequence": 256, "batch_size": 8}  # 16 × 16 pixels
        if self.size == "small":
            own["learning_rate"] = 1e-3
        if self.tokens:
            amount = int(self.tokens[:-1]) * {"k": 10**3, "M": 10**6, "B": 10**9}[self.tokens[-1]]
            sequence = self.sequence or own["sequence"]
            own["batch_size"] = max(1, min(own["batch_size"], amount // (FEWEST_STEPS * sequence)))
            batch_size = self.batch_size or own["batch_size"]
            own["steps"] = steps = max(1, round(amount / batch_size / sequence))
            if self.steps not in (None, steps):
                raise UserError(f"tokens={self.tokens} are {steps} steps here, not {self.steps}.")
        return own

    @property
    def name(self) -> str:
        """Name of the folder."""
        return "-".join(filter(None, (self.kind, self.size, self.tokens, f"seed{self.seed}")))

    @property
    def command(self) -> str:
        """The command that makes this starting point."""
        default = PretrainConfig(self.kind, self.size, self.seed, tokens=self.tokens)
        settings = [f"--size={self.size}", f"--seed={self.seed}"]
        for name, value in asdict(self).items():
            if value != getattr(default, name) or (name == "tokens" and value):
                settings.append(f"--set={name}={value}")
        return shlex.join(["python", "-m", "dtlib", "pretrain", self.kind, *settings])


def make_corpus(config: PretrainConfig, progress: bool = True) -> Corpus:
    """Return the tokens that ``config`` learns from."""
    if config.kind == "language":
        return language(config.corpus, config.sequence, config.vocabulary, progress)
    if config.kind == "image":
        return image(config.corpus, config.sequence)
    return synthetic(config.kind, config.seed, config.sequence)


def make_model(config: PretrainConfig, vocabulary: int) -> nn.Module:
    """Return the untrained model with its head. It has no dropout: most tokens are seen once."""
    blocks, width, heads = SIZES[config.size]
    shape = {"n_layer": blocks, "n_embd": width, "n_head": heads, "n_positions": config.sequence}
    shape |= dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
    shape |= {"use_cache": False, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "pre-trained weights"))
        if config.kind == "image":  # reads one token more than it predicts: the begin of an image
            settings = transformers.ImageGPTConfig(vocab_size=vocabulary + 1, **shape)
            return transformers.ImageGPTForCausalImageModeling(settings)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocabulary, **shape))


def token_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Return the mean nats per token of predicting ``sequences`` (B, T + 1) but their first."""
    logits = model(input_ids=sequences[:, :-1]).logits  # (B, T, vocabulary)
    return cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Tensor, batch_size: int = 32) -> float:
    """Return the ``token_loss`` over all of ``sequences`` (N, T + 1), in float32."""
    model.eval()
    device, parts = next(model.parameters()).device, sequences.split(batch_size)
    losses = [float(token_loss(model, part.to(device))) * len(part) for part in parts]
    return sum(losses) / len(sequences)


def learning_rate_at(step: int, config: PretrainConfig) -> float:
    """Return the rate after a linear warm-up over a twentieth of the steps, then linearly to 0."""
    warm, left = (step + 1) / (0.05 * config.steps), (config.steps - step) / (0.95 * config.steps)
    return config.learning_rate * min(warm, left)


def load_starting_point(folder: Path) -> tuple[nn.Module, dict, Tensor]:
    """Return a starting point's model, record, held-out tokens (N, T + 1). Raises UserError."""
    size, tokenizer = read_config(folder)["vocab_size"], folder / "tokenizer.json"
    tensors = read_weights(folder)
    held_out = storage.read_tensors(folder / "held_out.safetensors")
    what = f"{folder} is no whole starting point, or a file in it does not fit its config.json"
    kinds = OSError, ValueError, KeyError, TypeError, RuntimeError, UserError
    with explained(what, "make it anew by `python -m dtlib pretrain`", *kinds), reading():
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        config = PretrainConfig(**record["config"])
        if tokenizer.exists():
            known = len(json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"])
            if known != size:
                raise ValueError(f"the tokenizer has {known} tokens but the weights have {size}")
        model = make_model(config, size - (config.kind == "image"))
        inside = {n if n == "lm_head.weight" else f"transformer.{n}": t for n, t in tensors.items()}
        head = tensors.get("wte.weight")  # GPT-2's is its word table, stored once
        model.load_state_dict({"lm_head.weight": head, **inside})
        return model.eval(), record, held_out["tokens"].long()


def is_trial(folder: Path, config: PretrainConfig) -> bool:
    """Return whether a model in the cache was trained otherwise, but for seed and precision."""
    record = read_training(folder)
    if folder.parent != storage.cache_root() / "starting_points" or not record:
        return False
    known = PretrainConfig(**record["config"])
    return replace(known, seed=config.seed, precision=config.precision) != config


def pretrain_all(configs: list[PretrainConfig], device: str = "auto") -> list[Path]:
    """Pre-train several starting points side by side: one a core, or one a card."""
    steps, about = sum(c.steps for c in configs), f"pre-training {len(configs)} starting points"
    return run_all(lambda c, *given: pretrain(c, None, *given), configs, steps, about, device)


def pretrain(
    config: PretrainConfig,
    folder: Path | None = None,
    device: str = "auto",
    on_steps: Callable[[int], None] | None = None,
) -> Path:
    """Return the folder of a starting point: trained if absent, resumed if interrupted.

    The same config, versions and kind of machine give the same bytes. ``on_steps(n)`` is called
    after n more steps; None shows a progress bar. Raises UserError for a bad corpus, and if
    ``folder`` (None: in the cache) holds something else.
    """
    if folder is None:
        folder = storage.cache_root() / "starting_points" / config.name
        _refuse_unused(config, folder)
    folder = storage.typed(folder)
    device = choose_device(device)
    with storage.growing(folder) as partial:
        record = read_training(partial or folder)
        if record.get("config") != asdict(config) and (partial is None or any(partial.iterdir())):
            advice = "move it away or use another --out"
            raise UserError(f"{partial or folder} holds something else: {advice}.")
        if partial and not (partial / storage.SEAL).exists():  # else only the rename is missing
            with one_thread(device):  # the same rounding on any number of cores
                _train(config, partial, record, device, on_steps)
        elif on_steps is not None:
            on_steps(config.steps)
    return folder


def _refuse_unused(config: PretrainConfig, folder: Path) -> None:
    try:
        used = pretrained_folder(config.kind, config.size, config.seed, config.tokens)
    except UserError:  # there is none yet
        return
    alike = recipe(read_training(used)) == recipe({"config": asdict(config)})
    if used != folder and (used.name == folder.name or not alike):
        advice = "choose another folder by --out, and give runs that folder as initialisation"
        raise UserError(f"Runs would not use this model but {used}: {advice}.")


def _train(
    config: PretrainConfig, folder: Path, record: dict, device: str, on_steps: Callable | None
) -> None:
    """Take the steps that are left and write the files; ``record``: what was begun, if anything."""
    corpus = make_corpus(config, progress=on_steps is None)
    begun = {"config": asdict(config), "corpus": json.loads(json.dumps(corpus.facts))}
    if record.get("corpus", begun["corpus"]) != begun["corpus"]:
        advice = "bring that text back, or move the folder away"
        raise UserError(f"{folder} was begun on another text: {advice}.")
    storage.write_text(folder / "training.json", begun)
    model = make_model(config, corpus.vocabulary).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)
    measured = torch.as_tensor(corpus.held_out[: count_within(config.sequence, *MEASURED)])
    marks = sorted({round(config.steps * i / CHECKPOINTS) for i in range(CHECKPOINTS + 1)})
    bar = tqdm(total=config.steps, desc=config.name, unit=" steps", disable=on_steps is not None)
    on_steps = on_steps or bar.update

    def advance(i: int, done: dict) -> dict:
        began, total = time.perf_counter(), torch.zeros((), device=device)
        losses, norms = [], []
        # Every checkpoint begins a new stream, so that resuming needs no generator's state.
        generator = np.random.default_rng(stream_seed(config.seed, "sequences", i))
        model.train()
        steps = range(marks[max(i - 1, 0)], marks[i])
        for step in steps:
            sequences = torch.as_tensor(corpus.sample(generator, config.batch_size)).to(device)
            optimiser.zero_grad(set_to_none=True)
            losses.append(torch.zeros((), device=device))
            for part in sequences.split(max(AT_ONCE // config.sequence, 1)):
                with torch.autocast(device, torch.bfloat16, config.precision == "bfloat16"):
                    loss = token_loss(model, part) * (len(part) / len(sequences))
                loss.backward()
                total += loss.detach()
                losses[-1] += loss.detach()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimiser.param_groups[0]["lr"] = learning_rate_at(step, config)
            optimiser.step()
            on_steps(1)
        if steps:
            rate = functools.partial(learning_rate_at, config=config)
            refuse_divergence(model, losses, norms, steps.start, rate)
        row = {"step": marks[i], "training_loss": float(total / len(steps)) if steps else None}
        row["held_out_loss"] = held_out_loss(model, measured)
        done["seconds"] += time.perf_counter() - began
        return row

    with bar:
        given = {"curve": [], "seconds": 0.0}, "curve", len(marks), advance, on_steps
        done = storage.resumable(folder, model, optimiser, *given)
    _write_files(config, corpus, model, done, folder)


def _write_files(
    config: PretrainConfig, corpus: Corpus, model: nn.Module, done: dict, folder: Path
) -> None:
    """Write the starting point, with the held-out loss of its weights as they are stored."""
    device, held_out = next(model.parameters()).device, torch.as_tensor(corpus.held_out)
    on_card = device.type == "cuda"
    model.cpu().half().save_pretrained(folder)
    loss = held_out_loss(model.float().to(device), held_out)
    packages = {name: version(name) for name in ("tokenizers", "scikit-learn")}
    record = {
        "config": asdict(config),
        "command": config.command,
        "corpus": corpus.facts,
        "tokens_seen": config.steps * config.batch_size * config.sequence,
        **{name: done[name] for name in ("curve", "seconds", "begun_with") if name in done},
        "held_out": {"model": loss, **corpus.baselines()},
        "device": torch.cuda.get_device_name() if on_card else f"one {platform.machine()} core",
        "versions": storage.versions() | packages,
    }
    tokens = {"tokens": held_out.to(torch.uint16)}
    storage.write_tensors(folder / "held_out.safetensors", tokens)
    for name, text in {**corpus.files, "README.md": model_card(record)}.items():
        storage.write_text(folder / name, text)
    storage.write_text(folder / "training.json", record)
    (folder / "resume.safetensors").unlink()
    storage.seal(folder)


def model_card(record: dict) -> str:
    """Return the README of a starting point: card.md, filled from its ``record``."""
    digits = "{:.4f}".format
    values = {"shape": SIZES[record["config"]["size"]], "minutes": record["seconds"] / 60}
    corpus = {name: value for name, value in record["corpus"].items() if name != "sources"}
    values["corpus"] = json.dumps(corpus, indent=1)
    values["held_out"] = pd.Series(record["held_out"]).to_string(float_format=digits)
    values["curve"] = pd.DataFrame(record["curve"]).to_string(float_format=digits, index=False)
    values["versions"] = ", ".join(map(" ".join, record["versions"].items()))
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return template.format_map(record | values)
