"""Micro-batches as network input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


def on_device(
    stream: Iterator[list[Any]],
    collate: Callable[[Sequence[Any]], tuple[Any, Any]],
    device: torch.device,
) -> Iterator[tuple[list[Any], tuple[Any, Any]]]:
    """Each micro-batch's samples, and its input and target."""
    for samples in stream:
        yield samples, collate(samples)
