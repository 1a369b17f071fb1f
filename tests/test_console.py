from __future__ import annotations

import time

import pytest

from voxelscale.console import Progress, count, duration, set_verbosity


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0 s"),
        (0.44, "0.4 s"),
        (5, "5 s"),
        (9.96, "10 s"),
        (45.2, "45 s"),
        (59.6, "1 min"),
        (250, "4 min 10 s"),
        (3599.7, "1 h"),
        (7800, "2 h 10 min"),
        (50880, "14 h 8 min"),
        (47 * 3600 + 3599, "2 d"),
        (76 * 3600, "3 d 4 h"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nouns_agree_with_their_numbers() -> None:
    assert [count(n, "scan") for n in (0, 1, 2)] == ["0 scans", "1 scan", "2 scans"]
    assert (count(2, "study"), count(1, "series"), count(2, "series")) == (
        "2 studies",
        "1 series",
        "2 series",
    )
    assert count(3, "axis", "axes") == "3 axes"
    assert count(6, "key") == "6 keys"


def test_progress_says_how_long_it_still_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    set_verbosity(1)
    with Progress("train", 1000, done=100) as progress:
        now += 60
        progress.update(200, "loss 0.5")
        now += 10
        progress.update(200, "loss 0.4", left=7800)
        now += 10
        progress.update(1000)
    assert capsys.readouterr().err.splitlines() == [
        "train: 200/1000, 1.7/s, 8 min left; loss 0.5",
        "train: 200/1000, 1.4/s, 2 h 10 min left; loss 0.4",
        "train: 1000/1000, 11.2/s",
        "train: 1000/1000, 11.2/s",
    ]
