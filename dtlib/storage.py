"""Files that are whole or absent, locks, digests, the cache, and interrupted trainings."""

import contextlib
import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dtlib.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def cache_root() -> Path:
    """Return the folder of data, runs and starting points: ``DTLIB_CACHE`` or the user's cache."""
    return Path(os.environ.get("DTLIB_CACHE") or platformdirs.user_cache_dir("dtlib"))


def repository() -> Path:
    """Return the repository's root: this folder or the next one up with notebooks/."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise UserError(
        f"{Path.cwd()} is not inside the repository: go to the folder with pyproject.toml and "
        "notebooks/."
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that every number depends on."""
    names = ("torch", "transformers", "gymnasium", "mujoco", "numpy")
    return {name: version(name) for name in names}


def digest(*parts: Path | bytes | str | object) -> str:
    """Return the SHA-256 of a path's content, of bytes, of text, or of anything else as JSON."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = bytes.fromhex(_file_digest(part, part.stat().st_mtime_ns, part.stat().st_size))
            if len(parts) == 1:
                return part.hex()
        elif not isinstance(part, bytes):
            text = part if isinstance(part, str) else json.dumps(part, sort_keys=True)
            part = text.encode()
        found.update(part)
    return found.hexdigest()


@functools.cache
def _file_digest(path: Path, modified: int, size: int) -> str:
    """Computed once for as long as a file keeps its time and size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def no_room(path: Path) -> Iterator[None]:
    """Turn a full disk, or a file over the size limit, into a ``UserError`` with ``path``."""
    try:
        yield
    except Exception as error:
        # Safetensors wraps the system's error, whose text is still there.
        if any(os.strerror(code) in str(error) for code in DISK_FULL):
            raise UserError(
                f"No room to write {path}: the disk is full or a size limit was reached ({error}); "
                "free some space, or point DTLIB_CACHE to a larger disk, and run again."
            ) from error
        raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``path`` on success, remove it on any error.

    ``path`` is the old file or the whole new one, even after ``kill -9``, which may leave a
    ``.writing-*`` file beside it. Raises ``UserError`` when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        with no_room(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str | dict) -> None:
    """Write text, or a dictionary as JSON, whole or not at all."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return a safetensors file's tensors, on the CPU. Raises UserError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): get it anew; no pickle is opened, "
            "but transformers' save_pretrained turns them into this format."
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` against other processes; leave no lock file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is making {path.name}: waiting for it.", flush=True)
        held = lock.acquire()
    with held:
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)


@contextlib.contextmanager
def growing(final: Path) -> Iterator[Path | None]:
    """Yield the folder in which ``final`` grows, ``.partial/`` beside it, and rename it on success.

    Yields None where ``final`` is there already. Of several processes, one works, the others wait.
    """
    folder = final.parent / ".partial" / final.name
    with locked(folder):
        if final.exists():
            yield None
            return
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".writing-*"):  # of a process that was killed
            leftover.unlink()
        yield folder
        os.rename(folder, final)


def save_state(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: dict
) -> None:
    """Write what an interrupted training needs: weights, optimiser, and ``progress`` as JSON."""
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{key}.{i}": value for key, value in state.items()}
    write_tensors(path, tensors, {"progress": json.dumps(progress)})


def load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict | None:
    """Load what ``save_state`` wrote, in place; return its ``progress``, or None without a file."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        progress = json.loads(file.metadata()["progress"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    moments = {
        i: {key: tensors[f"{key}.{i}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for i, _ in enumerate(model.parameters())
        if f"step.{i}" in tensors  # before the first step there are none
    }
    optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    return progress
