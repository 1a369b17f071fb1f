"""Networks of other packages, by name.

A package registers one in its ``pyproject.toml``::

    [project.entry-points."voxelscale.models"]
    swin = "my_package.nets:make_swin"

    def make_swin(config: ModelConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> nn.Module

The network takes ``(batch, 1, z, y, x)`` float32 and gives logits of the same shape; z is 1 where
``config.dims`` is 2. For images of several channels, or several classes or regions, the function is called
with the keywords ``channels`` and ``outputs``, the network's channels in and out. With
``config.deep_supervision`` the network may give a list of logits in training mode, those of the full size
first; the names of weights that only these need begin with ``supervision.``.

``model.name`` is then ``swin``, or ``my-package:swin`` where two packages have one of that name, or
``my-package`` where it has only one.

A name comes from files that others may have written, a config or a model bundle. It is only looked
up among the names that installed packages have registered; no module is imported by it. What a hostile
file can choose is which of the installed networks is built.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from voxelscale.errors import VoxelscaleError

GROUP = "voxelscale.models"
OWN = ("unet",)
"""Networks of this package; no other can take their names."""


def check_name(name: str) -> None:
    """Refuse an unknown network before anything is started.

    Raises:
        VoxelscaleError: there is none or more than one of this name.
    """
    if name not in OWN:
        find(name)


def find(name: str) -> EntryPoint:
    """The registered network of this name, not yet imported.

    Raises:
        VoxelscaleError: there is none or more than one of this name.
    """
    registered = list(entry_points(group=GROUP))
    found = {_full(entry): entry for entry in registered if name in _names(entry)}
    if len(found) > 1:
        hint = f"name one of them: {', '.join(sorted(found))}"
        raise VoxelscaleError(f"model.name: {len(found)} networks are called {name}", hint)
    if not found:
        known = [*OWN, *sorted(_full(entry) for entry in registered)]
        spellings = [*OWN, *(spelling for entry in registered for spelling in _names(entry))]
        near = difflib.get_close_matches(name, spellings, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]}? " if near else ""
        raise VoxelscaleError(
            f"model.name: no network is called {name}",
            f"{guess}known here: {', '.join(known)}; others come with packages that register theirs",
        )
    return next(iter(found.values()))


def load(name: str) -> Callable[..., Any]:
    """The function that builds the registered network of this name.

    Raises:
        VoxelscaleError: there is none, or its package cannot be imported.
    """
    entry = find(name)
    try:
        function = entry.load()
    except (ImportError, AttributeError) as error:
        hint = f"fix or reinstall the package that registers {entry.value}"
        raise VoxelscaleError(f"model.name {name}: cannot be loaded ({error})", hint) from error
    if not callable(function):
        raise VoxelscaleError(f"model.name {name}: {entry.value} is no function", "register a function")
    made: Callable[..., Any] = function
    return made


def _names(entry: EntryPoint) -> tuple[str, ...]:
    package = entry.dist.name if entry.dist else ""
    return (entry.name, _full(entry), package)


def _full(entry: EntryPoint) -> str:
    return f"{entry.dist.name}:{entry.name}" if entry.dist else entry.name
