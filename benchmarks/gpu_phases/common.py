"""What the phases share: sizes, a record that outlives them, timing and comparing."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxelscale.device import default_device, keep_freed_memory, seconds_of

FP32, BF16 = 1e-4, 2e-2
"""Largest relative differences (L2) from float64 in float32, and from float32 in bfloat16."""


class Skipped(Exception):
    """A phase, or a part of it, that cannot be done here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how large.

    Attributes:
        device: the first GPU, or the processor.
        tiny: sizes for a processor.
        out: a folder for the phases' files.
        seconds: that this phase may take.
    """

    device: torch.device
    tiny: bool
    out: Path
    seconds: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


class Record:
    """What a phase has found so far, in a file after every addition: a phase that is killed leaves it.

    Attributes:
        figures: by name.
        wrong: what was not as it should be; one makes the phase a failed one.
        says: the outcome in a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.figures: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.says = ""

    def put(self, **figures: Any) -> None:
        """Add figures."""
        self.figures.update(figures)
        self._write("running")

    def check(self, name: str, found: float, limit: float) -> None:
        """Note a difference that is above its limit, or no number."""
        if not found <= limit:
            self.wrong.append(f"{name}: {found:.2g} is above {limit:.2g}")
            self._write("running")

    def end(self, status: str, why: str = "") -> None:
        """The outcome: ok, failed or skipped."""
        self._write(status, why)

    def _write(self, status: str, why: str = "") -> None:
        content = {"status": status, "why": why, "wrong": self.wrong, "says": self.says}
        text = json.dumps({**content, "figures": plain(self.figures)})
        part = self._path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, self._path)


Function = Callable[[Setting, Record], None]


def carry_out(name: str, function: Function, out: Path, tiny: bool, limit: float) -> int:
    """Run a phase, or one rank of one, in this process; its record says how it ended."""
    device = default_device()
    keep_freed_memory()
    setting = Setting(device=device, tiny=tiny or device.type == "cpu", out=out, seconds=limit)
    rank = os.environ.get("RANK", "") if name in ("rank", "nodes") else ""
    record = Record(out / f"{name}{rank}.json")
    record.put()
    try:
        function(setting, record)
    except Skipped as skipped:
        record.end("skipped", str(skipped))
    except Exception as error:
        traceback.print_exc()
        record.end("failed", "; ".join([described(error), *record.wrong]))
        return 1
    else:
        record.end("failed" if record.wrong else "ok", "; ".join(record.wrong))
    return 1 if record.wrong else 0


def described(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


def per_call(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one of many calls, the fastest of three series that take `seconds` together."""
    call()
    count = max(1, min(200, int(seconds / 3 / max(seconds_of(call, device), 1e-6))))

    def series() -> None:
        for _ in range(count):
            call()

    return min(seconds_of(series, device) for _ in range(3)) / count


def relative(found: Tensor, right: Tensor) -> float:
    """||found - right|| / ||right||, in float64 on the processor; infinite where it is no number."""
    a, b = found.detach().cpu().double().flatten(), right.detach().cpu().double().flatten()
    value = float((a - b).norm() / b.norm().clamp_min(1e-30))
    return value if math.isfinite(value) else math.inf


def channels_last(x: Tensor) -> Tensor:
    """``(batch, channel, ...)`` with its channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def plain(value: Any) -> Any:
    """For JSON: five digits, and what is no number as a word."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value)
