"""When which device worked on which trial, and how much of its time: as figures and as an SVG figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from voxelscale.pages.charts import BOTTOM, TOP, Frame, round_ticks
from voxelscale.search.figures import ROW, STATES, WIDE, duration, figure, legend, svg
from voxelscale.search.results import SearchResults, TrialResult, utilisation

Span = tuple[float, float, TrialResult]
"""Begun, ended (seconds since the epoch), and what was worked on."""

RIGHT = 64
"""Pixels for the utilisation in %."""

UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def device_spans(results: SearchResults, now: float) -> dict[str, list[Span]]:
    """Each device's stretches of work in order, devices by name; what still runs lasts until `now` (s)."""
    spans: dict[str, list[Span]] = {}
    for trial in results.trials:
        for stretch in trial.stretches:
            ended = now if stretch.ended is None else stretch.ended
            for device in stretch.devices:
                spans.setdefault(device, []).append((stretch.begun, max(ended, stretch.begun), trial))
    return {device: sorted(spans[device], key=lambda span: span[:2]) for device in sorted(spans)}


def busy_share(spans: Sequence[Span]) -> float:
    """Share of one device's time, from its first to its last moment of work, in which it worked."""
    whole = max(e for _, e, _ in spans) - min(b for b, _, _ in spans)
    return sum(e - b for b, e, _ in spans) / whole if whole > 0 else 0.0


def period(results: SearchResults, now: float) -> tuple[float, float]:
    """From the first moment of work to the last (`now` while any trial runs), seconds since the epoch."""
    stretches = [stretch for trial in results.trials for stretch in trial.stretches]
    begun = min((s.begun for s in stretches), default=now)
    ended = max((now if s.ended is None else s.ended for s in stretches), default=now)
    return begun, max(begun, ended)


def timeline(results: SearchResults, now: float) -> str:
    """A row for each device, its stretches coloured by their trial's state, and its utilisation in %.

    Args:
        now: seconds since the epoch.
    """
    spans = device_spans(results, now)
    begun, ended = period(results, now)
    size, unit = next(((s, u) for s, u in UNITS if ended - begun > 3 * s), (1.0, "seconds"))
    frame = Frame(
        x=(0.0, (ended - begun) / size or 1.0),
        y=(0.0, 1.0),
        width=WIDE,
        height=TOP + BOTTOM + ROW * len(spans),
        left=18 + 7 * min(max((len(device) for device in spans), default=0), 30),
        right=RIGHT,
    )
    body = _ground(frame, f"{unit} since the start")
    for row, (device, own) in enumerate(spans.items()):
        moments = [((a - begun) / size, (b - begun) / size, _said(a, b, t), t.state) for a, b, t in own]
        body += _row(frame, TOP + ROW * row, device, moments, busy_share(own))
    states = {trial.state for own in spans.values() for *_, trial in own}
    title = f"When which device worked: {100 * utilisation(results, now):.1f} % of the time overall"
    drawn = svg(WIDE, frame.height, body, title, wide=True)
    return figure(title, drawn, legend([state for state in STATES if state in states]))


def _ground(frame: Frame, name: str) -> str:
    floor, middle = frame.height - BOTTOM, (frame.left + frame.width - frame.right) / 2
    drawn = f'<text x="{middle}" y="{frame.height - 4}" text-anchor="middle">{name}</text>'
    for tick in round_ticks(*frame.x):
        x = frame.place(tick, 0.0)[0]
        drawn += f'<path class="grid" d="M{x:.1f} {TOP}V{floor}"/>'
        drawn += f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{tick:g}</text>'
    return drawn


def _row(
    frame: Frame, top: int, device: str, moments: Sequence[tuple[float, float, str, str]], share: float
) -> str:
    """One device; its moments are (begun, ended, tooltip, state), times as on the x axis."""
    name = device if len(device) <= 30 else f"{device[:29]}…"
    drawn = f'<text class="ink" x="{frame.left - 8}" y="{top + 15}" text-anchor="end">{escape(name)}</text>'
    for begun, ended, said, state in moments:
        x, end = frame.place(begun, 0.0)[0], frame.place(ended, 0.0)[0]
        wide = max(end - x, 1.0)
        drawn += f'<rect class="is-{state} fill" x="{x:.1f}" y="{top + 3}" width="{wide:.1f}"'
        drawn += f' height="{ROW - 6}"><title>{escape(said)}</title></rect>'
    x = frame.width - frame.right + 8
    return f'{drawn}<text class="ink" x="{x}" y="{top + 15}">{100 * share:.1f} %</text>'


def _said(begun: float, ended: float, trial: TrialResult) -> str:
    return f"trial {trial.number}, {trial.state}: {duration(ended - begun)}"
