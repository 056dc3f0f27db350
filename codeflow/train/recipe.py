"""How a model is trained, as settings: what holds for a whole run, and its stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from codeflow.errors import RecipeError
from codeflow.settings import setting
from codeflow.train.config import ModelConfig


@dataclass(frozen=True)
class StageSettings:
    """What may differ from stage to stage; what a stage does not say, `[train]` says."""

    steps: int | None = setting(None, "Optimizer updates.", unit="steps", minimum=1)
    tokens: int | None = setting(
        None, "Length in tokens instead, made steps by the mean row.", unit="tokens", minimum=1
    )
    batch_rows: int | None = setting(
        None,
        "Packed rows of one step, over all processes; unset: micro_rows in each.",
        unit="rows",
        minimum=1,
    )
    batch_tokens: int | None = setting(
        None,
        "The same in tokens, made rows by the mean row.",
        unit="tokens",
        minimum=1,
    )
    max_length: int | None = setting(
        None, "Crop rows to this length, and count what is lost; unset: never.", minimum=2
    )
    learning_rate: float = setting(3e-3, "Peak of the schedule.", minimum=0)
    min_learning_rate: float = setting(0.1, "End of the decay, as a share of the peak.", minimum=0)
    warmup_steps: int = setting(20, "Linear warm-up.", unit="steps", minimum=0)
    schedule: str = setting(
        "cosine",
        "After warm-up; wsd: stable, then a decay.",
        choices=("constant", "linear", "cosine", "wsd"),
    )
    decay_share: float = setting(
        0.2, "wsd: last share of the stage that decays.", minimum=0, maximum=1
    )
    decay_steps: int | None = setting(
        None, "wsd: the same in steps, and stronger.", unit="steps", minimum=1
    )
    decay_shape: str = setting("1-sqrt", "wsd: how it decays.", choices=("linear", "1-sqrt"))
    holdout: float | None = setting(
        None,
        "Share of the rows kept from training, for evaluation; unset: a twentieth, but no more "
        "than 500 rows, and none of less than 50.",
        minimum=0,
        maximum=0.9,
    )

    def __post_init__(self) -> None:
        for one, other in (("steps", "tokens"), ("batch_rows", "batch_tokens")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise RecipeError(f"{self._name}: give `{one}` or `{other}`, not both")

    @property
    def _name(self) -> str:
        return "[train]"


@dataclass(frozen=True)
class Stage(StageSettings):
    """One part of a run: its data, its length, its learning rates."""

    name: str = setting("", "Names the stage in metrics and messages, e.g. pretrain or sft.")
    shards: str | None = setting(
        None, "Its data: dataset folder, shards or manifest; unset: that of --shards."
    )
    reset_optimizer: bool = setting(False, "Forget the moments of the stage before.")

    @property
    def _name(self) -> str:
        return f"stage `{self.name}`"


@dataclass(frozen=True)
class TrainConfig(StageSettings):
    """What holds for a whole run, and what stages do not say. A step is one optimizer update."""

    micro_rows: int = setting(
        1, "Rows in one forward pass; more memory, fewer launches.", unit="rows", minimum=1
    )
    optimizer: str = setting(
        "adamw",
        "muon: Muon for the matrices of the layers, AdamW for the rest.",
        choices=("adamw", "muon"),
    )
    clip_norm: float = setting(1.0, "Largest global norm of the gradient.", minimum=0)
    z_loss: float = setting(
        0.0, "Coefficient of logsumexp(logits)^2 in the loss.", source="PaLM: 1e-4", minimum=0
    )
    weight_decay: float = setting(0.1, "Of matrices other than embeddings and gates.", minimum=0)
    beta1: float = setting(0.9, "AdamW.", minimum=0, maximum=1)
    beta2: float = setting(0.95, "AdamW.", minimum=0, maximum=1)
    epsilon: float = setting(1e-8, "AdamW.", minimum=0)
    momentum: float = setting(0.95, "Muon.", minimum=0, maximum=1)
    skip_sigmas: float = setting(
        6.0,
        "Make no update when loss or gradient norm is this many standard deviations above the mean "
        "of the last 128 steps; 0: only when it is not finite.",
        source="OLMo-core",
        minimum=0,
    )
    skip_limit: int = setting(
        10, "Stop the run after so many skipped updates in a row.", unit="steps", minimum=1
    )
    initialise_from: str | None = setting(
        None, "Folder of a Llama or LoopCoder to start from, instead of random weights."
    )
    fold: bool = setting(False, "Take evenly spaced layers of a dense model with more of them.")
    seed: int = setting(0, "Of the initial weights and the order of rows.", minimum=0)
    device: str = setting("auto", "`cuda`, `cpu`, …; `auto`: cuda when there is one.")
    parallel: str = setting(
        "auto",
        "Several processes: replicate (ddp) or shard (fsdp) the model.",
        choices=("auto", "ddp", "fsdp"),
    )
    reshard: bool = setting(
        True, "fsdp: free a layer's weights after each use; false: faster, more memory."
    )
    dtype: str = setting(
        "auto",
        "Of activations; weights stay float32. auto: bfloat16 on a GPU that computes in it.",
        choices=("auto", "float32", "bfloat16"),
    )
    backend: str = setting(
        "auto",
        "How attention is computed.",
        choices=("auto", "sdpa", "dense", "varlen", "flex"),
    )
    checkpointing: str = setting(
        "auto",
        "Activations to compute again instead of keeping them; auto: as few as memory allows.",
        choices=("auto", "none", "full", "save_attention"),
    )
    compile: bool = setting(False, "Compile the layers (minutes at the start, faster steps).")
    log_every: int = setting(10, "Between progress lines.", unit="steps", minimum=1)
    checkpoint_every: int = setting(100, "Between checkpoints.", unit="steps", minimum=1)
    keep_checkpoints: int = setting(2, "Older checkpoints are deleted.", minimum=1)
    evaluate_every: int = setting(
        100, "Between evaluations, where rows are held out.", unit="steps", minimum=1
    )
    evaluate_rows: int = setting(16, "Held-out rows of one evaluation.", unit="rows", minimum=1)
    tensorboard: bool = setting(False, "Write TensorBoard events, too.")
    wandb_project: str | None = setting(None, "Send metrics to this Weights & Biases project, too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_rows is not None and self.batch_rows % self.micro_rows:
            raise RecipeError(
                f"train.batch_rows ({self.batch_rows}) must be a multiple of "
                f"train.micro_rows ({self.micro_rows})"
            )


@dataclass(frozen=True)
class RunConfig:
    """A training recipe: `[model]`, `[train]` and any number of `[[stage]]` tables."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stage: tuple[Stage, ...] = ()
