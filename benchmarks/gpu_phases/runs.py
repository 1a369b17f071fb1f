"""Trainings through the engine: resuming, waiting of the host, and a real one."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu_phases.common import Record, Setting
from benchmarks.gpu_phases.subject import (
    apart,
    large_config,
    make_store,
    run_engine,
    shape_of,
    small_config,
)
from torch.profiler import ProfilerActivity, profile

from voxelscale.train.log import STOP_FILE, read_events
from voxelscale.train.loop import train

STEPS = 8
DIFFERENT, LUCK = 10.0, 3e-4
"""A resumed run may differ from the first so many times as much as two uninterrupted ones do, and by
`LUCK`: on a GPU sums in no fixed order make a difference one time, and none the next."""


def resume(setting: Setting, record: Record) -> None:
    """Eight steps against four, a stop and four more; as usual, and with deterministic algorithms."""
    store = setting.out / "store"
    make_store(store, shape_of(setting))
    for way, deterministic in {"usual": False, "deterministic": True}.items():
        config = small_config(setting, train={"samples": 2 * STEPS, "deterministic": deterministic})
        (_, first), (_, again) = (run_engine(config, store, setting.out / f"{way} {n}") for n in range(2))
        seen, _ = run_engine(config, store, setting.out / way, asked=after(STEPS // 2))
        end, resumed = run_engine(config, store, setting.out / way)
        repeated, broken = apart(again, first), apart(resumed, first)
        record.put(**{way: {"stopped_after": seen, "repeated": repeated, "resumed": broken}})
        if not 0 < seen < end:
            record.wrong.append(f"{way}: stopped after {seen} of {end} samples, not between")
        exactly = deterministic or not setting.cuda
        record.check(f"{way}: a repeated run", repeated, 0.0 if exactly else 1e-2)
        record.check(f"{way}: a resumed run", broken, 0.0 if exactly else DIFFERENT * repeated + LUCK)
        record.says += f"{way}: resumed {broken:.1e} apart, repeated {repeated:.1e}; "


def after(steps: int) -> Callable[[], bool]:
    """To be asked once a step: whether to stop, from the `steps`-th on."""
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    return ask


def synchronisations(setting: Setting, record: Record) -> None:
    """Where the host waits for the device, in a few steps of the engine; kernels, and the busy share."""
    store = setting.out / "store"
    record.put(cases=make_store(store, shape_of(setting)))
    warm, steps = (2, 3) if setting.tiny else (6, 6)
    config = large_config(setting, train={"samples": 2 * (warm + steps + 3)})
    trace = setting.out / "trace.json"
    run_engine(config, store, None, asked=profiled(warm, steps, setting, trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    trace.unlink()
    record.put(steps=steps, **(on_gpu if setting.cuda else on_processor)(events, steps))
    shown = {name: value for name, value in record.figures.items() if isinstance(value, float)}
    record.says = ", ".join(f"{name} {value:.3g}" for name, value in shown.items())


def profiled(warm: int, steps: int, setting: Setting, trace: Path) -> Callable[[], bool]:
    """To be asked once a step: profiles some after the first, writes the trace, and then stops."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.cuda else [])]
    recorder = profile(activities=activities)
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        if asked == warm:
            recorder.start()
        if asked == warm + steps:
            recorder.stop()
            recorder.export_chrome_trace(str(trace))
        return asked >= warm + steps

    return ask


def on_processor(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Operations a step."""
    return {"operations": sum(event.get("cat") == "cpu_op" for event in events) / steps}


def on_gpu(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Calls by which the host waits, copies, kernels (each a step), and the share of time with work.

    Asynchronous copies from pageable memory, and any to it, wait as well.
    """
    calls, copies = Counter[str](), Counter[str]()
    kernels, spans = 0, []
    for event in events:
        kind, name = event.get("cat"), event["name"]
        if kind in ("cuda_runtime", "cuda_driver"):
            calls[name] += 1
        if kind == "gpu_memcpy":
            copies[name] += 1
        kernels += kind == "kernel"
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            spans.append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
    waits = {name: calls[name] / steps for name in sorted(calls) if "Synchronize" in name}
    return {
        "stream_synchronisations": calls["cudaStreamSynchronize"] / steps,
        "device_synchronisations": calls["cudaDeviceSynchronize"] / steps,
        "pageable_copies": sum(n for name, n in copies.items() if "Pageable" in name) / steps,
        "kernels": kernels / steps,
        "launches": sum(n for name, n in calls.items() if "Launch" in name) / steps,
        "busy_share": busy(spans),
        "step_ms": (max(end for _, end in spans) - min(s for s, _ in spans)) / 1e3 / steps if spans else 0,
        "waits": waits,
        "copies": {name: number / steps for name, number in sorted(copies.items())},
    }


def busy(spans: list[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end in which there is a span."""
    if not spans:
        return 0.0
    covered, end = 0.0, min(spans)[0]
    first = end
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered / max(end - first, 1e-9)


def training(setting: Setting, record: Record) -> None:
    """A real training as `voxelscale train` does it, without validation and with, for some 15 s each."""
    store = setting.out / "store"
    record.put(cases=make_store(store, shape_of(setting)))
    for way, every in (("alone", 0), ("validated", 8 if setting.tiny else 100)):
        config = large_config(setting, train=budget(setting, every))
        run = setting.out / way
        run.mkdir()
        with stopped_after(run / STOP_FILE, 15.0):
            result = train(config, store, run)
        events = read_events(run)
        record.put(**{way: figures_of(events, result.seen)})
        figures = record.figures[way]
        if not figures["last_loss"] < 2 * figures["first_loss"]:
            record.wrong.append(
                f"{way}: the loss went from {figures['first_loss']} to {figures['last_loss']}"
            )
        if every and not figures["validations"]:
            record.wrong.append(f"{way}: no validation has ended")
        record.says += f"{way}: {figures['samples_per_second']:.3g} samples/s, "
        record.says += f"input wait {100 * figures['input_wait']:.1f} %; "


def budget(setting: Setting, every: int) -> dict[str, Any]:
    """More samples than there is time for: a file stops the run. The log has a line in `samples` / 200."""
    if setting.tiny:
        return {"samples": 16, "validate_every": every}
    return {"samples": 4_000, "validate_every": every, "checkpoint_every": 10_000}


@contextmanager
def stopped_after(path: Path, seconds: float) -> Iterator[None]:
    """Within it a run is asked to stop, by its file, after so many seconds."""
    timer = threading.Timer(seconds, path.touch)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def figures_of(events: list[dict[str, Any]], seen: int) -> dict[str, Any]:
    """Speed and waiting after the first line of the log, which the start is part of."""
    lines = [event for event in events if event["event"] == "train"]
    steady = lines[1:] or lines
    weights = [line["samples_per_second"] for line in steady]
    losses = [line["loss"] for line in lines if "loss" in line]
    waited = sum(line["input_wait"] / rate for line, rate in zip(steady, weights, strict=True))
    spent = sum(1 / rate for rate in weights)
    return {
        "seen": seen,
        "samples_per_second": len(steady) / spent,
        "input_wait": waited / spent,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validations": sum(event["event"] == "validation" for event in events),
        "validation_seconds": [event["seconds"] for event in events if event["event"] == "validation"],
    }
