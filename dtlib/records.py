"""Where runs lie, what their names cover, and run.json, which a finished run writes."""

import dataclasses
import json
import platform
from pathlib import Path

import torch

from dtlib.build import Parts
from dtlib.config import RETIRED, RunConfig
from dtlib.starts import get_starting_point, weights_folder
from dtlib.storage import cache_root, digest, versions, write_text


def runs_root() -> Path:
    """Return the folder of finished runs."""
    return cache_root() / "runs"


def run_folder(config: RunConfig) -> Path:
    """Return the folder of a run, which exists once the run is finished."""
    return runs_root() / config.name(digests(config))


def digests(config: RunConfig) -> dict[str, str]:
    """Return digests of the files that ``config`` points to, which its run's name covers."""
    names = filter(None, (config.initialisation, config.donor, config.words))
    weights = [weights_digest(name, config.size, config.seed) for name in names]
    found = {"starting_weights": "+".join(weights)}
    if (path := Path(config.dataset).expanduser()).is_file():
        found["dataset_digest"] = digest(path)[:16]
    return found


def weights_digest(name: str, size: str, seed: int) -> str:
    """Return the digest of a local weights file; "" for random and the hub's weights."""
    point = get_starting_point(name)
    local = point.pretrained or point.wheel or (point.hub and Path(point.hub).is_dir())
    if not local:
        return ""
    path = weights_folder(point, size, seed) / "model.safetensors"
    return digest(path)[:16] if path.is_file() else ""


def checkpoint_name(epoch: int) -> str:
    return f"epoch_{epoch:03d}.safetensors"


def write_record(
    folder: Path, config: RunConfig, parts: Parts, progress: dict, device: str
) -> None:
    """Write run.json: config, architecture, metrics, data, provenance, digests of checkpoints."""
    known, model = parts.trajectories, parts.model
    donor = None if config.donor is None else model.h[config.swapped_block].attn.config.to_dict()
    statistics = {"state_mean": known.state_mean.tolist(), "state_std": known.state_std.tolist()}
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    seconds = progress["seconds"]
    record = {
        "config": dataclasses.asdict(config) | digests(config),
        "backbone": model.config.to_dict(),
        "donor": donor,
        "metrics": progress["metrics"],
        "data": {"fingerprint": known.fingerprint, "summary": known.summary(), **statistics},
        "provenance": {"device": where, "seconds": seconds, "versions": versions()},
        "checkpoints": {file.name: digest(file) for file in sorted(folder.glob("epoch_*"))},
    }
    write_text(folder / "run.json", {"checksum": _checksum(record), **record})


def read_record(folder: Path) -> tuple[RunConfig, dict]:
    """Return a finished run's config and record. Raises ValueError if run.json was changed."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    values = dict(record["config"])
    found = {name: values.pop(name, None) for name in ("starting_weights", "dataset_digest")}
    for name, default in RETIRED.items():
        if values.pop(name, default) != default:
            raise ValueError(f"this version has no {name}")
    config = RunConfig(**values)
    name = config.name({key: value for key, value in found.items() if value is not None})
    if record["checksum"] != _checksum(record) or name != folder.name:
        raise ValueError("run.json was changed")
    return config, record


def _checksum(record: dict) -> str:
    return digest(json.dumps({k: v for k, v in record.items() if k != "checksum"}))
