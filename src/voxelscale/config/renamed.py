"""Keys that had other names: files and commands that use the old ones are still read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from voxelscale.config.optim import OWN
from voxelscale.errors import VoxelscaleError

RENAMED = {
    "prepare.labels": "reading.labels",
    "prepare.consensus": "reading.consensus",
    "prepare.allow_empty": "reading.allow_empty",
    "prepare.fill_gaps": "reading.fill_gaps",
    "prepare.select": "reading.select",
    "prepare.names": "reading.names",
    "prepare.name_key": "reading.name_key",
    "loss.hardest": "loss.top_k",
    "optim.average": "optim.ema",
    "optim.clip": "optim.gradient_clipping",
    "predict.flips": "predict.test_time_augmentation",
    "predict.low": "predict.low_threshold",
}
"""Old key -> new key, with the same meaning."""


ADDED: dict[str, object] = {
    "phantom.crops": "",
    "reading.regions_class_order": (),
    "reading.channels": (),
    "prepare.splits": "",
    "prepare.folds": 0,
    "prepare.normalisation": (),
    "data.fold": None,
    "model.downsampling": "max",
    "model.kernels": (),
    "model.blocks": (),
    "model.preset": "none",
    "model.deep_supervision": False,
    "augment.flip_axes": "zyx",
    "train.start_from": "",
    "train.freeze": "nothing",
    "optim.pretrained_lr": 1.0,
    "train.cuda_graph": None,
    "train.deterministic": False,
    "predict.probabilities": False,
    "train.track": (),
    "train.track_to": "",
    "predict.smallest_mm3": {},
    "predict.largest_only": (),
    "export.segments": "finding",
    "export.codes": {},
    "export.patient_names": False,
}
"""Keys that came after the first digests were made, and the defaults with which they are left out."""


def as_once_meant(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config that an earlier version let pass: codes as it exported them, lists with each once."""
    renewed = {name: dict(keys) if isinstance(keys, Mapping) else keys for name, keys in tree.items()}
    if codes := renewed.get("export", {}).get("codes"):
        renewed["export"]["codes"] = {
            name: [word if type(word) is int else str(word) for word in code]
            for name, code in codes.items()
        }
    for key in {"workers", "recipes", "seeds"} & set(renewed.get("scale", ())):
        renewed["scale"][key] = list(dict.fromkeys(renewed["scale"][key]))
    return renewed


def new_name(key: str) -> str:
    """Today's name of ``section.key``."""
    return RENAMED.get(key, key)


def with_new_names(tree: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The tree under today's keys, and which old ones it had.

    Raises:
        VoxelscaleError: a key is given under its old and its new name.
    """
    renewed = {name: dict(keys) if isinstance(keys, Mapping) else keys for name, keys in tree.items()}
    found = []
    for old, new in RENAMED.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        if not isinstance(tree.get(section), Mapping) or key not in tree[section]:
            continue
        found.append(old)
        target = renewed.setdefault(new_section, {})
        if not isinstance(target, dict) or new_key in target:
            hint = f"leave out {old}, the old name of {new}"
            raise VoxelscaleError(f"{where}: both {old} and {new} are set", hint)
        target[new_key] = renewed[section].pop(key)
        if not renewed[section]:
            del renewed[section]
    return renewed, found


def with_first_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sections under the keys' first names, of which digests are made.

    Digests stay the same when a key is renamed or added, so that old runs, studies and predictions can be
    resumed. What is left to the optimiser is there as the value that is used, as it was before it could be.
    """
    named = {
        section: {key: value for key, value in keys.items() if not _is_added(f"{section}.{key}", value)}
        for section, keys in tree.items()
    }
    if "name" in (optim := named.get("optim", {})):
        own = OWN[optim["name"]]._asdict()
        named["optim"] = {k: own[k] if v is None and k in own else v for k, v in optim.items()}
    for old, new in RENAMED.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        if new_key in named.get(new_section, {}):
            named.setdefault(section, {})[key] = named[new_section].pop(new_key)
    return {section: keys for section, keys in named.items() if keys or not tree.get(section)}


def _is_added(key: str, value: object) -> bool:
    """Whether a key came later and says what was done before."""
    return key in ADDED and ADDED[key] == (tuple(value) if isinstance(value, list) else value)
