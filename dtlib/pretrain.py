"""Starting points made here: a small GPT-2 or ImageGPT learns language, images or synthetic tokens, into a folder."""

import dataclasses
import json
import os
import platform
import shlex
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, ImageGPTConfig, ImageGPTForCausalImageModeling

from dtlib import corpora
from dtlib.errors import UserError, atomic_write, cache_root, checked, locked, versions, write_text
from dtlib.model import SIZES, read_config, read_tensors
from dtlib.seeding import stream_seed
from dtlib.train import choose_device, load_state, save_state
from dtlib.workers import one_thread, spread

Count, Whole, Positive = Annotated[int, Field(gt=0)], Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]
KINDS = ("language", "image", "markov", "iid")
CHECKPOINTS = 20  # a training is measured, and can be resumed, at this many places
MEASURED = 64, 16_384  # held-out sequences and tokens, at most, whose loss is taken there
AT_ONCE = 8192  # tokens of a step that go through the model together, so that GPT-2's and ImageGPT's sizes fit 24 GB
SMALL = dict(vocabulary=2048, sequence=128, batch_size=16, learning_rate=2e-3)
LARGE = dict(vocabulary=16_384, sequence=1024, batch_size=64, learning_rate=3e-4)  # 65,536 tokens a step
FEWEST = 480  # steps that an amount of tokens is divided into at least, by smaller batches: 15 of 65,536 would teach nothing
STEPS = {"language": (3500, 15_000), "image": (2500, 15_000), "markov": (1500, 15_000), "iid": (300, 1500)}  # small, large


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class PretrainConfig:
    """All that decides a starting point; None takes the size's own value. Raises UserError for wrong names and values."""

    kind: Literal[KINDS]
    size: Literal[tuple(SIZES)] = "mini"
    seed: Whole = 0
    corpus: str = ""  # see corpora.language and corpora.image; empty: what comes with every install
    vocabulary: Annotated[int, Field(ge=257, le=65535)] | None = None  # of the byte-level BPE
    sequence: Count | None = None  # tokens
    tokens: Annotated[str, Field(pattern=r"^([1-9]\d*[kMB])?$")] = ""  # such as "10M": sets the steps (see FEWEST)
    steps: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None  # after a warm-up of a twentieth of the steps; then falls linearly to 0
    weight_decay: float = Field(0.01, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: object, build: Callable) -> "PretrainConfig":
        config = checked(cls, values, build)
        small = SIZES[config.size][1] <= 384
        own = {**(SMALL if small else LARGE),
               "corpus": {"language": "installed", "image": "photographs"}.get(config.kind, "")}
        if small and config.kind == "image":
            own |= {"sequence": 256, "batch_size": 8}  # 16 × 16 pixels
        if config.size == "small":
            own["learning_rate"] = 1e-3
        if config.tokens:
            amount = int(config.tokens[:-1]) * {"k": 10**3, "M": 10**6, "B": 10**9}[config.tokens[-1]]
            affordable = amount // (FEWEST * (config.sequence or own["sequence"]))
            own["batch_size"] = max(1, min(own["batch_size"], affordable))
        for name, value in own.items():
            if not getattr(config, name):
                object.__setattr__(config, name, value)
        steps = config.steps or STEPS[config.kind][not small]
        if config.tokens:
            steps = max(1, round(amount / config.batch_size / config.sequence))
            if config.steps not in (None, steps):
                raise UserError(f"tokens={config.tokens} are {steps} steps here, not {config.steps}: leave out one of them.")
        object.__setattr__(config, "steps", steps)
        return config

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.kind, self.size, self.tokens, f"seed{self.seed}")))

    @property
    def command(self) -> str:
        """What makes this starting point again."""
        default = PretrainConfig(self.kind, self.size, self.seed, tokens=self.tokens)
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        if self.tokens:
            changed = {"tokens": self.tokens} | {name: value for name, value in changed.items() if name != "steps"}
        return " ".join([f"python -m dtlib pretrain {self.kind} --size {self.size} --seed {self.seed}",
                         *(f"--set {shlex.quote(f'{name}={value}')}" for name, value in changed.items())])


def make_corpus(config: PretrainConfig, progress: bool = True) -> corpora.Corpus:
    """The tokens that ``config`` learns from."""
    if config.kind == "language":
        return corpora.language(config.corpus, config.sequence, config.vocabulary, progress)
    if config.kind == "image":
        return corpora.image(config.corpus, config.sequence)
    if config.corpus:
        raise UserError(f"{config.kind} tokens are drawn, not read: leave out the corpus {config.corpus!r}.")
    return corpora.synthetic(config.kind, config.seed, config.sequence)


def make_model(config: PretrainConfig, vocabulary: int) -> GPT2LMHeadModel | ImageGPTForCausalImageModeling:
    """The untrained model, without dropout (less than one pass over the tokens needs none); the same for the same seed."""
    blocks, width, heads = SIZES[config.size]
    shape = dict(n_layer=blocks, n_embd=width, n_head=heads, n_positions=config.sequence, resid_pdrop=0.0, attn_pdrop=0.0,
                 embd_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "pre-trained weights"))
        if config.kind == "image":  # one more input than outputs: the token that begins every image
            return ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=vocabulary + 1, **shape))
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape))


def token_loss(model: torch.nn.Module, sequences: Tensor) -> Tensor:
    """Mean loss in nats per token of predicting each token of ``sequences`` (B, T + 1) from those before it."""
    logits = model(input_ids=sequences[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, sequences: Tensor, batch_size: int = 32) -> float:
    """``token_loss`` over all of ``sequences`` (N, T + 1), without dropout, in float32."""
    model.eval()
    device = next(model.parameters()).device
    losses = [float(token_loss(model, part.to(device))) * len(part) for part in sequences.split(batch_size)]
    return sum(losses) / len(sequences)


def load_starting_point(folder: Path) -> tuple[torch.nn.Module, dict, Tensor]:
    """A starting point's model with its head (float32, evaluation mode), its record and its held-out tokens (N, T + 1).

    Raises ``UserError`` if a file is missing, damaged or pickled, or the tokenizer does not belong to the weights.
    """
    config = read_config(folder)
    tensors = read_tensors(folder / "model.safetensors")
    held_out = read_tensors(folder / "held_out.safetensors")
    try:
        record = json.loads((folder / "training.json").read_text())
        kind, held_out = record["config"]["kind"], held_out["tokens"].long()
        tokenizer = folder / "tokenizer.json"
        known = len(json.loads(tokenizer.read_text())["model"]["vocab"]) if tokenizer.exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no whole starting point ({error}): make it by `python -m dtlib pretrain`.") from error
    if known not in (None, config["vocab_size"]):
        raise UserError(f"{tokenizer} has {known} tokens but the weights beside it have {config['vocab_size']}: put back the "
                        "tokenizer that they were trained with.")
    model = make_model(PretrainConfig(**record["config"]), config["vocab_size"] - (kind == "image"))
    try:  # GPT-2's head is its word table, which is stored once
        model.load_state_dict({"lm_head.weight": tensors.get("transformer.wte.weight"), **tensors})
    except RuntimeError as error:
        raise UserError(f"{folder / 'model.safetensors'} does not fit its config.json ({str(error).splitlines()[1].strip()}): "
                        "put back the file that belongs to it.") from error
    return model.eval(), record, held_out


def pretrain(config: PretrainConfig, folder: Path | None = None, device: str = "auto", progress: bool = True,
             on_steps: Callable[[int], None] = lambda steps: None) -> Path:
    """The folder of a finished starting point in transformers' layout: trained if absent, resumed if interrupted.

    The same config, versions and kind of machine give the same bytes: on a CPU it is one thread's work. Weights are stored as
    float16. ``on_steps(n)`` is called as n more steps are done. Raises ``UserError`` for a bad corpus, and if ``folder``
    holds something else.
    """
    folder = Path(folder or cache_root() / "starting_points" / config.name)
    growing = folder.with_name(f".partial-{folder.name}")
    device = choose_device(device)
    with locked(growing):
        for leftover in growing.glob(".writing-*"):  # of a process that was killed
            leftover.unlink()
        for place in (folder, growing):
            record = place / "training.json"
            known = json.loads(record.read_text()).get("config", {}) if record.exists() else {}
            if {"tokens": "", **known} != dataclasses.asdict(config) and (known or place.is_file() or any(place.glob("*"))):
                raise UserError(f"{place} holds something else than this starting point: give another --out, or remove it.")
        if not (folder / "training.json").exists():
            with one_thread(device):
                _train(config, growing, device, progress, on_steps)
            os.rename(growing, folder)
        (folder / "resume.safetensors").unlink(missing_ok=True)
    return folder


def pretrain_all(configs: list[PretrainConfig], device: str = "auto") -> None:
    """``pretrain`` of several, side by side: one a core, or one a card."""
    with tqdm(total=sum(config.steps for config in configs), desc=f"pre-training {len(configs)} starting points",
              unit="step") as bar:
        spread(_pretrain_one, configs, choose_device(device), None, bar)


def _pretrain_one(config: PretrainConfig, device: str, on_steps: Callable[[int], None]) -> None:
    pretrain(config, None, device, False, on_steps)


def _train(config: PretrainConfig, folder: Path, device: str, progress: bool, on_steps: Callable[[int], None]) -> None:
    corpus = make_corpus(config, progress)
    model = make_model(config, corpus.vocabulary).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    held_out, state = torch.as_tensor(corpus.held_out), folder / "resume.safetensors"
    begun = {"config": dataclasses.asdict(config), "corpus": json.loads(json.dumps(corpus.facts))}
    if state.exists() and json.loads((folder / "training.json").read_text()).get("corpus", begun["corpus"]) != begun["corpus"]:
        raise UserError(f"{folder} was begun on another text than is there now: bring it back (or the packages it came with), "
                        "or remove the folder to begin anew.")
    write_text(folder / "training.json", begun)
    done = load_state(state, model, optimiser) if state.exists() else {"curve": [], "seconds": 0.0}
    measured = held_out[:corpora.count_within(config.sequence, *MEASURED)]
    marks = sorted({round(config.steps * i / CHECKPOINTS) for i in range(CHECKPOINTS + 1)})
    before = marks[max(len(done["curve"]) - 1, 0)]
    on_steps(before)
    with tqdm(total=config.steps, initial=before, desc=config.name, unit=" steps", disable=not progress) as bar:
        for i in range(len(done["curve"]), len(marks)):
            began, total = time.perf_counter(), torch.zeros((), device=device)
            # The stream is made anew at every checkpoint, so a resumed training needs no generator's state.
            generator = np.random.default_rng(stream_seed(config.seed, "sequences", i))
            model.train()
            for step in range(marks[max(i - 1, 0)], marks[i]):
                sequences = torch.as_tensor(corpus.sample(generator, config.batch_size)).to(device)
                optimiser.zero_grad(set_to_none=True)
                for part in sequences.split(max(AT_ONCE // config.sequence, 1)):
                    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
                        loss = token_loss(model, part) * (len(part) / len(sequences))
                    loss.backward()
                    total += loss.detach()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                warm, left = (step + 1) / (0.05 * config.steps), (config.steps - step) / (0.95 * config.steps)
                optimiser.param_groups[0]["lr"] = config.learning_rate * min(warm, left)
                optimiser.step()
                bar.update()
                on_steps(1)
            taken = marks[i] - marks[max(i - 1, 0)]
            done["curve"].append({"step": marks[i], "training_loss": float(total / taken) if taken else None,
                                  "held_out_loss": held_out_loss(model, measured)})
            done["seconds"] += time.perf_counter() - began
            bar.set_postfix(held_out=f"{done['curve'][-1]['held_out_loss']:.3f}")
            save_state(state, model, optimiser, done)
    _finish(config, folder, corpus, model.cpu(), done, device)


def _finish(config: PretrainConfig, folder: Path, corpus: corpora.Corpus, model: torch.nn.Module, done: dict,
            device: str) -> None:
    """Write what ``load_starting_point`` reads, with the held-out loss of the weights as they are stored."""
    model.half().save_pretrained(folder)
    for name, text in corpus.files.items():
        write_text(folder / name, text)
    with atomic_write(folder / "held_out.safetensors") as temporary:
        save_file({"tokens": torch.as_tensor(corpus.held_out).to(torch.uint16)}, temporary)
    loss = held_out_loss(model.float().to(device), torch.as_tensor(corpus.held_out))
    record = {"config": dataclasses.asdict(config), "command": config.command, "corpus": corpus.facts,
              "tokens_seen": config.steps * config.batch_size * config.sequence, **done,
              "held_out": {"model": loss, **corpus.baselines()},
              "device": torch.cuda.get_device_name() if device == "cuda" else f"one {platform.machine()} core",
              "versions": versions() | {name: version(name) for name in ("tokenizers", "scikit-learn")}}
    write_text(folder / "README.md", model_card(record))
    write_text(folder / "training.json", record)


def model_card(record: dict) -> str:
    """What a reader must know of a starting point, as Markdown: data, steps, loss curve, held-out loss, command."""
    config, corpus, losses = record["config"], record["corpus"], record["held_out"]
    blocks, width, heads = SIZES[config["size"]]
    blocks_of = "ImageGPT" if config["kind"] == "image" else "GPT-2"
    data = {"language": "English prose", "image": "Images", "markov": "An order-1 Markov chain of 100 states",
            "iid": "Independent uniform tokens"}[config["kind"]]
    facts = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in corpus.items() if name != "sources")
    curve = "\n".join(f"| {row['step']} | {row['training_loss']:.4f} | {row['held_out_loss']:.4f} |"
                      for row in record["curve"][::2] if row["training_loss"])
    table = "\n".join(f"| {name} | {loss:.4f} |" for name, loss in losses.items())
    return f"""# {config['kind']}, {config['size']}, seed {config['seed']}

{data}, learnt by {blocks_of} blocks: {blocks} of width {width} with {heads} head{'s' * (heads > 1)}, from \
{record['tokens_seen']:,} tokens in {config['steps']:,} steps ({record['seconds'] / 60:.0f} minutes on {record['device']}).

    {record['command']}

The corpus:

{facts}

Held-out loss, nats per token (sequences of {config['sequence']} tokens from what training never saw):

| predictor | loss |
|---|---|
{table}

Loss curve (held out: the first {corpora.count_within(config['sequence'], *MEASURED)} sequences):

| step | training | held out |
|---|---|---|
{curve}

Versions: {', '.join(f'{name} {number}' for name, number in record['versions'].items())}. Weights are stored as float16.
"""
