"""The benchmark of the time model: two ranks behind a limited link, and what is left of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.links import gloo_ring_seconds, unavailable
from benchmarks.published import FILTERS, mlperf, nnunet, unet_gradients

from voxelscale.scale.links import Link

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "links.py"
LINK = Link(name="link", alpha_seconds=1e-3, beta_bytes_per_second=1e6, source="test")
REASON = unavailable()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=f"no limited links here: {REASON}")


@pytest.mark.parametrize("workers", [2, 3, 8, 16])
def test_gloo_hides_alpha_behind_large_segments_only(workers: int) -> None:
    large, small = 64e6, 1e-3
    bytes_seconds = 2 * (workers - 1) / workers * large / 1e6
    assert gloo_ring_seconds(LINK, workers, large) == pytest.approx(bytes_seconds + 2e-3)
    assert gloo_ring_seconds(LINK, workers, small) == pytest.approx(2 * (workers - 1) * 1e-3)


def test_a_gloo_ring_of_three_by_hand() -> None:
    # 6 segments of 500 bytes, 0.5 ms each; 4 are sent in a phase. The third waits for the first (1.5 ms),
    # the fourth for the second (2 ms), which arrives at 2 + 0.5 + 1 ms.
    assert gloo_ring_seconds(LINK, 3, 3000) == pytest.approx(2 * 3.5e-3)


def test_a_u_nets_gradients_are_those_of_its_layers() -> None:
    gradients = unet_gradients((2, 4), side=4, channels=1, bytes_each=4)
    weights = [27 * 2 * 2, 27 * 4 * 2, 8 * 4 * 2, 27 * 4 * 4, 27 * 2 * 4, 27 * 2 * 2, 27 * 1 * 2]
    assert [size for _, size in gradients] == [4 * n for n in weights]
    work = [n * v for n, v in zip(weights, [64, 64, 8, 8, 8, 64, 64], strict=True)]
    assert gradients[0][0] == pytest.approx(work[0] / sum(work))
    assert gradients[-1][0] == 1.0
    # nnU-Net's 3-D network for BraTS has 31.2 million parameters.
    whole = sum(size for _, size in unet_gradients(FILTERS, 128, channels=4, bytes_each=1))
    assert whole == pytest.approx(31.2e6, rel=0.01)


def test_published_runs_are_met_as_well_as_the_page_says() -> None:
    assert all(abs(row["percent"]) < 5 for row in nnunet())
    assert all(abs(row["percent"]) < 20 for row in mlperf())


@needs_namespaces
def test_two_ranks_behind_a_limited_link(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--only", "2x1", "--rate", "800"]
    command += ["--updates", "small", "--rounds", "4", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predicted = json.loads((tmp_path / "predictions.json").read_text())
    measured = json.loads((tmp_path / "2x1.json").read_text())
    assert predicted["time"] <= measured["time"]
    rows = {row["what"]: row for row in json.loads((tmp_path / "compared.json").read_text())["rows"]}
    assert set(rows) == {*(f"all-reduce {4**n}" for n in (6, 8, 10)), "all-reduce 8388608", "update small"}
    # 8 MiB leave each rank at 100 MB/s at most, whatever else the machine does.
    assert rows["all-reduce 8388608"]["least"] > 0.95 * 8 * 2**20 / 100e6
    links = json.loads((tmp_path / "links.json").read_text())["links"]
    assert links["between"]["beta_bytes_per_second"] < links["within"]["beta_bytes_per_second"]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout


@needs_namespaces
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_leaves_neither_processes_nor_links(tmp_path: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: len(alive(children(process.pid))) >= 3)  # a namespace and two ranks
        started = children(process.pid)
        assert not links_here()
    finally:
        process.send_signal(how)
        process.wait()
    wait_for(lambda: not alive(started))
    assert not links_here()


def links_here() -> list[str]:
    """Those of this machine that have the script's names."""
    listed = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0].partition("@")[0] for line in listed.splitlines()]
    return [name for name in names if name == "hub" or name.startswith("node")]


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in path.read_text().split()] if path.exists() else []


def alive(processes: list[int]) -> list[int]:
    """Those that are there and not only waiting to be noticed."""
    return [n for n in processes if (state := state_of(n)) and state != "Z"]


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
