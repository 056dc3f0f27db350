"""How a model is trained, as settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from codeflow.errors import RecipeError
from codeflow.settings import setting
from codeflow.train.config import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A step is one optimizer update on `batch_rows` packed rows."""

    steps: int = setting(200, "Optimizer updates.", minimum=1)
    batch_rows: int = setting(1, "Packed rows of one step.", unit="rows", minimum=1)
    micro_rows: int = setting(
        1, "Rows in one forward pass; more memory, fewer launches.", unit="rows", minimum=1
    )
    max_length: int | None = setting(
        None, "Crop rows to this length, and count what is lost; unset: never.", minimum=2
    )
    learning_rate: float = setting(3e-3, "Peak of the schedule.", minimum=0)
    min_learning_rate: float = setting(0.1, "End of the decay, as a share of the peak.", minimum=0)
    warmup_steps: int = setting(20, "Steps of linear warm-up.", minimum=0)
    schedule: str = setting(
        "cosine", "Decay after warm-up.", choices=("constant", "linear", "cosine")
    )
    clip_norm: float = setting(1.0, "Largest global norm of the gradient.", minimum=0)
    weight_decay: float = setting(0.1, "Of matrices other than embeddings and gates.", minimum=0)
    beta1: float = setting(0.9, "AdamW.", minimum=0, maximum=1)
    beta2: float = setting(0.95, "AdamW.", minimum=0, maximum=1)
    epsilon: float = setting(1e-8, "AdamW.", minimum=0)
    seed: int = setting(0, "Of the initial weights and the order of rows.", minimum=0)
    device: str = setting("auto", "`cuda`, `cpu`, …; `auto`: cuda when there is one.")
    dtype: str = setting(
        "float32",
        "Of activations; weights stay float32.",
        choices=("float32", "bfloat16"),
    )
    backend: str = setting("sdpa", "How attention is computed.", choices=("sdpa", "dense"))
    log_every: int = setting(10, "Between progress lines.", unit="steps", minimum=1)
    checkpoint_every: int = setting(100, "Between checkpoints.", unit="steps", minimum=1)
    keep_checkpoints: int = setting(2, "Older checkpoints are deleted.", minimum=1)

    def __post_init__(self) -> None:
        if self.batch_rows % self.micro_rows:
            raise RecipeError(
                f"train.batch_rows ({self.batch_rows}) must be a multiple of "
                f"train.micro_rows ({self.micro_rows})"
            )


@dataclass(frozen=True)
class RunConfig:
    """The two sections of a training configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
