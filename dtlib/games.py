"""The Atari games of paper B: playing them, DQN-replay data, windows of screens, and the Decision Transformer over these.

[code] is here the Atari code of Chen et al. 2021, whose setting is B's. A step is one decision, kept for four frames.
"""

import dataclasses
import gzip
import hashlib
import json
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from pydantic import ConfigDict, Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dtlib.collect import POLICIES
from dtlib.data import Trajectories, Windows
from dtlib.errors import UserError, atomic_write, cache_root, checked, locked, sha256, versions, write_text
from dtlib.evaluate import Episodes
from dtlib.model import LAST, SIZES, STATES, DecisionTransformer, build_model, weights_digest
from dtlib.seeding import stream_seed
from dtlib.tasks import get_task
from dtlib.train import choose_device, load_state, predict, save_state

try:
    import ale_py
    from ale_py.vector_env import AtariVectorEnv
except ModuleNotFoundError as error:  # an extra
    raise UserError("Games need the package ale-py: install it with `pip install 'dtlib[games]'`.") from error

HORIZON = 27_000  # steps, 30 minutes of play: where DQN's and Chen et al.'s episodes are cut
STACK = 4  # screens in a state
# DQN-replay's arrays: the stem of a file's name, the dtype, the shape of a row.
REPLAY = {"$store$_observation": (np.uint8, (84, 84)), "$store$_action": (np.int32, ()), "$store$_reward": (np.float32, ()),
          "$store$_terminal": (np.uint8, ())}


@dataclass(frozen=True)
class Game:
    """One Atari game. Scores are sums of an episode's rewards as the game counts them."""

    name: str  # as ALE calls it
    actions: int  # A: the game's minimal set in ALE's order, as DQN-replay numbers them
    target: float  # return asked of the model, in rewards clipped to [−1, 1] as DQN-replay stores them
    reference: tuple[float, float]  # score of random actions, score of a human
    context: int = 30  # K
    batch_size: int = 128


# Targets: Chen et al. 2021, table 8 ([code] has 14000 for Qbert and 1150 for Seaquest; its authors say to take the table's).
# Context and batch: theirs and B's. References: Mnih et al. 2015 and Wang et al. 2016; Chen et al. use them rounded.
GAMES: dict[str, Game] = {game.name: game for game in (
    Game("breakout", 4, 90.0, (1.7, 30.5)),
    Game("qbert", 6, 2500.0, (163.9, 13455.0)),
    Game("pong", 6, 20.0, (-20.7, 14.6), context=50, batch_size=512),
    Game("seaquest", 18, 1450.0, (68.4, 42054.7)),
)}


def get_game(name: str) -> Game:
    """The game called ``name``; ``UserError`` for any other."""
    if name not in GAMES:
        raise UserError(f"Unknown game {name!r}: the games are {', '.join(GAMES)}.")
    return GAMES[name]


def lockstep(game: Game, generators: list[np.random.Generator], choose: Callable[..., np.ndarray], sticky: bool,
             horizon: int = HORIZON) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Play E games at once, one for each generator; each step gives screens, actions, rewards, and which games were running.

    ``choose(states, actions, rewards)`` gets states (E, 4, 84, 84) uint8, the newest screen last, and what was done and gained
    before, (E,). As in DQN: grey, each screen the maximum of the last two of four frames, area-averaged; black before the
    start; 1 to 30 idle frames first. A game ends when it is over or at ``HORIZON``, not with a life. ``sticky``: each frame
    repeats the action before with probability 0.25, as in DQN-replay (Agarwal et al. 2020) and in data collected here; Chen
    et al. evaluate without [code].
    """
    games = AtariVectorEnv(game.name, len(generators), num_threads=min(len(generators), torch.get_num_threads()), noop_max=30,
                           max_num_frames_per_episode=4 * HORIZON, repeat_action_probability=0.25 if sticky else 0.0,
                           use_fire_reset=False, reward_clipping=False)
    states, _ = games.reset(seed=np.array([generator.integers(1, 2**31 - 1) for generator in generators]))
    actions, rewards, running = (np.full(len(generators), value) for value in (0, 0.0, True))
    for _ in range(horizon):
        actions = choose(states, actions, rewards)
        following, rewards, ends, cuts, _ = games.step(actions)
        yield states[:, -1], actions, rewards, running
        states, running = following, running & ~(ends | cuts)  # a finished game begins anew, unheeded
        if not running.any():
            return


def load_replay(folder: Path, game: Game, checkpoints: tuple[int, ...] = (0,), steps: int | None = None) -> Trajectories:
    """Whole episodes from a folder in DQN-replay's layout: observations (N, 84, 84) uint8, actions (N,) int64.

    A checkpoint is a file for each array, as Dopamine writes its replay buffer: up to a million rows in the order of play.
    Of ``steps``, every checkpoint gives an equal share, its first rows (None: all); [code] draws its share at random. Left out
    are rows that the buffer did not fill in that round, the three blank ones that Dopamine puts before each episode ([code]
    learns from these, too), and episodes cut by a file's end. Raises UserError: files missing, damaged, or of another game.
    """
    parts, lengths = [], [[]]
    for checkpoint in checkpoints:
        columns = _read_checkpoint(folder, checkpoint, None if steps is None else -(-steps // len(checkpoints)))
        ends = np.flatnonzero(columns[3]) + 1
        starts = np.concatenate([[0], ends])[:-1]
        padded = ends - starts >= STACK  # is it, at all?
        padded[padded] = ~columns[0][starts[padded, None] + np.arange(STACK - 1)].any((1, 2, 3))
        begins = starts + (STACK - 1) * padded
        if checkpoint and not padded[:1].all():  # it began in the checkpoint before
            begins, ends = begins[1:], ends[1:]
        rows = np.concatenate([np.arange(0), *map(np.arange, begins, ends)])
        parts.append([column[rows] for column in columns[:3]])
        lengths.append(ends - begins)
    starts = np.concatenate([[0], *lengths]).astype(np.int64).cumsum()
    if len(starts) == 1:
        raise UserError(f"{folder}: no whole episode in what was read of checkpoints {checkpoints}: take more steps.")
    observations, actions, rewards = map(np.concatenate, zip(*parts, strict=True))
    if not 0 <= actions.min() <= actions.max() < game.actions:
        raise UserError(f"{folder} has actions from {actions.min()} to {actions.max()}, but {game.name} those from 0 to "
                        f"{game.actions - 1}: choose {game.name}'s folder.")
    return Trajectories(folder.name, observations, actions.astype(np.int64), rewards, starts)


def _read_checkpoint(folder: Path, checkpoint: int, limit: int | None) -> list[np.ndarray]:
    """The first ``limit`` rows (None: all) of the four arrays, without those that the buffer did not fill in that round."""
    totals, columns = {}, []
    try:
        for name, (dtype, shape) in REPLAY.items():
            with gzip.open(path := folder / f"{name}_ckpt.{checkpoint}.gz") as file:
                np.lib.format.read_magic(file)
                (totals[name], *rest), _, found = np.lib.format.read_array_header_1_0(file)
                if found != dtype or tuple(rest) != shape:
                    raise UserError(f"{path} holds {found} in rows of shape {tuple(rest)}, expected {np.dtype(dtype)} and "
                                    f"{shape}: get DQN-replay's own file.")
                rows = totals[name] if limit is None else min(limit, totals[name])
                content = file.read(rows * int(np.prod(shape)) * found.itemsize)
                columns.append(np.frombuffer(content, dtype).reshape(rows, *shape))
        with gzip.open(path := folder / f"add_count_ckpt.{checkpoint}.gz") as file:
            added = int(np.load(file, allow_pickle=False))
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}: expected DQN-replay's layout, one file for each array and checkpoint; give "
                        "a game's folder replay_logs.") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not a whole array of DQN-replay ({error}): remove it, get it anew.") from error
    if len(set(totals.values())) > 1:
        raise UserError(f"{folder}, checkpoint {checkpoint}: different lengths, {totals}; get all files of one checkpoint.")
    return [column[:added % totals[name] or totals[name]] for column in columns]


def write_replay(folder: Path, trajectories: Trajectories) -> None:
    """Write checkpoint 0 as Dopamine would, three blank rows before each episode. The same data gives the same bytes."""
    terminals = np.zeros(len(trajectories.rewards))
    terminals[trajectories.starts[1:] - 1] = 1
    given = trajectories.observations, trajectories.actions, trajectories.rewards, terminals
    blanks = np.repeat(trajectories.starts[:-1], STACK - 1)
    files = {name: np.insert(values.astype(dtype), blanks, 0, axis=0)
             for (name, (dtype, _)), values in zip(REPLAY.items(), given, strict=True)}
    rows = len(terminals) + len(blanks)  # the buffer is just full, its cursor at 0; no stack of screens may reach across that
    for name, array in (files | {"invalid_range": np.arange(-1, STACK) % rows, "add_count": np.array(rows)}).items():
        with (atomic_write(folder / f"{name}_ckpt.0.gz") as temporary, open(temporary, "wb") as raw,
              gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file):  # neither name nor time in the bytes
            np.save(file, array, allow_pickle=False)


def pong_actions(weights: np.ndarray, states: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Pong's policy, (E,) actions for states (E, 4, 84, 84) and the actions before them (E,).

    The paddle goes to where the ball will arrive, or follows it while it leaves. The 5 weights: how far from the paddle's
    middle to hit, what share of the way to follow, which distance to put up with, how far the move before still carries (all
    but the second in rows), and below which speed, in columns a step, to fire, which makes the ball three times as fast.
    """
    def centre(columns: slice, axis: int) -> np.ndarray:  # (E, 2), in the last two screens; the middle where there is nothing
        sums = court[..., columns].sum(5 - axis)
        places = np.arange(sums.shape[-1])
        return np.where(sums.any(-1), sums @ places / np.maximum(sums.sum(-1), 1), places.mean())

    aim, follow, margin, glide, slow = weights.T
    court = np.abs(states[:, -2:, 14:77] - 87.0).clip(max=61)  # (E, 2, 63, 84): its ground is grey 87
    (_, paddle), (last_row, row), (last_column, column) = (
        centre(*where).T for where in ((slice(73, 76), 2), (slice(12, 72), 2), (slice(12, 72), 3)))
    speed = column - last_column
    arrival = row + (row - last_row) * (61 - column) / np.maximum(speed, 0.5)
    arrival = 62 - np.abs(arrival % 124 - 62)  # reflected at both walls
    goal = np.where(speed > 0.5, arrival + aim, 31 + follow * (row - 31))
    error = goal - paddle - glide * np.array([0, 0, -1, 1, -1, 1])[before]
    move = np.where(np.abs(error) > margin, np.sign(error), 0).astype(int)
    return np.array([[2, 0, 3], [4, 1, 5]])[(speed < slow).astype(int), move + 1]  # ALE calls up right, and down left


def collect_game(game: Game, steps: int = 20_000, seed: int = 0, progress: bool = True) -> Path:
    """The folder, in DQN-replay's layout, with the first whole episodes that make ``steps``; made on first use.

    The shipped policy plays, but a share of its actions, drawn from 0 to ½ for each episode, is random. The same arguments
    give the same bytes. ``UserError``: a game without a policy, steps or seed out of range, a full disk.
    """
    def choose(states: np.ndarray, before: np.ndarray, _: np.ndarray) -> np.ndarray:
        random = generator.random() < share  # of the episode that is being played
        return generator.integers(game.actions, size=1) if random else pong_actions(weights, states, before)

    policy = POLICIES / game.name / "policy.json"
    if not policy.exists() or steps < 1 or seed < 0:
        raise UserError(f"Cannot collect {steps} steps of {game.name} with seed {seed}: expected pong, the one game with a "
                        "policy, at least 1 step and a seed from 0; of other games, load DQN-replay's data.")
    weights = np.array(json.loads(policy.read_text())["weights"])
    out = cache_root() / "data" / f"{game.name}-{steps}-seed{seed}-ale{ale_py.__version__}-{sha256(policy)[:8]}"
    with locked(out):
        if (out / "add_count_ckpt.0.gz").exists():  # the last to be written
            return out
        bar, rows, starts = tqdm(desc=f"collecting {game.name}", total=steps, unit=" steps", disable=not progress), [], [0]
        while len(rows) < steps:
            generator = np.random.default_rng([seed, len(starts)])
            share = generator.uniform(0, 0.5)
            rows.extend((screens[0].copy(), *actions, *rewards) for screens, actions, rewards, _ in
                        lockstep(game, [generator], choose, sticky=True))
            starts.append(len(rows))
            bar.update(min(len(rows), steps) - bar.n)
        bar.close()
        write_replay(out, Trajectories(out.name, *map(np.array, zip(*rows, strict=True)), np.array(starts)))
    return out


class GameTransformer(DecisionTransformer):
    """Predict a_t from (R̂_1, s_1, a_1, …, R̂_t, s_t), s_t a stack of screens (Chen et al. 2021, paper B).

    The blocks and the final norm, ``initialisation``, ``size``, ``dropout`` and errors are build_model's; paper B's baseline
    is ("random-matched", "atari"). Around them, as in [code]: DQN's convolutions, a table of actions, tanh after each
    embedding and no input norm, a learned vector for each of the window's 3K places, and one for the time step at which the
    window begins; from ``horizon`` on, the longest episode of the data, they share the last. ``context``: K, None the game's.
    """

    def __init__(self, initialisation: str, size: str, game: Game, seed: int, *, horizon: int, context: int | None = None,
                 dropout: tuple[float, float, float] = (0.1, 0.1, 0.1)):
        nn.Module.__init__(self)
        start = build_model(initialisation, size, get_task("hopper"), seed, dropout)  # any task: only its blocks are used
        self.config, self.h, self.ln_f, width = start.config, start.h, start.ln_f, start.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "game"))
            self.embed_return = nn.Sequential(nn.Linear(1, width), nn.Tanh())
            self.embed_state = nn.Sequential(
                nn.Conv2d(STACK, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
                nn.Flatten(), nn.Linear(3136, width), nn.Tanh())
            self.embed_action = nn.Sequential(nn.Embedding(game.actions, width), nn.Tanh())
            self.embed_place = nn.Parameter(torch.zeros(3 * (context or game.context), width))
            self.embed_time = nn.Parameter(torch.zeros(horizon, width))
            self.head = nn.Linear(width, game.actions, bias=False)
            for part in (self.embed_action[0], self.head):
                nn.init.normal_(part.weight, std=0.02)

    def encode(self, states: Tensor) -> Tensor:
        """Embedded states (B, K, D) of states (B, K, 4, 84, 84) uint8."""
        return self.embed_state(states.flatten(0, 1).to(self.head.weight.dtype) / 255).unflatten(0, states.shape[:2])

    def embed(self, encoded: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Tokens (B, T, D) from embedded states (B, K, D) and the rest as in ``forward``."""
        kinds = (self.embed_return(returns_to_go.unsqueeze(-1)), encoded, self.embed_action(actions))
        tokens = torch.stack(kinds, dim=2).flatten(1, 2)
        # [code] numbers the window in evaluation by its last step: here it is its first, as in training.
        begin = self.embed_time[time_steps[:, :1].clamp(max=len(self.embed_time) - 1)]
        return tokens + self.embed_place[:tokens.shape[1]] + begin

    def act(self, encoded: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Logits (B, A) of the last step's action, from embedded states (B, K, D)."""
        return self.head(self.hidden(self.embed(encoded, actions, returns_to_go, time_steps)[:, :-1], LAST)[:, 0])

    def forward(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Logits (B, K, A) of the actions from states (B, K, 4, 84, 84) uint8, actions and time_steps (B, K) int64 and
        returns_to_go (B, K), not scaled [code]. Logit t does not see a_t itself; windows are padded on the right."""
        return self.head(self.hidden(self.embed(self.encode(states), actions, returns_to_go, time_steps)[:, :-1], STATES))


class ScreenSampler:
    """WindowSampler for games: the screens stay uint8, 7 kB a step, and are stacked here; before an episode they are black."""

    def __init__(self, trajectories: Trajectories, context: int, device: torch.device | str = "cpu"):
        edges = (np.repeat(rows, trajectories.lengths) for rows in (trajectories.starts[:-1], trajectories.starts[1:]))
        columns = trajectories.actions, trajectories.returns_to_go, trajectories.time_steps, *edges
        self._screens, *self._columns, self._begins, self._ends = (
            torch.from_numpy(rows).to(device) for rows in (trajectories.observations, *columns))
        self._offsets = torch.arange(1 - STACK, context, device=device)
        self.number_of_steps = len(trajectories.rewards)

    def windows(self, starts: Tensor) -> Windows:
        """The windows that begin at rows ``starts``, (B,) int64: states (B, K, 4, 84, 84) uint8, actions (B, K) int64."""
        rows = starts[:, None] + self._offsets
        real = (rows >= self._begins[starts][:, None]) & (rows < self._ends[starts][:, None])
        rows, mask = torch.where(real, rows, 0), real[:, STACK - 1:]
        screens = self._screens[rows].masked_fill_(~real[..., None, None], 0)
        states = screens.unfold(1, STACK, 1).movedim(-1, 2).masked_fill(~mask[..., None, None, None], 0)
        return Windows(states, *(column[rows[:, STACK - 1:]].masked_fill_(~mask, 0) for column in self._columns), mask)


def game_loss(logits: Tensor, windows: Windows) -> Tensor:
    """Mean cross-entropy of the actions over real (not padded) steps, in nats; logits (B, K, A)."""
    actions = windows.actions.masked_fill(~windows.mask, -100)  # what cross_entropy leaves out
    return nn.functional.cross_entropy(logits.flatten(0, 1), actions.flatten())


@torch.no_grad()
def play(model: GameTransformer, game: Game, *, target_return: float, episodes: int, seed: int,
         horizon: int = HORIZON) -> Episodes:
    """Scores and lengths of ``episodes`` games side by side, each asked for ``target_return``, cut at ``horizon`` steps.

    Actions are drawn from the model's distribution [code]. R̂ falls by the clipped rewards that it is made of in the data;
    [code] subtracts the raw ones. Game e draws all from (seed, "game", e).
    """
    def choose(states: np.ndarray, _: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        encoded = model.encode(torch.from_numpy(states).to(device)[:, None])[:, 0]
        before = past[-1][2] if past else torch.full((episodes,), target_return).to(encoded)
        still_to_come = before - torch.from_numpy(rewards.clip(-1, 1)).to(encoded)
        past.append((encoded, torch.zeros(episodes, dtype=torch.int64, device=device), still_to_come))
        begins = torch.full((episodes, 1), len(steps) + 1 - len(past), device=device)
        logits = model.act(*(torch.stack(column, 1) for column in zip(*past, strict=True)), begins)
        draws = torch.tensor([[generator.random()] for generator in generators], device=device)
        drawn = (logits.double().softmax(-1).cumsum(-1)[:, :-1] < draws).sum(-1)
        return past[-1][1].copy_(drawn).cpu().numpy()

    model.eval()
    device, steps = model.head.weight.device, []
    generators = [np.random.default_rng(stream_seed(seed, "game", e)) for e in range(episodes)]
    past = deque(maxlen=len(model.embed_place) // 3)  # embedded states (E, D), actions and returns-to-go (E,)
    for _, _, rewards, running in lockstep(game, generators, choose, sticky=False, horizon=horizon):
        steps.append((rewards * running, running))
    return Episodes(*(np.sum(column, 0) for column in zip(*steps, strict=True)))


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class GameConfig:
    """All that decides a run on a game; by default paper B's baseline. Raises UserError for wrong names and values."""

    game: str = "breakout"
    data: str = "collected"  # or a folder in DQN-replay's layout
    data_steps: Annotated[int, Field(gt=0)] | None = 500_000  # None: all of a folder's
    data_checkpoints: Annotated[tuple[int, ...], Field(strict=False)] = tuple(range(50))  # of a folder
    initialisation: str = "random-matched"
    size: Literal[tuple(SIZES)] = "atari"
    seed: Annotated[int, Field(ge=0)] = 0
    context: Annotated[int, Field(gt=0)] | None = None  # None: the game's, as of batch and target
    batch_size: Annotated[int, Field(gt=0)] | None = None
    target_return: float | None = None
    epochs: Annotated[int, Field(gt=0)] = 5
    steps_per_epoch: Annotated[int, Field(gt=0)] | None = None  # None: the data once
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    warmup_steps: Annotated[int, Field(gt=0)] = 3  # 10,240 actions [code]
    evaluation_episodes: Annotated[int, Field(gt=0)] = 10
    horizon: Annotated[int, Field(gt=0)] = HORIZON  # steps after which a game in evaluation is cut
    starting_weights: str | None = None  # filled in: the digest of the starting point's weights

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: object, build: Callable) -> "GameConfig":
        config = checked(cls, values, build)
        game = get_game(config.game)
        given = dict(context=game.context, batch_size=game.batch_size, target_return=game.target,
                     starting_weights=weights_digest(config.initialisation, config.size, config.seed))
        for name, value in given.items():
            if getattr(config, name) is None:
                object.__setattr__(config, name, value)
        return config

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.game}-{Path(self.initialisation).name}-K{self.context}-seed{self.seed}-{digest}"

    def load_data(self, progress: bool = True) -> Trajectories:
        """The data (collected on first use). Raises UserError as ``collect_game`` and ``load_replay`` do."""
        game = get_game(self.game)
        if self.data == "collected":
            return load_replay(collect_game(game, self.data_steps or 20_000, progress=progress), game)
        return load_replay(Path(self.data), game, self.data_checkpoints, self.data_steps)


def game_optimiser(model: GameTransformer, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with β₂ 0.95 and weight decay 0.1 for matrices and kernels, not for tables, norms and biases [code]."""
    tables = {id(model.embed_action[0].weight), id(model.embed_place), id(model.embed_time)}
    decayed = [p for p in model.parameters() if p.dim() > 1 and id(p) not in tables]
    rest = [p for p in model.parameters() if p.dim() < 2 or id(p) in tables]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                             lr=learning_rate, betas=(0.9, 0.95), fused=True)


def train_game_epoch(model: GameTransformer, optimiser: torch.optim.Optimizer, sampler: ScreenSampler, starts: Tensor, *,
                     first_step: int, total_steps: int, learning_rate: float, warmup_steps: int,
                     on_step: Callable[[], None]) -> float:
    """``train_epoch`` for games: a step per row of ``starts`` (steps, B), gradients clipped at norm 1; the mean loss.

    The learning rate grows linearly over ``warmup_steps``, and falls along a cosine to a tenth [code].
    """
    model.train()
    total = torch.zeros((), device=starts.device)
    for step, row in enumerate(starts, first_step):
        falling = max(0.1, 0.5 * (1 + math.cos(math.pi * step / total_steps)))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min((step + 1) / warmup_steps, falling)
        windows = sampler.windows(row)
        loss = game_loss(predict(model, windows), windows)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        total += loss.detach()
        on_step()
    return float(total / len(starts))


def fine_tuned_game(config: GameConfig, device: str = "auto", progress: bool = True) -> dict:
    """The record of ``config``'s run: config, metrics, versions; trained if absent, from its last finished epoch.

    metrics: per epoch, 0 being the start: step, loss (mean of the epoch, nats an action; None at 0), scores and lengths (one
    for each episode). The weights of the last epoch lie beside the record.
    """
    final, device = cache_root() / "games" / config.name, choose_device(device)
    with locked(final):
        if not (final / "run.json").exists():
            _train_game(config, final, device, progress)
    return json.loads((final / "run.json").read_text())


def _train_game(config: GameConfig, folder: Path, device: str, progress: bool) -> None:
    state = folder / "resume.safetensors"
    game, trajectories = get_game(config.game), config.load_data(progress)
    sampler = ScreenSampler(trajectories, config.context, device)
    model = GameTransformer(config.initialisation, config.size, game, config.seed, context=config.context,
                            horizon=int(trajectories.lengths.max())).to(device)
    optimiser = game_optimiser(model, config.learning_rate)
    metrics = load_state(state, model, optimiser)["metrics"] if state.exists() else []
    per_epoch = config.steps_per_epoch or -(-sampler.number_of_steps // config.batch_size)
    total = config.epochs * per_epoch
    with tqdm(total=total, initial=max(len(metrics) - 1, 0) * per_epoch, desc=config.name, unit="step",
              disable=not progress) as bar, torch.random.fork_rng(range(torch.cuda.device_count())):
        for epoch in range(len(metrics), config.epochs + 1):
            loss, step = None, epoch * per_epoch
            if epoch > 0:
                torch.manual_seed(stream_seed(config.seed, "dropout", epoch))
                generator = torch.Generator().manual_seed(stream_seed(config.seed, "batches", epoch))
                starts = torch.randint(sampler.number_of_steps, (per_epoch, config.batch_size), generator=generator)
                loss = train_game_epoch(model, optimiser, sampler, starts.to(device), first_step=step - per_epoch,
                                        total_steps=total, learning_rate=config.learning_rate,
                                        warmup_steps=config.warmup_steps, on_step=bar.update)
            played = play(model, game, target_return=config.target_return, episodes=config.evaluation_episodes,
                          seed=stream_seed(config.seed, "evaluation of epoch", epoch), horizon=config.horizon)
            metrics.append({"step": step, "loss": loss, "scores": played.returns.tolist(),
                            "lengths": played.lengths.tolist()})
            save_state(state, model, optimiser, {"metrics": metrics})
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(model.state_dict(), temporary)
    record = {"config": dataclasses.asdict(config), "metrics": metrics,
              "versions": {**versions(), "ale-py": ale_py.__version__}}
    write_text(folder / "run.json", record)
    state.unlink()
