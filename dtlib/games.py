"""The Atari games of paper B: playing them, DQN-replay data, windows of screens, and the Decision Transformer over these.

The setting is Chen et al. 2021, whose Atari code B takes over: below, [code] is theirs. A step is one decision, which the
console repeats for four frames.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ale_py
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from dtlib.collect import POLICIES
from dtlib.data import Trajectories, Windows
from dtlib.errors import UserError, atomic_write, cache_root, locked
from dtlib.evaluate import Episodes
from dtlib.model import LAST, SIZES, STATES, DecisionTransformer, build_model
from dtlib.seeding import stream_seed
from dtlib.tasks import get_task
from dtlib.train import predict

SIZES["atari"] = 6, 128, 8  # paper B's Decision Transformer for games
HORIZON = 27_000  # steps, 30 minutes of play: where DQN's and Chen et al.'s episodes are cut
STACK = 4  # screens in a state
# DQN-replay's arrays: dtype and shape of a row.
REPLAY = {"observation": (np.uint8, (84, 84)), "action": (np.int32, ()), "reward": (np.float32, ()), "terminal": (np.uint8, ())}


@dataclass(frozen=True)
class Game:
    """One Atari game. Scores are sums of an episode's rewards as the game counts them."""

    name: str  # as ALE calls it
    actions: int  # A: the game's minimal set, in ALE's order; DQN-replay numbers its actions so
    target: float  # return asked of the model, in rewards clipped to [−1, 1], as DQN-replay stores them
    reference: tuple[float, float]  # score of random actions, score of a human
    context: int = 30  # K
    batch_size: int = 128

    def normalised(self, scores: float | np.ndarray) -> float | np.ndarray:
        """Gamer-normalised score: 0 is random actions, 100 the human games tester."""
        random, human = self.reference
        return 100 * (scores - random) / (human - random)


# Targets: Chen et al. 2021, table 8. [code] has 14000 for Qbert and 1150 for Seaquest, from an earlier version of the paper, and
# its authors say to take the table's. Context and batch: theirs and B's. References: Mnih et al. 2015 and Wang et al. 2016, the
# ones that Chen et al. normalise with, there rounded.
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


def make_environments(game: Game, number: int, sticky: bool) -> AtariVectorEnv:
    """``number`` games side by side with DQN's preprocessing: states (number, 4, 84, 84) uint8, the newest screen last.

    Grey, each screen the maximum of the last two of four frames, area-averaged to 84×84; screens from before the start are
    black; 1 to 30 idle frames first. The game's end and ``HORIZON`` end an episode, the loss of a life does not. ``sticky``:
    each frame repeats the action before with probability 0.25. DQN-replay was played so (Agarwal et al. 2020), but Chen et
    al. evaluate without, so collecting sets it and ``play`` does not by default.
    """
    return AtariVectorEnv(game.name, number, num_threads=min(number, torch.get_num_threads()), noop_max=30,
                          max_num_frames_per_episode=4 * HORIZON, repeat_action_probability=0.25 if sticky else 0.0,
                          use_fire_reset=False, reward_clipping=False)


def _replay_file(folder: Path, array: str, checkpoint: int) -> Path:
    return folder / f"{'$store$_' if array in REPLAY else ''}{array}_ckpt.{checkpoint}.gz"


def load_replay(folder: Path | str, game: Game, *, checkpoints: tuple[int, ...] = (0,),
                steps: int | None = None) -> Trajectories:
    """Whole episodes from a folder in DQN-replay's layout: observations (N, 84, 84) uint8, actions (N,) int64.

    A checkpoint is a file for each array, as Dopamine writes its replay buffer: up to a million rows in the order of play.
    Of ``steps``, every checkpoint gives an equal share, its first rows (None: all); [code] draws its share at random. Left out
    are rows that the buffer did not fill in that round, the three blank ones that Dopamine puts before each episode ([code]
    learns from these, too), and episodes cut by a file's end. Raises UserError: files missing, damaged, or of another game.
    """
    folder, parts, lengths = Path(folder).expanduser(), [], []
    for checkpoint in checkpoints:
        columns = _read_checkpoint(folder, checkpoint, None if steps is None else -(-steps // len(checkpoints)))
        ends = np.flatnonzero(columns["terminal"]) + 1
        starts = np.concatenate([[0], ends])[:-1]
        first = np.minimum(starts[:, None] + np.arange(STACK - 1), ends[:, None] - 1)
        blank = ~columns["observation"][first].any((2, 3)) & (columns["action"][first] == 0) & (columns["terminal"][first] == 0)
        begins = starts + np.cumprod(blank, axis=1).sum(1)
        whole = np.full(len(starts), True)
        whole[:1] = checkpoint == 0 or begins[:1] > starts[:1]  # otherwise it began in the checkpoint before
        kept = np.full(len(columns["terminal"]), False)
        for begin, end in zip(begins[whole], ends[whole], strict=True):
            kept[begin:end] = True
        parts.append([columns[name][kept] for name in ("observation", "action", "reward")])
        lengths.append((ends - begins)[whole])
    if not sum(map(len, lengths)):
        raise UserError(f"{folder}: no whole episode in what was read of checkpoints {checkpoints}: take more steps, or others.")
    observations, actions, rewards = map(np.concatenate, zip(*parts, strict=True))
    if not 0 <= actions.min() <= actions.max() < game.actions:
        raise UserError(f"{folder} has actions from {actions.min()} to {actions.max()}, but {game.name} those from 0 to "
                        f"{game.actions - 1}: choose {game.name}'s folder.")
    starts = np.concatenate([[0], *lengths]).astype(np.int64).cumsum()
    return Trajectories(folder.name, observations, actions.astype(np.int64), rewards, starts)


def _read_checkpoint(folder: Path, checkpoint: int, limit: int | None) -> dict[str, np.ndarray]:
    """The first ``limit`` rows (None: all) of the four arrays, without those that the buffer did not fill in that round."""
    totals, columns = {}, {}
    for name, (dtype, shape) in REPLAY.items():
        with _opened(_replay_file(folder, name, checkpoint)) as file:
            np.lib.format.read_magic(file)
            found_shape, _, found = np.lib.format.read_array_header_1_0(file)
            if found != dtype or found_shape != (*found_shape[:1], *shape):
                raise UserError(f"{file.name} holds {found} of shape {found_shape}, expected {np.dtype(dtype)} of shape "
                                f"{('N', *shape)}: get DQN-replay's own file.")
            totals[name] = found_shape[0]
            rows = min(totals[name], totals[name] if limit is None else limit)
            content = file.read(size := rows * math.prod(shape) * found.itemsize)
            if len(content) < size:
                raise EOFError(f"{len(content):,} of {size:,} bytes")
        columns[name] = np.frombuffer(content, dtype).reshape(rows, *shape)
    if len(set(totals.values())) > 1:
        raise UserError(f"{folder}, checkpoint {checkpoint}: the arrays have different lengths, {totals}; get all of one buffer.")
    with _opened(_replay_file(folder, "add_count", checkpoint)) as file:
        added = int(np.load(file, allow_pickle=False))
    return {name: column[:added % total or total] for (name, column), total in zip(columns.items(), totals.values(), strict=True)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[gzip.GzipFile]:
    """A file of DQN-replay, unzipped as it is read; ``UserError`` where it is missing or damaged."""
    try:
        with gzip.open(path) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}: expected DQN-replay's layout, one file for each array and checkpoint; give "
                        "the folder replay_logs of a game.") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not a whole file of DQN-replay ({error}): remove it, get it anew.") from error


def write_replay(folder: Path, trajectories: Trajectories) -> None:
    """Write checkpoint 0 as Dopamine would: three blank rows before each episode. The same data gives the same bytes."""
    real = np.arange(len(trajectories.rewards)) + np.repeat((STACK - 1) * np.arange(1, len(trajectories.starts)),
                                                            trajectories.lengths)
    terminals = np.zeros(len(real))
    terminals[trajectories.starts[1:] - 1] = 1
    rows, files = int(real[-1]) + 1, {}
    given = trajectories.observations, trajectories.actions, trajectories.rewards, terminals
    for (name, (dtype, shape)), values in zip(REPLAY.items(), given, strict=True):
        files[name] = np.zeros((rows, *shape), dtype)
        files[name][real] = values
    # The buffer is just full: its cursor is at 0, and no stack of screens may reach across it.
    files |= {"invalid_range": np.arange(-1, STACK) % rows, "add_count": np.array(rows)}
    for name, array in files.items():
        with (atomic_write(_replay_file(folder, name, 0)) as temporary, open(temporary, "wb") as raw,
              gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file):  # neither name nor time in the bytes
            np.save(file, array, allow_pickle=False)


def pong_features(states: np.ndarray) -> np.ndarray:
    """What the Pong policy sees, (E, 6) float64, from states (E, 4, 84, 84): 1; and, in rows of the court downwards, the
    height at which the ball will arrive (walls reflect it; where it is, if it leaves) and where it is, both less the
    paddle's; the paddle's velocity; the ball's; and the opponent's height less the paddle's."""
    court = np.abs(states[:, -2:, 14:77].astype(np.float64) - 87)  # (E, 2, 63, 84): the last two screens, less the ground
    down, across = np.arange(63.0), np.arange(84.0)

    def centre(part: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:  # (E, 2); the middle where there is nothing
        weights = part.sum(axis)
        return np.where(weights.any(-1), weights @ places / np.maximum(weights.sum(-1), 1e-9), places.mean())

    ball = court[..., 12:72]
    x, y = centre(ball, across[12:72], 2), centre(ball, down, 3)
    paddle, opponent = (centre(court[..., columns].clip(max=61), down, 3) for columns in (slice(73, 76), slice(8, 11)))
    speed = x[:, 1] - x[:, 0]
    fall = y[:, 1] - y[:, 0]
    arrival = y[:, 1] + np.where(speed > 0.5, fall * (73 - x[:, 1]) / np.maximum(speed, 0.5), 0)
    arrival = 62 - np.abs(arrival % 124 - 62)  # reflected at both walls
    now = paddle[:, 1]
    return np.stack([np.ones_like(now), arrival - now, y[:, 1] - now, now - paddle[:, 0], fall, opponent[:, 1] - now], 1)


def pong_actions(weights: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Linear in the features (6,): down where their weighted sum exceeds 1, up where it is below −1, else nothing; (E,)."""
    drive = (pong_features(states) * weights).sum(1)
    return np.select([drive > 1, drive < -1], [3, 2], 0)  # ALE calls them left and right


def collect_game(game: Game, steps: int = 20_000, seed: int = 0, progress: bool = True) -> Path:
    """The folder, in DQN-replay's layout, with the first whole episodes that make ``steps``; made on first use.

    The shipped policy plays them with sticky actions; for variety each replaces its own share of the actions, drawn from 0 to
    a half, by random ones. Episodes depend on ``seed`` and their number alone, and the same arguments give the same bytes.
    ``UserError``: a game without a policy, steps or seed out of range, a full disk.
    """
    policy = POLICIES / game.name / "policy.json"
    if not policy.exists():
        raise UserError(f"No policy for {game.name} is shipped, only for pong: give a folder of DQN-replay to load_replay.")
    if steps < 1 or seed < 0:
        raise UserError(f"Cannot collect {steps} steps with seed {seed}: expected at least 1 step and a seed from 0.")
    digest = hashlib.sha256(f"layout 1, ale-py {ale_py.__version__} ".encode() + policy.read_bytes()).hexdigest()
    out = cache_root() / "data" / f"{game.name}-{steps}-seed{seed}-{digest[:8]}"
    with locked(out):
        if _replay_file(out, "add_count", 0).exists():  # the last to be written
            return out
        weights, parts, taken = np.array(json.loads(policy.read_text())["weights"]), [], 0
        with tqdm(desc=f"collecting {game.name}", total=steps, unit=" steps", disable=not progress) as bar:
            episodes = itertools.chain.from_iterable(_eight_episodes(game, weights, seed, i) for i in itertools.count())
            while taken < steps:
                parts.append(next(episodes))
                taken += len(parts[-1])
                bar.update(min(taken, steps) - bar.n)
        columns = (np.array(column) for column in zip(*itertools.chain.from_iterable(parts), strict=True))
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        write_replay(out, Trajectories(out.name, *columns, starts))
    return out


def _eight_episodes(game: Game, weights: np.ndarray, seed: int, group: int) -> list[list[tuple]]:
    """Whole episodes 8·``group`` to 8·``group`` + 7, side by side: lists of (screen, action, reward)."""
    generators = [np.random.default_rng([seed, 8 * group + slot]) for slot in range(8)]
    environments, episodes = make_environments(game, 8, sticky=True), [[] for _ in generators]
    states, _ = environments.reset(seed=np.array([generator.integers(1, 2**31 - 1) for generator in generators]))
    shares, running = [generator.uniform(0, 0.5) for generator in generators], np.full(8, True)
    while running.any():
        actions = pong_actions(weights, states)
        for slot, (generator, share) in enumerate(zip(generators, shares, strict=True)):
            if generator.random() < share:
                actions[slot] = generator.integers(game.actions)
        following, rewards, ends, cuts, _ = environments.step(actions)
        for slot in np.flatnonzero(running):
            episodes[slot].append((states[slot, -1].copy(), actions[slot], rewards[slot]))
        states, running = following, running & ~(ends | cuts)  # a finished game begins anew, unheeded
    return episodes


class GameTransformer(DecisionTransformer):
    """Predict a_t from (R̂_1, s_1, a_1, …, R̂_t, s_t), s_t a stack of screens (Chen et al. 2021, paper B).

    The blocks and the final norm are those of ``start``. Around them, as in [code]: DQN's convolutions, a table of actions,
    tanh after each embedding and no input norm, one learned vector for each of the window's 3K places, and one for the time
    step at which the window begins, below ``horizon``; later ones share the last.
    """

    def __init__(self, game: Game, start: DecisionTransformer, context: int, horizon: int):
        nn.Module.__init__(self)
        self.config, self.h, self.ln_f, width = start.config, start.h, start.ln_f, start.config.hidden_size
        self.embed_return = nn.Sequential(nn.Linear(1, width), nn.Tanh())
        self.embed_state = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(3136, width), nn.Tanh())
        self.embed_action = nn.Sequential(nn.Embedding(game.actions, width), nn.Tanh())
        self.embed_place, self.embed_time = nn.Embedding(3 * context, width), nn.Embedding(horizon, width)
        self.head = nn.Linear(width, game.actions, bias=False)
        for module, std in (self.embed_action[0], 0.02), (self.head, 0.02), (self.embed_place, 0.0), (self.embed_time, 0.0):
            nn.init.normal_(module.weight, std=std)

    def encode(self, states: Tensor) -> Tensor:
        """Embedded states (B, K, D) of states (B, K, 4, 84, 84) uint8."""
        return self.embed_state(states.flatten(0, 1).to(self.head.weight.dtype) / 255).unflatten(0, states.shape[:2])

    def embed(self, encoded: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Tokens (B, T, D) from embedded states (B, K, D) and the rest as in ``forward``."""
        kinds = (self.embed_return(returns_to_go.unsqueeze(-1)), encoded, self.embed_action(actions))
        # [code] numbers the window in evaluation by its last step: here it is its first, as in training.
        begin = time_steps[:, :1].clamp(max=self.embed_time.num_embeddings - 1)
        tokens = torch.stack(kinds, dim=2).flatten(1, 2)
        return tokens + self.embed_place.weight[:tokens.shape[1]] + self.embed_time(begin)

    def act(self, encoded: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Logits (B, A) of the last step's action, from embedded states (B, K, D)."""
        return self.head(self.hidden(self.embed(encoded, actions, returns_to_go, time_steps)[:, :-1], LAST)[:, 0])

    def forward(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor) -> Tensor:
        """Logits (B, K, A) of the actions.

        states (B, K, 4, 84, 84) uint8; actions (B, K) int64, a_t itself is not seen by its prediction; returns_to_go (B, K)
        in clipped rewards, not scaled [code]; time_steps (B, K) int64. Windows are padded on the right.
        """
        tokens = self.embed(self.encode(states), actions, returns_to_go, time_steps)[:, :-1]
        return self.head(self.hidden(tokens, STATES))


def build_game_model(initialisation: str, size: str, game: Game, seed: int, *, horizon: int, context: int | None = None,
                     dropout: tuple[float, float, float] = (0.1, 0.1, 0.1)) -> GameTransformer:
    """A GameTransformer at its starting point, float32, on the CPU; the same for the same seed. K is ``context`` or the game's.

    ``initialisation``, ``size``, ``dropout`` and errors as in build_model; ("random-matched", "atari") is paper B's baseline.
    [code] takes ``horizon`` from the data: the longest episode's steps.
    """
    start = build_model(initialisation, size, get_task("hopper"), seed, dropout)  # any task: only its blocks are used
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "game"))
        return GameTransformer(game, start, context or game.context, horizon)


class ScreenSampler:
    """All trajectories on one device, and any window of K = ``context`` steps by indexing, as in WindowSampler.

    Screens stay uint8, 7 kB a step, and are stacked here; those from before an episode's start are black.
    """

    def __init__(self, trajectories: Trajectories, context: int, device: torch.device | str = "cpu"):
        begins, ends = (np.repeat(edge, trajectories.lengths) for edge in (trajectories.starts[:-1], trajectories.starts[1:]))
        self._screens, *self._columns, self._begins, self._ends = (torch.from_numpy(rows).to(device) for rows in (
            trajectories.observations, trajectories.actions, trajectories.returns_to_go, trajectories.time_steps, begins, ends))
        self._offsets = torch.arange(1 - STACK, context, device=device)
        self.number_of_steps = len(trajectories.rewards)

    def windows(self, starts: Tensor) -> Windows:
        """The windows that begin at rows ``starts``, (B,) int64: states (B, K, 4, 84, 84) uint8, actions (B, K) int64."""
        rows = starts[:, None] + self._offsets
        real = (rows >= self._begins[starts][:, None]) & (rows < self._ends[starts][:, None])
        rows = torch.where(real, rows, 0)
        screens = self._screens[rows].masked_fill_(~real[..., None, None], 0)
        rows, mask = rows[:, STACK - 1:], real[:, STACK - 1:]
        columns = (column[rows].masked_fill_(~mask, 0) for column in self._columns)
        states = screens.unfold(1, STACK, 1).movedim(-1, 2).masked_fill(~mask[..., None, None, None], 0)
        return Windows(states, *columns, mask)


def game_loss(logits: Tensor, windows: Windows) -> Tensor:
    """Mean cross-entropy of the actions over real (not padded) steps, in nats; logits (B, K, A)."""
    return cross_entropy(logits.flatten(0, 1), windows.actions.masked_fill(~windows.mask, -100).flatten(), ignore_index=-100)


def make_game_optimiser(model: GameTransformer, learning_rate: float = 6e-4) -> torch.optim.AdamW:
    """[code]'s AdamW: weight decay 0.1 for matrices and kernels, none for biases, norms and tables."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.dim() > 1 and id(parameter) not in tables].append(parameter)
    return torch.optim.AdamW([{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
                             lr=learning_rate, betas=(0.9, 0.95), fused=True)


def train_game_epoch(model: GameTransformer, optimiser: torch.optim.Optimizer, sampler: ScreenSampler, starts: Tensor, *,
                     first_step: int, total_steps: int, learning_rate: float = 6e-4, precision: str = "float32",
                     on_step: Callable[[], None] = lambda: None) -> float:
    """train_epoch for games: one step per row of ``starts`` (steps, B), gradients clipped at 1; return the mean loss.

    The learning rate falls along a cosine to a tenth; [code] chose its end so that five epochs make five sixths of it.
    """
    model.train()
    total = torch.zeros((), device=starts.device)
    for step, row in enumerate(starts, first_step):
        windows = sampler.windows(row)
        loss = game_loss(predict(model, windows, precision), windows)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * max(0.1, (1 + math.cos(math.pi * 5 / 6 * step / total_steps)) / 2)
        optimiser.step()
        total += loss.detach()
        on_step()
    return float(total / len(starts))


@torch.no_grad()
def play(model: GameTransformer, game: Game, *, target_return: float, episodes: int, seed: int, first_episode: int = 0,
         greedy: bool = False, sticky: bool = False, horizon: int = HORIZON) -> Episodes:
    """Scores and lengths of ``episodes`` games played side by side, each asked for ``target_return``.

    Actions are drawn from the model's distribution [code], or are the likeliest (``greedy``). R̂ falls by the clipped rewards
    that it is made of in the data; [code] subtracts the raw ones. Game e draws all from (seed, "game", first_episode + e),
    whatever runs beside it, up to the last bits of batched arithmetic.
    """
    model.eval()
    device, places = model.head.weight.device, model.embed_place.num_embeddings
    generators = [np.random.default_rng(stream_seed(seed, "game", first_episode + e)) for e in range(episodes)]
    environments = make_environments(game, episodes, sticky)
    states, _ = environments.reset(seed=np.array([generator.integers(1, 2**31 - 1) for generator in generators]))
    scores, clipped, lengths, alive = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes, np.int64), np.arange(episodes)
    past: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=places // 3)  # of the games still running
    for t in range(horizon):
        encoded = model.encode(torch.as_tensor(states[alive, None], device=device))[:, 0]
        still_to_come = torch.as_tensor(target_return - clipped[alive], device=device, dtype=encoded.dtype)
        past.append((encoded, torch.zeros(len(alive), dtype=torch.int64, device=device), still_to_come))
        begin = torch.full((len(alive), 1), t + 1 - len(past), device=device)
        logits = model.act(*(torch.stack(column, 1) for column in zip(*past, strict=True)), begin)
        if greedy:
            chosen = logits.argmax(-1)
        else:
            draws = torch.tensor([generators[e].random() for e in alive], device=device)
            chosen = (logits.double().softmax(-1).cumsum(-1)[:, :-1] < draws[:, None]).sum(-1)
        past[-1][1].copy_(chosen)
        actions = np.zeros(episodes, np.int64)
        actions[alive] = chosen.cpu().numpy()
        states, rewards, ends, cuts, _ = environments.step(actions)
        scores[alive] += rewards[alive]
        clipped[alive] += rewards[alive].clip(-1, 1)
        lengths[alive] = t + 1
        running = ~(ends | cuts)[alive]
        if not running.all():
            alive, kept = alive[running], torch.as_tensor(running, device=device)
            past = deque((tuple(column[kept] for column in step) for step in past), maxlen=past.maxlen)
        if not len(alive):
            break
    return Episodes(scores, lengths)
