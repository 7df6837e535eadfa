"""Games: replay files written by hand, windows in a loop, the model against transformers, play."""

import copy
import gzip
import io
import json
import shutil

import ale_py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Model

from dtlib.data import Trajectories
from dtlib.errors import UserError
from dtlib.starts import build_model
from dtlib.tasks import get_task
from dtlib.wikipedia import emulator, games, replay

PONG = emulator.GAMES["pong"]


def made_up(lengths, seed=0):
    """Episodes of random screens, actions and rewards."""
    generator, steps = np.random.default_rng(seed), sum(lengths)
    return Trajectories(
        "made-up",
        generator.integers(1, 255, (steps, 84, 84), np.uint8),
        generator.integers(0, 6, steps),
        generator.integers(-1, 2, steps).astype(np.float32),
        np.cumsum([0, *lengths]),
    )


def put(folder, checkpoint=0, *, observation, action, reward, terminal, add_count):
    """Write a checkpoint's files as Dopamine does: np.save into gzip."""
    folder.mkdir(exist_ok=True)
    arrays = {
        "$store$_observation": observation,
        "$store$_action": action,
        "$store$_reward": reward,
        "$store$_terminal": terminal,
        "add_count": add_count,
    }
    for name, array in arrays.items():
        with gzip.open(folder / f"{name}_ckpt.{checkpoint}.gz", "wb") as file:
            np.save(file, array)
    return folder


def rows(trajectories, episodes, blanks=3):
    """The four arrays of some episodes, with blank rows before each."""
    parts = {"observation": [], "action": [], "reward": [], "terminal": []}
    for episode in episodes:
        span = slice(*trajectories.starts[episode : episode + 2])
        end = np.zeros(trajectories.lengths[episode], np.uint8)
        end[-1] = 1
        given = (
            trajectories.observations[span],
            trajectories.actions[span].astype(np.int32),
            trajectories.rewards[span],
            end,
        )
        for part, array in zip(parts.values(), given, strict=True):
            part.extend([np.zeros((blanks, *array.shape[1:]), array.dtype), array])
    return {name: np.concatenate(part) for name, part in parts.items()}


def same(ours, trajectories, episodes):
    kept = np.concatenate([np.arange(*trajectories.starts[e : e + 2]) for e in episodes])
    for name in ("observations", "actions", "rewards", "returns_to_go", "time_steps"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(trajectories, name)[kept])
    assert ours.lengths.tolist() == [trajectories.lengths[e] for e in episodes]


@pytest.mark.parametrize("blanks", [0, 3])
def test_files_written_by_hand_are_cut_into_whole_episodes(tmp_path, blanks):
    data = made_up([7, 1, 9, 5])
    columns = rows(data, [0, 1, 2], blanks)
    ours = replay.load_replay(
        put(tmp_path / "a", **columns, add_count=np.array(len(columns["reward"]))), PONG
    )
    same(ours, data, [0, 1, 2])
    assert ours.actions.dtype == np.int64 and ours.observations.dtype == np.uint8
    last = np.flatnonzero(columns["terminal"])[1]  # two whole episodes and a part of the third
    same(replay.load_replay(tmp_path / "a", PONG, steps=last + 4), data, [0, 1])


def test_several_checkpoints_and_rows_that_were_not_written(tmp_path):
    data = made_up([6, 8, 5, 7, 4])
    stream, full = rows(data, range(5)), 24
    for checkpoint in (0, 1):
        part = {
            name: column[full * checkpoint : full * (checkpoint + 1)].copy()
            for name, column in stream.items()
        }
        for (
            name,
            column,
        ) in part.items():  # each logged buffer has a row that was not written in that round
            part[name] = np.concatenate(
                [column, np.full_like(column[:1], 1 if name == "terminal" else 5)]
            )
        put(
            tmp_path,
            checkpoint,
            **part,
            add_count=np.array(len(column) + (len(column) + 1) * checkpoint),
        )
    same(replay.load_replay(tmp_path, PONG), data, [0, 1])
    same(
        replay.load_replay(tmp_path, PONG, checkpoints=(0, 1)), data, [0, 1, 3, 4]
    )  # the third is cut by the file's end
    same(replay.load_replay(tmp_path, PONG, checkpoints=(0, 1), steps=24), data, [0])


def test_what_is_written_is_loaded_and_has_dopamines_layout(tmp_path):
    data = made_up([5, 3, 8])
    for name in ("a", "b"):
        replay.write_replay(tmp_path / name, data)
    same(replay.load_replay(tmp_path / "a", PONG), data, range(3))
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    stored = {
        name: np.load(io.BytesIO(gzip.decompress(content))) for name, content in files.items()
    }
    expected = {
        f"$store$_{name}_ckpt.0.gz": column for name, column in rows(data, range(3)).items()
    }
    expected |= {
        "add_count_ckpt.0.gz": np.array(25),
        "invalid_range_ckpt.0.gz": np.array([24, 0, 1, 2, 3]),
    }
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(stored[name], array, strict=name.startswith("$"))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda files, put: files["action"].unlink(),
            r"action_ckpt\.0\.gz.*No such file.*replay_logs",
        ),
        (
            lambda files, put: files["observation"].write_bytes(
                files["observation"].read_bytes()[:-200]
            ),
            "not a whole",
        ),
        (lambda files, put: files["reward"].write_bytes(b"no gzip"), "not a whole array"),
        (
            lambda files, put: put(reward=np.zeros(9, np.float32)),
            "different lengths.*'.*reward': 9",
        ),
        (
            lambda files, put: put(observation=np.zeros((18, 84, 80), np.uint8)),
            r"rows of shape \(84, 80\), expected uint8",
        ),
        (lambda files, put: put(reward=np.zeros(18)), "float64 in rows.*expected float32"),
        (
            lambda files, put: put(action=np.full(18, None)),
            "object in rows.*expected int32",
        ),  # a pickle, which is not opened
        (lambda files, put: put(terminal=np.zeros(18, np.uint8)), "no whole episode"),
        (lambda files, put: put(terminal=np.full(18, 7, np.uint8)), "terminals other than 0 and 1"),
        (
            lambda files, put: put(observation=np.zeros((84, 84, 18), np.uint8).T),
            "is in Fortran's order",
        ),
        (
            lambda files, put: put(action=np.full(18, 7, np.int32)),
            "actions from 7 to 7, but pong those from 0 to 5",
        ),
    ],
)
def test_bad_files_are_refused_in_a_sentence(tmp_path, change, sentence):
    columns = rows(made_up([5, 7]), [0, 1])
    put(tmp_path, **columns, add_count=np.array(18))
    files = {name: tmp_path / f"$store$_{name}_ckpt.0.gz" for name in columns}
    change(files, lambda **other: put(tmp_path, **columns | other, add_count=np.array(18)))
    with pytest.raises(UserError, match=sentence) as error:
        replay.load_replay(tmp_path, PONG)
    assert "\n" not in str(error.value)


def test_only_games_with_a_policy_are_collected():
    for game, steps in ("qbert", 100), ("pong", 0):
        with pytest.raises(
            UserError, match=f"{steps} steps of {game} .*expected pong.*at least 1 step"
        ):
            replay.collect_game(emulator.GAMES[game], steps)
    for game in emulator.GAMES.values():
        known = ale_py.vector_env.AtariVectorEnv(game.name, 1).ale.get_action_set()
        assert len(known) == game.actions


def test_windows_never_mix_episodes():
    data, context = made_up([4, 1, 9, 2]), 5
    windows = replay.ScreenSampler(data, context).windows(torch.arange(16))
    for start in range(16):
        episode = np.searchsorted(data.starts, start, side="right") - 1
        begin, end = data.starts[episode : episode + 2]
        for k, row in enumerate(range(start, start + context)):
            real = row < end
            assert windows.mask[start, k] == real
            stack = [
                data.observations[r] if real and r >= begin else np.zeros((84, 84))
                for r in range(row - 3, row + 1)
            ]
            np.testing.assert_array_equal(windows.states[start, k], stack)
            for name in ("actions", "returns_to_go", "time_steps"):
                assert getattr(windows, name)[start, k] == (getattr(data, name)[row] if real else 0)


def area_average(n):
    """The matrix (84, n) that shrinks n pixels to 84, each the mean of what it covers."""
    edges = [
        [(max(j, i * n / 84), min(j + 1, (i + 1) * n / 84)) for j in range(n)] for i in range(84)
    ]
    return np.array([[max(0, high - low) for low, high in row] for row in edges]) * 84 / n


def test_screens_are_dqns():
    """Against the raw console, idle: the maximum of two grey frames, averaged over areas."""
    seed = int(np.random.default_rng(0).integers(1, 2**31 - 1))
    generators = [np.random.default_rng(0)]
    played = emulator.lockstep(PONG, generators, lambda *seen: np.array([3]), False, horizon=30)
    screens = np.stack([screen[0] for screen, *_ in played]).astype(float)
    console = ale_py.ALEInterface()
    console.setFloat("repeat_action_probability", 0.0)
    console.setInt("random_seed", seed)
    console.loadROM(ale_py.roms.get_rom_path("pong"))
    down, across = area_average(210), area_average(160)
    action, found = console.getMinimalActionSet()[3], []

    def frame(of):
        console.act(of)
        return console.getScreenGrayscale().astype(float)

    for idle in range(1, 31):
        console.reset_game()
        frames = [frame(0) for _ in range(idle)][-1:] + [frame(action) for _ in range(4 * 29)]
        pairs = ((frames[i - 1], frames[i]) for i in range(4, len(frames), 4))
        pooled = [frames[0], *(np.maximum(*pair) for pair in pairs)]
        averaged = np.stack([down @ one @ across.T for one in pooled])
        assert averaged.shape == screens.shape
        found.append(np.abs(averaged - screens).max())
    assert min(found) <= 1 and sorted(found)[1] > 1  # rounding, and one number of idle frames alone


def configured(**other):
    given = {"game": "pong", "data_steps": 100, "initialisation": "language", "size": "mini"}
    given |= {"context": 4, "batch_size": 16, "epochs": 2, "steps_per_epoch": 10}
    return games.GameConfig(**given | {"evaluation_episodes": 2, "horizon": 50} | other)


def transformer(initialisation, size):
    config = configured(initialisation=initialisation, size=size, context=5)
    return games.GameTransformer(config, horizon=8)


@pytest.fixture(scope="module")
def model():
    made = transformer("random-matched", "atari")
    with torch.no_grad():
        for table in (made.embed_place, made.embed_time):
            table.normal_(generator=torch.Generator().manual_seed(0))
    return made.double().eval()


def test_model_equals_transformers_and_is_causal(model):
    windows = replay.ScreenSampler(made_up([30]), 5).windows(torch.tensor([2, 9, 24]))
    given = [windows.states, windows.actions, windows.returns_to_go.double(), windows.time_steps]
    logits = model(*given)
    returns, states, actions = model.embed_return, model.embed_state, model.embed_action
    tokens = []
    for k in range(5):
        tokens += [returns(given[2][:, k, None]), states(windows.states[:, k].double() / 255)]
        tokens += [actions(windows.actions[:, k])]
    time = model.embed_time[torch.tensor([2, 7, 7])][:, None]
    tokens = torch.stack(tokens, 1) + model.embed_place + time
    longer = model.config.__class__.from_dict(model.config.to_dict() | {"n_positions": 15})
    reference = GPT2Model(longer).double().eval()
    reference.h.load_state_dict(model.h.state_dict())
    reference.ln_f.load_state_dict(model.ln_f.state_dict())
    torch.nn.init.zeros_(reference.wpe.weight)
    hidden = reference(inputs_embeds=tokens).last_hidden_state
    assert (len(model.h), model.h[0].attn.num_heads, logits.shape) == (6, 8, (3, 5, 6))
    torch.testing.assert_close(logits, hidden[:, 1::3] @ model.head.weight.T, rtol=0, atol=1e-10)
    last = model.act(model.encode(given[0]), *given[1:])
    torch.testing.assert_close(last, logits[:, -1], rtol=0, atol=1e-10)
    changed = [tensor.clone() for tensor in given]
    changed[0][:, 3:], changed[1][:, 2:], changed[2][:, 3:] = 0, 1, 9
    after = model(*changed)
    assert torch.equal(after[:, :3], logits[:, :3])
    assert not torch.allclose(after[:, 3], logits[:, 3])


def test_starting_points_bring_their_blocks():
    ours, again = (transformer("language", "mini") for _ in range(2))
    blocks = build_model("language", "mini", get_task("hopper"), 0).h.state_dict()
    assert all(torch.equal(tensor, blocks[name]) for name, tensor in ours.h.state_dict().items())
    assert all(map(torch.equal, ours.parameters(), again.parameters()))


def test_loss_is_the_mean_over_real_steps():
    windows = replay.ScreenSampler(made_up([5, 7]), 4).windows(torch.tensor([3, 4, 6]))
    logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    losses = [
        -logits[b, k].log_softmax(-1)[windows.actions[b, k]]
        for b, k in windows.mask.nonzero().tolist()
    ]
    assert len(losses) == 2 + 1 + 4
    torch.testing.assert_close(games.game_loss(logits, windows), torch.stack(losses).mean())


def test_collected_pong_is_learnt_and_played(cache, monkeypatch):
    config = configured()
    found = games.fine_tuned_game(config, progress=False)
    start, first, last = found["metrics"]
    assert start["loss"] is None and last["loss"] < first["loss"] and last["loss"] < np.log(6)
    assert [row["step"] for row in found["metrics"]] == [0, 10, 20] and last["lengths"] == [50, 50]
    assert all(score <= 0 for score in last["scores"])
    data = games.load_data(config)
    assert len(data.lengths) == 1 and data.returns[0] > PONG.reference[0]
    monkeypatch.setattr(games, "play", None)  # asked for twice, trained once
    assert games.fine_tuned_game(config, progress=False) == found
    other, folder = configured(seed=1), cache / "games"
    shutil.copytree(folder / config.name, folder / other.name)
    (folder / config.name / "model.safetensors").write_bytes(b"")
    for damaged in (other, config):
        with pytest.raises(UserError, match=f"{damaged.name} was changed: move that folder away"):
            games.fine_tuned_game(damaged, progress=False)
        shutil.rmtree(folder / damaged.name)
    digests = iter("abcd")
    monkeypatch.setattr(games, "weights_digest", lambda *_: next(digests))
    with pytest.raises(UserError, match="changed meanwhile: run again"):
        games.fine_tuned_game(config, progress=False)
    assert not list(folder.glob(f"*seed0-{config.name[-12:]}"))


def test_replay_files_to_an_episode_interrupted_and_resumed(cache, tmp_path, monkeypatch):
    columns = rows(made_up([40, 60]), [0, 1])
    put(tmp_path, **columns, add_count=np.array(len(columns["reward"])))
    configs = [
        configured(data=str(tmp_path), data_checkpoints=[0], data_steps=steps)
        for steps in (None, 200)
    ]
    assert configs[0].name != configs[1].name
    whole = games.fine_tuned_game(configs[0], progress=False)
    play = games.play
    monkeypatch.setattr(
        games,
        "play",
        lambda *args, **given: (
            play(*args, **given) if len(calls) < 2 and not calls.append(0) else 1 / 0
        ),
    )
    calls = []
    with pytest.raises(ZeroDivisionError):
        games.fine_tuned_game(configs[1], progress=False)
    monkeypatch.setattr(games, "play", play)
    resumed = games.fine_tuned_game(configs[1], progress=False)
    assert resumed["metrics"] == whole["metrics"] and len(whole["metrics"]) == 3
    weights = [load_file(cache / "games" / config.name / "model.safetensors") for config in configs]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_episodes_are_a_function_of_their_seeds(model):
    config, model = configured(context=5, horizon=20), copy.deepcopy(model).float()
    first, again = (games.play(model, config, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_collected_files_are_a_function_of_policy_and_seed(cache, tmp_path, monkeypatch):
    first = replay.collect_game(PONG, 100, seed=0, progress=False)
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    again = replay.collect_game(PONG, 100, seed=0, progress=False)
    first, again = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (first, again)
    )
    assert first == again


def test_optimiser_decays_matrices_alone():
    made = transformer("random-matched", "mini")
    decayed, rest = games.game_optimiser(made, 1e-3).param_groups
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    decayed, rest = ({names[id(one)] for one in group["params"]} for group in (decayed, rest))
    assert decayed | rest == set(names.values()) and not decayed & rest
    assert {"h.0.attn.c_attn.weight", "embed_state.0.weight", "head.weight"} <= decayed
    assert {"embed_place", "embed_time", "embed_action.0.weight"} <= rest
    assert {"ln_f.weight", "h.0.ln_1.bias"} <= rest


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(game="tetris"), "Parameter game='tetris'.*'breakout', 'qbert'"),
        (dict(size="huge"), "Parameter size='huge'"),
        (dict(epoch=1), "Parameter epoch"),
        (dict(initialisation="nonsense"), "nonsense"),
        (dict(batch_size=0), "Parameter batch_size=0"),
        (dict(target_return=1e308), "Parameter target_return=1e"),
        (dict(data_checkpoints=()), r"data_checkpoints is \(\)"),
        (dict(data_checkpoints=(0, 0)), r"data_checkpoints is \(0, 0\)"),
        (dict(data_checkpoints=(-1,)), r"data_checkpoints is \(-1,\)"),
    ],
)
def test_wrong_parameters_are_named(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        games.GameConfig(**wrong)


def test_the_defaults_are_the_papers():
    config = games.GameConfig(game="pong")
    assert (config.context, config.batch_size, config.target_return) == (50, 512, 20.0)
    assert config.size == "atari"
    assert games.GameConfig(game="seaquest").batch_size == 128


def test_the_shipped_policy_plays_better_than_chance():
    policy = json.loads((replay.POLICIES / "pong" / "policy.json").read_text())
    assert policy["episodes"] == 10 and policy["score_mean"] > PONG.reference[0]
    weights = np.tile(policy["weights"], (4, 1))
    generators = [np.random.default_rng([7, e]) for e in range(4)]

    def choose(states, before, _):
        return emulator.pong_actions(weights, states, before)

    played = emulator.lockstep(PONG, generators, choose, sticky=True, horizon=400)
    points = sum((rewards * running).sum() for _, _, rewards, running in played)
    assert points > -4  # random actions lose every rally: 4 games of about 8 points each
