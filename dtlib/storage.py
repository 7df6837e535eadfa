"""Files that are whole or absent, locks, digests, the cache, and interrupted trainings."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dtlib.errors import UserError, explained, reading, refused

FULL = errno.ENOSPC, errno.EFBIG, errno.EDQUOT
REFUSED = *FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR
SEAL = "sha256.json"  # in a folder made here: the SHA-256 of its other files


def typed(path: str | Path) -> Path:
    """Return a path as its user meant it: absolute, with ``~`` for the home folder."""
    return Path(os.path.expanduser(path)).absolute()


def readable(path: str) -> str:
    """Return at most 80 bytes of a path's last part: a name in a file system takes 255."""
    return Path(path).name.encode(errors="ignore")[:80].decode(errors="ignore")


def cache_root() -> Path:
    """Return the folder of data, runs and starting points: ``DTLIB_CACHE`` or the user's cache."""
    return typed(os.environ.get("DTLIB_CACHE") or platformdirs.user_cache_dir("dtlib"))


def repository() -> Path:
    """Return the repository's root: this folder or the next one up with notebooks/."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    where = "go to the folder with pyproject.toml and notebooks/"
    raise UserError(f"{Path.cwd()} is not inside the repository: {where}.")


def memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Versions of the libraries that every number depends on."""
    names = ("torch", "transformers", "gymnasium", "mujoco", "numpy")
    return {name: version(name) for name in names}


def code_digest() -> str:
    """Return a digest of dtlib's own files, as they lie there now."""
    return digest(*sorted(filter(Path.is_file, Path(__file__).parent.rglob("*.py"))))[:12]


def digest(*parts: Path | bytes | str | object) -> str:
    """Return the SHA-256 of a path's content, of bytes, of text, or of anything else as JSON."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = bytes.fromhex(_file_digest(part, part.stat().st_ctime_ns, part.stat().st_size))
            if len(parts) == 1:
                return part.hex()
        elif not isinstance(part, bytes):
            text = part if isinstance(part, str) else json.dumps(part, sort_keys=True)
            part = text.encode()
        found.update(part)
    return found.hexdigest()


@functools.cache
@reading()
def _file_digest(path: Path, changed: int, size: int) -> str:
    """Computed once for as long as a file keeps its time of change and its size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_hash(cells: list[dict]) -> str:
    """Hexadecimal SHA-256 over the sources of all code cells among a notebook's ``cells``."""
    return digest(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])


def notebook_hash(path: Path) -> str:
    """Return ``code_hash`` of a notebook's file. Raises UserError for a file that is none."""
    if not path.is_file():
        raise UserError(f"There is no notebook {path}: give Output the name of one.")
    with explained(f"{path} is no whole notebook", "bring it back or move it away", Exception):
        return code_hash(json.loads(path.read_text(encoding="utf-8"))["cells"])


CODE = code_digest()  # as it was when this was imported; modules imported later may be newer


def _here() -> str:
    """Name this boot and this namespace: elsewhere a process's number is another process's."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        return digest(os.readlink("/proc/self/ns/pid"), boot)[:8]
    return "here"


# Begins temporary names; the process's number follows.
WRITING = f".writing-{platform.node()}-{_here()}-"


def writing(path: Path) -> contextlib.AbstractContextManager:
    """Turn a full disk and a folder that cannot be written into a ``UserError`` with ``path``."""
    advice = "make room there, or point DTLIB_CACHE to another disk, and run again"
    return refused(REFUSED, f"Cannot write {path}", advice)


def sweep(found: Iterable[Path]) -> None:
    """Remove those of ``found`` that processes of this machine were writing when they died."""
    for leftover in found:
        if ours := re.fullmatch(rf"{re.escape(WRITING)}(\d+)-[0-9a-f]+", leftover.name):
            with contextlib.suppress(OSError):  # another user's, or another process sweeps, too
                try:
                    os.kill(int(ours[1]), 0)
                except ProcessLookupError:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def sweep_cache() -> None:
    """Remove what dead processes left in the cache: temporary files and locks."""
    linked = [folder for folder in cache_root().glob("*/") if folder.is_symlink()]
    for root in (cache_root(), *linked):
        root = root.resolve()  # else not entered
        sweep(root.rglob(".writing-*"))
        for lock in root.rglob("*.lock"):
            with contextlib.suppress(OSError, Timeout), FileLock(lock).acquire(timeout=0):
                lock.unlink()


def temporary_name(folder: Path) -> Path:
    """Return an unpredictable name in ``folder``, which ``sweep`` knows as this process's."""
    return folder / f"{WRITING}{os.getpid()}-{secrets.token_hex(8)}"


@contextlib.contextmanager
def temporary_folder(parent: str | Path = "") -> Iterator[str]:
    """Yield a folder that is gone afterwards; after ``kill -9``, when this is next called.

    It lies in ``parent``; by default where Python keeps temporary files (TMPDIR).
    """
    folder = temporary_name(Path(parent or tempfile.gettempdir()))
    sweep(folder.parent.glob(".writing-*"))
    folder.mkdir(mode=0o700)
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``path`` on success, remove it on any error.

    ``path`` is the old file or the whole new one, even after ``kill -9``. What that leaves is swept
    when the next file is written beside it. Raises ``UserError`` if the disk is full or read-only.
    """
    temporary = temporary_name(path.parent)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent.glob(".writing-*"))
            temporary.touch(exist_ok=False)  # follows no link
            mode = temporary.stat().st_mode  # the umask's
            yield temporary
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)  # safetensors' own is for its writer only
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
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
    what = f"{path} is not a whole safetensors file"
    advice = "get it anew; no pickle is opened, but transformers' save_pretrained converts them"
    kinds = OSError, SafetensorError
    with explained(what, advice, *kinds), reading(), safe_open(_opens(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _opens(path: Path) -> Path:
    """Return ``path`` if the system opens it: safetensors calls a file "absent" that it refuses."""
    path.open("rb").close()
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, then remove it. Raises UserError where a disk has no locks."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    advice = "point DTLIB_CACHE or --figures to a folder that can be written, on a local disk"
    with explained(f"Cannot lock {path}", advice, OSError):
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            print(f"Another process is making {path.name}: waiting for it.", flush=True)
            held = lock.acquire()
    with held:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)


@contextlib.contextmanager
def growing(final: Path, remake: bool = False) -> Iterator[Path | None]:
    """Yield the folder in which ``final`` grows, ``.partial/`` beside it, and rename it on success.

    Yields None where ``final`` is there already. Of several processes, one works, the others wait.
    ``remake``: a sealed folder in which a file changed is made anew.
    """
    if _made(final) and not (remake and damaged(final)):
        yield None
        return
    folder = final.parent / ".partial" / final.name
    with locked(folder):
        if remake and (changed := damaged(final)):
            print(f"{changed} is damaged: {final.name} is made anew.", flush=True)
            shutil.rmtree(final)
        if _made(final):
            yield None
            return
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file where a folder is to grow: move it away.")
        folder.mkdir(exist_ok=True)
        sweep(folder.glob(".writing-*"))
        yield folder
        with writing(final):
            os.rename(folder, final)
    with contextlib.suppress(OSError):  # in the cache, another process may be about to use it
        final.is_relative_to(cache_root()) or folder.parent.rmdir()


def _made(final: Path) -> bool:
    if final.is_symlink() and not final.exists():
        raise UserError(f"{final} is a link that leads nowhere: mend it, or move it away.")
    return final.exists() and not (final.is_dir() and not any(final.iterdir()))


def seal(folder: Path) -> None:
    """Write the digests of a folder's files, except for its README, into the folder."""
    files = [path for path in sorted(folder.iterdir()) if path.name not in (SEAL, "README.md")]
    write_text(folder / SEAL, {path.name: digest(path) for path in files})


def damaged(folder: Path) -> Path | None:
    """Return a file of ``folder`` that is not as it was sealed, or None."""
    seals = folder / SEAL
    if not seals.is_file():
        return None
    try:
        with reading():
            known = json.loads(seals.read_text(encoding="utf-8"))
        wrong = [name for name, code in known.items() if digest(folder / name) != code]
    except (OSError, ValueError, AttributeError):
        return seals
    return folder / wrong[0] if wrong else None


def save_state(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: dict
) -> None:
    """Write what an interrupted training needs: weights, optimiser, and ``progress`` as JSON."""
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{key}.{i}": value for key, value in state.items()}
    text = json.dumps(progress)
    write_tensors(path, tensors, {"progress": text, "sha256": _sealed(tensors, text)})


def _sealed(tensors: dict[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def load_state(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, name: str | None = None
) -> dict | None:
    """Load what ``save_state`` wrote, in place; return its ``progress``, or None without a file.

    One that is damaged, or of a training of another ``name``, is as none: the training begins anew,
    and that is printed.
    """
    if not path.exists():
        return None
    try:
        with reading(), safe_open(_opens(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            about = file.metadata()
        if about["sha256"] != _sealed(tensors, about["progress"]):
            raise ValueError("its checksum is another one")
        progress = json.loads(about["progress"])
        if progress.get("name") != name:
            raise ValueError(f"it belongs to {progress.get('name', 'an older version')}")
        for file, code in progress.get("files", {}).items():
            if digest(path.with_name(file)) != code:
                raise ValueError(f"so is {file} beside it")
        weights = {key: tensors[f"model.{key}"] for key, _ in model.named_parameters()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        print(f"{path} is damaged or another's ({error}): this training begins anew.", flush=True)
        return None
    model.load_state_dict(weights, strict=False)  # buffers are not saved
    moments = {
        i: {key: tensors[f"{key}.{i}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for i, _ in enumerate(model.parameters())
        if f"step.{i}" in tensors  # before the first step there are none
    }
    optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    return progress


def resumable(
    folder: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    new: dict,
    rows: str,
    count: int,
    advance: Callable[[int, dict], dict],
    on_steps: Callable[[int], None],
) -> dict:
    """Train in ``folder`` from the last saved state on; return the progress at the end.

    ``new`` is the progress of a training that begins. ``advance(number, progress)`` trains and
    returns the row that ``progress[rows]`` gets, with its "step"; numbers run from 0 to ``count`` −
    1. After each, the state is saved. ``on_steps`` is told of the steps of an earlier process.
    Raises UserError if the training was begun on other data.
    """
    state, now = folder / "resume.safetensors", versions() | {"dtlib": CODE}
    progress = load_state(state, model, optimiser, new.get("name")) or new | {"versions": now}
    if progress.get("fingerprint") != new.get("fingerprint"):
        advice = "bring the old data back, or move that folder away"
        raise UserError(f"There are other data than when {folder} was begun: {advice}.")
    if (old := progress["versions"]) != now:
        changed = [f"{n} {old.get(n)} then, {v} now" for n, v in now.items() if old.get(n) != v]
        print(f"{folder.name} goes on with other code: {'; '.join(changed)}.", flush=True)
        progress |= {"versions": now, "begun_with": progress.get("begun_with", old)}
    if progress[rows]:
        on_steps(progress[rows][-1]["step"])
    for number in range(len(progress[rows]), count):
        progress[rows].append(advance(number, progress))
        now_there = {file.name: digest(file) for file in folder.glob("epoch_*")}
        progress["files"] = progress.get("files", {}) | now_there  # one that is lost stays known
        save_state(state, model, optimiser, progress)
    return progress
