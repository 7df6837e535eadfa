"""What decides a fine-tuning run: values, their defaults and the run's name. Touches no disk."""

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dtlib.errors import Checked, UserError
from dtlib.storage import digest, readable
from dtlib.tasks import get_task

VALUES = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # of every config
Count, Whole = Annotated[int, Field(gt=0, lt=2**31)], Annotated[int, Field(ge=0, lt=2**63)]
Positive, NotNegative = Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0)]
Float32 = Annotated[float, Field(gt=-1e38, lt=1e38)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Lax = Field(strict=False)  # accepts a list where a tuple is asked for

# Blocks, width D, heads H.
SIZES = {
    "tiny": (2, 64, 2),
    "mini": (4, 128, 4),
    "chibit": (3, 128, 1),
    "atari": (6, 128, 8),
    "small": (6, 384, 6),
    "gpt2": (12, 768, 12),
    "imagegpt": (24, 512, 8),
    "smollm2": (30, 576, 9),  # this and the next two: see causal.py
    "clip-text": (12, 512, 8),
    "clip-vision": (12, 768, 12),
}
# Fields of earlier versions. No run changed them; an old run.json may hold these values.
RETIRED = {"compile": False, "adam_epsilon": 1e-8, "weight_decay": 1e-4}


@dataclass(frozen=True, config=VALUES)
class RunConfig(Checked):
    """All values that decide a run. The defaults are paper A's setting, except for the data."""

    task: str = "hopper"
    dataset: str = "collected:medium"  # see data.load
    dataset_steps: Count | None = None  # to collect (None: 100,000) or to read (None: all)
    initialisation: str = "random"  # a starting point: see starts.py
    size: Literal[tuple(SIZES)] = "gpt2"  # of random weights and of models pre-trained here
    action_head: Literal["tied", "separate"] = "tied"  # see model.py
    context: Count = 20  # K
    seed: Whole = 0
    epochs: Count = 40
    steps_per_epoch: Count = 2500
    batch_size: Count = 64  # windows
    learning_rate: Positive = 1e-4
    warmup_steps: Whole = 5000
    learning_rate_decay: bool = False  # linearly to 0 over the run; the papers keep the rate
    gradient_clip: Positive | None = 0.25  # largest norm of the gradient; None: no clipping
    dropout: Annotated[tuple[Probability, Probability, Probability], Lax] = (0.2, 0.1, 0.1)
    time_embedding_std: NotNegative = 1.0  # see starts.build_model
    precision: Literal["float32", "bfloat16"] = "float32"
    target_return: Float32 | None = None  # None becomes the task's first target (own_values)
    evaluation_episodes: Count = 100
    checkpoints: Annotated[tuple[Whole, ...], Lax] = ()  # epochs kept beside the first and the last
    donor: str | None = None  # starting point that gives the block ``swapped_block``
    swapped_block: Whole = 0
    reset_heads: Annotated[tuple[Whole, ...], Lax] = ()  # heads of block 0, drawn anew
    # Paper B's additions: see wikipedia/losses.py.
    alignment: NotNegative = 0.0  # λ₁, 0.1 in the paper
    alignment_steps: Positive = 5000.0  # until the alignment has faded; 15,000 with co-training
    alignment_reduction: Literal["max", "mean", "as released"] = "max"
    cotraining: NotNegative = 0.0  # λ₂, 1 in the paper (0.1 in half precision)
    cotraining_corpus: str = ""  # empty: what the language model learnt from
    words: str | None = None  # starting point whose word table is used; None: the run's own
    extended_positions: bool = False
    frozen_blocks: bool = False
    adapter_rank: Whole = 0  # of low-rank adapters to frozen blocks; 0: none
    data_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the episodes, drawn from the seed
    delayed_rewards: bool = False  # the whole return at an episode's end

    def own_values(self) -> dict[str, object]:
        """Return what None stands for. Raises UserError for a checkpoint after the last epoch."""
        if beyond := [epoch for epoch in self.checkpoints if epoch > self.epochs]:
            raise UserError(f"checkpoints has {beyond[0]}, but the last epoch is {self.epochs}.")
        return {"target_return": get_task(self.task).targets[0]}

    def name(self, digests: dict[str, str]) -> str:
        """Return the name of the run's folder: readable first, then a hash that makes it unique.

        The hash covers the values that differ from their defaults, so that a new field renames no
        old run, and ``digests`` of the files that values name (records.digests).
        """
        fields = type(self).__pydantic_fields__
        values = dataclasses.asdict(self).items()
        chosen = {name: value for name, value in values if value != fields[name].default}
        code = digest(chosen | digests)[:12]
        return f"{self.task}-{readable(self.initialisation)}-K{self.context}-seed{self.seed}-{code}"
