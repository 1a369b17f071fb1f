"""A training that takes no time, for tests of what runs many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from voxelscale.config import Config, dump
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import Ending, Order, Training, TrainingResult


@dataclass(kw_only=True)
class Emulated:
    """Trains in the place of `train_once`: at once, in this process, with a Dice made up of the config.

    Attributes:
        ending: of a training, by its config.
        dice: of a config, after all samples; after fewer it is lower.
        meanwhile: called at each validation, with the training.
        trained: what was trained so far.
    """

    ending: Callable[[Config], Ending] = lambda config: "finished"
    dice: Callable[[Config], float] = lambda config: 0.5 + config.optim.used.lr + config.model.filters / 100
    meanwhile: Callable[[Training], None] = lambda training: None
    trained: list[Training] = field(default_factory=list)

    def __call__(
        self,
        training: Training,
        /,
        order: Callable[[], Order],
        validated: Callable[[int, float], bool] = lambda samples, dice: False,
    ) -> TrainingResult:
        self.trained.append(training)
        config, run = training.config, training.run
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(dump(config))
        curve = []
        for samples in (*config.train.validate_at, config.train.samples):
            dice = self.dice(config) * samples / config.train.samples
            curve.append((samples, dice))
            hopeless = validated(samples, dice)
            self.meanwhile(training)
            if hopeless or order() == "stop":
                return TrainingResult(ending="stopped", curve=tuple(curve))
        ending = self.ending(config)
        fault = VoxelscaleError("made up", "nothing") if ending in ("failed", "diverged") else None
        return TrainingResult(ending=ending, curve=tuple(curve), fault=fault)
