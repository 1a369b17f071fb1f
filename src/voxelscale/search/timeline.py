"""When which device worked on which trial, and how much of its time."""

from __future__ import annotations

from collections.abc import Sequence

from voxelscale.search.results import SearchResults, TrialResult

Span = tuple[float, float, TrialResult]
"""Begun, ended (seconds since the epoch), and what was worked on."""


def device_spans(results: SearchResults, now: float) -> dict[str, list[Span]]:
    """Each device's stretches of work in order, devices by name; what still runs lasts until `now` (s)."""
    spans: dict[str, list[Span]] = {}
    for trial in results.trials:
        for stretch in trial.stretches:
            ended = now if stretch.ended is None else stretch.ended
            for device in stretch.devices:
                spans.setdefault(device, []).append((stretch.begun, max(ended, stretch.begun), trial))
    return {device: sorted(spans[device], key=lambda span: span[:2]) for device in sorted(spans)}


def busy_share(*devices: Sequence[Span]) -> float:
    """Share of the devices' time, from each one's first to its last moment of work, in which it worked."""
    whole = sum(max(e for _, e, _ in spans) - min(b for b, _, _ in spans) for spans in devices)
    return sum(e - b for spans in devices for b, e, _ in spans) / whole if whole > 0 else 0.0


def utilisation(results: SearchResults, now: float) -> float:
    """`busy_share` of all devices; 0 where nothing has been done."""
    return busy_share(*device_spans(results, now).values())


def period(results: SearchResults, now: float) -> tuple[float, float]:
    """From the first moment of work to the last (`now` while any trial runs), seconds since the epoch."""
    stretches = [stretch for trial in results.trials for stretch in trial.stretches]
    begun = min((s.begun for s in stretches), default=now)
    ended = max((now if s.ended is None else s.ended for s in stretches), default=now)
    return begun, max(begun, ended)
