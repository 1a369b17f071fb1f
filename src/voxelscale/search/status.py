"""``voxelscale search status``: the progress of a search, for anyone who can read its storage."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from voxelscale.search.definition import reopen
from voxelscale.search.records import UNFINISHED, read_results
from voxelscale.search.report import status_table

REFRESH = 3.0
"""Seconds between status tables."""


def follow_status(out: Path, forever: bool) -> None:
    """Print the progress of a search, once or every few seconds until nothing waits or runs."""
    found = reopen(out)
    while True:
        results = read_results(found.study, found.config, found.space)
        clear = "\033[2J\033[H" if forever and sys.stdout.isatty() else ""
        print(clear + status_table(results, time.time()), flush=True)
        left = any(t.state in UNFINISHED for t in results.trials)
        if not forever or not (left or not results.trials):
            return
        time.sleep(REFRESH)
