"""The section `train` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The training: budget, workers, precision, validation and checkpoints."""

    samples: int = 20_000
    """Budget: the number of patches to train on, whatever the number of workers; `recipe` may add to it."""
    batch_size: int = 2
    """Patches per worker per step; the global batch is ranks x virtual_workers x batch_size."""
    ranks: int = 0
    """Processes on this machine; 0: one per GPU, or one on CPUs. torchrun's own number overrides it."""
    virtual_workers: int = 1
    """Workers that each rank emulates, one after another."""
    recipe: Literal["none", "auto", "muon", "large_batch"] = "none"
    """Settings for large global batches, which override `optim`; auto: from 8 workers on muon, where the
    optimiser is AdamW or Muon, else large_batch. muon also takes more samples: 1.4 times `samples` from 64
    workers on."""
    start_from: str = ""
    """Model file, run's folder, checkpoint, or nnU-Net's checkpoint_final.pth whose weights a new run
    begins with, as far as they fit by name and shape; "": random weights. A resumed run does not read it
    again."""
    freeze: Literal["nothing", "encoder", "all_but_head"] = "nothing"
    """Which of the weights taken from `start_from` are not trained. Of the encoder, or of all but the head,
    those that were not taken are trained."""
    seed: int = 0
    """Seed of the initial weights and, with its index, of every sample."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward and backward pass; auto: bf16 if the device has it in hardware. fp32 is
    without TF32 on GPUs."""
    channels_last: bool | None = None
    """Memory format of activations and weights; null: by a short trial on GPUs, true on CPUs."""
    compile: bool | None = False
    """Whether to compile the network with torch.compile; null: if a short trial finds it faster."""
    cuda_graph: bool | None = None
    """Whether one process with one GPU replays the forward and backward pass as a CUDA graph; null: if a
    short trial finds it faster. It has no effect on CPUs and on several ranks."""
    deterministic: bool = False
    """Whether a GPU computes the same bits each time; the start of the training says what it costs. CPUs
    always do, with the same number of threads."""
    checkpoint_activations: bool = False
    """Activation checkpointing: recompute the activations within a level in the backward pass. A quarter
    more time for an eighth less memory on CPUs (docs/benchmarks.md)."""
    compress: Literal["none", "bf16"] = "none"
    """Compression of gradients between ranks; bf16 halves the bytes and rounds to 3 digits."""
    not_finite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite: stop, naming the sample, or skip the update."""
    recalibrate: int = 0
    """Samples from which batch norm statistics are recomputed before the model is validated or saved;
    0: the running statistics, which are averaged if the weights are (`optim.ema`)."""
    validate_every: int = 5_000
    """Samples between validations; 0: only at the end."""
    validate_at: tuple[int, ...] = ()
    """Further numbers of samples after which to validate."""
    validate_cases: int = 0
    """Number of validation scans; 0: all."""
    checkpoint_every: int = 1_000
    """Samples between checkpoints."""
    checkpoint_seconds: float = 600.0
    """Maximum seconds between checkpoints; 0: by samples only."""
    keep: int = 2
    """Checkpoints kept besides the best."""
    max_restarts: int = 3
    """How often a job on several ranks restarts from its last checkpoint when a rank is lost."""
    threads: int = 0
    """CPU threads per rank; 0: an equal share of the cores."""
    track: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Where settings, metrics and files of the run are also logged, beside TensorBoard: mlflow, wandb
    (Weights & Biases). Nothing of the scans is sent."""
    track_to: str = ""
    """MLflow's server, as http://host:5000, or a folder; "": what MLFLOW_TRACKING_URI says, or MLflow's own
    choice. Weights & Biases goes by its own environment (WANDB_BASE_URL, WANDB_MODE)."""

    @property
    def formatted(self) -> bool:
        """Whether activations and weights are channels last, as they are unless a trial found otherwise."""
        return self.channels_last is not False

    def rules(self) -> Sequence[Rule]:
        return [
            ("freeze", self.freeze == "nothing" or bool(self.start_from), "nothing without start_from"),
            ("samples", self.samples >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            *self.at_least_0("ranks", "seed", "threads", "max_restarts"),
            *self.at_least_0("validate_every", "validate_cases", "recalibrate", "checkpoint_seconds"),
            ("virtual_workers", self.virtual_workers >= 1, "at least 1"),
            ("checkpoint_every", self.checkpoint_every >= 1, "at least 1"),
            ("keep", self.keep >= 1, "at least 1"),
            (
                "track_to",
                "@" not in self.track_to,
                "without a password, which goes into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            ),
        ]
