"""Films show the episode that an evaluation measures."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dtlib.config import RunConfig
from dtlib.evaluate import rollout
from dtlib.runs import fine_tuned
from dtlib.seeding import stream_seed
from dtlib.tasks import get_task

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import make_films as films  # noqa: E402

HOPPER = get_task("hopper")


def test_what_is_filmed_is_what_is_evaluated():
    short = dict(epochs=1, steps_per_epoch=2, evaluation_episodes=1, dataset_steps=300)
    config = RunConfig(size="tiny", context=3, dataset="collected:random", **short)
    (run,) = fine_tuned([config])
    mean, std = run.statistics()
    asked = dict(target_return=3600.0, context=3, episodes=1, seed=5)
    expected = rollout(run.load_model(), HOPPER, mean, std, **asked)
    first_state = stream_seed(5, "evaluation", 0) % 2**31
    *_, last = films.play(HOPPER, films.by_run(run, 3600.0), first_state, pictures=False)
    assert last.step == expected.lengths[0] and last.fell
    assert abs(last.gained - expected.returns[0]) < 1e-3


def test_a_film_is_a_small_moving_picture(tmp_path, monkeypatch):
    drawn = np.random.default_rng(0).integers(0, 255, (films.SIDE, films.SIDE, 3), np.uint8)
    monkeypatch.setattr(films, "play", lambda *_: moments)
    moments = [films.Moment(step, float(step), step == 3, drawn) for step in (1, 2, 3)]
    last = films.film(HOPPER, None, 0, tmp_path / "film.webp", 10.0)
    assert last.fell and last.gained == 3
    assert Image.open(tmp_path / "film.webp").n_frames == 3
    assert Image.open(tmp_path / "film.png").size == (films.SIDE, films.SIDE)
