"""The channels of a data set: what they are called, and in which file of a case each lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxelscale.channels import ONE_CT, Channel, channel_of
from voxelscale.dataset.classes import shown
from voxelscale.dataset.source import PICTURES, Found, Source, case_name
from voxelscale.errors import VoxelscaleError

NUMBERED = re.compile(r"(.+)_(\d{4})")
"""How nnU-Net numbers the channels of an image: case_0000.nii.gz is the first of case."""

MOST_CHANNELS = 100

TO_NAME = "name the channels: reading.channels=[CT, PET]"

COLOURS, GREY = ("R", "G", "B"), "grey"
"""Names of a picture's channels, where nobody gives others."""

_COLOURS = (COLOURS, ("r", "g", "b"), ("red", "green", "blue"), ("Red", "Green", "Blue"))


def said_by(path: Path, tree: Any) -> tuple[str, ...]:
    """The names of a ``dataset.json``'s ``channel_names`` or ``modality``, in the order of their numbers.

    Raises:
        VoxelscaleError: they are no table of names.
    """
    wrong = not isinstance(tree, Mapping) or len(tree) > MOST_CHANNELS
    if wrong or not all(isinstance(name, str) for name in tree.values()):
        raise VoxelscaleError(f"{path}: its channels are no table", 'write them as {"0": "CT"}')
    keys = list(tree)
    if all(re.fullmatch(r"[0-9]{1,4}", str(key)) for key in keys):
        keys.sort(key=int)
        if [int(key) for key in keys] != list(range(len(keys))):
            hint = 'write them as {"0": "CT", "1": "PET"}'
            raise VoxelscaleError(f"{path}: its channels are not numbered from 0 on", hint)
    return tuple(shown(tree[key]) for key in keys)


def settled(where: object, said: Sequence[str], asked: Sequence[str]) -> tuple[Channel, ...]:
    """The channels by the names that the user gives, or else the data set; () where nobody does.

    Raises:
        VoxelscaleError: both name channels, but not as many, or the same ones in another order.
    """
    named = ", ".join(said[:MOST_CHANNELS])
    if said and asked and len(said) != len(asked):
        what = f"reading.channels names {len(asked)} channels, but {where} has {len(said)}"
        raise VoxelscaleError(f"{what} ({named})", "name as many")
    if turned(said, asked):
        what = f"reading.channels names the channels of {where} in another order than it does ({named})"
        hint = "write them in its order; a CSV with columns as image_CT and image_PET is read in any order"
        raise VoxelscaleError(what, hint)
    channels = tuple(channel_of(name) for name in asked or said)
    # A single CT is one whatever it is called.
    return ONE_CT if [channel.scheme for channel in channels] == ["ct"] else channels


def turned(said: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether both are the same names in different orders: then the user means the order, not new names."""
    ones, others = ([name.casefold() for name in names] for names in (said, asked))
    return ones != others and sorted(ones) == sorted(others)


def placed(source: Source, images: Mapping[int, Path], channels: Sequence[Channel]) -> Source:
    """A case with the files of its channels.

    Args:
        images: by the numbers of the channels, from 0; at least one. The only file may hold all of them.
        channels: of the data set; () of one that nobody names. What is missing, and what is beyond them, is
            the case's fault.
    """
    channels = tuple(channels) or ONE_CT
    source = replace(source, channels=channels, image=images[min(images)])
    if len(channels) > 1 and list(images) == [0]:
        from voxelscale.formats import volumes_of

        if volumes_of(source.image) == len(channels):
            return replace(source, volumes=len(channels))
    missing = [number for number in range(len(channels)) if number not in images]
    beyond = [number for number in images if number >= len(channels)]
    source = replace(
        source, more=tuple(file for number, file in sorted(images.items()) if number)[:MOST_CHANNELS]
    )
    if missing:
        fault = f"lacks the channel {channels[missing[0]].name} (number {missing[0]})"
        return replace(source, fault=fault, remedy="add the file, or take the case out")
    if beyond:
        names = ", ".join(channel.name for channel in channels)
        fault = f"{images[beyond[0]].name} is a channel beyond those that are named ({names})"
        remedy = "name it in channel_names of dataset.json or in reading.channels, or remove the file"
        return replace(source, fault=fault, remedy=remedy)
    return source


def with_colours(found: Found) -> Found:
    """Of pictures, what is not named: red, green and blue, or one grey channel; of others one CT.

    Pictures that do not have as many as the first are at fault.
    """
    channels = found.channels
    each = [*found.sources, *found.tests]
    pictures = [source for source in each if source.image.suffix.lower() in PICTURES and not source.more]
    if not channels and pictures:
        from voxelscale.formats import volumes_of

        count = {source.case: volumes_of(source.image) for source in pictures}
        first = count[pictures[0].case]
        channels = tuple(map(channel_of, COLOURS)) if first == len(COLOURS) else (channel_of(GREY),)
        each = [
            replace(source, volumes=first, channels=channels)
            if count.get(source.case) == first
            else replace(source, fault="is not in the colours of the others", remedy="write all alike")
            for source in each
        ]
    names = tuple(channel.name for channel in channels)
    if pictures and names in _COLOURS and any(source.volumes == len(COLOURS) for source in each):
        channels = tuple(Channel(name=name, scheme="rgb") for name in names)
    channels = channels or ONE_CT
    each = [replace(source, channels=channels) for source in each]
    sources, tests = each[: len(found.sources)], each[len(found.sources) :]
    return replace(found, sources=sources, tests=tests, channels=channels)


def by_case(paths: Iterable[Path], ending: str = "") -> dict[str, dict[int, Path]]:
    """The files of each case by the number of their channel, of files named as nnU-Net names them.

    Args:
        ending: of the names of files, where the data set says it; "": that of any format.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in paths:
        name = path.name[: len(path.name) - len(ending)] if ending else case_name(path)
        if numbered := NUMBERED.fullmatch(name):
            files = found.setdefault(numbered[1], {})
            other = files.setdefault(int(numbered[2]), path)
            if other != path:
                raise VoxelscaleError(f"{path}: the same channel as {other.name}", "remove one of them")
    return found


def remark(channels: Sequence[Channel]) -> str:
    """The notice of the channels: "channels: CT (ct), PET (zscore)"; "" of one CT."""
    if tuple(channels) == ONE_CT:
        return ""
    return f"channels: {', '.join(f'{channel.name} ({channel.scheme})' for channel in channels)}"
