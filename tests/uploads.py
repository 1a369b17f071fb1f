"""Tensors without contents in place of a GPU's: what would wait for a GPU, or mix devices, is an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from voxelscale import device as room

META = torch.device("meta")


class NoOtherCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it a tensor comes from main memory to `META` by `voxelscale.device.upload` alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        into = {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A number goes with the kernel.
        mixed = [leaf for leaf in given if leaf.device.type == "cpu" and leaf.ndim]
        assert "meta" not in into or not mixed, f"{func} takes {tuple(mixed[0].shape)} from main memory"
        return out


@contextmanager
def only_uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Within it every other copy to `META` is an error; gives the bytes of those that were made."""
    copied: list[int] = []
    own = room.upload

    def upload(values: Tensor, device: torch.device) -> Tensor:
        if device != META or values.device.type != "cpu":
            return values.to(device)
        copied.append(values.nbytes)
        return torch.empty(values.shape, dtype=values.dtype, device=META)

    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("voxelscale") and getattr(module, "upload", None) is own:
                patch.setattr(module, "upload", upload)
        with NoOtherCopies():  # type: ignore[no-untyped-call]
            yield copied
