"""What may have been meant by a name that does not exist: a command, an option, a config key, a choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CUTOFF = 0.7
"""Least similarity (difflib's ratio) of a suggestion: transposed or missing letters reach 0.8, other words
rarely more than 0.6."""

COMMANDS = {
    "eval": "evaluate",
    "infer": "predict",
    "inference": "predict",
    "preprocess": "prepare",
    "score": "evaluate",
    "segment": "predict",
    "test": "evaluate",
    "tune": "search",
    "validate": "evaluate",
}
"""Names that other tools give to our commands."""

KEYS = {
    "amp": "train.precision",
    "architecture": "model.name",
    "augmentation": "augment.enabled",
    "base_channels": "model.filters",
    "batch": "train.batch_size",
    "batch_size": "train.batch_size",
    "channels": "model.filters",
    "crop_size": "data.patch_size",
    "devices": "train.ranks",
    "ema": "optim.ema",
    "epochs": "train.samples",
    "features": "model.filters",
    "fp16": "train.precision",
    "gpus": "train.ranks",
    "grad_clip": "optim.gradient_clipping",
    "gradient_clipping": "optim.gradient_clipping",
    "iterations": "train.samples",
    "kernel": "model.kernel_size",
    "learning_rate": "optim.lr",
    "levels": "model.depth",
    "lr": "optim.lr",
    "max_epochs": "train.samples",
    "mixed_precision": "train.precision",
    "nproc": "train.ranks",
    "num_epochs": "train.samples",
    "num_samples": "train.samples",
    "num_workers": "data.readers",
    "optimizer": "optim.name",
    "patch": "data.patch_size",
    "patch_size": "data.patch_size",
    "resolution": "prepare.spacing",
    "roi_size": "data.patch_size",
    "scheduler": "optim.schedule",
    "steps": "train.samples",
    "test_time_augmentation": "predict.test_time_augmentation",
    "tta": "predict.test_time_augmentation",
    "val_interval": "train.validate_every",
    "voxel_spacing": "prepare.spacing",
    "wd": "optim.weight_decay",
    "world_size": "train.ranks",
}
"""Names that other tools of the field give to our keys."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like this one, or begins with it; "" where none is much like it."""
    import difflib

    names = list(known)
    longer = [other for other in names if len(name) >= 3 and other.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=CUTOFF)), "")


def nearest_command(name: str, known: Iterable[str]) -> str:
    """The command that was meant; "" where none is much like it."""
    return COMMANDS.get(name, "") or nearest(name, known)


def nearest_keys(dotted: str, known: Sequence[str]) -> list[str]:
    """The config keys that may have been meant by ``section.key`` or a bare key; [] where none is likely.

    Looked for in this order: the same section, another tool's name for a key, the same key in other
    sections, a misspelt section, a misspelt key of another section.

    Args:
        known: all keys, as ``section.key``.
    """
    section, _, key = dotted.rpartition(".")
    sections = list(dict.fromkeys(other.partition(".")[0] for other in known))
    keys = [other.partition(".")[2] for other in known]
    own = [other.partition(".")[2] for other in known if other.partition(".")[0] == section]
    if near := nearest(key, own):
        return [f"{section}.{near}"]
    if key.replace("-", "_") in KEYS:
        return [KEYS[key.replace("-", "_")]]
    if near := nearest(section or key, sections) if section not in sections else "":
        within = nearest(key, [k.partition(".")[2] for k in known if k.startswith(f"{near}.")])
        return [f"{near}.{within}" if within else near]
    near = key if key in keys else nearest(key, keys)
    return [other for other in known if near and other.partition(".")[2] == near][:3]


def meant(names: Sequence[str]) -> str:
    """A hint that asks whether one of them was meant."""
    return f"did you mean {' or '.join(names)}?"
