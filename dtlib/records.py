"""Where runs lie, what their names cover, and run.json, which a finished run writes."""

import contextlib
import dataclasses
import json
import platform
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from dtlib.build import Parts
from dtlib.config import RETIRED, RunConfig
from dtlib.errors import UserError, explained
from dtlib.pretraining.language import text_files, text_identity
from dtlib.sources.files import data_files
from dtlib.starts import get_starting_point, pretrained_size, weights_folder
from dtlib.storage import CODE, cache_root, digest, sweep_cache, typed, versions, write_text
from dtlib.tasks import get_task
from dtlib.weights import is_usual, weights_files
from dtlib.wikipedia.losses import corpus_of

DIGESTS = ("starting_weights", "dataset_digest", "text_digest")  # in run.json, beside the config


def runs_root() -> Path:
    """Return the folder of finished runs."""
    return cache_root() / "runs"


def run_folder(config: RunConfig) -> Path:
    """Return the folder of a run, which exists once the run is finished."""
    return runs_root() / config.name(digests(config))


def unfinished() -> list[str]:
    """Return a line for each unfinished run: running (locked) or interrupted, and at which step."""
    sweep_cache()  # removes the locks of processes that died
    lines = []
    for folder in sorted(runs_root().glob(".partial/*/")):
        step, state = 0, folder / "resume.safetensors"
        with contextlib.suppress(OSError, SafetensorError), safe_open(state, "pt") as file:
            step = json.loads(file.metadata()["progress"])["metrics"][-1]["step"]
        locked = folder.with_name(f"{folder.name}.lock").exists()
        how = "running" if locked else "interrupted"
        lines.append(f"{folder.name}   {how}, saved at step {step}")
    return lines


def digests(config: RunConfig) -> dict[str, str]:
    """Return digests of all files that ``config`` points to, which its run's name covers.

    Not of files that are not downloaded yet, nor of data collected here: see runs.fine_tuned.
    """
    names = filter(None, (config.initialisation, config.donor, config.words))
    weights = [weights_digest(name, config.size, config.seed) for name in names]
    found = {"starting_weights": "+".join(weights)}
    if files := data_files(config.dataset, get_task(config.task)):
        found["dataset_digest"] = _digest_of(files)
    if config.cotraining:
        point = get_starting_point(config.words or config.initialisation)
        usual = "installed" if point.pretrained else "wikitext-103"
        if files := text_files(corpus := corpus_of(config)):
            found["text_digest"] = _digest_of(files)
        elif corpus not in (config.cotraining_corpus, usual):  # the model's training.json says so
            found["text_digest"] = digest(corpus)[:16]
    return found


def fetch_weights(config: RunConfig) -> None:
    """Download or unpack the starting points of ``config``, which its run's name covers."""
    for name in filter(None, (config.initialisation, config.donor, config.words)):
        weights_folder(get_starting_point(name), config.size, config.seed)


def _digest_of(files: list[Path]) -> str:
    return digest(*files)[:16] if files else ""


def weights_digest(name: str, size: str, seed: int) -> str:
    """Return the digest of the files of a starting point; "" for random weights.

    Of models pre-trained here it covers the weights, and config.json where that is not the size's
    own; of others config.json, tokenizer and weights.
    """
    point = get_starting_point(name)
    if point.hub and not typed(point.hub).is_dir():
        config = try_to_load_from_cache(point.hub, "config.json")
        folder = config and Path(config).parent  # None: not downloaded yet
    else:
        folder = weights_folder(point, size, seed)
    if folder is None:
        return ""
    weights = weights_files(folder)
    own = point.pretrained and is_usual(folder, pretrained_size(point.pretrained, size))
    if not (own or point.wheel):
        weights = [folder / "config.json", folder / "tokenizer.json", *weights]
    return _digest_of([path for path in weights if path.is_file()])


def check_source(config: RunConfig, record: dict, fingerprint: str, folder: Path) -> None:
    """Raise UserError if a finished run learnt from other data or text than there are now."""
    what, advice = f"The run in {folder} learnt from other", "back, or move that folder away"
    if record["data"]["fingerprint"] != fingerprint:
        raise UserError(
            f"{what} data than {config.dataset!r} has now: bring the old data {advice}."
        )
    then = record["data"].get("text")  # older records have none
    if config.cotraining and then not in (None, text_identity(corpus := corpus_of(config))):
        raise UserError(f"{what} text than {corpus!r} has now: bring the old versions {advice}.")


def say_other_code(found: dict[str, dict]) -> None:
    """Print one sentence if runs, {name: record}, were trained by other code or libraries."""
    now, other = versions() | {"dtlib": CODE}, {}
    for name, record in found.items():
        about = record["provenance"]
        then = about.get("versions", {}) | about.get("begun_with", {})
        changed = [
            f"{key} {then[key]}, now {now.get(key)}" for key in then if then[key] != now.get(key)
        ]
        other |= {name: changed[0]} if changed else {}
    if other:
        name, changed = next(iter(other.items()))
        print(
            f"{len(other)} of {len(found)} runs were trained by other code or libraries, first "
            f"{name} ({changed}). To train them again, point DTLIB_CACHE to another folder."
        )


def say_still(still: list[str], count: int) -> None:
    """Print one sentence if some of ``count`` runs, named in ``still``, stand still."""
    if still:
        print(
            f"{len(still)} of {count} runs stand still: the last epoch changed no prediction, "
            "as if every action were ±1 and the gradient 0. Try a lower learning_rate or "
            f"action_head=separate. First: {still[0]}."
        )


def checkpoint_name(epoch: int) -> str:
    return f"epoch_{epoch:03d}.safetensors"


def write_record(
    folder: Path, config: RunConfig, found: dict, parts: Parts, progress: dict, device: str
) -> None:
    """Write run.json. ``found``: digests of the files that it was built from, as they were then."""
    known, model = parts.trajectories, parts.model
    donor = None if config.donor is None else model.h[config.swapped_block].attn.config.to_dict()
    statistics = {"state_mean": known.state_mean.tolist(), "state_std": known.state_std.tolist()}
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    kept = [checkpoint_name(epoch) for epoch in sorted({0, config.epochs, *config.checkpoints})]
    how = {key: progress[key] for key in ("seconds", "versions", "begun_with") if key in progress}
    record = {
        "config": dataclasses.asdict(config) | found,
        "backbone": model.config.to_dict(),
        "donor": donor,
        "metrics": progress["metrics"],
        "data": {"fingerprint": known.fingerprint, "summary": known.summary(), **statistics},
        "provenance": {"device": where, **how},
        "checkpoints": {name: digest(folder / name) for name in kept},
    }
    record["data"] |= {"text": progress["text"]} if "text" in progress else {}
    write_text(folder / "run.json", {"checksum": digest(json.dumps(record)), **record})


def read_record(folder: Path) -> tuple[RunConfig, dict]:
    """Return a finished run's config and record. ValueError if run.json was changed.

    UserError if another version of dtlib wrote it, or if the folder has another run's name.
    """
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    checksum = record.pop("checksum")
    if checksum != digest(json.dumps(record)):
        raise ValueError("run.json was changed")
    values = dict(record["config"])
    found = {name: code for name in DIGESTS if (code := values.pop(name, None)) is not None}
    values = {n: v for n, v in values.items() if n not in RETIRED or v != RETIRED[n]}
    with explained(f"{folder} is of another version of dtlib", "open it with that one", UserError):
        config = RunConfig(**values)
    if (name := config.name(found)) != folder.name:
        raise UserError(f"{folder} is a renamed or copied {name}: name it so, or move it away.")
    return config, record
