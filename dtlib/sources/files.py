"""Data from elsewhere: HDF5 files in D4RL's layout, D4RL's own files, and Minari's data sets."""

import contextlib
import logging
import os
from pathlib import Path

import h5py
import numpy as np
import pooch
import requests

from dtlib.errors import UserError, explained, reading
from dtlib.progress import tqdm
from dtlib.sources.collected import QUALITIES
from dtlib.sources.episodes import KEYS, fingerprint
from dtlib.storage import digest, locked, memory, temporary_folder, typed, write_text, writing
from dtlib.tasks import Task

D4RL_ADDRESS = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
PICKLES = {".pkl", ".pickle", ".pt", ".pth"}
SUFFIXES = {".hdf5", ".h5", *PICKLES}  # of paths; pickles are refused


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a whole HDF5 file in D4RL's layout. Raises UserError for others."""
    if not os.path.isfile(path):  # nor a name that is too long
        raise UserError(f"There is no file {path}: expected an HDF5 file in D4RL's layout.")
    with reading():
        head = np.fromfile(path, np.uint8, 2).tolist()
    if path.suffix.lower() in PICKLES or (head[:1] == [0x80] and head[1:] <= [5]):
        raise UserError(f"{path} is a pickle, which can run code: give HDF5 in D4RL's layout.")
    what, advice = f"{path} is not HDF5, or not all of it is there", "move it away, get it anew"
    # Damage surfaces as any of many kinds.
    with explained(what, advice, Exception), reading(), h5py.File(path) as file:
        # Without following links: one to a pipe would hang.
        links = {key: file.get(key, getlink=True) for key in set(KEYS) & set(file.keys())}
        columns = {k: _read_array(path, file, k, links[k]) for k in KEYS if k in links}
        if (seal := file.attrs.get("sha256")) and seal != fingerprint(columns.values()):
            raise ValueError("its arrays are not those that were written")
        return columns


def _read_array(path: Path, file: h5py.File, key: str, link: object) -> np.ndarray:
    inside = isinstance(link, h5py.HardLink)
    if inside and not isinstance(file[key], h5py.Dataset):
        raise UserError(f"{path}: {key} is no array: give one, of a row a step.")
    if not inside or (array := file[key]).external or array.is_virtual:
        raise UserError(f"{path}: {key} lies in another file, which is not read: copy it into one.")
    if array.nbytes > memory():
        size = f"{array.nbytes / 1e9:,.0f} GB, more than this machine's memory"
        raise UserError(f"{path}: {key} takes {size}: take a smaller data set.")
    settings = array.id.get_create_plist()
    for code, *_ in map(settings.get_filter, range(settings.get_nfilters())):
        if not h5py.h5z.filter_avail(code):
            advice = "install it for h5py, or copy the file without (h5repack -f NONE)"
            raise UserError(f"{path}: {key} is compressed by filter {code}: {advice}.")
    return array[()]


def data_files(dataset: str, task: Task) -> list[Path]:
    """Return the files that ``dataset`` names, as far as they are here; of collected data, none."""
    kind, _, what = dataset.partition(":")
    if kind == "d4rl":
        files = [d4rl_path(task, what)]
    elif kind == "minari":
        root = typed(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets")
        files = sorted((root / what / "data").rglob("*")) if what else []
    else:
        files = [typed(dataset)] if kind != "collected" else []
    return [path for path in files if os.path.isfile(path)]


def d4rl_path(task: Task, quality: str) -> Path:
    """Return where d4rl keeps a ``-v2`` file: in D4RL_DATASET_DIR or ~/.d4rl/datasets."""
    if quality not in QUALITIES:
        known = ", ".join(QUALITIES)
        raise UserError(f"Unknown data set d4rl:{quality}: the qualities are {known}.")
    folder = typed(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    return folder / f"{task.name}_{quality.replace('-', '_')}-v2.hdf5"


def d4rl_file(task: Task, quality: str, progress: bool = True) -> Path:
    """Return D4RL's file, downloaded if it is absent.

    No hashes are published. So the SHA-256 of a file's first use is kept beside it, as sha256sum
    does, and checked at each later use. Raises UserError if it differs, or if the download fails.
    """
    path = d4rl_path(task, quality)
    known = path.with_suffix(".sha256")
    if not path.exists() or (not known.exists() and os.access(path.parent, os.W_OK)):
        with locked(path):  # another process may have been quicker
            if not path.exists():
                _download(path, progress)
            if not known.exists():
                write_text(known, f"{digest(path)}  {path.name}\n")
    if known.exists() and known.read_text(encoding="utf-8").split()[:1] != [digest(path)]:
        advice = f"get the former one, or move {known.name} away to use this one"
        raise UserError(f"{path} has changed since it was first used: {advice}.")
    return path


def _download(path: Path, progress: bool) -> None:
    """Download a D4RL file, whole or not at all; two versions of it are never joined."""
    pooch.get_logger().setLevel(logging.WARNING)
    fetch = pooch.HTTPDownloader(progressbar=progress, chunk_size=1 << 20, timeout=60)
    secure = D4RL_ADDRESS.replace("http:", "https:")  # not every server has it
    what = f"Cannot download {path.name} from {D4RL_ADDRESS}"
    advice = f"put {path.name} into {path.parent}, or set D4RL_DATASET_DIR to where it lies"
    with explained(what, advice, OSError), writing(path), temporary_folder(path.parent) as folder:
        for address in (secure, D4RL_ADDRESS):
            unreachable = [requests.ConnectionError] * (address == secure)
            with contextlib.suppress(*unreachable):
                pooch.retrieve(address + path.name, None, path.name, folder, downloader=fetch)
                break
        if not h5py.is_hdf5(arrived := Path(folder, path.name)):
            raise ConnectionError("what the server sent is not HDF5")
        arrived.replace(path)


def read_minari(identifier: str, progress: bool = True) -> dict[str, np.ndarray]:
    """Return a Minari data set as D4RL's arrays (no last observations). Raises UserError."""
    import minari  # slow, and seldom needed

    parts, what = [], f"Minari can neither read nor download {identifier!r}"
    advice = "give an id such as mujoco/hopper/medium-v0; move a damaged copy away"
    with explained(what, advice, Exception), reading():  # each of its backends raises its own kind
        dataset = minari.load_dataset(identifier, download=True)
        for episode in tqdm(dataset, identifier, dataset.total_episodes, disable=not progress):
            last = np.arange(len(episode)) == len(episode) - 1  # ends, if only as a timeout
            ends = episode.terminations, episode.truncations | last
            parts.append((episode.observations[:-1], episode.actions, episode.rewards, *ends))
        columns = zip(*parts, strict=True)
        return {key: np.concatenate(rows) for key, rows in zip(KEYS, columns, strict=True)}
