"""Weights that a new training begins with: of another model, of a checkpoint, or of nnU-Net."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from voxelscale.config import Config, from_dict, to_dict
from voxelscale.console import first_and_more, notice, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.model.bundle import bundle_path, load_untrusted, read_bundle
from voxelscale.ranks.workers import Workers
from voxelscale.store import Store
from voxelscale.train.foreign import load_foreign, names_of, network_of, renamed

RECORD = "pretrained.json"
HEADS = ("head.", "supervision.")
FIRST = ("encode.levels.0.conv1", "encode.levels.0.bridge", "encode.stem.conv1")
"""Layers that see the image's channels."""
FEW = 0.5
"""Of the weights; where fewer are taken, it is a warning."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A trained network's weights, under our names.

    Attributes:
        channels: of its input; () where it does not say.
        classes: names of its outputs; () where it does not say.
        kind: what its outputs are: ``softmax`` with the background first, or ``sigmoid``.
        network: sections of the config whose network the weights fit; {} where it does not say.
    """

    weights: Mapping[str, Tensor]
    channels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    kind: str = "sigmoid"
    network: Mapping[str, Any]


def read_pretrained(path: Path) -> Pretrained:
    """The weights in a model file, a run's folder, a checkpoint (``.ckpt``) or nnU-Net's ``.pth``.

    Raises:
        VoxelscaleError: there are none, the file is damaged, or it holds several networks.
    """
    if not path.exists():
        raise VoxelscaleError(f"{path}: there is no such file", "name a model, a run or a checkpoint")
    found = _read(path)
    for name, weight in found.weights.items():
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or not weight.isfinite().all():
            raise VoxelscaleError(f"{path}: its weight {name} is not finite", "name another file")
    return found


def _read(path: Path) -> Pretrained:
    if path.suffix == ".pth":
        content = load_foreign(path)
        channels, names, regions = names_of(content, path)
        return Pretrained(
            weights=renamed(content["network_weights"]),
            channels=channels,
            classes=names,
            kind="sigmoid" if regions else "softmax",
            network=network_of(content),
        )
    if path.suffix == ".ckpt":
        content = load_untrusted(path)
        model, average = content.get("model"), content.get("average")
        if not isinstance(model, dict) or not isinstance(average, dict):
            raise VoxelscaleError(f"{path}: no checkpoint of a training", "name one in run/checkpoints/")
        weights = {n: w for n, w in (model | average).items() if w.is_floating_point()}
        return Pretrained(weights=weights, network={})
    bundle = read_bundle(path)
    if bundle.others:
        several = f"{bundle_path(path)}: holds {1 + len(bundle.others)} networks"
        raise VoxelscaleError(several, "name the model of one of them")
    whole = to_dict(bundle.config)
    classes = bundle.classes
    return Pretrained(
        weights={n: w for n, w in bundle.weights.items() if w.is_floating_point()},
        channels=tuple(channel.name for channel in bundle.channels),
        classes=classes.names,
        kind="sigmoid" if classes.regions or classes.single else "softmax",
        network={"model": whole["model"], "data": {"patch_size": whole["data"]["patch_size"]}},
    )


def config_like(path: Path) -> Config:
    """The defaults, with the network and the patch that the weights in a file fit."""
    tree = {key: dict(section) for key, section in read_pretrained(path).network.items()}
    return from_dict(tree, str(path))


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What became of a network's weights.

    Attributes:
        names: of the weights that were taken.
        new: why the others were not, by their names.
    """

    names: tuple[str, ...]
    new: Mapping[str, str]


def take_over(model: nn.Module, given: Pretrained, channels: tuple[str, ...], store: Store) -> Taken:
    """Put the layers that fit by name and shape into a network; the decoder's levels count from the top.

    Of a first convolution with other channels those of the same name are taken. A head is taken where it
    tells the same classes apart.
    """
    ours = {name: weight for name, weight in model.state_dict().items() if weight.is_floating_point()}
    theirs = _aligned(given.weights, ours)
    theirs = {name: w for name, w in theirs.items() if not name.startswith(HEADS)} | _head(
        theirs, given, store
    )
    names: list[str] = []
    new: dict[str, str] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in ours):
        parts = {name: weight for name, weight in ours.items() if name.rpartition(".")[0] == layer}
        reason = _put(layer, parts, theirs, given.channels, channels)
        names += [] if reason else parts
        new |= dict.fromkeys(parts, reason) if reason else {}
    return Taken(names=tuple(names), new=new)


def _put(
    layer: str,
    parts: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    their_channels: tuple[str, ...],
    channels: tuple[str, ...],
) -> str:
    """Put a layer's weights in place; why not, where they do not fit."""
    if not parts.keys() <= theirs.keys():
        return "of other classes" if f"{layer}.".startswith(HEADS) else "not there"
    if layer in FIRST and their_channels and _folded(their_channels) != _folded(channels):
        name = f"{layer}.weight"
        same = _put_channels(parts[name], theirs[name], their_channels, channels)
        return "other channels; those of the same name are taken" if same else "of other channels"
    if any(weight.shape != theirs[name].shape for name, weight in parts.items()):
        return "of another shape"
    with torch.no_grad():
        for name, weight in parts.items():
            weight.copy_(theirs[name])
    return ""


def _folded(names: Iterable[str]) -> list[str]:
    return [name.casefold() for name in names]


def _put_channels(weight: Tensor, source: Tensor, theirs: tuple[str, ...], ours: tuple[str, ...]) -> bool:
    """Whether a first convolution looks at some of the same channels, whose weights it is then given."""
    if source.shape[1] != len(theirs):
        return False
    if weight.shape[0] != source.shape[0] or weight.shape[2:] != source.shape[2:]:
        return False
    places, put = {name: n for n, name in enumerate(_folded(theirs))}, False
    for n, name in enumerate(_folded(ours)):
        if name in places:
            with torch.no_grad():
                weight[:, n] = source[:, places[name]]
            put = True
    return put


def _aligned(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights with the decoder's levels numbered as ours, whose depth may be another."""
    shift = _levels(ours) - _levels(theirs)

    def at(name: str) -> str:
        return re.sub(r"^decode\.levels\.(\d+)", lambda m: f"decode.levels.{int(m[1]) + shift}", name)

    return {at(name): weight for name, weight in theirs.items()}


def _levels(weights: Iterable[str]) -> int:
    numbers = [int(name.split(".")[2]) for name in weights if name.startswith("decode.levels.")]
    return max(numbers, default=-1) + 1


def _head(theirs: Mapping[str, Tensor], given: Pretrained, store: Store) -> dict[str, Tensor]:
    """The heads' weights, where they are of the same classes."""
    classes = store.classes
    if _folded(given.classes) != _folded(classes.names):
        return {}
    heads = {name: weight for name, weight in theirs.items() if name.startswith(HEADS)}
    kind = "sigmoid" if classes.regions or classes.single else "softmax"
    if kind == given.kind:
        return heads
    if classes.single:  # sigmoid(b - a) is the softmax of (a, b)
        return {name: weight[1:2] - weight[0:1] for name, weight in heads.items() if len(weight) == 2}
    return {}


def begin_from(
    model: nn.Module, config: Config, store: Store, run: Path, workers: Workers
) -> frozenset[str]:
    """Give a new training the weights of `config.train.start_from`, and freeze what is to be.

    Rank 0 reads them, as DDP sends its weights to the others; the run's record keeps their names, for a
    training that is resumed.

    Returns:
        the names of the parameters that were taken.

    Raises:
        VoxelscaleError: the file cannot be read, or none of its weights fits.
    """
    if not config.train.start_from:
        return frozenset()
    found: list[Any] = [()]
    if workers.rank == 0:
        resumed = any((run / "checkpoints").glob("*.ckpt"))
        found = [_recorded(run) if resumed else _begun(model, config, store, run)]
    if workers.ranks > 1:
        dist.broadcast_object_list(found, src=0)
    names = frozenset(found[0])
    _freeze(model, names, config.train.freeze)
    return names


def _begun(model: nn.Module, config: Config, store: Store, run: Path) -> tuple[str, ...]:
    path = Path(config.train.start_from)
    channels = tuple(channel.name for channel in store.channels)
    taken = take_over(model, read_pretrained(path), channels, store)
    sizes = {name: weight.numel() for name, weight in model.state_dict().items()}
    share = sum(sizes[name] for name in taken.names) / max(
        1, sum(sizes[n] for n in (*taken.names, *taken.new))
    )
    if not taken.names:
        hint = "begin without --config, or with the model section of that model's config"
        raise VoxelscaleError(f"{path}: none of its weights fits this network", hint)
    say = warn if share < FEW else notice
    say(f"train: {share:.1%} of the weights are those of {path}")
    for reason in dict.fromkeys(taken.new.values()):
        each = [name for name, why in taken.new.items() if why == reason]
        notice(f"train: new ({reason}): {first_and_more(each, 4)}")
    write_atomic(run / RECORD, json.dumps({"from": path.name, "taken": taken.names, "new": taken.new}))
    return taken.names


def _recorded(run: Path) -> tuple[str, ...]:
    try:
        return tuple(map(str, json.loads((run / RECORD).read_text(encoding="utf-8"))["taken"]))
    except (OSError, ValueError, KeyError, TypeError):
        hint = "train into another folder"
        raise VoxelscaleError(f"{run / RECORD}: cannot be read, so the run cannot go on", hint) from None


def _freeze(model: nn.Module, names: frozenset[str], what: str) -> None:
    """Keep weights that were taken as they are.

    Raises:
        VoxelscaleError: a frozen layer is batch norm.
    """
    for name, parameter in model.named_parameters():
        inside = not name.startswith(HEADS) if what == "all_but_head" else name.startswith("encode.")
        if what != "nothing" and inside and name in names:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            raise VoxelscaleError(
                f"train.freeze={what}: the statistics of batch norm in {name} would still change",
                "set a low optim.pretrained_lr instead, or take a model with model.norm=instance",
            )
