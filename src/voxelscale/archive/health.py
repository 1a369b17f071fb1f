"""Whether all is well, and figures for Prometheus, over HTTP; nothing of a patient is in either."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from voxelscale.archive.settings import HealthSettings
from voxelscale.archive.troubles import missing_extra
from voxelscale.errors import VoxelscaleError

PREFIX = "voxelscale_listen"

HELP = {
    "series": ("gauge", "Series in the ledger, by state."),
    "archive_up": ("gauge", "Whether the archive answered when it was last asked."),
    "last_look_seconds": ("gauge", "When the archive was last looked at, seconds since 1970."),
    "last_alive_seconds": ("gauge", "When the loop last went round or began a step, seconds since 1970."),
    "instances_total": ("counter", "Instances that were sent by C-STORE, by what became of them."),
    "results_total": ("counter", "Results that were sent."),
    "steps_total": ("counter", "Steps of series, by step and how they ended."),
    "step_seconds_total": ("counter", "Seconds that steps took, by step."),
}
"""Kind and meaning of each figure."""

START_SECONDS = 10.0
"""So long the server may take to start."""


class Meter:
    """Figures that the loop counts and the server shows; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[tuple[str, str]] = Counter()
        self._series: dict[str, int] = {}

    def add(self, name: str, labels: str = "", value: float = 1) -> None:
        """Count something up; `labels` as Prometheus writes them."""
        with self._lock:
            self._values[name, labels] += value  # type: ignore[assignment]

    def put(self, name: str, value: float) -> None:
        """Set a figure."""
        with self._lock:
            self._values[name, ""] = value  # type: ignore[assignment]

    def series(self, counts: Mapping[str, int]) -> None:
        """Set how many series are in each state."""
        with self._lock:
            self._series = dict(counts)

    def get(self, name: str, labels: str = "") -> float:
        """A figure; 0 where it was never counted."""
        with self._lock:
            return self._values[name, labels]

    def health(self) -> dict[str, Any]:
        """What ``/health`` says."""
        with self._lock:
            up = bool(self._values["archive_up", ""])
            return {
                "status": "ok" if up else "the archive does not answer",
                "last_look": self._values["last_look_seconds", ""],
                "last_alive": self._values["last_alive_seconds", ""],
                "series": dict(self._series),
            }

    def text(self) -> str:
        """All figures in Prometheus' text format, version 0.0.4."""
        with self._lock:
            values: dict[tuple[str, str], float] = dict(self._values)
            values |= {("series", f'state="{state}"'): n for state, n in self._series.items()}
        lines = []
        for name, (kind, meaning) in HELP.items():
            of_this = sorted((labels, v) for (own, labels), v in values.items() if own == name)
            if of_this:
                lines += [f"# HELP {PREFIX}_{name} {meaning}", f"# TYPE {PREFIX}_{name} {kind}"]
            for labels, value in of_this:
                braces = f"{{{labels}}}" if labels else ""
                lines.append(f"{PREFIX}_{name}{braces} {value:.17g}")
        return "\n".join(lines) + "\n"


@contextmanager
def serve(settings: HealthSettings, meter: Meter) -> Iterator[int]:
    """Serve ``/health`` and ``/metrics`` from a thread while the block runs; gives the port.

    Raises:
        VoxelscaleError: the port cannot be opened.
    """
    try:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, PlainTextResponse
        from starlette.routing import Route
    except ImportError:
        raise missing_extra("starlette") from None

    def health(request: object) -> JSONResponse:
        said = meter.health()
        return JSONResponse(said, 200 if said["status"] == "ok" else 503)

    def metrics(request: object) -> PlainTextResponse:
        return PlainTextResponse(meter.text(), media_type="text/plain; version=0.0.4")

    app = Starlette(routes=[Route("/health", health), Route("/metrics", metrics)])
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    try:
        socket = config.bind_socket()
    except (OSError, SystemExit):
        where = f"{settings.host}:{settings.port}"
        raise VoxelscaleError(f"{where}: cannot be opened", "choose another health: {port: ...}") from None
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        _await(lambda: server.started or not thread.is_alive())
        yield int(socket.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
        socket.close()


def _await(true: Callable[[], bool]) -> None:
    end = time.monotonic() + START_SECONDS
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
