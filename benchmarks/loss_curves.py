"""Does the fast path learn as the plain one does? A thousand steps of each, on the same windows.

    python benchmarks/loss_curves.py            (ten minutes on two cores; part of `make bench`)

All start from the same weights. The plain loop runs the same layers through transformers' own
blocks, in float32, with torch's own dropout. It runs twice, with two streams of dropout, to show
how far two runs differ by chance. Writes loss_curves.csv and .png into this folder.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from dtlib import data, figures
from dtlib.devices import fast_precision
from dtlib.model import DecisionTransformer
from dtlib.starts import build_model
from dtlib.tasks import get_task
from dtlib.train import action_loss, learning_rate_at, make_optimiser, train_epoch

HERE, HOPPER = Path(__file__).parent, get_task("hopper")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = fast_precision(DEVICE)
SIZE, STEPS, BATCH, MEAN_OF = "chibit", 1000, 64, 25
PEAK, WARMUP, CLIP = 1e-4, 100, 0.25


def plain_predictions(model: DecisionTransformer, windows: data.Windows) -> torch.Tensor:
    """Return predictions by transformers' own blocks, with a mask and torch's dropout."""
    tokens = model.embed(windows.states, windows.actions, windows.returns_to_go, windows.time_steps)
    hidden = torch.nn.functional.dropout(tokens, model.config.embd_pdrop)
    future = torch.full((tokens.shape[1],) * 2, -torch.inf, device=tokens.device).triu(1)
    for block in model.h:
        block.attn.config._attn_implementation = "eager"
        hidden = block(hidden, attention_mask=future[None, None])
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return torch.tanh(model.ln_f(hidden)[:, 1::3] @ model.embed_action.weight)


def curve(
    sampler: data.WindowSampler, starts: torch.Tensor, plain: bool, dropout_seed: int, label: str
) -> list[float]:
    model = build_model("random", SIZE, HOPPER, seed=0, dropout=(0.1, 0.1, 0.1)).to(DEVICE)
    optimiser, losses = make_optimiser(model, PEAK), []
    torch.manual_seed(dropout_seed)
    for step, row in enumerate(tqdm(starts, desc=label)):
        if not plain:
            options = {"rate": rate, "gradient_clip": CLIP, "precision": FAST}
            losses.append(
                train_epoch(model, optimiser, sampler, row[None], first_step=step, **options)
            )
            continue
        windows = sampler.windows(row)
        loss = action_loss(plain_predictions(model, windows), windows)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.param_groups[0]["lr"] = rate(step)
        optimiser.step()
        losses.append(loss.item())
    return losses


def rate(step: int) -> float:
    return learning_rate_at(step, PEAK, WARMUP, STEPS)


def main() -> None:
    ways = {
        "plain, float32": (True, 0),
        "plain, other dropout": (True, 1),
        f"fast, {FAST}": (False, 2),
    }
    looks = dict(zip(ways, ("data", "iid", "igpt"), strict=True))
    found, (figure, axes) = [], plt.subplots(1, 2, figsize=(7.0, 3.0))
    trajectories = data.load("collected:medium", HOPPER, steps=100_000)
    for ax, context in zip(axes, (20, 1), strict=True):
        sampler = data.WindowSampler(trajectories, context, HOPPER.return_scale, DEVICE)
        starts = torch.randint(
            sampler.number_of_steps, (STEPS, BATCH), generator=torch.Generator().manual_seed(0)
        ).to(DEVICE)
        for name, (plain, seed) in ways.items():
            losses = np.reshape(
                curve(sampler, starts, plain, seed, f"K = {context}, {name}"), (-1, MEAN_OF)
            ).mean(1)
            steps = MEAN_OF * np.arange(1, len(losses) + 1)
            found += [
                {"K": context, "way": name, "step": step, "loss": loss}
                for step, loss in zip(steps, losses, strict=True)
            ]
            ax.plot(
                steps,
                losses,
                color=figures.COLOURS[looks[name]],
                linestyle="--" if "other" in name else "-",
                label=name,
            )
        ax.set(title=f"K = {context}", xlabel="training step", yscale="log")
    axes[0].set_ylabel(f"loss, mean of {MEAN_OF} steps")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(HERE / "loss_curves.png", dpi=200)
    table = pd.DataFrame(found)
    table.to_csv(HERE / "loss_curves.csv", index=False, float_format="%.5g")
    for context, own in table.groupby("K", sort=False):
        by_way = own.pivot(index="step", columns="way", values="loss")[list(ways)]
        last = by_way.iloc[len(by_way) // 2 :]
        gap = [(last.iloc[:, i] / last.iloc[:, 0] - 1).mean() for i in (1, 2)]
        print(
            f"K = {context}, second half: other dropout {gap[0]:+.2%}, fast {gap[1]:+.2%} of the "
            "plain loop's loss"
        )


if __name__ == "__main__":
    figures.use_style()
    main()
