"""The Decision Transformer on paper B's Atari games: config, model, play, training.

[code] is here Chen et al.'s (2021), whose setting is paper B's.
"""

import json
from collections import deque
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from dtlib import storage
from dtlib.build import draw
from dtlib.config import SIZES, VALUES, Count, Float32, Lax, Positive, Whole
from dtlib.data import Trajectories, Windows
from dtlib.devices import choose_device
from dtlib.errors import Checked, UserError
from dtlib.evaluate import Episodes
from dtlib.model import DecisionTransformer
from dtlib.parallel import one_thread
from dtlib.progress import tqdm
from dtlib.records import weights_digest
from dtlib.seeding import stream_seed
from dtlib.starts import build_model, get_starting_point
from dtlib.tasks import get_task
from dtlib.train import learning_rate_at, train_epoch
from dtlib.wikipedia.emulator import GAMES, HORIZON, STACK, lockstep
from dtlib.wikipedia.replay import ScreenSampler, collect_game, load_replay, replay_files

CONVOLUTIONS = ((STACK, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))  # DQN's: in, out, kernel, stride
NOT_DECAYED = ("embed_action.0.weight", "embed_place", "embed_time")  # nor norms and biases


@dataclass(frozen=True, config=VALUES)
class GameConfig(Checked):
    """All values that decide a run on a game. The defaults are paper B's baseline."""

    game: Literal[tuple(GAMES)] = "breakout"
    data: str = "collected"  # or a folder in DQN-replay's layout
    data_steps: Count | None = 500_000  # None: all of a folder's
    data_checkpoints: Annotated[tuple[int, ...], Lax] = tuple(range(50))  # of a folder
    initialisation: str = "random-matched"
    size: Literal[tuple(SIZES)] = "atari"
    seed: Whole = 0
    context: Count | None = None  # K; None here and in the next two: the game's own
    batch_size: Count | None = None
    target_return: Float32 | None = None
    epochs: Count = 5
    steps_per_epoch: Count | None = None  # None: as many as see the data once
    learning_rate: Positive = 6e-4
    warmup_steps: Count = 3  # 10,240 actions [code]
    evaluation_episodes: Count = 10
    horizon: Count = HORIZON  # steps after which a game in evaluation is cut

    def own_values(self) -> dict[str, object]:
        """Return the game's own values. Raises UserError for an unknown start, odd checkpoints."""
        get_starting_point(self.initialisation)
        chosen = self.data_checkpoints
        if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
            raise UserError(f"data_checkpoints is {chosen}: expected different numbers from 0 up.")
        game = GAMES[self.game]
        own = {"context": game.context, "batch_size": game.batch_size}
        return own | {"target_return": game.target}

    @property
    def name(self) -> str:
        """Name of the run's folder: readable first, then a hash of all values and files."""
        files = [weights_digest(self.initialisation, self.size, self.seed)]
        if self.data != "collected":
            found = replay_files(storage.typed(self.data), self.data_checkpoints)
            files += [storage.digest(path) for path in found if path.is_file()]
        start = storage.readable(self.initialisation)
        code = storage.digest(asdict(self), *files)[:12]
        return f"{self.game}-{start}-K{self.context}-seed{self.seed}-{code}"


def load_data(config: GameConfig, progress: bool = True) -> Trajectories:
    """Return the run's recorded games; Pong is collected on first use."""
    game = GAMES[config.game]
    if config.data == "collected":
        return load_replay(collect_game(game, config.data_steps or 20_000, progress=progress), game)
    return load_replay(storage.typed(config.data), game, config.data_checkpoints, config.data_steps)


class GameTransformer(DecisionTransformer):
    """Predict a_t from R̂_1, s_1, a_1, …, R̂_t, s_t, each s_t a stack of screens.

    ``forward`` and ``act`` are DecisionTransformer's. They take states (B, K, 4, 84, 84) uint8, or
    encoded (B, K, D), actions (B, K) int64 and unscaled returns_to_go, and give logits (…, A).
    Around the starting point's blocks, as in [code]: DQN's convolutions, tanh after each embedding,
    no input norm, a learned vector for each of the window's 3K places, and one for the time step at
    which the window begins. Time steps from ``horizon`` on, the data's longest episode, share one.
    """

    def __init__(self, config: GameConfig, horizon: int):
        nn.Module.__init__(self)
        task, dropout = get_task("hopper"), (0.1, 0.1, 0.1)  # any task: only the blocks are used
        start = build_model(config.initialisation, config.size, task, config.seed, dropout)
        self.config, self.h, self.ln_f = start.config, start.h, start.ln_f
        width, actions = start.config.hidden_size, GAMES[config.game].actions
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "game"))
            self.embed_return = nn.Sequential(nn.Linear(1, width), nn.Tanh())
            layers = [part for sizes in CONVOLUTIONS for part in (nn.Conv2d(*sizes), nn.ReLU())]
            layers += [nn.Flatten(), nn.Linear(3136, width), nn.Tanh()]
            self.embed_state = nn.Sequential(*layers)
            self.embed_action = nn.Sequential(nn.Embedding(actions, width), nn.Tanh())
            self.embed_place = nn.Parameter(torch.zeros(3 * config.context, width))
            self.embed_time = nn.Parameter(torch.zeros(horizon, width))
            self.head = nn.Linear(width, actions, bias=False)
            nn.init.normal_(self.embed_action[0].weight, std=0.02)
            nn.init.normal_(self.head.weight, std=0.02)

    def encode(self, states: Tensor) -> Tensor:
        """Return (B, K, D) for states (B, K, 4, 84, 84) uint8."""
        screens = states.flatten(0, 1).to(self.head.weight.dtype) / 255
        return self.embed_state(screens).unflatten(0, states.shape[:2])

    def embed(
        self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor
    ) -> Tensor:
        """Return the tokens (B, 3K, D)."""
        encoded = self.encode(states) if states.dtype == torch.uint8 else states
        kinds = self.embed_return(returns_to_go.unsqueeze(-1)), encoded, self.embed_action(actions)
        tokens = torch.stack(kinds, dim=2).flatten(1, 2)
        # In evaluation [code] takes the window's last step; here it is the first, as in training.
        begin = self.embed_time[time_steps[:, :1].clamp(max=len(self.embed_time) - 1)]
        return tokens + self.embed_place[: tokens.shape[1]] + begin

    def predict_action(self, hidden: Tensor) -> Tensor:
        """Return logits (…, A) from the state tokens' final hidden states (…, D)."""
        return self.head(hidden)


def game_loss(logits: Tensor, windows: Windows) -> Tensor:
    """Return the mean cross-entropy over real steps, in nats an action; logits (B, K, A)."""
    actions = windows.actions.masked_fill(~windows.mask, -100)  # left out by cross_entropy
    return nn.functional.cross_entropy(logits.flatten(0, 1), actions.flatten())


@torch.no_grad()
def play(model: GameTransformer, config: GameConfig, seed: int) -> Episodes:
    """Play ``config``'s games side by side; return their scores and lengths, each (E,).

    Actions are drawn from the model's distribution [code]. R̂ falls by the clipped rewards, as in
    the data; [code] subtracts the raw ones. Game e draws from the stream (seed, "game", e).
    """

    def choose(states: np.ndarray, _: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        nonlocal to_go
        to_go = to_go - torch.as_tensor(rewards.clip(-1, 1)).to(to_go)
        encoded = model.encode(torch.from_numpy(states).to(to_go.device)[:, None])[:, 0]
        actions = torch.zeros(len(generators), dtype=torch.int64, device=to_go.device)
        past.append((encoded, actions, to_go))
        begin = torch.full_like(actions, int(lengths.max()) + 1 - len(past))[:, None]
        logits = model.act(*(torch.stack(column, 1) for column in zip(*past, strict=True)), begin)
        draws = torch.tensor([[generator.random()] for generator in generators]).to(to_go.device)
        drawn = (logits.double().softmax(-1).cumsum(-1)[:, :-1] < draws).sum(-1)
        return actions.copy_(drawn).cpu().numpy()

    model.eval()
    numbers = range(config.evaluation_episodes)
    generators = [np.random.default_rng(stream_seed(seed, "game", e)) for e in numbers]
    to_go = torch.full((len(numbers),), config.target_return).to(model.head.weight)
    past = deque(maxlen=config.context)  # of each step: encoded states (E, D), actions, R̂ (E,)
    returns, lengths = np.zeros(len(numbers)), np.zeros(len(numbers), np.int64)
    game = GAMES[config.game]
    for _, _, rewards, running in lockstep(game, generators, choose, False, config.horizon):
        returns += rewards * running
        lengths += running
    return Episodes(returns, lengths)


def game_optimiser(model: GameTransformer, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay 0.1 for the matrices and kernels alone [code]."""
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() > 1 and name not in NOT_DECAYED else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def fine_tuned_game(config: GameConfig, device: str = "auto", progress: bool = True) -> dict:
    """Return the record of the run of ``config``: trained if absent, resumed if interrupted.

    The record has config, versions and metrics: for each epoch (0: the start) step, loss (mean of
    the epoch in nats an action; None at 0), scores and lengths of the games. The last epoch's
    weights lie beside it. Raises UserError if one of them was changed.
    """
    final, device = storage.cache_root() / "games" / config.name, choose_device(device)
    with storage.growing(final) as folder:
        begun = folder and (folder / "resume.safetensors").exists()
        if folder and (begun or not (folder / "run.json").exists()):
            with one_thread(device):  # the same rounding on any number of cores
                _train(config, folder, device, progress)
    record = json.loads((final / "run.json").read_text(encoding="utf-8"))
    if storage.damaged(final) or record["config"] != json.loads(json.dumps(asdict(config))):
        raise UserError(f"The run in {final} was changed: move that folder away and run again.")
    return record


def _train(config: GameConfig, folder: Path, device: str, progress: bool) -> None:
    """Train in ``folder`` from the last finished epoch on; play and save after each epoch."""
    trajectories = load_data(config, progress)
    sampler = ScreenSampler(trajectories, config.context, device)
    model = GameTransformer(config, int(trajectories.lengths.max())).to(device)
    if folder.name != config.name:
        raise UserError(f"A file that {folder.name} is made from changed meanwhile: run again.")
    optimiser = game_optimiser(model, config.learning_rate)
    steps = config.steps_per_epoch or -(-sampler.number_of_steps // config.batch_size)
    peak, warmup, total = config.learning_rate, config.warmup_steps, config.epochs * steps
    bar = tqdm(desc=config.name, total=total, disable=not progress)
    options = {"gradient_clip": 1.0, "loss_of": game_loss, "on_step": bar.update}
    options["rate"] = lambda step: learning_rate_at(step, peak, warmup, total, "cosine")

    def advance(epoch: int, _: dict) -> dict:
        loss, first_step = None, (epoch - 1) * steps
        if epoch > 0:
            torch.manual_seed(stream_seed(config.seed, "dropout", epoch))
            seed = stream_seed(config.seed, "batches", epoch)
            rows = draw(seed, sampler.number_of_steps, steps, config.batch_size).to(device)
            loss = train_epoch(model, optimiser, sampler, rows, first_step=first_step, **options)
        played = play(model, config, stream_seed(config.seed, "evaluation of epoch", epoch))
        row = {"step": epoch * steps, "loss": loss}
        return row | {"scores": played.returns.tolist(), "lengths": played.lengths.tolist()}

    with bar, torch.random.fork_rng(range(torch.cuda.device_count())):
        new = {"metrics": [], "fingerprint": trajectories.fingerprint}
        given = new, "metrics", config.epochs + 1, advance, bar.update
        done = storage.resumable(folder, model, optimiser, *given)
    storage.write_tensors(folder / "model.safetensors", model.state_dict())
    versions = storage.versions() | {"ale-py": version("ale-py")}
    about = {name: done[name] for name in ("metrics", "fingerprint", "begun_with") if name in done}
    record = {"config": asdict(config), **about, "versions": versions}
    storage.write_text(folder / "run.json", record)
    (folder / "resume.safetensors").unlink()
    storage.seal(folder)
