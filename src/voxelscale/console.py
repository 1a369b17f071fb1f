"""What a person sees while a command works: progress, notices, nothing when quiet.

Progress goes to stderr, results to stdout, so that a command's output can be piped.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Sequence
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


def first_of(names: Sequence[str], most: int) -> str:
    """The first names with commas; ``...`` stands for the others."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def first_and_more(names: Sequence[str], most: int = 5) -> str:
    """The first names with commas, and how many others there are: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A line a row; the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join(
            [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]
        ).rstrip()
        for row in rows
    )


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun in the right form: "1 scan", "2 scans", "0 studies", "3 series".

    Args:
        plural: where it is not the noun's regular one.
    """
    if number == 1:
        return f"1 {noun}"
    regular = noun if noun.endswith("series") else f"{noun}s"
    if re.search("[^aeiou]y$", noun):
        regular = f"{noun[:-1]}ies"
    return f"{number} {plural or regular}"


def duration(seconds: float) -> str:
    """Seconds for people, in at most two units: "0.4 s", "45 s", "4 min 10 s", "2 h 10 min", "3 d 4 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    # The smaller unit and its seconds; the larger one and how many smaller ones it has; up to which time.
    units = (("s", 1, "min", 60, 3600.0), ("min", 60, "h", 60, 48 * 3600.0), ("h", 3600, "d", 24, math.inf))
    small, size, large, each = next(u[:4] for u in units if round(seconds / u[1]) * u[1] < u[4])
    whole, rest = divmod(round(seconds / size), each)
    return " ".join(f"{number} {unit}" for number, unit in ((whole, large), (rest, small)) if number)


class Progress:
    """A bar with rate and time left on a terminal; elsewhere a line every few seconds.

    Args:
        label: what is being done.
        total: units of work.
        done: units that an earlier run did already; they count neither for the rate nor the time left.
        every: seconds between lines where stderr is no terminal.
        rate: whether to say the units a second, or a minute; not where the notes do.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, every: float = 10.0, rate: bool = True
    ) -> None:
        self.label, self.total, self.done, self.note = label, total, done, ""
        self._first, self._every, self._rated = done, every, rate
        self._left: float | None = None
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if _level >= 1 and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def update(self, done: int, note: str = "", left: float | None = None) -> None:
        """`done` units are finished; `note` is shown beside the bar.

        Args:
            left: seconds still to go, where the caller knows better than the mean rate so far.
        """
        self.done, self.note, self._left = done, note, left
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self._said())
        elif time.monotonic() - self._last >= self._every:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        notice(f"{self.label}: {self.done}/{self.total}{', ' * bool(self._said())}{self._said()}")

    def _said(self) -> str:
        """Rate, time left and note."""
        return "; ".join(filter(None, (", ".join(filter(None, (self._rate(), self._to_go()))), self.note)))

    def _to_go(self) -> str:
        passed, new = time.monotonic() - self._start, self.done - self._first
        if self.done >= self.total or (self._left is None and new <= 0):
            return ""
        left = (self.total - self.done) * passed / new if self._left is None else self._left
        return f"{duration(round(left))} left"

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
