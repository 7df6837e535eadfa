"""Damage and interrupt everything, with a seed, and count what goes wrong.

Run from the repository's root: python tests/campaign/run.py --seed 0 (ten minutes on a core), or a
part of it: --parts values kills --tries 50 --moments 5. Prints a table; the exit status is 1 unless
every count is 0:

    traceback   an error other than UserError
    hang        no answer within 60 seconds
    silent      another result than the undamaged one's, under the same name and without a word
    left        files that an undisturbed process does not leave, and the next start does not remove
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import nbformat
import numpy as np
import torch

from dtlib import batch, config, data, records, runs, settings, starts, storage
from dtlib.errors import UserError
from dtlib.pretraining import training
from dtlib.sources import collected
from dtlib.tasks import get_task
from dtlib.train import make_optimiser
from dtlib.wikipedia import games, losses

HOPPER = get_task("hopper")
RUN = {"dataset": "collected:random", "dataset_steps": 200, "size": "tiny", "context": 2}
RUN |= {"epochs": 2, "steps_per_epoch": 2, "batch_size": 2, "warmup_steps": 0}
RUN = config.RunConfig(**RUN, evaluation_episodes=1, initialisation="language")
START = training.PretrainConfig("markov", "tiny", sequence=8, steps=20, batch_size=4)
ODD = [None, True, False, -1, 0, 1, 3, 7.5, 1e-300, 1e308, 10**30, float("nan"), float("inf")]
ODD += ["", "many", "gpt2", "../x", "\0", "x" * 5000, [], [1], [[1]], {}, {"a": 1}, "é", "-0", "1e"]


def within(seconds, action):
    """Return "ok" and the result of ``action``, or what ended it."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "ok", action()
    except UserError as error:
        return ("traceback", error) if "\n" in str(error) else ("refused", error)
    except TimeoutError as error:
        return "hang", error
    except Exception as error:
        return "traceback", error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(content, chance):
    """Return bytes with some flipped, overwritten, cut, repeated or put in."""
    content, size = bytearray(content), len(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        place, length = chance.randrange(size), chance.choice((1, 1, 4, 64))
        part = content[place : place + length]
        kind = chance.randrange(6)
        if kind == 0 and part:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place : place + length] = chance.randbytes(length)
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + length]
        elif kind == 4:
            content[place:place] = part
        else:
            content[place : place + length] = bytes(length)
    return bytes(content)


def mutants(path, tries, chance, read, same):
    """Damage ``path`` and read it; silent is what differs from the undamaged under one name."""
    whole, counts = path.read_bytes(), collections.Counter()
    expected = read()
    for _ in range(tries):
        while (damaged := mutated(whole, chance)) == whole:
            pass
        path.write_bytes(damaged)
        end, found = within(60, read)
        if end == "ok" and not same(found, expected):
            end = "silent"
        counts[end] += 1
        if end in ("traceback", "hang", "silent"):
            print(f"  {path.name}: {end}: {type(found).__name__}: {str(found)[:200]}", flush=True)
    path.write_bytes(whole)
    return counts


def hdf5(tries, chance, folder):
    path = collected.collect(HOPPER, "random", 200, progress=False)

    def read():
        return data.load("collected:random", HOPPER, steps=200).fingerprint

    return mutants(path, tries, chance, read, str.__eq__)


def model_folder(folder):
    return Path(shutil.copytree(starts.SHIPPED / "language-tiny-seed0", folder / "model"))


def weights_of(place):
    model = starts.build_model(str(place), "tiny", HOPPER, 0)
    return records.weights_digest(str(place), "tiny", 0), flat(model.h)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def same_or_renamed(found, expected):
    return found[0] != expected[0] or torch.equal(found[1], expected[1])


def safetensors(tries, chance, folder):
    made = training.pretrain(START, folder / "sealed", "cpu", lambda steps: None)
    sealed = mutants(
        made / "model.safetensors",
        tries // 2,
        chance,
        lambda: weights_of(made),
        lambda found, expected: torch.equal(found[1], expected[1]),
    )
    brought = model_folder(folder)
    path = brought / "model.safetensors"
    rest = tries - tries // 2
    return sealed + mutants(path, rest, chance, lambda: weights_of(brought), same_or_renamed)


def model_config(tries, chance, folder):
    path, counts = model_folder(folder) / "config.json", collections.Counter()
    good = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(tries):
        path.write_text(json.dumps(good | {chance.choice([*good]): chance.choice(ODD)}))
        end, found = within(60, lambda: weights_of(path.parent))
        counts[end] += 1
        if end in ("traceback", "hang"):
            print(f"  config: {end}: {type(found).__name__}: {str(found)[:200]}", flush=True)
    path.write_text(json.dumps(good))
    read = lambda: weights_of(path.parent)  # noqa: E731
    return counts + mutants(path, tries // 4, chance, read, same_or_renamed)


def tokenizer(tries, chance, folder):
    brought, texts = model_folder(folder), folder / "texts"
    texts.mkdir()
    words = [
        [chance.choice("etaoin") * chance.randint(1, 3) for _ in range(30)] for _ in range(400)
    ]
    (texts / "a.txt").write_text("\n\n\n".join(map(" ".join, words)))
    wish = {"initialisation": str(brought), "cotraining": 0.1, "cotraining_corpus": str(texts)}
    wish = config.RunConfig(size="tiny", **wish)

    def read():
        corpus = losses.text_for(brought, str(texts))
        return records.run_folder(wish).name, torch.from_numpy(corpus.held_out)

    return mutants(brought / "tokenizer.json", tries, chance, read, same_or_renamed)


def state(tries, chance, folder):
    model = starts.build_model("random", "tiny", HOPPER, 0)
    optimiser = make_optimiser(model, 1e-3)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimiser.step()
    path = folder / "resume.safetensors"
    storage.save_state(path, model, optimiser, {"metrics": [{"step": 1}]})

    def read():
        ours = starts.build_model("random", "tiny", HOPPER, 1)
        before = flat(ours)
        progress = storage.load_state(path, ours, make_optimiser(ours, 1e-3))
        return progress, flat(ours), before

    def same(found, expected):
        whole = found[0] == expected[0] and torch.equal(found[1], expected[1])
        return whole or (found[0] is None and torch.equal(found[1], found[2]))

    return mutants(path, tries, chance, read, same)


def read_setting(kind, fixed, text, examples):
    return kind(**fixed | settings.parse_settings([text], examples))


def values(tries, chance, folder):
    counts = collections.Counter()
    for _ in range(2 * tries):
        kind, examples, fixed = chance.choice(
            (
                (config.RunConfig, vars(config.RunConfig()), {}),
                (training.PretrainConfig, {"tokens": "", "corpus": ""}, {"kind": "markov"}),
                (games.GameConfig, {}, {"game": "pong"}),
            )
        )
        names = [*kind.__dataclass_fields__, "nonsense"]
        text = f"{chance.choice(names)}={chance.choice(ODD)}"
        if chance.random() < 0.3:
            text = mutated(text.encode(), chance).decode(errors="replace")
        given = [kind, fixed, text, examples]
        end, found = within(60, functools.partial(read_setting, *given))
        counts[end] += 1
        if end in ("traceback", "hang"):
            print(f"  {text[:80]!r}: {end}: {type(found).__name__}: {str(found)[:200]}", flush=True)
    return counts


# Kills


def finetuning():
    run = runs.fine_tune(RUN)
    return run.record["checkpoints"], run.metrics


def data_set():
    return data.load("collected:random", HOPPER, steps=300).fingerprint


def pretraining():
    made = training.pretrain(START, None, "cpu", lambda steps: None)
    return storage.digest(made / "model.safetensors")


FIRST = """import pandas as pd
from dtlib.figures import Output, plt
output, (figure, ax) = Output(profile, "00_first"), plt.subplots()
ax.plot([0, 1])
output.save(figure, "a", output.remembered("a", lambda: pd.DataFrame({"a": [1.5]})))
output.record({"a": 1})"""


def without_kernel(notebook, output, values, **_):
    """Execute a notebook here, where it can be killed at each moment, as papermill does."""
    for cell in notebook.cells[1:]:
        exec(cell.source, dict(values))
    nbformat.write(notebook, output)


def figures():
    new, root = nbformat.v4, Path(os.environ["DTLIB_CACHE"], "repository")
    parameters = new.new_code_cell('profile = ""', id="a", metadata={"tags": ["parameters"]})
    cells = [parameters, new.new_code_cell(FIRST, id="b", metadata={"tags": ["figure-a"]})]
    notebook = new.new_notebook(cells=cells, metadata={"dtlib": {"figures": ["a"]}})
    (root / "notebooks").mkdir(parents=True, exist_ok=True)
    (root / "pyproject.toml").touch()
    nbformat.write(notebook, root / "notebooks" / "00_first.ipynb")
    os.chdir(root)
    with patch("papermill.execute_notebook", without_kernel):
        batch.run("smoke", ["00"])
    return {path.name: storage.digest(path) for path in root.glob("figures/smoke/*/[!.]*")}


def child(cache, action, moment, answers):
    """Run ``action``; die by SIGKILL at the ``moment``-th rename, fsync or unlink."""
    os.environ["DTLIB_CACHE"] = cache
    os.environ["TMPDIR"] = tempfile.tempdir = f"{cache}/tmp"
    Path(tempfile.tempdir).mkdir(parents=True, exist_ok=True)
    count = 0

    def event(*_):
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda file: (event(), fsync(file))
    events = ("os.rename", "os.remove", "os.rmdir")
    sys.addaudithook(lambda name, _: event() if name in events else None)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        answers.put((action(), count))


def kills(most, chance, folder):
    forks, counts = multiprocessing.get_context("forkserver"), collections.Counter()
    slow = ["dtlib.runs", "dtlib.pretraining.training", "dtlib.figures", "dtlib.batch", "papermill"]
    forks.set_forkserver_preload(slow)

    def run(cache, action, moment):
        answers = forks.SimpleQueue()
        process = forks.Process(target=child, args=(str(cache), action, moment, answers))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            return "hang", None
        return (None, answers.get()) if process.exitcode == 0 else (process.exitcode, None)

    def files(cache):
        with storage_of(cache):
            storage.sweep_cache()
        found = {str(path.relative_to(cache)) for path in cache.rglob("*")}
        return {re.sub("-[0-9a-f]{12}.json", "", path) for path in found}  # a measure's key

    for action in (data_set, figures, pretraining, finetuning):
        whole = folder / action.__name__
        _, (expected, moments) = run(whole, action, 0)
        usual, chosen = files(whole), range(1, moments + 1)
        if most is not None:
            chosen = sorted(chance.sample(chosen, min(moments, most)))
        print(f"  {action.__name__}: killed at {len(chosen)} of {moments} moments", flush=True)
        for moment in chosen:
            cache = folder / f"{action.__name__}-{moment}"
            end, _ = run(cache, action, moment)
            again, found = run(cache, action, 0)
            left = sorted(files(cache) ^ usual)
            wrong = "left" if left else "whole"
            wrong = "silent" if found and found[0] != expected else wrong
            wrong = "traceback" if again or end != -signal.SIGKILL else wrong
            wrong = "hang" if "hang" in (end, again) else wrong
            counts[wrong] += 1
            if wrong != "whole":
                print(f"    at {moment}: {wrong} {end} {again} {left}", flush=True)
            shutil.rmtree(cache)
    return counts


@contextlib.contextmanager
def storage_of(cache):
    before = os.environ["DTLIB_CACHE"]
    os.environ["DTLIB_CACHE"] = str(cache)
    yield
    os.environ["DTLIB_CACHE"] = before


PARTS = {
    "hdf5": hdf5,
    "safetensors": safetensors,
    "config": model_config,
    "tokenizer": tokenizer,
    "state": state,
    "values": values,
    "kills": kills,
}


def main():
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=300, help="of each kind; twice of values")
    parser.add_argument("--moments", type=int, help="of each killed action; default: every one")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    asked, rows = parser.parse_args(), {}
    torch.set_num_threads(1)
    for part in asked.parts:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["DTLIB_CACHE"] = f"{folder}/cache"
            chance = random.Random(f"{asked.seed} {part}")
            number = asked.moments if part == "kills" else asked.tries
            rows[part] = PARTS[part](number, chance, Path(folder))
        print(f"{part}: {dict(rows[part])}", flush=True)
    wrong = ("traceback", "hang", "silent", "left")
    print(f"\n{'part':<13}{'tries':>8}" + "".join(f"{name:>11}" for name in wrong))
    for part, counts in rows.items():
        found = "".join(f"{counts[name]:>11}" for name in wrong)
        print(f"{part:<13}{sum(counts.values()):>8}{found}")
    return int(np.sum([[counts[name] for name in wrong] for counts in rows.values()]) > 0)


if __name__ == "__main__":
    sys.exit(main())
