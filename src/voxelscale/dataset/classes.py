"""The classes of a data set: as its ``dataset.json`` names them, and as the user does.

nnU-Net: its documentation/dataset_format.md, region_based_training.md and ignore_label.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxelscale.classes import LESION, Classes, Value
from voxelscale.config import ReadingConfig
from voxelscale.errors import VoxelscaleError

LONGEST_NAME = 60
"""Characters of a class's or a channel's name that are kept."""

MOST_NAMED = 20
"""Classes that a message names at most."""

IGNORE, BACKGROUND = "ignore", "background"
"""Names that are no classes."""


def of_json(path: Path, tree: Mapping[str, Any]) -> Classes:
    """The classes of a ``dataset.json``.

    The Decathlon writes ``{"1": "cancer"}``, nnU-Net 2 ``{"cancer": 1}`` or, for regions that overlap,
    ``{"whole": [1, 2]}``. Where there are none, every value above 0 is the lesion.

    Raises:
        VoxelscaleError: they are not understood, or contradict each other.
    """
    labels = tree.get("labels", {})
    if not isinstance(labels, Mapping):
        raise VoxelscaleError(f"{path}: 'labels' is no table", 'write it as {"background": 0, "cancer": 1}')
    named: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items():
        name, numbers = (value, key) if isinstance(value, str) else (key, value)
        try:
            group = tuple(_whole(n) for n in (numbers if isinstance(numbers, list) else [numbers]))
        except (TypeError, ValueError):
            hint = "a class needs a whole number, a region a list of them"
            raise VoxelscaleError(
                f"{path}: label {str(name)[:LONGEST_NAME]!r} has no number", hint
            ) from None
        name = shown(name)
        if name in named and any(group):
            raise VoxelscaleError(f"{path}: two labels are called {name!r}", "give each a name of its own")
        named[name] = group
    ignore = tuple(value for value in named.pop(IGNORE, ()) if value)
    background = tuple(value for value in named.pop(BACKGROUND, ()) if value)
    groups = {name: group for name, group in named.items() if any(group)}
    order = tree.get("regions_class_order", [])
    try:
        if not isinstance(order, list):
            raise TypeError("regions_class_order is no list")
        # As nnU-Net tells them: a list of several values is a region.
        overlap = len(groups) > 1 and any(len(group) > 1 for group in groups.values())
        written = tuple(_whole(value) for value in order) if overlap else ()
        return _made(groups, overlap, written, ignore, background)
    except (TypeError, ValueError) as error:
        raise VoxelscaleError(f"{path}: its labels: {error}", _hint(str(error))) from None


def settled(classes: Classes, reading: ReadingConfig) -> Classes:
    """The user's classes (``reading.labels``) over those of the data set; settled ones stay as they are.

    Of a list every other value is background; of a mapping every other value that the data set names.

    Raises:
        VoxelscaleError: what the user says is not understood, or contradicts itself.
    """
    labels, order = reading.labels, reading.regions_class_order
    try:
        if isinstance(labels, Mapping) and labels:
            return _of_mapping(labels, order, classes)
        if labels:
            return Classes(values=(tuple(labels),))
        if order and order != classes.order:
            if classes.single:
                raise ValueError("regions_class_order is for several classes")
            return replace(classes, regions=True, order=order)
    except (TypeError, ValueError) as error:
        where = "reading.labels" if labels else "reading.regions_class_order"
        raise VoxelscaleError(f"{where}: {error}", _hint(str(error))) from None
    return classes


def values_of(reading: ReadingConfig) -> tuple[int, ...] | None:
    """The mask values of the one lesion, where the user lists them: all others are background."""
    labels = reading.labels
    return tuple(labels) if labels and not isinstance(labels, Mapping) else None


def digested(classes: Classes, reading: ReadingConfig) -> Any:
    """What a digest of a case takes of its classes; of one class what it took before there were several."""
    classes = settled(classes, reading)
    if values_of(reading) or (classes.plain and classes.values in (((),), ((1,),))):
        return None
    return list(classes.values[0]) if classes.plain else classes.to_dict()


def remark(classes: Classes, reading: ReadingConfig) -> str:
    """The notice of several classes: "classes: liver [1], tumour [2]"."""
    if classes.single:
        return ""
    groups = zip(classes.names, classes.values, strict=True)
    each = [f"{name} [{','.join(map(str, group))}]" for name, group in groups]
    more = f" and {len(each) - MOST_NAMED} more" if len(each) > MOST_NAMED else ""
    text = f"{'regions' if classes.regions else 'classes'}: {', '.join(each[:MOST_NAMED])}{more}"
    if classes.ignore:
        text += f", ignored [{','.join(map(str, classes.ignore))}]"
    if values := values_of(reading):
        return f"{text}; taken as one lesion: [{','.join(map(str, values))}]"
    numbers = sorted(set(classes.numbers))
    if reading.labels or not numbers or len(numbers) > MOST_NAMED:
        return text
    return f"{text}; reading.labels=[{','.join(map(str, numbers))}] makes one lesion of them"


def shown(name: object) -> str:
    """A name that a file gives, as it can be printed."""
    return "".join(c if c.isprintable() else "_" for c in str(name)[:LONGEST_NAME]).strip()


def _of_mapping(labels: Mapping[Any, Any], order: tuple[int, ...], classes: Classes) -> Classes:
    """The classes of ``{liver: 1, tumour: [2, 3], ignore: 255, background: [0, 4]}``."""
    groups: dict[str, tuple[Value, ...]] = {}
    for name, value in labels.items():
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"{name!r} is no name of a class")
        group = value if isinstance(value, list | tuple) else [value]
        wrong = [v for v in group if isinstance(v, bool) or not isinstance(v, int | str)]
        if wrong or not group:
            raise ValueError(f"{name} has no values: they are whole numbers or names")
        groups[name.strip()] = tuple(v.strip() if isinstance(v, str) else v for v in group)
    ignore, background = (
        _numbers(name, [v for v in groups.pop(name, ()) if v != 0]) for name in (IGNORE, BACKGROUND)
    )
    if not groups:
        raise ValueError("it names no class")
    used = {value for group in groups.values() for value in group} | set(ignore) | set(background)
    # What the data set ignores stays so, unless the user says what it is.
    ignore += tuple(value for value in classes.ignore if value not in used)
    known = {*classes.numbers, *classes.background} - used
    background += tuple(sorted(known))
    flat = [value for group in groups.values() for value in set(group)]
    shared = len(flat) > len(set(flat)) and len(groups) > 1
    return _made(groups, shared or bool(order), order, ignore, background)


def _made(
    groups: Mapping[str, Sequence[Value]],
    overlap: bool,
    order: tuple[int, ...],
    ignore: tuple[int, ...],
    background: tuple[int, ...],
) -> Classes:
    if not groups:
        return Classes(names=LESION.names, ignore=ignore, background=background)
    named = {name: tuple(dict.fromkeys(group)) for name, group in groups.items()}
    if overlap and len(named) > 1 and not order:
        named, order = _ordered(named)
    regions = overlap and len(named) > 1
    return Classes(
        names=tuple(named),
        values=tuple(named.values()),
        regions=regions,
        order=order if regions else (),
        ignore=ignore,
        background=background,
    )


def _ordered(
    groups: Mapping[str, tuple[Value, ...]],
) -> tuple[dict[str, tuple[Value, ...]], tuple[int, ...]]:
    """Regions from the outermost on, and a value of each that no later one has.

    Raises:
        ValueError: one has none; that they are consistent `Classes` sees to.
    """
    fallen = sorted(groups.items(), key=lambda item: -len(item[1]))
    order = []
    for at, (name, group) in enumerate(fallen):
        later = {value for _, other in fallen[at + 1 :] for value in other}
        own = [value for value in group if isinstance(value, int) and value not in later]
        if not own:
            raise ValueError(f"the region {name} has no value of its own to be written as")
        order.append(min(own))
    return dict(fallen), tuple(order)


def _numbers(name: str, group: Sequence[Value]) -> tuple[int, ...]:
    if wrong := [value for value in group if isinstance(value, str)]:
        raise ValueError(f"{name} takes whole numbers, not {wrong[0]!r}")
    return tuple(value for value in group if isinstance(value, int))


def _whole(value: Any) -> int:
    """A whole number, which keys of JSON write as a text."""
    if isinstance(value, bool) or not isinstance(value, int | str) or len(str(value)) > 20:
        raise TypeError(f"{str(value)[:20]!r} is no whole number")
    return int(value)


def _hint(problem: str) -> str:
    if "region" in problem or "own" in problem:
        return "name the regions from the outermost on, and the value of each in regions_class_order"
    return "correct it; classes are written as {liver: 1, tumour: [2, 3], ignore: 255, background: [4]}"
