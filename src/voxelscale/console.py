"""What a person sees while a command works: progress, notices, nothing when quiet.

Progress goes to stderr, results to stdout, so that a command's output can be piped.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_level = 1


def set_verbosity(level: int) -> None:
    """0: errors only; 1: progress and notices; 2: details too."""
    global _level
    _level = level


def verbosity() -> int:
    """The level in force."""
    return _level


def notice(text: str, level: int = 1) -> None:
    """A line on stderr, at this level of verbosity or above."""
    if _level >= level:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A line on stderr that even ``--quiet`` shows: the result may not mean what a reader takes it for."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Progress:
    """A bar with rate and ETA on a terminal; elsewhere a line every few seconds.

    Args:
        label: what is being done.
        total: units of work.
        done: units that an earlier run did already; they count neither for the rate nor the ETA.
        every: seconds between lines where stderr is no terminal.
        rate: whether to tell the units a second, or a minute; not where the notes do.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, every: float = 10.0, rate: bool = True
    ) -> None:
        self.label, self.total, self.done, self.note = label, total, done, ""
        self._first, self._every, self._rated = done, every, rate
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if _level >= 1 and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        """`done` units are finished; `note` is shown beside the bar."""
        self.done, self.note = done, note
        if self._bar is not None:
            told = "; ".join(filter(None, (self._rate(), note)))
            self._bar.update(self._task, completed=done, note=told)
        elif time.monotonic() - self._last >= self._every:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        new = self.done - self._first
        left = (self.total - self.done) * (self._last - self._start) / new if new > 0 else float("nan")
        parts = [f"{self.done}/{self.total}", self._rate(), f"{left:.0f} s left" if new > 0 else ""]
        told = ", ".join(filter(None, parts))
        notice(f"{self.label}: {told}{'; ' + self.note if self.note else ''}")

    def _rate(self) -> str:
        """Units done by this run over the time it took."""
        passed = time.monotonic() - self._start
        new = self.done - self._first
        if not self._rated or new <= 0 or passed <= 0:
            return ""
        return f"{new / passed:.1f}/s" if new >= passed else f"{60 * new / passed:.1f}/min"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif _level >= 1 and kind is None:
            self._line()
